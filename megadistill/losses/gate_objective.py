"""What the gate learns from: DAC-KL in either direction, or a virtual step of the student (docs/method.md, "Gate").

Suffixes: T tokens of the references, C tokens of one chunk, H hidden size, Vs this rank's classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megadistill.config.loss import Backend, LossConfig
from megadistill.losses.clipping import ClipTerms, MergedClip
from megadistill.losses.cross_entropy import cross_entropy
from megadistill.losses.fused import IGNORE_INDEX
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.mask import Mask, coverage_slope
from megadistill.parallel.collectives import Group, all_reduce_sum
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard


def virtual_step(
    references: Head,
    labels: Tensor,
    shard: VocabShard,
    dp_group: Group,
    *,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
) -> OutputHead:
    """The output head after one step of gradient descent on the references' negative log-likelihood.

    The step is W - G / sum |h|^2 with G the gradient of the sum over all tokens; with a bias, which is the weight of an
    input of 1, that input counts in |h|^2. So a token like the references' moves its logits by at most their mean
    error, whatever the scale of the hidden states. Without references the head stays.

    Communicates as ``cross_entropy`` over ``shard.group``, and two all-reduces over ``dp_group`` (three with a bias):
    a number, and the head's gradient.

    Args:
        references: The student's hidden states [T, H] that predict reference tokens, and its head.
        labels: [T] int64 these tokens; -100 ignores one.
        shard: This rank's slice of the vocabulary.
        dp_group: Ranks with other references.
        chunk_tokens: As ``loss.chunk_tokens``.
        backend: As ``loss.backend``.

    Returns:
        The head, in float32 or float64.
    """
    dtype, hidden = loss_dtype(references), references.hidden.detach()
    parts = [part.detach().to(dtype, copy=True).requires_grad_() for part in _parts(references)]
    has_bias = len(parts) > 1
    with torch.enable_grad():
        head = Head(hidden, parts[0], parts[1] if has_bias else None, references.logit_map)
        nats = cross_entropy(head, labels, shard, num_tokens=1, chunk_tokens=chunk_tokens, backend=backend)
        gradients = torch.autograd.grad(nats, parts)
    squares = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float64).square() + has_bias
    square = all_reduce_sum((squares * (labels != IGNORE_INDEX)).sum(), dp_group)
    rate = torch.where(square > 0, 1.0 / square, 0.0).to(dtype)
    moved = [part.detach() for part in parts]
    for part, gradient in zip(moved, gradients, strict=True):  # in place: each is as large as the head
        part.sub_(all_reduce_sum(gradient.contiguous(), dp_group).mul_(rate))
    return OutputHead(moved[0], moved[1] if has_bias else None, shard, references.logit_map)


def _parts(head: Head) -> list[Tensor]:
    return [head.weight] if head.bias is None else [head.weight, head.bias]


class LookAhead:
    """Logits of one chunk after the virtual step.

    Args:
        student: The student's hidden states, and its head after the step.
        positions: Token positions that count.
        dtype: That of the loss.
        bias_shift: As for ``LogitsProjector``.
        max_tokens: Tokens of the longest chunk.
    """

    def __init__(
        self, student: Head, positions: Tensor, dtype: torch.dtype, bias_shift: Tensor | None, max_tokens: int
    ) -> None:
        self._projector = LogitsProjector(student, positions, dtype, bias_shift)
        self._buffer = self._projector.new_buffer(max_tokens)

    def logits(self, chunk: slice) -> Tensor:
        """Logits [C, Vs], valid until the next call."""
        return self._projector.logits(chunk, self._buffer)


def gate_gradients(
    config: LossConfig,
    parameters: Sequence[Tensor],
    merged: MergedClip,
    ahead: MergedClip | None,
    terms: ClipTerms,
    mask: Mask,
    weight: Tensor,
) -> Sequence[Tensor | None]:
    """Gradients of the gate's own objective by its parameters, summed over the tokens; () where it has no influence.

    Args:
        config: Direction and guards.
        parameters: The gate's.
        merged: The sums of DAC-KL.
        ahead: The same after the virtual step, at the same mask; for ``gate_objective`` student alone.
        terms: DAC-KL and its mask.
        mask: Where the mask ends, with the quantiles' graph.
        weight: [C] factors of the tokens.
    """
    by = merged.derivatives(mask.place, mask.log_top)
    value_l, value_u = by.value_l, by.value_u
    scale = config.dac_kl * config.temperature**2
    penalty = torch.zeros_like(weight)
    if ahead is not None:
        # A loss that the step lowers is one whose own gradient lowers the references' likelihood loss, too.
        after = ahead.derivatives(mask.place, mask.log_top)
        value_l = after.value_l - value_l
        value_u = None if after.value_u is None or value_u is None else after.value_u - value_u
    else:
        scale *= -1.0 if config.gate_objective == "maximize" else 1.0
        if config.guards:
            penalty = coverage_slope(config, terms.clipped_mass, mask.log_beside)
    outputs, upstream = [], []
    for quantile, of_value, of_mass in ((mask.lambda_l, value_l, by.mass_l), (mask.lambda_u, value_u, by.mass_u)):
        # A gate may hold one of its bounds constant.
        if quantile is None or of_value is None or of_mass is None or not quantile.requires_grad:
            continue
        derivative = scale * of_value + penalty * of_mass
        slope = torch.sigmoid(quantile.detach()) * torch.sigmoid(-quantile.detach())  # of the quantile by its logit
        outputs.append(quantile)
        upstream.append((weight * derivative * slope).to(quantile.dtype))
    return torch.autograd.grad(outputs, list(parameters), upstream, allow_unused=True) if outputs else ()
