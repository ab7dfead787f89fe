"""One forward pass of the student: references for L_SFT and responses for the teacher's losses, together.

Shapes: B sequences, S columns; T_sft, T_kd positions of the flattened [B * S] hidden states that carry a loss; H
hidden size, H_T the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megadistill.data.collate import IGNORE_INDEX, SequenceBatch, concatenated, right_padded
from megadistill.data.sample import RowLoss, Sample, TokenIds
from megadistill.losses import DistillOutput, Head, LossConfig, QuantileGate, cross_entropy, distill_loss
from megadistill.losses.output import TERMS
from megadistill.parallel.output_head import OutputHead
from megadistill.training.row_parts import RowPart, row_numbers, row_parts, row_weights

# What each term contributes to the gradient, in metrics.jsonl, after the name of its weight in LossConfig.
GRADIENT_NAMES = tuple(f"gradient_share/{name}" for name in TERMS)


class GlobalCounts(NamedTuple):
    """Counts over all data-parallel ranks and micro-batches of one step; some of them divide its sums.

    Attributes:
        num_sft: Tokens of references.
        num_kd: Tokens of responses.
        num_pairs: Pairs of neighboring response tokens in one span.
        num_spans: Spans of two response tokens or more.
        sft_rows: Rows with a reference.
        kd_rows: Rows with a response that has tokens.
    """

    num_sft: float
    num_kd: float
    num_pairs: float
    num_spans: float = 0.0
    sft_rows: float = 0.0
    kd_rows: float = 0.0

    def of_references(self, config: LossConfig) -> float:
        """What divides the cross-entropy."""
        return self.sft_rows if config.average == "row" else self.num_sft

    def of_responses(self, config: LossConfig) -> float:
        """What divides the token loss."""
        return self.kd_rows if config.average == "row" else self.num_kd

    def of_spans(self, config: LossConfig) -> float:
        """What divides the span term."""
        return self.num_pairs if config.span_relation == "hadamard" else self.num_spans


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass.

    Attributes:
        batch: Sequences [B, S].
        sft_index: [T_sft] positions of the flattened hidden states that predict references.
        sft_labels: [T_sft] the tokens that they predict.
        kd_index: [T_kd] positions that predict responses.
        kd_labels: [T_kd] the tokens that they predict.
        sft_lengths: Tokens of each reference that are predicted, in the order of ``sft_index``.
        kd_lengths: The same of the responses.
        row_losses: Token losses that responses have in place of the configuration's.
        pair_mask: [T_kd] bool, as ``Sample.pair_mask``.
        teacher_hidden: [T_kd, H_T]; None where no sample has a response.
        num_tokens: Columns that are no padding.
        temperatures: [T_kd] as ``Sample.temperatures``; None: ``loss.temperature`` everywhere.
    """

    batch: SequenceBatch
    sft_index: torch.Tensor
    sft_labels: torch.Tensor
    kd_index: torch.Tensor
    kd_labels: torch.Tensor
    sft_lengths: tuple[int, ...]
    kd_lengths: tuple[int, ...]
    pair_mask: torch.Tensor
    teacher_hidden: torch.Tensor | None
    num_tokens: int
    row_losses: tuple[RowLoss | None, ...] = ()
    temperatures: torch.Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Columns of all rows, padding included."""
        return self.batch.input_ids.numel()

    @property
    def is_shared(self) -> bool:
        """Whether the responses are the references: one pass over the head then computes all three losses."""
        is_plain = self.temperatures is None and not any(self.row_losses)
        return is_plain and torch.equal(self.sft_index, self.kd_index)


def sequences_of(sample: Sample) -> list[tuple[TokenIds, TokenIds]]:
    """(prompt, reference) and (prompt, response), where there is a loss on them.

    A response that is the reference is not repeated.
    """
    sequences = []
    if sample.reference_ids is not None:
        sequences.append((sample.prompt_ids, sample.reference_ids))
    if _has_response(sample) and sample.response_ids is not None and sample.response_ids is not sample.reference_ids:
        sequences.append((sample.prompt_ids, sample.response_ids))
    return sequences


def _has_response(sample: Sample) -> bool:
    """Whether the teacher's losses are computed on it."""
    return sample.response_ids is not None and sample.teacher_hidden is not None


