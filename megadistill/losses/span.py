"""Span correlation on one chunk (paper: Eq. 10; docs/method.md, "Span level").

For a pair of adjacent rows r = q_i * q_{i+1} elementwise over the vocabulary; a pair's loss is the smoothed distance
of student and teacher. Suffixes: C rows, V this rank's classes; a pair is stored at its first row, so the last row of
a chunk never has one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def span_sums(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """[C, 2] local sums over the vocabulary of each pair: ||r^S - r^T||^2 and <r^S - r^T, r^S>; 0 for the last row."""
    difference, student = _products(log_p_CV, log_q_CV)
    sums = torch.stack([(difference * difference).sum(-1), (difference * student).sum(-1)], -1)
    return F.pad(sums, (0, 0, 0, 1))


def span_value(square: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(square + eps^2) - eps and the root itself; written without the difference, which would cancel."""
    root = torch.sqrt(square + eps * eps)
    return square / (root + eps), root


def span_gradient(log_p_CV: Tensor, log_q_CV: Tensor, inner: Tensor, pair_weight: Tensor) -> Tensor:
    """[C, V] derivative of sum(pair_weight * root) by the tempered student logits.

    inner: [C] merged <r^S - r^T, r^S>; pair_weight: [C] weight over root, 0 where the row starts no pair.
    """
    difference, student = _products(log_p_CV, log_q_CV)
    through_pair = difference.mul_(student).mul_(pair_weight[:-1].unsqueeze(-1))
    normaliser = pair_weight * inner
    # Each row belongs to the pair that it starts and to the one that it ends.
    normaliser = normaliser + F.pad(normaliser[:-1], (1, 0))
    gradient = log_q_CV.exp().mul_(-normaliser.unsqueeze(-1))
    gradient[:-1] += through_pair
    gradient[1:] += through_pair
    return gradient


def _products(log_p_CV: Tensor, log_q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """r^S - r^T and r^S, [C - 1, V]."""
    student = torch.exp(log_q_CV[:-1] + log_q_CV[1:])
    return student - torch.exp(log_p_CV[:-1] + log_p_CV[1:]), student
