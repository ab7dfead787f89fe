"""``megadistill demo``: the whole job on the built-in corpus, and what came of it. What is done is not done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadistill.cli.parsing import Parser
from megadistill.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo.yaml"
_NAMES = {"teacher": "teacher", "sft": "student, SFT", "distilled": "student, distilled"}


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "demo",
        "Makes a corpus and a tokenizer, fine-tunes a teacher and a student, distils the student with two processes,\n"
        "evaluates all three, exports the student, and shows a table, two examples and the loss curves.",
        "examples:\n  bash launchers/demo.sh\n  bash launchers/demo.sh --again distillation\n"
        "  bash launchers/demo.sh --seed 3 train.max_steps=100 run.dir=runs/short",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, the corpus included (default 0)")
    parser.add_argument(
        "--again", choices=("distillation", "everything"), help="throw away what an earlier run made, and make it anew"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="settings of the distillation that win over the file",
    )
    parsed = parser.parse(arguments)
    begun = time.perf_counter()
    enter_repository()
    overrides = [
        f"run.seed={parsed.seed}",
        *([f"run.dir=runs/demo_{parsed.seed}"] if parsed.seed else []),
        *parsed.overrides,
    ]
    result = run_demo(overrides, again=parsed.again)
    show(result, time.perf_counter() - begun)
    return 0


def enter_repository() -> None:
    """The demo's paths are relative to the repository root, like those of every configuration file there."""
    if not (REPOSITORY / CONFIG).is_file():
        raise ConfigError(f"the demo needs a clone of the repository ({CONFIG} is not beside the package)")
    os.chdir(REPOSITORY)


def run_demo(overrides: Sequence[str], *, again: str | None = None) -> dict[str, Any]:
    """All stages; returns the content of the run's summary.json with the scores of the three models under ``demo``."""
    from megadistill.config.load import load_config
    from megadistill.demo.assets import assets_folder, make_assets

    config = load_config(CONFIG, overrides)
    run_dir, assets = Path(config.run.dir), assets_folder("demo", config.run.seed)
    if again is not None:
        shutil.rmtree(run_dir, ignore_errors=True)
    if again == "everything":
        shutil.rmtree(assets, ignore_errors=True)
    _say(1, "corpus, tokenizer, fine-tuned teacher and student", assets)
    make_assets("demo", config.run.seed, say=lambda text: print(f"      {text}", flush=True))
    _say(2, "distillation with two processes", run_dir)
    launch_training(CONFIG, overrides, run_dir, config.train.max_steps)
    _say(3, "evaluation on the test rows", run_dir / "evaluation.json")
    models = {"teacher": str(assets / "teacher"), "sft": str(assets / "student"), "distilled": str(run_dir)}
    evaluation = evaluate_once(config, models, run_dir / "evaluation.json")
    _say(4, "export", run_dir / "student")
    _export(run_dir, run_dir / "student")
    _say(5, "loss curves", run_dir / "curves.png")
    from megadistill.observability.plots import loss_curves

    sft = scores_of(evaluation, "sft")
    loss_curves(run_dir, run_dir / "curves.png", baseline_nll=sft["nll"])
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["demo"] = {name: scores_of(evaluation, name) for name in models}
    from megadistill.files import write_json

    write_json(run_dir / "summary.json", summary)
    return {"summary": summary, "run_dir": run_dir, "config": config, "evaluation": evaluation}


def _say(number: int, what: str, where: Path) -> None:
    print(f"[{number}/5] {what} -> {where}", flush=True)


def launch_training(config_file: str, overrides: Sequence[str], run_dir: Path, max_steps: int) -> None:
    """``deepspeed launchers/run.sh`` with two processes, unless the run is finished already. Raises ConfigError."""
    from megadistill.checkpoint.manifest import LATEST

    latest = run_dir / "checkpoints" / LATEST
    if latest.is_file() and latest.read_text().strip() == f"step_{max_steps}" and (run_dir / "summary.json").is_file():
        return
    command = ["bash", "launchers/run.sh", "--config", config_file, *overrides]
    environment = {**os.environ, "NPROC": str(_num_processes())}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with exit code {done.returncode}")


