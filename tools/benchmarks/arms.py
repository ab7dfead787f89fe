"""What each part of the method does in the demo: one arm for each setting, several seeds, equal updates and equal time.

Every arm distils the demo's student with ``configs/demo.yaml`` and the settings below, in one process of one thread. It
is trained twice: for ``--updates`` updates, and for as many as fit into ``--time-share`` of the CPU time of the first
arm's updates. A finished run is not repeated, so the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megadistill.demo.assets import assets_folder, make_assets, settings_for
from megadistill.demo.stages import CONFIG, scores_of
from megadistill.errors import ConfigError, MegadistillError
from megadistill.evaluation.report import mean_std, text_table
from megadistill.files import write_json
from tools.benchmarks.measure import at_least, machine, save

_PLAIN = ("loss.span=0", "generation.scrg.enabled=false")
_FORWARD = (*_PLAIN, "loss.divergence=forward_kl")
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "without SCRG": ("generation.scrg.enabled=false",),
    "without DAC-KL": ("loss.divergence=forward_kl",),
    "without span": ("loss.span=0",),
    "forward KL": _FORWARD,
    "reverse KL": (*_PLAIN, "loss.divergence=reverse_kl"),
    "teacher's text": (*_FORWARD, "generation.mode=teacher"),
    "paper": ("loss.upper=0.98", "loss.remainder=none"),
    "entropy clip": ("loss.clip=entropy",),
    "truncate": ("loss.clip=entropy", "loss.remainder=truncate"),
    "relative guard": ("loss.coverage=relative",),
    "span joint": ("loss.span_relation=joint",),
    "span log": ("loss.span_relation=log",),
    "SCRG first": ("generation.scrg.error=first",),
    "SCRG keep": ("generation.scrg.after=keep",),
    "SKD": (*_FORWARD, "generation.mode=skd"),
}
_MEASURES = {
    "exact_match_greedy": "exact greedy",
    "exact_match_sampled": "exact sampled",
    "rouge_l_greedy": "ROUGE-L greedy",
    "nll": "NLL",
}
_LEGEND = """\
Mean and standard deviation over seeds, each with its own corpus, tokenizer, teacher and student. Time: CPU time of a
run beyond that of a run of one update, as a share of the first arm's, writing of the teacher's text included."""


def main(arguments: list[str]) -> int:
    """Trains, evaluates and prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    arms = {**ARMS, **{name: tuple(settings.split()) for name, settings in map(_named, options.arm)}}
    try:
        if options.only:
            arms = {name: arms[_known(name, arms)] for name in options.only}
        seeds = {seed: _one_seed(seed, arms, options) for seed in options.seeds}
    except MegadistillError as error:
        print(f"benchmark.py arms: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n\n".join(
        f"{title}\n\n{_table(seeds, arms, kind, suite)}"
        for suite in ("valid", "test")
        for kind, title in (
            ("updates", f"Split {suite}, {options.updates} updates each"),
            ("time", f"Split {suite}, as much time as {options.time_share:g} of the first arm's"),
        )
    )
    print(f"{text}\n\n{_LEGEND}")
    if options.output:
        import torch

        record = {
            "machine": machine(torch.device("cpu")), "updates": options.updates, "time_share": options.time_share,
            "arms": {name: list(settings) for name, settings in arms.items()}, "seeds": seeds,
        }  # fmt: skip
        save(options.output, record, f"{text}\n\n{_LEGEND}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py arms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--updates", type=at_least(2), default=100, metavar="N", help="updates of an arm, default 100")
    parser.add_argument(
        "--time-share", type=float, default=0.6, metavar="S", help="equal time: S of the first arm's, default 0.6"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help=f"these arms alone, of: {', '.join(ARMS)}")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME=SETTINGS", help="one more: 'hot=loss.temperature=4'"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/arms"), help="default runs/arms")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file; the table goes beside it as .md")
    return parser


def _named(value: str) -> tuple[str, str]:
    name, _, settings = value.partition("=")
    return name, settings


def _known(name: str, arms: dict[str, tuple[str, ...]]) -> str:
    if name not in arms:
        raise ConfigError(f"--only {name}: no such arm; allowed: {', '.join(arms)}")
    return name


