"""What sampling should do, class by class in Python."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """[V] float64 probabilities of one row of logits: the k likeliest, of these the fewest that reach top_p."""
    probs = (logits.double() / temperature).softmax(-1)
    order = sorted((c for c in range(len(probs)) if probs[c] > 0), key=lambda c: (-float(logits[c]), c))
    if top_k:
        order = order[:top_k]
    total = float(probs[order].sum())
    kept, mass = [], 0.0
    for c in order:
        kept.append(c)
        mass += float(probs[c]) / total
        if mass >= top_p * (1 - 1e-12):
            break
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


def expected_tokens(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Inverse CDF in class order."""
    cumulative = probabilities.cumsum(-1)
    return torch.tensor([int((cumulative <= number * cumulative[-1]).sum()) for number in numbers])
