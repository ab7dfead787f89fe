"""``evaluation.json``: the newest numbers of every model on every set, and all that were there before.

    {"format": ..., "results": {model: {set: entry}}, "history": [entry, newest first]}

An entry holds the scores and what they are scores of: ``model`` (name, path, files), ``set`` (path, suite), checksums
of the rows, and the settings that decide the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError
from megadistill.evaluation.suites import SuiteResult
from megadistill.files import reason_of, to_jsonable, write_json
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.loading import load_model_config
from megadistill.observability.lock import exclusive_lock

_FORMAT = "megadistill evaluation 2"
_WAIT_S = 60.0
# Settings of the sections eval and data that do not decide an evaluation's numbers.
_NOT_DECIDING = {
    "eval": ("path", "batch_size"),
    "data": (
        "train_path",
        "prompts_path",
        "prompts_ratio",
        "valid_path",
        "span_prior",
        "span_window",
        "span_verb_objects",
    ),  # fmt: skip
}


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the scores of given rows: "section.key" -> value."""
    tree = config.model_dump(mode="json", include=set(_NOT_DECIDING))
    settings = {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
        if key not in _NOT_DECIDING[section]
    }
    model = config.model
    return settings | {
        "model.student.dtype": model.student.dtype,
        "model.tokenizer": model.tokenizer,
        "model.attention": model.attention,
    }


def describe_model(name: str, folder: str) -> dict[str, Any]:
    """What identifies a model: what it is called, its path, and its files or its commit on the hub.

    Raises:
        OSError: A file cannot be read.
    """
    commit = getattr(load_model_config(folder, name), "_commit_hash", None)
    described = {"name": name, "path": folder, "files": model_fingerprint(folder)}
    return described if commit is None else described | {"commit": commit}


def make_entry(
    result: SuiteResult,
    nll: float | None,
    *,
    model: Mapping[str, Any],
    path: str,
    suite: str | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The entry of one model on one set, as JSON has it.

    Args:
        result: The scores.
        nll: Nats per reference token; None without references.
        model: From ``describe_model``.
        path: The set's file.
        suite: Its suite, or None.
        settings: From ``deciding_settings``.
    """
    made = {"model": model, "set": {"path": path, "suite": suite}, "settings": settings}
    entry: dict[str, Any] = to_jsonable(result) | {"nll": nll, "time": datetime.now(UTC).isoformat("T", "seconds")}
    return entry | json.loads(json.dumps(to_jsonable(made)))  # as it will be read: tuples are lists


def read_record(path: Path) -> dict[str, Any]:
    """What is in the file, also in one of an earlier version; an empty record where there is none.

    Raises:
        ConfigError: It cannot be read, or is not an evaluation's.
    """
    if not path.exists():
        return {"format": _FORMAT, "results": {}, "history": []}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_ours = _is_ours(record)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f"{path} exists and holds no results of evaluate, to which new ones could be added; move it, or give "
            "--output another file"
        )
    if record.get("format") != _FORMAT:
        record = _of_earlier_version(record)
    return dict(record)


def add_results(path: Path, results: Mapping[str, Mapping[str, dict[str, Any]]]) -> tuple[dict[str, Any], int]:
    """Adds entries to the file, under a lock: other evaluations may end at the same time.

    An entry takes the place of the one with the same names, which goes into the history, unless it only repeats it.

    Args:
        path: The file.
        results: Model -> set -> entry.

    Returns:
        What the file holds now, and the number of entries that went into the history.

    Raises:
        ConfigError: The file is not an evaluation's, or another process holds it.
        OSError: It cannot be written.
    """
    num_moved = 0
    with exclusive_lock(path.with_name(path.name + ".lock"), str(path), wait_s=_WAIT_S):
        record = read_record(path)
        for model, by_set in results.items():
            for name, entry in by_set.items():
                before = record["results"].setdefault(model, {}).get(name)
                if before is not None and before | {"time": None} != entry | {"time": None}:
                    record["history"].insert(0, before)
                    num_moved += 1
                record["results"][model][name] = entry
        write_json(path, record)
    return record, num_moved


def notes_on_rows(record: Mapping[str, Any], sets: Iterable[str]) -> list[str]:
    """One line for each set of which the models of a record were scored on different rows."""
    notes = []
    for name in sets:
        models_of: dict[str, list[str]] = {}
        counts: dict[str, str] = {}
        for model, by_set in record["results"].items():
            checksum = by_set.get(name, {}).get("rows_checksum")
            if checksum:
                models_of.setdefault(checksum, []).append(model)
                texts = by_set[name].get("predictions")
                counts[checksum] = "" if texts is None else f": {len(texts)} rows"
        if len(models_of) > 1:
            groups = "; ".join(f"{', '.join(models)}{counts[key]}" for key, models in models_of.items())
            notes.append(f"not comparable: the models answered different rows of {name} ({groups})")
    return notes


def _is_ours(record: Any) -> bool:
    """Whether a file is one of this format or of the one before it, which had no entry ``format``.

    What else it may be fails here as Python lets it fail: a list has no ``values``.
    """
    parts = [entry for by_set in record["results"].values() for entry in by_set.values()]
    if "format" in record:
        return record["format"] == _FORMAT and all(isinstance(part, dict) for part in (*parts, *record["history"]))
    made_from = record.get("made_from", {})
    parts += [record.get("models", {}), made_from.get("models", {}), made_from.get("settings", {})]
    return set(record) <= {"models", "results", "made_from"} and all(isinstance(part, dict) for part in parts)


def _of_earlier_version(record: Mapping[str, Any]) -> dict[str, Any]:
    """A file from before there was a history: each entry gets what the file says about all of them."""
    made_from = record.get("made_from", {})
    results = {
        model: {
            name: {
                **entry,
                "model": {
                    "name": model,
                    "path": record.get("models", {}).get(model),
                    "files": made_from.get("models", {}).get(model, {}),
                },
                "settings": made_from.get("settings", {}),
            }
            for name, entry in by_set.items()
        }
        for model, by_set in record["results"].items()
    }
    return {"format": _FORMAT, "results": results, "history": []}
