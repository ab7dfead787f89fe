"""A model seen by the objective: hidden states and this rank's rows of the output head.

Suffixes: T rows (tokens), C rows of one chunk, H hidden size, V this rank's classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """hidden [T, H], weight [stop-start, H] and bias [stop-start] or None: logits = hidden @ weight.T + bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def check(self, name: str, num_rows: int, num_classes: int) -> None:
        """Raises ValueError when the shapes do not fit each other, the rows or the shard."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.dim() != 2 or hidden.shape[0] != num_rows:
            raise ValueError(f"{name}.hidden has shape {tuple(hidden.shape)}, expected [{num_rows}, H]")
        if tuple(weight.shape) != (num_classes, hidden.shape[1]):
            raise ValueError(
                f"{name}.weight has shape {tuple(weight.shape)}, expected ({num_classes}, {hidden.shape[1]}): "
                "the classes of the shard by the hidden size"
            )
        if bias is not None and tuple(bias.shape) != (num_classes,):
            raise ValueError(f"{name}.bias has shape {tuple(bias.shape)}, expected ({num_classes},)")


def loss_dtype(*heads: Head) -> torch.dtype:
    """float64 as soon as one input is float64, else float32: losses are never computed in half precision."""
    is_double = any(head.hidden.dtype == torch.float64 or head.weight.dtype == torch.float64 for head in heads)
    return torch.float64 if is_double else torch.float32


class LogitsProjector:
    """The rows that count of one head, in the dtype of the loss, and its logits chunk by chunk."""

    def __init__(self, head: Head, rows: Tensor | None, dtype: torch.dtype) -> None:
        hidden = head.hidden.detach()
        self.hidden_TH = (hidden if rows is None else hidden[rows]).to(dtype)
        self.weight_VH = head.weight.detach().to(dtype)
        self.bias_V = None if head.bias is None else head.bias.detach().to(dtype)

    def logits(self, chunk: slice) -> Tensor:
        """[C, V] logits of the rows in `chunk`; the caller owns them."""
        if self.bias_V is None:
            return self.hidden_TH[chunk] @ self.weight_VH.T
        return torch.addmm(self.bias_V, self.hidden_TH[chunk], self.weight_VH.T)
