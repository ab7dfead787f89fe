"""The model card of an exported student: what it was made from, how, how good it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megadistill import __version__
from megadistill.checkpoint.hub_commits import recorded_commits
from megadistill.checkpoint.manifest import read_manifest
from megadistill.checkpoint.run_settings import settings_of_run
from megadistill.config.schema import RunConfig
from megadistill.data.hub import is_hub_name, split_revision

CARD = "README.md"
_EVALUATION = "evaluation.json"
_SCORES = ("model", "set", "ROUGE-L sampled", "ROUGE-L greedy", "exact match", "nats per token")
# What another person needs to do the same; paths of this machine are not published.
_SETTINGS = (
    "generation.mode", "generation.temperature", "generation.max_new_tokens", "generation.scrg.enabled",
    "generation.scrg.rounds", "loss.divergence", "loss.temperature", "loss.sft", "loss.dac_kl", "loss.span",
    "data.template", "data.max_prompt_tokens", "data.max_tokens", "optim.lr", "train.global_batch_size",
)  # fmt: skip


def model_card(checkpoint: Path, name: str) -> str:
    """The card of a checkpoint's student, as Markdown with the metadata that hubs read.

    Names of the hub are given as they are, of local paths only the last part.

    Args:
        checkpoint: A ``step_N`` folder.
        name: What the model is called where it can be loaded from, OWNER/NAME.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: The settings of its run cannot be read.
    """
    found, step = settings_of_run(checkpoint), int(read_manifest(checkpoint)["step"])
    config = None if found is None else found[1]
    scores = {} if found is None else _scores(found[0].parent / _EVALUATION)
    commits = {} if found is None else recorded_commits(found[0].parent)
    lines = [
        "---", yaml.safe_dump(_metadata(config), sort_keys=False).strip(), "---", "",
        f"# {name.rpartition('/')[2]}", "", _origin(config, step, commits), "",
        "## Use", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```", "",
        *(_method(config) if config is not None else ()),
        *_table("Scores", _SCORES, scores),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _metadata(config: RunConfig | None) -> dict[str, Any]:
    paths = [] if config is None else [config.model.student.path]
    base = [split_revision(path)[0] for path in paths if is_hub_name(path)]
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "megadistill"],
        **({"base_model": base} if base else {}),
    }


def _origin(config: RunConfig | None, step: int, commits: Mapping[str, str]) -> str:
    made = f"megadistill {__version__}, {step} updates"
    if config is None:
        return f"A student trained with {made}."
    student, teacher = _with_commit(config.model.student.path, commits), config.model.teacher.path
    if teacher is None or not config.needs_teacher:
        return f"{student}, fine-tuned on references ({made})."
    return f"{student}, distilled from {_with_commit(teacher, commits)} ({made})."


def _with_commit(path: str, commits: Mapping[str, str]) -> str:
    return public_name(path) + (f" (commit {commits[path]})" if path in commits else "")


def public_name(path: str) -> str:
    """A name of the hub, or the last part of a local path."""
    return path if is_hub_name(path) else Path(path).name


def _method(config: RunConfig) -> list[str]:
    from megadistill.config.load import flatten

    values = flatten(config.model_dump(mode="json"))
    rows = {
        "model.teacher.path": config.model.teacher.path and public_name(config.model.teacher.path),
        "model.student.path": public_name(config.model.student.path),
        "data.train_path": config.data.train_path and public_name(config.data.train_path),
        **{key: values[key] for key in _SETTINGS if key in values},
    }
    text = (
        "Method: multi-granularity semantic revision (Liu et al., ACL 2026, "
        "[arXiv 2407.10068](https://arxiv.org/abs/2407.10068)), in the variant of these settings."
    )
    return _table("Training", ("setting", "value"), {(f"`{key}`",): (value,) for key, value in rows.items()}, text)


def _scores(file: Path) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """(model, set) -> scores of ``megadistill evaluate``; empty where there are none."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    scores: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for model, sets in results.items():
        for name, entry in sets.items():
            sampled, greedy = entry.get("sampled") or {}, entry.get("greedy") or {}
            scores[model, name] = (
                _mean(sampled.get("rouge_l")), greedy.get("rouge_l"), greedy.get("exact_match"), entry.get("nll")
            )  # fmt: skip
    return scores


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, dict) else value


def _table(
    title: str, header: tuple[str, ...], rows: Mapping[tuple[str, ...], tuple[Any, ...]], text: str = ""
) -> list[str]:
    if not rows:
        return []
    lines = [[*key, *map(_cell, values)] for key, values in rows.items()]
    table = [header, ["---"] * len(header), *lines]
    return [f"## {title}", "", *([text, ""] if text else []), *("| " + " | ".join(row) + " |" for row in table), ""]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
