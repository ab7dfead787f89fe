"""``megadistill study``: the demo over several seeds, against SFT of as many updates and of as much time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megadistill.cli.parsing import Parser
from megadistill.demo.stages import (
    CONFIG,
    check_packages,
    evaluate_once,
    launch_training,
    scores_of,
)
from megadistill.files import read_json_lines

CONTROL = "configs/demo_sft.yaml"
_ARMS = {
    "teacher": "teacher",
    "sft": "student: SFT (start of all others)",
    "sft_updates": "student: more SFT, as many updates",
    "sft_time": "student: more SFT, as much time",
    "distilled": "student: distilled",
}
_MEASURES = {
    "rouge_l_greedy": "ROUGE-L greedy",
    "exact_match_greedy": "exact greedy",
    "rouge_l_sampled": "ROUGE-L sampled",
    "exact_match_sampled": "exact sampled",
    "nll": "NLL",
}


def run(arguments: Sequence[str]) -> int:
    """The verb ``study``; returns the exit code."""
    parser = Parser(
        "study",
        "Repeats the demo for several seeds (each with its own corpus, tokenizer, teacher and student) and compares\n"
        "the distilled student with SFT that continues for as many updates, and for as many seconds.",
        "example:\n  megadistill study --seeds 1 2 3 4 5",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--folder", default="runs/study", metavar="FOLDER", help="where everything is written (default runs/study)"
    )
    parser.add_argument("--keep-models", action="store_true", help="keep checkpoints after their evaluation")
    parsed = parser.parse(arguments)

    from megadistill.files import write_json

    check_packages()
    folder = Path(parsed.folder)
    results = {}
    for seed in parsed.seeds:
        results[seed] = _one_seed(seed, folder / f"seed_{seed}", parsed.keep_models)
        print(f"\nafter {len(results)} of {len(parsed.seeds)} seeds\n{table(results)}\n", flush=True)
        write_json(folder / "study.json", {"seeds": list(results), "scores": results})
    print(f"written to {folder / 'study.json'}")
    return 0


def _one_seed(seed: int, folder: Path, keep_models: bool) -> dict[str, dict[str, float]]:
    """Scores of every arm for one seed; finished parts are not repeated."""
    from megadistill.config.load import load_config
    from megadistill.config.shipped import find_config
    from megadistill.demo.assets import assets_folder, make_assets, settings_for

    done = folder / "scores.json"
    if done.is_file():
        finished: dict[str, dict[str, float]] = json.loads(done.read_text(encoding="utf-8"))
        return finished
    root = folder.parent / "assets"
    make_assets("demo", seed, root=root)
    distilled, updates, timed = (folder / name for name in ("distilled", "sft_updates", "sft_time"))
    overrides = [*settings_for(CONFIG, seed, root), f"run.dir={distilled}"]
    config = load_config(find_config(CONFIG), overrides)
    max_steps = config.train.max_steps
    assert max_steps is not None, f"{CONFIG} sets it"
    launch_training(overrides, distilled, max_steps)
    seconds = _seconds(distilled)
    control = settings_for(CONTROL, seed, root)
    _train_control(control, updates, max_steps)
    # As much time: the speed of the control just run, on the same cores.
    steps = max(1, round(max_steps * seconds / _seconds(updates)))
    _train_control(control, timed, steps)
    assets = assets_folder("demo", seed, root)
    models = {
        "teacher": str(assets / "teacher"),
        "sft": str(assets / "student"),
        "sft_updates": str(updates),
        "sft_time": str(timed),
        "distilled": str(distilled),
    }
    evaluation = evaluate_once(config, models, folder / "evaluation.json")
    scores = {name: scores_of(evaluation, name) for name in models}
    scores["distilled"]["kept_mass_min"] = min(_series(distilled, "kept_mass"))
    scores["distilled"]["kept_mass_max"] = max(_series(distilled, "kept_mass"))
    scores["distilled"]["seconds"], scores["sft_updates"]["seconds"] = seconds, _seconds(updates)
    scores["sft_time"]["seconds"], scores["sft_time"]["updates"] = _seconds(timed), float(steps)
    done.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    if not keep_models:
        for run_dir in (distilled, updates, timed):
            shutil.rmtree(run_dir / "checkpoints")
    return scores


def _train_control(settings: list[str], run_dir: Path, steps: int) -> None:
    from megadistill.demo.alone import run_alone

    if not (run_dir / "summary.json").is_file():
        run_alone(["train", "--config", CONTROL, *settings, f"run.dir={run_dir}", f"train.max_steps={steps}"])


def _seconds(run_dir: Path) -> float:
    """Seconds of the steps alone, without validation and checkpoints."""
    return sum(_series(run_dir, "time/step_s"))


def _series(run_dir: Path, key: str) -> list[float]:
    return [record[key] for record in read_json_lines(run_dir / "metrics.jsonl")]


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds of every measure and arm."""
    from megadistill.evaluation.report import mean_std, text_table

    rows = [
        [label, *(str(mean_std([scores[arm][key] for scores in results.values()])) for key in _MEASURES)]
        for arm, label in _ARMS.items()
    ]
    return text_table(["model", *_MEASURES.values()], rows)
