"""Cross-entropy on labels from a sharded head: L_SFT, and the loss of plain fine-tuning.

Suffixes: C tokens of one chunk, Vs this rank's classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megadistill.config.loss import Backend
from megadistill.losses.backends import make_kernels
from megadistill.losses.dense_teacher import local_statistics
from megadistill.losses.fused import (
    Normalizer,
    StudentGradients,
    bias_shifts,
    check_labels,
    check_shard,
    check_weights,
    chunk_size,
    chunks,
    inverse_count,
    keep_for_backward,
    needs_gradient,
    scaled_gradients,
    valid_positions,
    weights_of,
)
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.statistics import merge_student
from megadistill.losses.tiles import GradientWeights, TileSpec
from megadistill.parallel.output_head import LogitMap
from megadistill.parallel.vocab import VocabShard


def cross_entropy(
    student: Head,
    labels: Tensor,
    shard: VocabShard,
    *,
    num_tokens: Normalizer,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
    token_weights: Tensor | None = None,
) -> Tensor:
    """Sum over the tokens of -log q(label), divided by a global count.

    Communicates over ``shard.group``: 3 floats per token in one all-gather per chunk, and one all-reduce of the hidden
    gradient.

    Args:
        student: Hidden states [T, H] and head shard.
        labels: [T] int64; -100 ignores a token, whatever its hidden state contains.
        shard: This rank's slice of the vocabulary.
        num_tokens: The global count, over data-parallel ranks and micro-batches.
        chunk_tokens: As ``loss.chunk_tokens``.
        backend: As ``loss.backend``.
        token_weights: [T] factors of the tokens in the sum; None: 1.

    Returns:
        A differentiable scalar in nats, the same on every tensor-parallel rank, in float32 or float64 whatever the
        inputs. Every rank must call backward on it.

    Raises:
        ValueError: Shapes do not fit.
        DataError: A label is not a class.
    """
    check_shard(shard)
    check_labels(labels)
    check_weights(token_weights, len(labels))
    student.check("student", len(labels), shard.size)
    needs = needs_gradient(student, torch.is_grad_enabled())
    arguments = (labels, shard, num_tokens, chunk_tokens, backend, needs, token_weights)
    return _CrossEntropy.apply(student.hidden, student.weight, student.bias, student.logit_map, *arguments)


@torch.no_grad()
def label_nats(
    model: Head,
    labels: Tensor,
    shard: VocabShard,
    *,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """-log q(label) of each token [T] in nats, float64, at temperature 1 and without gradient.

    Communicates over ``shard.group``: 3 floats per token in one all-gather per chunk. Arguments and errors are those of
    ``cross_entropy``.
    """
    check_shard(shard)
    check_labels(labels)
    model.check("model", len(labels), shard.size)
    spec, kernels = TileSpec(), make_kernels(backend, shard, labels.device)
    nats = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    with torch.autocast(labels.device.type, enabled=False):
        projector = LogitsProjector(model, None, loss_dtype(model), *bias_shifts([model], shard.group))
        size = chunk_size(chunk_tokens, shard, labels.device)
        buffer = projector.new_buffer(min(size, len(labels)))
        for chunk, _ in chunks(len(labels), size):
            logits_CVs = projector.logits(chunk, buffer)
            local = local_statistics(spec, kernels, logits_CVs, None)
            nats[chunk] = merge_student(spec, local, logits_CVs, labels[chunk], shard).label_nats
    return nats


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_map: LogitMap,
        labels: Tensor,
        shard: VocabShard,
        num_tokens: Normalizer,
        chunk_tokens: int | Literal["auto"],
        backend: Backend,
        needs: tuple[bool, bool, bool],
        token_weights: Tensor | None,
    ) -> Tensor:
        head = Head(hidden, weight, bias, logit_map)
        dtype = loss_dtype(head)
        positions = valid_positions(labels, shard.total)
        labels = labels[positions]
        factors = weights_of(token_weights, positions, dtype)
        inverse = inverse_count(num_tokens, hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            spec, kernels = TileSpec(), make_kernels(backend, shard, hidden.device)
            projector = LogitsProjector(head, positions, dtype, *bias_shifts([head], shard.group))
            gradients = StudentGradients(projector, needs)
            size = chunk_size(chunk_tokens, shard, hidden.device)
            logits_buffer = projector.new_buffer(min(size, len(positions)))
            gradient_dtype = kernels.gradient_dtype(projector.hidden_TH.dtype, dtype)
            gradient_buffer = projector.new_buffer(min(size, len(positions)), gradient_dtype)
            for chunk, _ in chunks(len(positions), size):
                logits_CVs = projector.logits(chunk, logits_buffer)
                local = local_statistics(spec, kernels, logits_CVs, None)
                stats = merge_student(spec, local, logits_CVs, labels[chunk], shard)
                nats = stats.label_nats
                total += (nats if factors is None else nats * factors[chunk]).sum()
                if gradients.is_wanted:
                    gradient_CVs = gradient_buffer[: len(logits_CVs)]
                    weight = inverse.to(dtype).expand(len(logits_CVs)).contiguous()
                    if factors is not None:
                        weight = weight * factors[chunk]
                    weights = GradientWeights(weight, label=weight, label_column=labels[chunk] - shard.start)
                    if shard.size:
                        kernels.gradient(spec, logits_CVs, None, stats.norms, None, weights, gradient_CVs)
                    gradients.add(chunk, gradient_CVs)
            gradients.reduce(shard.group)
        keep_for_backward(ctx, head, positions, gradients, [])
        return (total * inverse).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, upstream), *[None] * 8
