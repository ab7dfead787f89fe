"""The interface of text sources: they give a step's samples and answer whatever depends on where text comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample, TokenIds
from megadistill.data.tokenize import response_limit
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.decoding.protocols import TextModel
from megadistill.decoding.rollout import Correction
from megadistill.errors import ConfigError
from megadistill.generation.scoring import TeacherScores
from megadistill.generation.scrg import ErrorRule, find_corrections
from megadistill.observability.timers import Timers
from megadistill.parallel.context import ParallelContext

# Kinds of text that every line of metrics.jsonl has a flag for; a new kind adds its own.
STANDARD_KINDS = ("generate", "replay", "dataset", "teacher")


class CacheNeeds(NamedTuple):
    """Whose keys and values are kept while text is written.

    Attributes:
        decoder: The model that writes, "student" or "teacher"; None where no text is written.
        is_scored: The teacher's cache may be kept beside it.
        is_offline: The text of many steps is written at a time, rather than one step's.
        is_written_by_both: The teacher writes beside the student, so its cache is needed, too.
    """

    decoder: str | None
    is_scored: bool = False
    is_offline: bool = False
    is_written_by_both: bool = False


@dataclass(frozen=True)
class SourceInputs:
    """What sources are built from.

    Attributes:
        config: The configuration of the run.
        context: The grid of processes.
        student: The model that is trained.
        teacher: The teacher; None where no loss needs it.
        eos_ids: Tokens that end a response of the student.
        decode_plan: How many examples are written at a time.
        examples: All that the run trains on.
        teacher_folder: Where the teacher was loaded from; None without one.
        max_steps: Steps of the run.
        teacher_eos_ids: Tokens that end a response of the teacher.
        find_corrections: Which tokens of responses the teacher replaces.
    """

    config: RunConfig
    context: ParallelContext
    student: TextModel
    teacher: TextModel | None
    eos_ids: frozenset[int]
    decode_plan: DecodeBatchPlan
    examples: Sequence[TokenizedExample] = ()
    teacher_folder: str | None = None
    max_steps: int = field(kw_only=True)
    teacher_eos_ids: frozenset[int] = frozenset()
    find_corrections: Callable[[Sequence[TokenIds], TeacherScores, ErrorRule], list[Correction]] = find_corrections

    def response_limit(self, prompt_length: int) -> int:
        """Most tokens that a response to a prompt of this length may have."""
        generation, data = self.config.generation, self.config.data
        return response_limit(prompt_length, max_new_tokens=generation.max_new_tokens, max_tokens=data.max_tokens)


class TextSource:
    """A source of training text.

    All decisions are functions of what all ranks know (the step, the seed, validations): a decision of one rank alone
    would deadlock ZeRO-3 and tensor parallelism.
    """

    kind: ClassVar[str] = ""
    """Flag of this text in metrics.jsonl (``text/KIND``); empty for a source that only chooses among others."""

    # What a configuration with this source means; asked before anything is loaded.

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Checks that the settings fit this source.

        Raises:
            ConfigError: No loss would be computed on its text.
        """
        if not config.loss.uses_teacher and (config.loss.sft_text != "text" or config.loss.sft == 0):
            raise ConfigError(
                f"generation.mode={config.generation.mode} with loss.dac_kl=0 and loss.span=0: no loss would be "
                "computed on its text (loss.sft_text=text would be); plain SFT is loss.dac_kl=0 loss.span=0 "
                "generation.mode=dataset"
            )

    @classmethod
    def check_examples(
        cls, config: RunConfig, train: Sequence[TokenizedExample], valid: Sequence[TokenizedExample]
    ) -> None:
        """Checks that this source can use the examples of a run.

        Args:
            config: The configuration of the run.
            train: Examples to train on.
            valid: Examples to validate on.

        Raises:
            DataError: It cannot.
        """

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """Whose cache it needs."""
        return CacheNeeds(None)

    @classmethod
    def validation_settings(cls) -> tuple[str, ...]:
        """Settings of the validation that this source depends on: a resumed run must keep them."""
        return ()

    @classmethod
    def build(cls, inputs: SourceInputs) -> TextSource:
        """The source of a run (collective over the world)."""
        raise NotImplementedError

    # What a step asks.

    @property
    def student_share(self) -> float:
        """Probability that a step trains on student text (metric ``phi``)."""
        raise NotImplementedError

    def choose(self, step: int) -> TextSource:
        """The source of this step's text; a source that chooses among others returns one of them."""
        return self

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """This rank's samples of a step, with responses and the teacher's hidden states of them.

        Args:
            step: The step, 0-based.
            batch: This rank's share of the global batch: prompts and references.
            timers: Phases are timed as ``rollout``, ``teacher``, ``score`` and ``regenerate``.
        """
        raise NotImplementedError

    def updated(self, step: int, samples: Sequence[Sample]) -> None:
        """Called after an update with the samples that it was made from."""

    # What a validation and a checkpoint ask.

    @property
    def needs_first_validation(self) -> bool:
        """Whether a new run validates before its first step."""
        return False

    def observe(self, validation: Mapping[str, float]) -> None:
        """Called after each validation with its metrics."""

    def metrics(self) -> dict[str, float]:
        """Numbers of this source for metrics.jsonl."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's trainer state, the same on every rank and at every layout (collective)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a trainer state that holds the entries of ``state_dict``, and others."""
