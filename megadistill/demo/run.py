"""``megadistill demo``: the whole job on the built-in corpus, and a table. Finished stages are not repeated."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser
from megadistill.demo.stages import (
    CONFIG,
    check_packages,
    evaluate_once,
    export_once,
    launch_training,
    scores_of,
)
from megadistill.files import read_json_lines

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig

_NAMES = {"teacher": "teacher", "sft": "student, SFT", "distilled": "student, distilled"}


def run(arguments: Sequence[str]) -> int:
    """The verb ``demo``; returns the exit code."""
    parser = Parser(
        "demo",
        "Makes a corpus and a tokenizer, fine-tunes a teacher and a student, distills the student with two processes,\n"
        "evaluates all three, exports the student, and shows a table, two examples and the loss curves.\n"
        "Everything is written below runs/ in the working directory.",
        "examples:\n  bash launchers/demo.sh\n  bash launchers/demo.sh --again distillation\n"
        "  megadistill demo --seed 3 train.max_steps=100 run.dir=runs/short",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, the corpus included (default 0)")
    parser.add_argument(
        "--again",
        choices=("distillation", "everything"),
        help="delete the results of earlier runs, and make them again",
    )
    parser.add_settings("settings of the distillation that win over configs/demo.yaml")
    parsed = parser.parse(arguments)
    started = time.perf_counter()
    check_packages()
    overrides = [
        f"run.seed={parsed.seed}",
        *([f"run.dir=runs/demo_{parsed.seed}"] if parsed.seed else []),
        *parsed.overrides,
    ]
    result = run_demo(overrides, again=parsed.again)
    show(result, time.perf_counter() - started)
    return 0


def run_demo(overrides: Sequence[str], *, again: str | None = None) -> dict[str, Any]:
    """Runs all stages, and adds the scores of the three models to the run's summary.json, under ``demo``.

    Args:
        overrides: ``section.field=value`` settings of the distillation.
        again: Delete earlier results first: "distillation" or "everything".

    Returns:
        ``summary``, ``run_dir``, ``config`` and ``evaluation``, for ``show``.
    """
    from megadistill.config.load import load_config
    from megadistill.config.shipped import find_config
    from megadistill.demo.assets import assets_folder, make_assets
    from megadistill.files import write_json
    from megadistill.observability.plots import loss_curves

    config = load_config(find_config(CONFIG), overrides)
    run_dir, assets = Path(config.run.dir), assets_folder("demo", config.run.seed)
    if again is not None:
        shutil.rmtree(run_dir, ignore_errors=True)
    if again == "everything":
        shutil.rmtree(assets, ignore_errors=True)
    _say(1, "corpus, tokenizer, fine-tuned teacher and student", assets)
    make_assets("demo", config.run.seed, say=lambda text: print(f"      {text}", flush=True))
    _say(2, "distillation with two processes", run_dir)
    launch_training(overrides, run_dir, config.train.max_steps)
    _say(3, "evaluation on the test rows", run_dir / "evaluation.json")
    models = {"teacher": str(assets / "teacher"), "sft": str(assets / "student"), "distilled": str(run_dir)}
    evaluation = evaluate_once(config, models, run_dir / "evaluation.json")
    _say(4, "export", run_dir / "student")
    export_once(run_dir, run_dir / "student")
    _say(5, "loss curves", run_dir / "curves.png")
    loss_curves(run_dir, run_dir / "curves.png", baseline_nll=scores_of(evaluation, "sft")["nll"])
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    summary["demo"] = {name: scores_of(evaluation, name) for name in models}
    write_json(run_dir / "summary.json", summary)
    return {"summary": summary, "run_dir": run_dir, "config": config, "evaluation": evaluation}


def _say(number: int, what: str, where: Path) -> None:
    print(f"[{number}/5] {what} -> {where}", flush=True)


def show(result: dict[str, Any], seconds: float) -> None:
    """Prints the table, two examples, and where everything is."""
    from megadistill.evaluation.report import text_table

    header = ["model", "ROUGE-L greedy", "exact greedy", "ROUGE-L sampled", "exact sampled", "NLL (nats/token)"]
    keys = ["rouge_l_greedy", "exact_match_greedy", "rouge_l_sampled", "exact_match_sampled", "nll"]
    demo, run_dir = result["summary"]["demo"], result["run_dir"]
    rows = [[_NAMES[name], *(f"{scores[key]:.2f}" for key in keys)] for name, scores in demo.items()]
    print(f"\n{text_table(header, rows)}\n")
    results = result["evaluation"]["results"]
    examples = _test_rows(result["config"])
    for index in _telling_examples(results, [example["output"] for example in examples]):
        example = examples[index]
        print(f"  {example['instruction']} | {example['input']}\n    reference          {example['output']}")
        for name, label in _NAMES.items():
            print(f"    {label:<18} {results[name]['test']['predictions'][index]}")
        print()
    print(f"student     {run_dir / 'student'}  (AutoModelForCausalLM.from_pretrained loads it)")
    print(f"numbers     {run_dir / 'summary.json'}, {run_dir / 'metrics.jsonl'}, {run_dir / 'evaluation.json'}")
    print(f"curves      {run_dir / 'curves.png'};  tensorboard --logdir {run_dir}")
    print(f"            {seconds:.0f} s")


def _test_rows(config: RunConfig) -> list[dict[str, str]]:
    assert config.eval.path is not None
    return read_json_lines(config.eval.path)


def _telling_examples(results: dict[str, Any], references: Sequence[str]) -> list[int]:
    """One row that only distillation got right and one that is still wrong, where there are such rows."""
    from megadistill.evaluation.rouge import is_exact_match

    # eval.max_rows may have left out the last rows.
    is_right = {
        name: [
            is_exact_match(text, (reference,))
            for text, reference in zip(results[name]["test"]["predictions"], references, strict=False)
        ]
        for name in ("sft", "distilled")
    }
    num_rows = len(is_right["distilled"])
    gained = [i for i in range(num_rows) if is_right["distilled"][i] and not is_right["sft"][i]]
    wrong = [i for i in range(num_rows) if not is_right["distilled"][i]]
    return [*gained[:1], *wrong[:1]]
