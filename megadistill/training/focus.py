"""AdaKD (Xie et al., AAAI 2026, arXiv 2510.11615): which tokens are trained on, and at which temperature.

docs/method.md, "Losses that adapt", has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megadistill.config.adaptive import AdakdSection
from megadistill.config.loss import LossConfig
from megadistill.data.sample import Sample
from megadistill.decoding.protocols import TextModel
from megadistill.generation.scoring import concatenated
from megadistill.generation.teacher_states import states_of
from megadistill.losses import Head
from megadistill.losses.difficulty import token_difficulty
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead


@dataclass
class TokenFocus:
    """The share of the tokens that are trained on, the hardest ones first, which follows the loss.

    Attributes:
        config: How fast it moves and how much temperatures differ.
        max_steps: Steps of the run.
        share: The share of the next step.
        average: Moving average of the token loss; None before the first step.
        mark: The average when the share last changed; None in the warm-up.
        difficulty: Median distance of the tokens that this step was trained on; no part of the state.
    """

    config: AdakdSection
    max_steps: int
    share: float = 1.0
    average: float | None = None
    mark: float | None = None
    difficulty: float = 0.0

    @classmethod
    def of(cls, config: AdakdSection, max_steps: int) -> TokenFocus | None:
        """At its start, on all tokens; None where it is off."""
        return cls(config, max_steps) if config.enabled else None

    def temperatures(self, own: Tensor, everyone: Tensor, temperature: float) -> Tensor:
        """The temperature of each token; 0 where it is not trained on.

        Tokens as hard as the last one that is taken are taken, too, so that nothing depends on an order. A distance
        that is no number counts as the largest.

        Args:
            own: Distances [T] of this rank's tokens.
            everyone: Distances of the tokens of all data-parallel ranks, in any order.
            temperature: ``loss.temperature``.
        """
        if not len(everyone):
            return own
        ordered = everyone.nan_to_num(nan=1.0).sort(descending=True)[0]
        num_taken = int((ordered >= ordered[max(1, int(len(ordered) * self.share)) - 1]).sum())
        median = ordered[:num_taken][num_taken // 2]  # of an even number the lower one, as torch's median
        self.difficulty = float(median)
        squares = (own.nan_to_num(nan=1.0) / median).square() if median > 0 else torch.ones_like(own)
        ratio = torch.where(squares.isinf(), 1.0, (squares - 1) / (squares + 1))  # tanh(log(distance / median))
        taken = own.nan_to_num(nan=1.0) >= ordered[num_taken - 1]
        return torch.where(taken, temperature * torch.exp(-self.config.temperature_scale * ratio), 0.0)

    def updated(self, done: int, loss: float) -> None:
        """After an update.

        Args:
            done: Updates so far.
            loss: Its token loss over all ranks, in nats.
        """
        config = self.config
        self.average = loss if self.average is None else config.beta * self.average + (1 - config.beta) * loss
        if self.mark is None:
            self.mark = self.average if done > config.warmup * self.max_steps else None
        elif self.average > self.mark * (1 + config.tolerance):
            self.share, self.mark = min(1.0, self.share * (1 + config.share_step)), self.average
        elif self.average < self.mark * (1 - config.tolerance):
            self.share, self.mark = max(config.min_share, self.share * (1 - config.share_step)), self.average

    def metrics(self) -> dict[str, float]:
        """Asked before ``updated``: this step's numbers for metrics.jsonl."""
        return {"adakd/share": self.share, "adakd/difficulty": self.difficulty}

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's trainer state, the same on every rank and layout."""
        return {"adakd": {"share": self.share, "average": self.average, "mark": self.mark}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a trainer state; from its start where that is of a run without."""
        for name, value in state.get("adakd", {}).items():
            setattr(self, name, value)


def focused(
    samples: Sequence[Sample],
    focus: TokenFocus,
    *,
    student: TextModel,
    teacher: TextModel,
    loss: LossConfig,
    context: ParallelContext,
    examples_per_pass: int,
) -> list[Sample]:
    """The samples with the temperatures of their responses' tokens (collective over the world).

    The student reads all responses once more, before anything is trained: which tokens are the hardest ones of a step
    is known when all of them are. Communicates as ``token_difficulty``, and gathers one number per token over the
    data-parallel group.

    Args:
        samples: This rank's samples, with the teacher's hidden states.
        focus: Chooses among the tokens of all ranks.
        student: The model that is trained.
        teacher: The teacher, for its head.
        loss: The options of the losses.
        context: The grid of processes.
        examples_per_pass: Examples of a forward pass of a student without a decoder plan.
    """
    states = states_of(samples, student, examples_per_pass)
    places = [i for i, sample in enumerate(samples) if sample.response_ids and sample.teacher_hidden is not None]
    lengths = [len(samples[i].response_ids or ()) for i in places]
    with student.head() as head, teacher.head() as teacher_head:
        distances = token_difficulty(
            _head([states[i] for i in places], head),
            _head([samples[i].teacher_hidden for i in places], teacher_head),
            head.shard,
            temperature=loss.temperature,
            chunk_tokens=loss.chunk_tokens,
            backend=loss.backend,
        )
    own = distances.double().cpu()
    everyone = torch.tensor([x for part in context.gather_objects_over_dp(own.tolist()) for x in part], dtype=own.dtype)
    found = focus.temperatures(own, everyone, loss.temperature).split(lengths) if lengths else ()
    by_place = dict(zip(places, found, strict=True))
    return [replace(sample, temperatures=by_place[i]) if i in by_place else sample for i, sample in enumerate(samples)]


def _head(hidden: Sequence[Tensor | None], head: OutputHead) -> Head:
    return Head.of(concatenated([part for part in hidden if part is not None], head.weight), head)
