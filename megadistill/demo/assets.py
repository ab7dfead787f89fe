"""Built-in assets (``run.prepare``): a seeded corpus, a tokenizer trained on it, and the models of a recipe.

They are below ``runs/assets/NAME_SEED`` (those of a study in its folder) and made once, by rank 0, before the process
group exists. A finished part is never made again; an interrupted one starts again, a fine-tuning run from its last
checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.config.load import flatten, load_config
from megadistill.config.schema import RunConfig
from megadistill.config.shipped import find_config
from megadistill.demo.alone import run_alone
from megadistill.demo.recipes import RECIPES
from megadistill.demo.waiting import POLL_S, Stopped, beat_file, beating, never, wait_for_rank0
from megadistill.files import read_json_lines
from megadistill.launch.launchers import rank_of
from megadistill.observability.log import get_logger

_ROOT = Path("runs/assets")


def assets_folder(name: str, seed: int, root: Path = _ROOT) -> Path:
    """The folder with the assets of a recipe, below ``root``, relative to the working directory."""
    return root / f"{name}_{seed}"


def settings_for(config: str, seed: int, root: Path) -> list[str]:
    """Overrides of a shipped configuration with ``run.prepare`` that read the assets of a seed from below ``root``."""
    loaded = load_config(find_config(config), [f"run.seed={seed}"])
    here = assets_folder(loaded.run.prepare, seed)
    moved = {
        key: assets_folder(loaded.run.prepare, seed, root) / Path(path).relative_to(here)
        for key, path in flatten(loaded.model_dump()).items()
        if isinstance(path, str) and Path(path).is_relative_to(here)
    }
    # They are made already, and are not to be made in the usual place.
    return [f"run.seed={seed}", "run.prepare=none", *(f"{key}={path}" for key, path in moved.items())]


def ensure_assets(config: RunConfig, is_stopping: Callable[[], bool]) -> bool:
    """Makes what ``run.prepare`` names and is missing; other ranks wait until it is complete.

    Args:
        config: The configuration of the run.
        is_stopping: Whether this process was asked to stop.

    Returns:
        True when everything exists, False when the job was asked to stop before.

    Raises:
        DataError: A part could not be made, or rank 0 does not report progress any more.
    """
    name, seed = config.run.prepare, config.run.seed
    folder, rank = assets_folder(name, seed), rank_of(os.environ)
    try:
        if is_ready(folder, name):
            return True
        if rank == 0:
            with beating(beat_file(folder)):
                make_assets(name, seed, say=get_logger().info, is_stopping=is_stopping)
        else:
            wait_for_rank0(lambda: is_ready(folder, name), beat_file(folder), is_stopping)
    except Stopped:
        get_logger(rank).warning(f"stopped before {folder} was complete; run the same command to resume")
        return False
    return True


def model_configs(config: RunConfig) -> dict[str, dict[str, object]]:
    """Path -> transformers configuration of the models that ``run.prepare`` names, with the largest vocabulary."""
    name = config.run.prepare
    folder, recipe = assets_folder(name, config.run.seed), RECIPES[name]
    return {
        str(folder / model): {**model_recipe.config, "vocab_size": recipe.vocab_size}
        for model, model_recipe in recipe.models.items()
    }


def is_ready(folder: Path, name: str) -> bool:
    """Whether every part of a recipe is complete."""
    return all((folder / part).exists() for part in ("data", "tokenizer", *RECIPES[name].models))


def make_assets(
    name: str,
    seed: int,
    say: Callable[[str], None] = print,
    is_stopping: Callable[[], bool] = never,
    root: Path = _ROOT,
) -> None:
    """Makes the missing parts of a recipe. One process at a time; others wait for the lock.

    Args:
        name: A key of RECIPES.
        seed: Seed of the corpus and the models.
        say: Prints a line about each part that takes a while.
        is_stopping: Whether this process was asked to stop.
        root: The folder with the assets of all recipes and seeds.

    Raises:
        Stopped: ``is_stopping()`` became true.
    """
    folder, recipe = assets_folder(name, seed, root), RECIPES[name]
    if is_ready(folder, name):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock", is_stopping):
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
                _fine_tune(folder, model, seed, (*recipe.common, *model_recipe.sft), is_stopping)


@contextmanager
def _locked(path: Path, is_stopping: Callable[[], bool]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while not lock.is_locked:
        if is_stopping():
            raise Stopped
        try:
            lock.acquire(timeout=POLL_S)
        except Timeout:
            continue
    try:
        yield
    finally:
        lock.release()


def _make_corpus(folder: Path, name: str, seed: int, say: Callable[[str], None]) -> None:
    from megadistill.data.synthetic import CorpusSizes, generate_corpus, write_corpus
    from megadistill.demo.tokenizer import train_tokenizer

    recipe = RECIPES[name]
    if not (folder / "data").exists():
        say(f"{folder}: writing the corpus")
        beside = folder / "data.partial"
        shutil.rmtree(beside, ignore_errors=True)
        write_corpus(beside, generate_corpus(seed, CorpusSizes(**recipe.sizes)))
        beside.rename(folder / "data")
    if not (folder / "tokenizer").exists():
        say(f"{folder}: training the tokenizer")
        beside = folder / "tokenizer.partial"
        shutil.rmtree(beside, ignore_errors=True)
        rows = read_json_lines(folder / "data" / "teacher_train.jsonl")
        texts = (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)
        train_tokenizer(texts, beside, vocab_size=recipe.vocab_size, seed=seed)
        beside.rename(folder / "tokenizer")


def _write_config(folder: Path, config: dict[str, object], tokenizer: Path) -> None:
    """The configuration of a model without weights, with the tokenizer's size and special tokens."""
    from megadistill.data.tokenize import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    folder.mkdir(exist_ok=True)
    tokens = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = json.dumps({**config, "vocab_size": len(loaded), **tokens}, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _fine_tune(folder: Path, model: str, seed: int, settings: tuple[str, ...], is_stopping: Callable[[], bool]) -> None:
    """Plain SFT by ``megadistill train`` in a separate process (one rank, all cores); exports to ``folder/model``."""
    from megadistill.checkpoint.hf_export import export_checkpoint

    run_dir = folder / "runs" / f"{model}_sft"
    config = folder / f"{model}_sft.yaml"
    _write_yaml(
        config,
        f"Fine-tuning of the built-in {model}; made by run.prepare. Launch: megadistill train --config {config}",
        {
            "run": {"dir": str(run_dir), "seed": seed},
            "model": {
                "student": {"path": str(folder / f"{model}_config" / "config.json")},
                "tokenizer": str(folder / "tokenizer"),
            },
        },
    )
    overrides = [setting.format(data=folder / "data") for setting in settings]
    run_alone(["train", "--config", str(config), *overrides], is_stopping)
    export_checkpoint(run_dir, folder / model)


def _write_yaml(path: Path, header: str, tree: dict[str, object]) -> None:
    import yaml

    path.write_text(f"# {header}\n{yaml.safe_dump(tree, sort_keys=False)}", encoding="utf-8")
