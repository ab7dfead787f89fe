"""``megadistill config init``: a commented configuration file for two models, with sizes that fit."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megadistill.cli.machines import add_machines, gpu_of, memory_of
from megadistill.cli.parsing import Parser, ask_hub_only_if_there, refuse_unwritable
from megadistill.config.load import load_config
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig
    from megadistill.planning.proposal import Proposal

_ACTIONS = ("init",)
_NO_DATA = "the file that megadistill prepare writes"


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    action, *rest = [*arguments, ""]
    if action in ("-h", "--help"):
        return _init(["--help"])  # its one action's
    if action not in _ACTIONS:
        found = f"'{action}'" if action else "nothing"
        raise ConfigError(
            f"megadistill config: {found}; allowed: {', '.join(_ACTIONS)}{did_you_mean(action, _ACTIONS)}"
        )
    return _init(rest[:-1])


def _init(arguments: Sequence[str]) -> int:
    parsed = _parser().parse(arguments)
    target = Path(parsed.output)
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--output {target}: the name must end in .yaml")
    refuse_unwritable(target, is_file=True)
    if target.exists():
        raise ConfigError(f"--output {target} exists already; choose another name, or remove it")
    ask_hub_only_if_there([parsed.teacher, parsed.student])
    given = _given(parsed)
    with tempfile.TemporaryDirectory() as folder:
        config = _loaded(_text(given, {}, []), Path(folder) / "given.yaml")
        proposal, notes = _proposal(config, parsed, Path(folder))
        text = _text({**given, **proposal.settings}, proposal.reasons, _header(parsed, proposal, notes))
        _check(_loaded(text, Path(folder) / target.name), {**given, **proposal.settings})
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("x", encoding="utf-8") as file:  # never over another file
        file.write(text)
    print(f"{target}: {proposal.describe()}")
    for note in notes:
        print(note)
    print(f"compare layouts: {_plan(parsed)} --sweep")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "config init",
        "Writes a commented configuration file for two models, with the batch, lengths, and layout that fit the\n"
        "machines: the fastest layout that megadistill plan predicts. Nothing is written over.",
        "examples:\n"
        "  megadistill config init --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --data data/mine/train.jsonl \\\n"
        "      --valid data/mine/valid.jsonl --gpus-per-node 4 --gpu A100-80 -o mine.yaml\n"
        "  megadistill config init --teacher T --student S --cpu --gpus-per-node 2 -o mine.yaml",
    )
    model = "model folder, hub name, checkpoint or run directory"
    parser.add_argument("--teacher", required=True, metavar="MODEL", help=model)
    parser.add_argument("--student", required=True, metavar="MODEL", help=model)
    parser.add_argument("--data", metavar="FILE", help=f"training rows; default: left open ({_NO_DATA})")
    parser.add_argument("--valid", metavar="FILE", help="validation rows; default: no validation")
    parser.add_argument("--run-dir", metavar="RUN", help="default: runs/NAME for NAME.yaml")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write; must not exist")
    add_machines(parser)
    return parser


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    """Key -> value of what the options say, and of what does not depend on sizes."""
    dtype = "fp32" if parsed.cpu else "bf16"
    has_valid = parsed.valid is not None
    return {
        "run.dir": parsed.run_dir or f"runs/{Path(parsed.output).stem}",
        "model.teacher.path": parsed.teacher,
        "model.teacher.dtype": dtype,
        "model.student.path": parsed.student,
        "model.student.dtype": dtype,
        "data.train_path": parsed.data,
        "data.valid_path": parsed.valid,
        "data.template": "auto",
        "optim.lr": 2.0e-5,
        "train.max_steps": None,
        "train.epochs": 3,
        "train.save_every": 500,
        "train.eval_every": 500 if has_valid else 0,
    }


_COMMENTS: Mapping[str, str] = {
    "run.dir": "everything that the run writes",
    "model.teacher.path": "best trained on the same rows first (README, step 3)",
    "data.template": "the tokenizer's chat template where rows are chats, else Alpaca's",
    "optim.lr": "a place to start: the shipped pairs have 1e-5 (1.7B) to 5e-4 (0.1B)",
    "train.epochs": "passes over the rows",
    "train.save_every": "steps between checkpoints; a signal saves one, too",
}


def _text(settings: Mapping[str, Any], reasons: Mapping[str, str], header: Sequence[str]) -> str:
    """The file: settings by section, in the order of the schema, with a comment where there is something to say."""
    from megadistill.config.fields import walk

    lines = [*(f"# {line}" for line in header), "base: paper.yaml  # the method of the paper; docs/configuration.md"]
    above: list[str] = []
    for key in (name for name, _ in walk() if name in settings):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
                above = sections[: depth + 1]
        above = sections
        comment = reasons.get(key) or _COMMENTS.get(key, "")
        if key == "data.train_path" and settings[key] is None:
            comment = _NO_DATA
        lines.append(f"{'  ' * len(sections)}{name}: {_yaml(settings[key])}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}"  # YAML 1.1 wants the point
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip().removesuffix("...").strip()


def _header(parsed: argparse.Namespace, proposal: Proposal, notes: Sequence[str]) -> list[str]:
    machines = f"{parsed.nodes} machine{'s' * (parsed.nodes > 1)} with {parsed.gpus_per_node} {proposal.gpu.name}"
    return [
        f"{parsed.teacher} into {parsed.student}, on {machines} each. Written by megadistill config init.",
        f"Layout: {proposal.describe()}.",
        *notes,
        f"Plan:   {_plan(parsed)}",
        f"Start:  bash launchers/run.sh --config {shlex.quote(parsed.output)}",
    ]


def _plan(parsed: argparse.Namespace) -> str:
    words = ["megadistill", "plan", "--config", parsed.output]
    words += ["--nodes", str(parsed.nodes), "--gpus-per-node", str(parsed.gpus_per_node)]
    words += ["--cpu"] if parsed.cpu else ["--gpu", gpu_of(parsed).name]
    if parsed.gpu_memory is not None:
        words += ["--gpu-memory", f"{parsed.gpu_memory / 1e9:g}GB"]
    return shlex.join(words)


def _proposal(config: RunConfig, parsed: argparse.Namespace, folder: Path) -> tuple[Proposal, Sequence[str]]:
    from megadistill.planning.known import with_configurations
    from megadistill.planning.proposal import propose

    described, notes = with_configurations(config, {}, folder)
    proposal = propose(
        described, nodes=parsed.nodes, gpus_per_node=parsed.gpus_per_node, gpu_memory=memory_of(parsed),
        gpu=gpu_of(parsed), like_gpu=not parsed.cpu,
    )  # fmt: skip
    return proposal, notes


def _loaded(text: str, file: Path) -> RunConfig:
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def _check(config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Whether the file says what was chosen: names with colons, quotes or ``${`` must come back as they are."""
    from megadistill.config.load import flatten

    said = flatten(config.model_dump())
    for key, value in settings.items():
        if said[key] != value:
            raise ConfigError(f"{key} {value!r} would be read as {said[key]!r}; choose another name")
