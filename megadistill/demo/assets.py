"""Built-in assets (``run.prepare``): a seeded corpus, a tokenizer trained on it, and the models of a recipe.

They live below ``runs/assets/NAME_SEED`` and are made once, by rank 0, before processes wait for one another. A
finished part is never made again; an interrupted one is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError, DataError
from megadistill.launch.launchers import rank_of, without_ranks
from megadistill.observability.redact import redact

_ROOT = Path("runs/assets")
_FAILED = "failed"
_POLL_S = 0.5


def assets_folder(name: str, seed: int) -> Path:
    """Where the assets of a recipe live, relative to the working directory."""
    return _ROOT / f"{name}_{seed}"


def ensure_assets(config: RunConfig) -> None:
    """Makes what ``run.prepare`` names and is missing; other ranks wait until it is whole.

    Raises DataError when a part could not be made.
    """
    if config.run.prepare == "none":
        return
    folder = assets_folder(config.run.prepare, config.run.seed)
    if rank_of(os.environ) == 0:
        (folder / _FAILED).unlink(missing_ok=True)
        try:
            make_assets(config.run.prepare, config.run.seed)
        except BaseException as error:
            if folder.is_dir():
                (folder / _FAILED).write_text(redact(str(error)))
            raise
        return
    begun = time.time()
    while not is_ready(folder, config.run.prepare):
        failed = folder / _FAILED
        with suppress(FileNotFoundError):
            if failed.stat().st_mtime > begun - _POLL_S:
                raise DataError(f"{folder}: {failed.read_text()}")
        time.sleep(_POLL_S)


def is_ready(folder: Path, name: str) -> bool:
    """Whether every part of a recipe is whole."""
    from megadistill.demo.recipes import RECIPES

    return all((folder / part).exists() for part in ("data", "tokenizer", *RECIPES[name].models))


def make_assets(name: str, seed: int, say: Callable[[str], None] = print) -> Path:
    """Makes the missing parts of a recipe and returns its folder. One process at a time; others wait for the lock."""
    from filelock import FileLock

    from megadistill.demo.recipes import RECIPES

    folder, recipe = assets_folder(name, seed), RECIPES[name]
    if is_ready(folder, name):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        _make_corpus(folder, name, seed, say)
        for model, model_recipe in recipe.models.items():
            target = folder / model
            if target.exists():
                continue
            configured = folder / f"{model}_config"
            _write_config(configured, model_recipe.config, folder / "tokenizer")
            if model_recipe.sft is None:
                configured.rename(target)
            else:
                say(f"{folder}: fine-tuning the {model}")
                _fine_tune(folder, model, seed, (*recipe.common, *model_recipe.sft))
    return folder


def _make_corpus(folder: Path, name: str, seed: int, say: Callable[[str], None]) -> None:
    from megadistill.data.synthetic import generate_corpus, write_corpus
    from megadistill.demo.recipes import RECIPES
    from megadistill.demo.tokenizer import train_tokenizer

    recipe = RECIPES[name]
    if not (folder / "data").exists():
        say(f"{folder}: writing the corpus")
        beside = folder / "data.partial"
        shutil.rmtree(beside, ignore_errors=True)
        write_corpus(beside, generate_corpus(seed, recipe.sizes))
        beside.rename(folder / "data")
    if not (folder / "tokenizer").exists():
        say(f"{folder}: training the tokenizer")
        beside = folder / "tokenizer.partial"
        shutil.rmtree(beside, ignore_errors=True)
        with (folder / "data" / "teacher_train.jsonl").open() as lines:
            rows = [json.loads(line) for line in lines]
        texts = (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)
        train_tokenizer(texts, beside, vocab_size=recipe.vocab_size, seed=seed)
        beside.rename(folder / "tokenizer")


def _write_config(folder: Path, config: dict[str, object], tokenizer: Path) -> None:
    """A model folder without weights: its configuration, with the tokenizer's size and special tokens."""
    from megadistill.data.tokenize import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    folder.mkdir(exist_ok=True)
    tokens = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = json.dumps({**config, "vocab_size": len(loaded), **tokens}, indent=2) + "\n"
    (folder / "config.json").write_text(text)


def _fine_tune(folder: Path, model: str, seed: int, settings: tuple[str, ...]) -> None:
    """Plain SFT by ``megadistill train`` in a process of its own (all cores, one rank); the result becomes
    ``folder/model``."""
    from megadistill.checkpoint.hf_export import export_checkpoint

    run_dir = folder / "runs" / f"{model}_sft"
    target = folder / model
    config = folder / f"{model}_sft.yaml"
    write_stage(
        config,
        f"Fine-tuning of the built-in {model}; made by run.prepare. Launch: megadistill train --config {config}",
        {
            "run": {"dir": str(run_dir), "seed": seed},
            "model": {"student": {"path": str(folder / f"{model}_config")}, "tokenizer": str(folder / "tokenizer")},
        },
    )
    overrides = [setting.format(data=folder / "data") for setting in settings]
    run_alone(["train", "--config", str(config), *overrides])
    export_checkpoint(run_dir, target)


def write_stage(path: Path, header: str, tree: dict[str, object]) -> None:
    """A YAML file of a stage, with its header."""
    import yaml

    path.write_text(f"# {header}\n{yaml.safe_dump(tree, sort_keys=False)}")


def run_alone(arguments: list[str]) -> None:
    """``megadistill`` in a process of its own, outside any launcher, on all cores. Raises ConfigError when it fails."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = without_ranks(os.environ) | {"OMP_NUM_THREADS": str(cores)}
    done = subprocess.run([sys.executable, "-m", "megadistill", *arguments], env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"megadistill {' '.join(arguments)} ended with exit code {done.returncode}")
