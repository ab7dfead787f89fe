"""Mode ``dataset``: the references are the training text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.row_file import has_references
from megadistill.data.sample import Sample
from megadistill.decoding.protocols import TextModel
from megadistill.errors import ConfigError, DataError
from megadistill.generation.sources.base import SourceInputs, TextSource
from megadistill.generation.teacher_states import with_teacher_states
from megadistill.observability.timers import Timers


class Dataset(TextSource):
    """References as they are; a prompt without one has no response."""

    kind = "dataset"
    student_share = 0.0

    def __init__(self, teacher: TextModel | None, examples_per_pass: int) -> None:
        self._teacher, self._examples_per_pass = teacher, examples_per_pass

    @classmethod
    def build(cls, inputs: SourceInputs) -> Dataset:
        """A source that the teacher reads, where there is one."""
        return cls(inputs.teacher, inputs.config.train.micro_batch_size)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Checks that the text of the cross-entropy is meant; plain SFT needs no loss on top of the references.

        Raises:
            ConfigError: ``loss.sft_text`` has no effect.
        """
        if config.loss.sft_text == "text":
            raise ConfigError(
                "loss.sft_text=text with generation.mode=dataset: its text is the references; set loss.sft_text to "
                "reference",
                setting="loss.sft_text",
            )

    @classmethod
    def check_examples(
        cls, config: RunConfig, train: Sequence[TokenizedExample], valid: Sequence[TokenizedExample]
    ) -> None:
        """Checks that there is a reference.

        Raises:
            DataError: There is none.
        """
        if not has_references(train):
            raise DataError(
                f"{config.data.train_path}: no row has a reference, and generation.mode={config.generation.mode} "
                "needs references wherever it does not use student text"
            )

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """The references as responses, read by the teacher."""
        samples = [replace(sample, response_ids=sample.reference_ids) for sample in batch]
        with timers("teacher"):
            return with_teacher_states(samples, self._teacher, self._examples_per_pass)


SOURCE = Dataset
