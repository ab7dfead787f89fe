"""One forward pass of the student: reference rows for L_SFT and rows of training text for the teacher's losses,
together.

Shapes: B rows, S columns; n_sft, n_kd rows of the flattened [B * S] hidden states that carry a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megadistill.data.collate import IGNORE_INDEX, SequenceBatch, right_padded
from megadistill.losses import DistillOutput, Head, LossConfig, QuantileGate, cross_entropy, distill_loss
from megadistill.parallel.vocab import VocabShard

Tokens = Sequence[int]


@dataclass(frozen=True)
class GlobalCounts:
    """Global numbers that divide the sums of one step: over data-parallel ranks and micro-batches."""

    num_sft: float
    num_kd: float
    num_pairs: float


@dataclass(frozen=True)
class TrainingRow:
    """One prompt of a step. ``text`` is what the teacher's losses are computed on (None: nothing), ``pairs[t]`` says
    that its tokens t and t+1 are in one span, ``teacher_hidden`` [len(text), H_T] predicts its tokens."""

    prompt: Tokens
    reference: Tokens | None
    text: Tokens | None
    pairs: Sequence[bool] = ()
    teacher_hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass; indices are into the flattened [B * S] rows."""

    batch: SequenceBatch
    sft_index: torch.Tensor
    sft_labels: torch.Tensor
    kd_index: torch.Tensor
    kd_labels: torch.Tensor
    pair_mask: torch.Tensor
    teacher_hidden: torch.Tensor | None

    @property
    def is_shared(self) -> bool:
        """True when the teacher's losses are on the reference rows themselves: one pass over the head serves all
        three."""
        return torch.equal(self.sft_index, self.kd_index)


def build_micro_batch(rows: Sequence[TrainingRow], *, pad_id: int, device: torch.device) -> MicroBatch:
    """Collates rows. Text that equals the reference is not repeated. A batch without any loss has one padding row,
    because every rank makes the same number of forward passes."""
    sequences: list[tuple[Tokens, Tokens]] = []
    reference_at: dict[int, int] = {}
    for number, row in enumerate(rows):
        if row.reference is not None:
            reference_at[number] = len(sequences)
            sequences.append((row.prompt, row.reference))
    for_kd: list[int] = []
    pairs: list[bool] = []
    hidden: list[torch.Tensor] = []
    for number, row in enumerate(rows):
        if row.text is None or row.teacher_hidden is None:
            continue
        if row.text is row.reference:
            for_kd.append(reference_at[number])
        else:
            for_kd.append(len(sequences))
            sequences.append((row.prompt, row.text))
        pairs.extend(row.pairs)
        hidden.append(row.teacher_hidden)
    batch = right_padded(sequences or [((pad_id,), ())], pad_id).to(device)
    sft_index, sft_labels = _labelled_rows(batch, list(reference_at.values()))
    kd_index, kd_labels = _labelled_rows(batch, for_kd)
    return MicroBatch(
        batch,
        sft_index,
        sft_labels,
        kd_index,
        kd_labels,
        torch.tensor(pairs, dtype=torch.bool, device=device),
        torch.cat(hidden) if hidden else None,
    )


def _labelled_rows(batch: SequenceBatch, sequences: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices and labels of the predicting rows of some sequences, in order."""
    width = batch.labels.shape[1]
    wanted = torch.tensor(sequences, dtype=torch.int64, device=batch.labels.device)
    labels = batch.labels[wanted]
    sequence, column = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    return wanted[sequence] * width + column, labels[sequence, column]


@dataclass
class MicroBatchLoss:
    """The three losses of one micro-batch as a function of the student's hidden states and head (method.md section 4).

    Called once, inside the engine's forward; ``sft`` (unweighted, detached) and ``output`` are its by-products.
    """

    micro_batch: MicroBatch
    counts: GlobalCounts
    config: LossConfig
    gate: QuantileGate | None
    shard: VocabShard
    teacher_head: tuple[torch.Tensor, torch.Tensor | None] | None
    sft: torch.Tensor | None = None
    output: DistillOutput | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the losses that were computed are finite numbers."""
        values = [value for value in (self.sft, self.output and self.output.loss) if value is not None]
        return all(math.isfinite(float(value.detach())) for value in values)

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The loss to back-propagate, a scalar. Hidden states [B, S, H], this rank's head shard [Vs, H] and [Vs]."""
        flat, micro, config = hidden.flatten(0, 1), self.micro_batch, self.config
        if self.teacher_head is None:
            return self._reference_loss(flat, weight, bias)
        if micro.is_shared and self.counts.num_sft == self.counts.num_kd:
            self.output = self._distill(flat, weight, bias, config)
            self.sft = self.output.sft
            return self.output.loss
        self.output = self._distill(flat, weight, bias, replace(config, sft=0.0))
        if config.sft == 0:
            return self.output.loss
        return self.output.loss + self._reference_loss(flat, weight, bias)

    def _reference_loss(self, flat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        micro = self.micro_batch
        head = Head(flat[micro.sft_index], weight, bias)
        loss = cross_entropy(
            head,
            micro.sft_labels,
            self.shard,
            num_tokens=self.counts.num_sft,
            chunk_tokens=self.config.chunk_tokens,
            backend=self.config.backend,
        )
        self.sft = loss.detach()
        return self.config.sft * loss

    def _distill(
        self, flat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: LossConfig
    ) -> DistillOutput:
        assert self.teacher_head is not None
        micro, (teacher_weight, teacher_bias) = self.micro_batch, self.teacher_head
        teacher_hidden = micro.teacher_hidden
        if teacher_hidden is None:
            teacher_hidden = teacher_weight.new_zeros(0, teacher_weight.shape[1])
        return distill_loss(
            Head(flat[micro.kd_index], weight, bias),
            Head(teacher_hidden, teacher_weight, teacher_bias),
            micro.kd_labels,
            micro.pair_mask,
            self.gate,
            config,
            self.shard,
            num_tokens=self.counts.num_kd,
            num_pairs=self.counts.num_pairs,
        )
