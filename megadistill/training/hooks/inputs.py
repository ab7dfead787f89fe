"""What a run was made from, kept in its checkpoints: a resumed run must have the same rows, tokenizer and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadistill.data.fingerprint import is_fingerprint_of, rows_fingerprint, tokenizer_fingerprint
from megadistill.data.spans import span_prior_version
from megadistill.errors import CheckpointError
from megadistill.files import os_errors_as
from megadistill.generation.sources import source_class
from megadistill.models.end_tokens import describe_end_tokens
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.loading import load_model_config
from megadistill.observability.log import get_logger
from megadistill.training.components import Components
from megadistill.training.data import TrainingData
from megadistill.training.hooks.base import Hook

_STATE = "inputs"


class Inputs(Hook):
    """Refuses a trainer state of other inputs, on all ranks; ``train.resume_on_other_data`` makes it a warning.

    Settings are compared before (``training/resume.py``); this is about what the paths in them hold. A checkpoint of a
    version that did not record this is taken as it is.

    Args:
        components: What the run is made of.
        data: What it trains on.
    """

    def __init__(self, components: Components, data: TrainingData) -> None:
        self._components, self._data = components, data
        self._now = components.context.run_on_rank0(lambda: describe_inputs(components, data))

    def state_dict(self) -> dict[str, Any]:
        """What the run is made from."""
        return {_STATE: self._now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compares.

        Raises:
            CheckpointError: On all ranks: something is not what it was.
        """
        before: Mapping[str, str] = state.get(_STATE, {})
        # A run that branches off another one may have more, such as a teacher after SFT: settings decide that.
        changed = [name for name in self._now if name in before and not self._is_same(name, before[name])]
        if not changed:
            return
        name = changed[0]
        more = f"; also changed: {', '.join(changed[1:])}" if changed[1:] else ""
        message = (
            f"the checkpoint was made with other inputs: {name} was {before[name]} and is now {self._now[name]}{more}"
        )
        if not self._components.config.train.resume_on_other_data:
            raise CheckpointError(
                f"{message}; restore them, start a new run, or set train.resume_on_other_data=true",
                setting="train.resume_on_other_data",
            )
        get_logger(self._components.context.rank, "train").warning(message)

    def _is_same(self, name: str, before: str) -> bool:
        data = self._data
        rows = {"data.train_path": data.train, "data.prompts_path": data.prompts, "data.valid_path": data.valid}
        return before == self._now[name] or (name in rows and is_fingerprint_of(before, rows[name]))


def describe_inputs(components: Components, data: TrainingData) -> dict[str, str]:
    """What the user calls each input -> what it is.

    Raises:
        CheckpointError: A file of a model cannot be read.
    """
    config = components.config
    described = {
        "data.train_path": rows_fingerprint(data.train),
        "the tokenizer": f"checksum {tokenizer_fingerprint(components.tokenizer)}",
    }
    described["the end tokens"] = describe_end_tokens(components.eos_ids, components.tokenizer)
    if data.prompts:
        described["data.prompts_path"] = rows_fingerprint(data.prompts)
    if "data.valid_path" in source_class(config).validation_settings():
        described["data.valid_path"] = rows_fingerprint(data.valid)
    teacher = components.model_folders.get("model.teacher.path")
    if teacher is not None:
        described["model.teacher.path"] = _model(teacher, "model.teacher.path")
    if config.model.student.lora.enabled:  # a checkpoint holds the adapters alone
        key = "model.student.path"
        described[key] = _model(components.model_folders[key], key)
    if teacher is not None and config.loss.span > 0:
        described["the span parser"] = span_prior_version(config.data.span_prior)
    return described


def _model(path: str, where: str) -> str:
    with os_errors_as(CheckpointError, path, "cannot be read"):
        files = model_fingerprint(path)
    commit = getattr(load_model_config(path, where), "_commit_hash", None)
    return "; ".join(f"{name} {text}" for name, text in files.items()) or f"commit {commit}"