def build_micro_batch(
    samples: Sequence[Sample], *, pad_id: int, device: torch.device, padding_free: bool = False
) -> MicroBatch:
    """Collates samples.

    A batch without any loss has one padding token, because every rank makes the same number of forward passes.

    Args:
        samples: The samples of the micro-batch.
        pad_id: The padding token.
        device: Where the tensors go.
        padding_free: The sequences follow one another in one row.
    """
    sequences: list[tuple[TokenIds, TokenIds]] = []
    for_sft: dict[int, Sequence[tuple[int, int]]] = {}  # place in sequences -> earlier turns that are predicted, too
    for_kd: dict[int, Sequence[tuple[int, int]]] = {}
    for sample in samples:
        own = sequences_of(sample)
        if sample.reference_ids is not None:
            for_sft[len(sequences)] = sample.targets
        sequences += own
        if _has_response(sample):
            for_kd[len(sequences) - 1] = ()
    read = sequences or [((pad_id,), ())]
    batch = concatenated(read) if padding_free else right_padded(read, pad_id)
    with_kd = [sample for sample in samples if _has_response(sample)]
    pair_mask = [is_pair for sample in with_kd for is_pair in sample.pair_mask]
    hidden = [sample.teacher_hidden for sample in with_kd if sample.teacher_hidden is not None]
    sft_index, sft_labels = _predicting(batch, for_sft)
    kd_index, kd_labels = _predicting(batch, for_kd)
    given = [sample.temperatures for sample in with_kd if sample.temperatures is not None]
    temperatures = torch.cat(given).to(device, torch.float32) if given else None
    if temperatures is not None:
        kd_labels = kd_labels.masked_fill(temperatures.cpu() == 0, IGNORE_INDEX)
    return MicroBatch(
        batch.to(device),
        sft_index.to(device),
        sft_labels.to(device),
        kd_index.to(device),
        kd_labels.to(device),
        tuple(_num_predicted(sample) for sample in samples if sample.reference_ids is not None),
        tuple(len(sample.response_ids or ()) for sample in with_kd),
        torch.tensor(pair_mask, dtype=torch.bool, device=device),
        torch.cat(hidden) if hidden else None,
        num_tokens=sum(batch.lengths) if sequences else 0,
        row_losses=tuple(sample.row_loss for sample in with_kd),
        temperatures=temperatures,
    )