def _num_processes() -> int:
    """Two on CPUs; on a machine with GPUs no more than it has."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def evaluate_once(config: Any, models: dict[str, str], output: Path) -> dict[str, Any]:
    """Evaluates in this process on all cores, or reads what an earlier evaluation of the same models wrote."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.cli.evaluate import evaluate_models
    from megadistill.files import write_json

    folders = {name: model_folder(path) for name, path in models.items()}
    if output.is_file():
        known = json.loads(output.read_text())
        if known["models"] == folders:
            return known
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    found = evaluate_models(config, models, {"test": (config.eval.path, None)})
    assert found is not None
    write_json(output, found["json"])
    return json.loads(output.read_text())


def scores_of(evaluation: dict[str, Any], name: str) -> dict[str, float]:
    """The measures of one model, flat: means over seeds for sampled answers."""
    result = evaluation["results"][name]["test"]
    return {
        "rouge_l_greedy": result["greedy"]["rouge_l"],
        "exact_match_greedy": result["greedy"]["exact_match"],
        "rouge_l_sampled": result["sampled"]["rouge_l"]["mean"],
        "exact_match_sampled": result["sampled"]["exact_match"]["mean"],
        "nll": result["nll"],
    }


def _export(run_dir: Path, folder: Path) -> None:
    """Exports once, and proves it by loading the folder with plain transformers."""
    from megadistill.checkpoint.hf_export import check_export, export_checkpoint

    if not folder.exists():
        export_checkpoint(run_dir, folder)
    check_export(folder)


def show(result: dict[str, Any], seconds: float) -> None:
    """The table, two examples, and where everything is."""
    from megadistill.evaluation.report import text_table

    header = ["model", "ROUGE-L greedy", "exact greedy", "ROUGE-L sampled", "exact sampled", "NLL (nats/token)"]
    keys = ["rouge_l_greedy", "exact_match_greedy", "rouge_l_sampled", "exact_match_sampled", "nll"]
    demo, run_dir = result["summary"]["demo"], result["run_dir"]
    rows = [[_NAMES[name], *(f"{scores[key]:.2f}" for key in keys)] for name, scores in demo.items()]
    print(f"\n{text_table(header, rows)}\n")
    for index in _telling_examples(result):
        row = result["evaluation"]["results"]
        with Path(result["config"].eval.path).open() as lines:
            example = json.loads(lines.readlines()[index])
        print(f"  {example['instruction']} | {example['input']}\n    reference          {example['output']}")
        for name, label in _NAMES.items():
            print(f"    {label:<18} {row[name]['test']['predictions'][index]}")
        print()
    print(f"student     {run_dir / 'student'}  (AutoModelForCausalLM.from_pretrained loads it)")
    print(f"numbers     {run_dir / 'summary.json'}, {run_dir / 'metrics.jsonl'}, {run_dir / 'evaluation.json'}")
    print(f"curves      {run_dir / 'curves.png'};  tensorboard --logdir {run_dir}")
    print(f"            {seconds:.0f} s")


def _telling_examples(result: dict[str, Any]) -> list[int]:
    """One row that distillation put right and one that is still wrong, where there are such rows."""
    from megadistill.evaluation.rouge import is_exact_match

    found = result["evaluation"]["results"]
    with Path(result["config"].eval.path).open() as lines:
        references = [json.loads(line)["output"] for line in lines]
    is_right = {
        name: [
            is_exact_match(text, (ref,))
            for text, ref in zip(found[name]["test"]["predictions"], references, strict=True)
        ]
        for name in ("sft", "distilled")
    }
    mended = [i for i in range(len(references)) if is_right["distilled"][i] and not is_right["sft"][i]]
    wrong = [i for i in range(len(references)) if not is_right["distilled"][i]]
    return [*mended[:1], *wrong[:1]]
