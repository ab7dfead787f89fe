"""The value of the span term (paper: Eq. 10; docs/method.md, "Span level") from the sums of ``SpanSum``."""

from __future__ import annotations

import torch
from torch import Tensor


def span_value(square: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The value sqrt(square + eps^2) - eps, computed without the difference, which would cancel; and the root."""
    root = torch.sqrt(square + eps * eps)
    return square / (root + eps), root
