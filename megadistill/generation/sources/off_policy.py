"""Mode ``off_policy``: new student text, replayed student text, or references, as DistiLLM schedules them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.errors import ConfigError, DataError
from megadistill.generation.phi_schedule import OffPolicySchedule
from megadistill.generation.replay_buffer import merge, split
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.sources.by_row import ByRow
from megadistill.generation.sources.dataset import Dataset
from megadistill.generation.sources.mixed import step_draw
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.generation.sources.replay import Replay
from megadistill.observability.log import get_logger
from megadistill.observability.timers import Timers

_STATE = "off_policy"


class OffPolicy(TextSource):
    """``OnPolicy``, ``Replay`` or ``Dataset`` at each step; what the student writes goes into the replay buffer.

    Args:
        inputs: What the sources were built from.
        on_policy: New student text.
        replay: Replayed student text; its buffer is filled here.
        dataset: References, and student text for rows that have none.
    """

    def __init__(self, inputs: SourceInputs, on_policy: TextSource, replay: Replay, dataset: TextSource) -> None:
        config, settings = inputs.config, inputs.config.generation.off_policy
        self._context, self._seed, self._max_steps = inputs.context, config.run.seed, inputs.max_steps
        self._validates = config.train.eval_every > 0
        self._schedule = OffPolicySchedule(phi=settings.initial_phi, eps=settings.eps)
        self._replay = replay
        self._sources = {"generate": on_policy, "replay": replay, "dataset": dataset}

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Checks that student text will be used.

        Raises:
            ConfigError: It would never be, or no loss would be computed on it.
        """
        super().check(config)
        if config.train.eval_every == 0 and config.generation.off_policy.initial_phi == 0:
            raise ConfigError(
                "generation.mode=off_policy with generation.off_policy.initial_phi=0 and train.eval_every=0 would "
                "never use student text: phi rises after validations only"
            )

    @classmethod
    def check_examples(
        cls, config: RunConfig, train: Sequence[TokenizedExample], valid: Sequence[TokenizedExample]
    ) -> None:
        """Checks that there are references to train on, and to validate on where phi waits for that.

        Raises:
            DataError: There are none.
        """
        initial_phi = config.generation.off_policy.initial_phi
        if initial_phi < 1:
            Dataset.check_examples(config, train, valid)
        if initial_phi == 0 and not any(example.response_ids for example in valid[: config.train.eval_rows]):
            raise DataError(
                f"{config.data.valid_path}: none of the first train.eval_rows={config.train.eval_rows} rows has a "
                "reference, and generation.mode=off_policy with initial_phi=0 waits for their likelihood"
            )

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """Those of the student text."""
        return OnPolicy.cache_needs()

    @classmethod
    def validation_settings(cls) -> tuple[str, ...]:
        """Which validation it is: phi follows the validation loss."""
        return ("train.eval_every", "train.eval_rows", "data.valid_path")

    @classmethod
    def build(cls, inputs: SourceInputs) -> OffPolicy:
        """All three sources, and an empty buffer."""
        return cls(inputs, OnPolicy.build(inputs), Replay.build(inputs), ByRow.build(inputs))

    @property
    def student_share(self) -> float:
        """Phi of the schedule."""
        return self._schedule.phi

    def choose(self, step: int) -> TextSource:
        """What the schedule decides, the same on every rank."""
        buffer = self._replay.buffer
        draw = step_draw(self._seed, step)
        return self._sources[self._schedule.decide(draw, step, self._max_steps, buffer.is_full, buffer.is_empty)]

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """The samples of the chosen source."""
        return self.choose(step).samples(step, batch, timers)

    def updated(self, step: int, samples: Sequence[Sample]) -> None:
        """Appends what the student wrote in this step to the buffer."""
        if self.choose(step) is self._sources["generate"]:
            self._replay.buffer.append(samples)

    @property
    def needs_first_validation(self) -> bool:
        """Whether the run validates: phi compares the next validation with the first one."""
        return self._validates

    def observe(self, validation: Mapping[str, float]) -> None:
        """Shows the likelihood of the references to the schedule."""
        if "eval/nll" in validation:
            self._schedule.observe(validation["eval/nll"])

    def metrics(self) -> dict[str, float]:
        """The buffer's size."""
        return self._replay.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The schedule and the whole buffer (one object all-gather over the data-parallel group)."""
        shards = self._context.gather_objects_over_dp(self._replay.buffer.state_dict())
        return {_STATE: {"schedule": self._schedule.state_dict(), "buffer": merge(shards)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the saved schedule and this rank's shard of the saved buffer."""
        if _STATE not in state:
            get_logger(self._context.rank, "generation").info(
                "the checkpoint comes from another generation.mode: the replay buffer starts empty, phi as configured"
            )
            return
        self._schedule.load_state_dict(state[_STATE]["schedule"])
        shard = split(state[_STATE]["buffer"], self._context.dp_rank, self._context.dp_size)
        self._replay.buffer.load_state_dict(shard)


SOURCE = OffPolicy