def _predicting(
    batch: SequenceBatch, sequences: Mapping[int, Sequence[tuple[int, int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions that predict a loss's tokens, and these tokens.

    Args:
        batch: The batch.
        sequences: Sequences with the loss -> spans of theirs that have it besides the response (``Sample.targets``).
    """
    ids, labels, starts = batch.input_ids.flatten(), batch.labels.flatten().clone(), batch.starts
    for i, spans in sequences.items():
        for start, end in spans:  # column c predicts the token in column c + 1
            first, last = starts[i] + max(start, 1), starts[i] + end
            labels[first - 1 : last - 1] = ids[first:last]
    columns = [torch.arange(starts[i], starts[i] + batch.lengths[i]) for i in sequences]
    index = torch.cat([torch.empty(0, dtype=torch.int64), *columns])
    index = index[labels[index] != IGNORE_INDEX]
    return index, labels[index]


def _num_predicted(sample: Sample) -> int:
    """Tokens of ``_predicting`` for a reference: nothing predicts the first token of a prompt."""
    return len(sample.reference_ids or ()) + sum(max(0, end - max(start, 1)) for start, end in sample.targets)


@dataclass
class MicroBatchLoss:
    """The three losses of one micro-batch as a function of the student's hidden states and head (method.md section 4).

    Called once, inside the engine's forward.

    Attributes:
        micro_batch: What the losses are computed on.
        counts: What divides them.
        config: Their weights and options.
        gate: The quantile gate; None where it is not used.
        teacher_head: The teacher's head; None for plain SFT.
        is_diagnosed: Whether ``gradient_squares`` are wanted.
        teacher_share: The teacher's share in what responses were drawn from (the policy term).
        ahead: The student's head after a virtual step on the references, for ``loss.gate_objective`` student.
        interpolation: The teacher's share in what teaches (TAID).
        gradient_squares: Squared norm of each term's derivative by the last hidden states, by ``GRADIENT_NAMES``; every
            position counts once, so that squares add up over micro-batches and data-parallel ranks.
        sft: The loss on references, unweighted and detached; None before the call.
        outputs: The teacher's losses, of each part of the rows; none before the call.
    """

    micro_batch: MicroBatch
    counts: GlobalCounts
    config: LossConfig
    gate: QuantileGate | None
    teacher_head: OutputHead | None
    is_diagnosed: bool = False
    teacher_share: float = 0.0
    ahead: OutputHead | None = None
    interpolation: float = 1.0
    gradient_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    sft: torch.Tensor | None = None
    outputs: list[DistillOutput] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the losses' metrics, by name; only what was computed."""
        metrics: dict[str, torch.Tensor] = {}
        for output in self.outputs:
            own = output.metrics
            metrics = {name: metrics[name] + value for name, value in own.items()} if metrics else own
        return metrics if self.sft is None else metrics | {"loss/sft": self.sft}

    @property
    def is_finite(self) -> bool:
        """Whether the losses that were computed are finite numbers (waits for the device)."""
        values = [] if self.sft is None else [self.sft]
        values += [output.loss for output in self.outputs]
        return all(math.isfinite(float(value.detach())) for value in values)

    def __call__(self, hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        """The loss to back-propagate, a scalar, of hidden states [B, S, H]."""
        flat, micro, config = hidden.flatten(0, 1), self.micro_batch, self.config
        if self.is_diagnosed:
            self._diagnose(flat, head)
        if self.teacher_head is None or not config.uses_teacher:
            return self._reference_loss(flat, head)
        if micro.is_shared and self.counts.of_references(config) == self.counts.of_responses(config):
            self.outputs = self._distill(flat, head, self.teacher_head, config)
            self.sft = self.outputs[0].sft
            return self.outputs[0].loss
        self.outputs = self._distill(flat, head, self.teacher_head, config.replace(sft=0.0))
        loss = _total(self.outputs)
        return loss if config.sft == 0 else loss + self._reference_loss(flat, head)

    def _weights(self, lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
        return row_weights(lengths, device) if self.config.average == "row" else None

    def _diagnose(self, flat: torch.Tensor, head: OutputHead) -> None:
        """Computes each term alone, for its gradient."""
        bias = None if head.bias is None else head.bias.detach()
        frozen = OutputHead(head.weight.detach(), bias, head.shard, head.logit_map)
        for name in GRADIENT_NAMES:
            term = name.rpartition("/")[2]
            others = {other.rpartition("/")[2]: 0.0 for other in GRADIENT_NAMES if other != name}
            config = self.config.model_copy(update=others)  # which, alone, a user might not mean
            with torch.enable_grad():
                leaf = flat.detach().requires_grad_()
                if getattr(config, term) == 0 or (self.teacher_head is None and term != "sft"):
                    continue
                if term == "sft":
                    loss = config.sft * self._cross_entropy(leaf, frozen)
                else:
                    assert self.teacher_head is not None
                    loss = _total(self._distill(leaf, frozen, self.teacher_head, config))
                (gradient,) = torch.autograd.grad(loss, leaf)
            self.gradient_squares[name] = gradient.double().square().sum()

    def _reference_loss(self, flat: torch.Tensor, head: OutputHead) -> torch.Tensor:
        loss = self._cross_entropy(flat, head)
        self.sft = loss.detach()
        return self.config.sft * loss

    def _cross_entropy(self, flat: torch.Tensor, head: OutputHead) -> torch.Tensor:
        return cross_entropy(
            Head.of(flat[self.micro_batch.sft_index], head),
            self.micro_batch.sft_labels,
            head.shard,
            num_tokens=self.counts.of_references(self.config),
            chunk_tokens=self.config.chunk_tokens,
            backend=self.config.backend,
            token_weights=self._weights(self.micro_batch.sft_lengths, flat.device),
        )

    def _distill(
        self, flat: torch.Tensor, head: OutputHead, teacher_head: OutputHead, config: LossConfig
    ) -> list[DistillOutput]:
        """The teacher's losses, of one part of the rows after the other."""
        micro = self.micro_batch
        parts = row_parts(micro.kd_lengths, micro.row_losses, config, flat.device)
        return [self._distill_part(part, flat, head, teacher_head) for part in parts]

    def _distill_part(
        self, part: RowPart, flat: torch.Tensor, head: OutputHead, teacher_head: OutputHead
    ) -> DistillOutput:
        micro, config, teacher_hidden = self.micro_batch, part.config, self.micro_batch.teacher_hidden
        if teacher_hidden is None:
            teacher_hidden = teacher_head.weight.new_zeros(0, teacher_head.weight.shape[1])
        tensors = (micro.kd_index, teacher_hidden, micro.kd_labels, micro.pair_mask)
        index, states, labels, pair_mask = tensors if part.tokens is None else (t[part.tokens] for t in tensors)
        return distill_loss(
            Head.of(flat[index], head),
            Head.of(states, teacher_head),
            labels,
            pair_mask,
            self.gate,
            config,
            head.shard,
            num_tokens=self.counts.of_responses(config),
            num_pairs=self.counts.of_spans(config),
            token_weights=part.weights,
            rows=row_numbers(micro.kd_lengths, flat.device) if config.policy > 0 else None,
            teacher_share=self.teacher_share,
            skews=part.skews,
            ahead=self.ahead,
            interpolation=self.interpolation,
            temperatures=micro.temperatures,
        )


def _total(outputs: Sequence[DistillOutput]) -> torch.Tensor:
    first, *others = (output.loss for output in outputs)
    return sum(others, first)