def _one_seed(seed: int, arms: dict[str, tuple[str, ...]], options: argparse.Namespace) -> dict[str, Any]:
    """Arm -> kind of run -> updates, seconds and scores on both splits; ``start``: the student before."""
    root, folder = options.folder / "assets", options.folder / f"seed_{seed}"
    make_assets("demo", seed, root=root)
    base = settings_for(CONFIG, seed, root)
    # The first run of all fills the file system's cache.
    startup = min(_train(base, _FORWARD, folder / f"startup_{number}", 1) for number in range(3))
    runs: dict[str, dict[str, Any]] = {}
    for name, settings in arms.items():
        here = folder / name.replace(" ", "_").replace("'", "")
        seconds = _train(base, settings, here / "updates", options.updates) - startup
        runs[name] = {"updates": {"run": here / "updates", "updates": options.updates, "seconds": seconds}}
        budget = options.time_share * runs[next(iter(arms))]["updates"]["seconds"]
        updates = max(1, round(options.updates * budget / seconds))
        seconds = _train(base, settings, here / f"time_{updates}", updates) - startup
        runs[name]["time"] = {"run": here / f"time_{updates}", "updates": updates, "seconds": seconds}
    models = {f"{name} {kind}": run["run"] for name, kinds in runs.items() for kind, run in kinds.items()}
    models["start"] = assets_folder("demo", seed, root) / "student"
    evaluation = _evaluate(base, models, folder / "evaluation.json", assets_folder("demo", seed, root) / "data")
    for name, kinds in runs.items():
        for kind, run in kinds.items():
            del run["run"]
            run |= {suite: scores_of(evaluation, f"{name} {kind}", suite) for suite in ("valid", "test")}
    return {**runs, "start": {suite: scores_of(evaluation, "start", suite) for suite in ("valid", "test")}}


def _train(base: list[str], settings: tuple[str, ...], run: Path, updates: int) -> float:
    """CPU seconds of a whole run of ``updates`` updates; those that were measured, where it is finished."""
    record = run / "seconds.json"
    if record.is_file():
        return float(json.loads(record.read_text(encoding="utf-8")))
    overrides = [*base, *settings, f"run.dir={run}", f"train.max_steps={updates}", "train.eval_every=0"]
    arguments = ["train", "--config", CONFIG, *overrides, "train.samples_every=0"]
    print(f"{run}: {updates} updates", flush=True)
    seconds = _call(arguments, run.with_suffix(".log"))
    write_json(record, seconds)
    return seconds


def _evaluate(base: list[str], models: dict[str, Path], output: Path, data: Path) -> dict[str, Any]:
    known = json.loads(output.read_text(encoding="utf-8"))["results"] if output.is_file() else {}
    missing = [f"--model={name}={path}" for name, path in models.items() if name not in known]
    if missing:
        suites = [f"--suite={name}={data / name}.jsonl" for name in ("valid", "test")]
        _call(
            ["evaluate", "--config", CONFIG, *base, *missing, *suites, "--output", str(output)],
            output.with_suffix(".log"),
        )
    evaluation: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return evaluation


def _call(arguments: list[str], log: Path) -> float:
    """Runs ``megadistill ARGUMENTS`` with one thread; returns its CPU seconds. Raises ConfigError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megadistill", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise ConfigError(f"megadistill {arguments[0]} ended with exit code {code}; its output is in {log}")
    return usage.ru_utime + usage.ru_stime


def _table(seeds: dict[int, Any], arms: dict[str, tuple[str, ...]], kind: str, suite: str) -> str:
    first = next(iter(arms))
    rows = [["student before", "", "", *_scores([seeds[seed]["start"] for seed in seeds], suite)]]
    for name in arms:
        found = [seeds[seed][name][kind] for seed in seeds]
        updates = sum(run["updates"] for run in found) / len(found)
        shares = [
            run["seconds"] / seeds[seed][first]["updates"]["seconds"] for seed, run in zip(seeds, found, strict=True)
        ]
        rows.append([name, f"{updates:.0f}", f"{sum(shares) / len(shares):.2f}", *_scores(found, suite)])
    return text_table(["arm", "updates", "time", *_MEASURES.values()], rows)


def _scores(found: list[dict[str, Any]], suite: str) -> list[str]:
    return [str(mean_std([scores[suite][key] for scores in found])) for key in _MEASURES]
