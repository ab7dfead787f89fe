"""What each part of the method does in the demo: one arm for each setting, several seeds, equal updates and equal time.

Every arm distils the demo's student with ``configs/demo.yaml`` and the settings below, in one process of one thread. It
is trained twice: for ``--updates`` updates, and for as many as take as long as ``--time-share`` of the first arm's.
What an update costs is measured between the two, all arms in turn. A finished run is not repeated, so the command may
be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from megadistill.demo.assets import assets_folder, make_assets, settings_for
from megadistill.demo.stages import CONFIG, scores_of
from megadistill.errors import ConfigError, MegadistillError
from megadistill.evaluation.report import mean_std, text_table
from megadistill.files import read_json_lines, write_json
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
SUITES = ("valid", "test")
COST_UPDATES = 16
_LEGEND = """\
Mean and standard deviation over seeds, each with its own corpus, tokenizer, teacher and student. Time: that of the
updates, where the first arm's in the first table take 1; without writing the teacher's text, once before training."""


def main(arguments: list[str]) -> int:
    """Trains, evaluates and prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    arms = {**ARMS, **{name: tuple(settings.split()) for name, settings in map(_named, options.arm)}}
    try:
        if options.only:
            arms = {name: arms[_known(name, arms)] for name in options.only}
        seeds = _run_all(arms, options)
    except MegadistillError as error:
        print(f"benchmark.py arms: {error}", file=sys.stderr)
        return error.exit_code
    text = f"{_tables(seeds, arms, options)}\n\n{_LEGEND}"
    print(text)
    if options.output:
        record = {
            "machine": machine(torch.device("cpu")), "updates": options.updates, "time_share": options.time_share,
            "arms": {name: list(settings) for name, settings in arms.items()}, "seeds": seeds,
        }  # fmt: skip
        command = f"python tools/benchmark.py arms {shlex.join(arguments)}"
        save(options.output, {"command": command, **record}, f"`{command}`\n\n```\n{text}\n```")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py arms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--updates", type=at_least(2), default=100, metavar="N", help="updates of an arm, default 100")
    parser.add_argument(
        "--time-share",
        type=float,
        default=0.6,
        metavar="S",
        help="equal time: that of S of the first arm's updates, default 0.6",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="of the measurement of costs, default 3")
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


def _run_all(arms: dict[str, tuple[str, ...]], options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Seed -> arm -> kind of run -> updates, time and scores on both splits; ``start``: the student before."""
    for seed in options.seeds:
        make_assets("demo", seed, root=options.folder / "assets")
        for name, settings in arms.items():
            _train(_base(seed, options), settings, _folder(seed, name, options) / "updates", options.updates)
    costs = _costs(arms, options)
    seeds: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        runs: dict[str, dict[str, Any]] = {}
        for name, settings in arms.items():
            updates = max(1, round(options.updates * options.time_share / costs[name]))
            here = _folder(seed, name, options)
            if updates != options.updates:
                _train(_base(seed, options), settings, here / f"time_{updates}", updates)
            runs[name] = {
                kind: {"run": here / folder, "updates": number, "time": costs[name] * number / options.updates}
                for kind, folder, number in (
                    ("updates", "updates", options.updates),
                    ("time", "updates" if updates == options.updates else f"time_{updates}", updates),
                )
            }
        seeds[seed] = _scored(seed, runs, options)
        print(f"after seed {seed}\n\n{_tables(seeds, arms, options)}\n", flush=True)
    return seeds


def _costs(arms: dict[str, tuple[str, ...]], options: argparse.Namespace) -> dict[str, float]:
    """Time of an update, of the first arm's: the lower quartile of a run's steps, then the median of the rounds."""
    record = options.folder / "costs.json"
    rounds: list[dict[str, float]] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    first, seed = next(iter(arms)), options.seeds[0]
    while len(rounds) < options.rounds or any(name not in found for name in arms for found in rounds):
        missing = next((found for found in rounds if any(name not in found for name in arms)), None)
        found = {} if missing is None else missing
        names = [name for name in arms if name not in found or name == first]
        seconds = {}
        for name in names:
            run = options.folder / "costs" / f"{len(list((options.folder / 'costs').glob('*.log')))}"
            _train(_base(seed, options), arms[name], run, COST_UPDATES)
            steps = [step["time/step_s"] for step in read_json_lines(run / "metrics.jsonl")]
            # What else runs on the machine makes steps longer, never shorter.
            seconds[name] = quantiles(steps[len(steps) // 4 :], n=4)[0]
        found |= {name: seconds[name] / seconds[first] for name in names}
        if missing is None:
            rounds.append(found)
        write_json(record, rounds)
    return {name: median(found[name] for found in rounds) for name in arms}


def _scored(seed: int, runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    assets = assets_folder("demo", seed, options.folder / "assets")
    models = {f"{name} {run['updates']}": run["run"] for name, kinds in runs.items() for run in kinds.values()}
    models["start"] = assets / "student"
    evaluation = _evaluate(_base(seed, options), models, options.folder / f"evaluation_{seed}.json", assets / "data")
    scores: dict[str, Any] = {
        name: {
            kind: {
                "updates": run["updates"],
                "time": run["time"],
                **{suite: scores_of(evaluation, f"{name} {run['updates']}", suite) for suite in SUITES},
            }
            for kind, run in kinds.items()
        }
        for name, kinds in runs.items()
    }
    return {**scores, "start": {suite: scores_of(evaluation, "start", suite) for suite in SUITES}}


def _base(seed: int, options: argparse.Namespace) -> list[str]:
    return settings_for(CONFIG, seed, options.folder / "assets")


def _folder(seed: int, arm: str, options: argparse.Namespace) -> Path:
    folder: Path = options.folder / f"seed_{seed}" / arm.replace(" ", "_").replace("'", "")
    return folder


def _train(base: list[str], settings: tuple[str, ...], run: Path, updates: int) -> None:
    if (run / "summary.json").is_file():
        return
    print(f"{run}: {updates} updates", flush=True)
    overrides = [*base, *settings, f"run.dir={run}", f"train.max_steps={updates}", "train.eval_every=0"]
    _call(["train", "--config", CONFIG, *overrides, "train.samples_every=0"], run.with_suffix(".log"))


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


def _call(arguments: list[str], log: Path) -> None:
    """Runs ``megadistill ARGUMENTS`` with one thread. Raises ConfigError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "megadistill", *arguments]
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise ConfigError(f"megadistill {arguments[0]} ended with exit code {code}; its output is in {log}")


def _tables(seeds: dict[int, Any], arms: dict[str, tuple[str, ...]], options: argparse.Namespace) -> str:
    titles = {
        "updates": f"{options.updates} updates each",
        "time": f"as much time as {options.time_share * options.updates:.0f} updates of the first arm",
    }
    return "\n\n".join(
        f"Split {suite}, {title}\n\n{_table(seeds, arms, kind, suite)}"
        for suite in SUITES
        for kind, title in titles.items()
    )


def _table(seeds: dict[int, Any], arms: dict[str, tuple[str, ...]], kind: str, suite: str) -> str:
    rows = [["student before", "", "", *_scores([seeds[seed]["start"] for seed in seeds], suite)]]
    for name in arms:
        found = [seeds[seed][name][kind] for seed in seeds]
        rows.append([name, str(found[0]["updates"]), f"{found[0]['time']:.2f}", *_scores(found, suite)])
    return text_table(["arm", "updates", "time", *_MEASURES.values()], rows)


def _scores(found: list[dict[str, Any]], suite: str) -> list[str]:
    return [str(mean_std([scores[suite][key] for scores in found])) for key in _MEASURES]
