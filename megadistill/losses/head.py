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


def loss_dtype(student: Head, teacher: object = None) -> torch.dtype:
    """float64 as soon as a part of a head is float64, else float32: losses are never computed in half precision."""
    heads = [head for head in (student, teacher) if isinstance(head, Head)]
    parts = [part for head in heads for part in (head.hidden, head.weight, head.bias) if part is not None]
    is_double = any(part.dtype == torch.float64 for part in parts)
    return torch.float64 if is_double else torch.float32


class LogitsProjector:
    """The rows that count of one head, and its logits chunk by chunk in the dtype of the loss.

    On CUDA bfloat16 inputs stay as they are: the products read them, and accumulate and write float32. Elsewhere, and
    for float16 (whose range the scaled derivatives leave), inputs are converted once. `bias_shift` is taken off every
    bias: no loss depends on it, and large logits are coarse.
    """

    def __init__(self, head: Head, rows: Tensor | None, dtype: torch.dtype, bias_shift: Tensor | None = None) -> None:
        hidden, weight = head.hidden.detach(), head.weight.detach()
        self.dtype = dtype
        self.is_mixed = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32
        kept = torch.bfloat16 if self.is_mixed else dtype
        self.hidden_TH = (hidden if rows is None else hidden[rows]).to(kept)
        self.weight_VH = weight.to(kept)
        self.bias_V = None if head.bias is None else head.bias.detach().to(dtype)
        if self.bias_V is not None and bias_shift is not None:
            self.bias_V = self.bias_V - bias_shift.to(dtype)

    def new_tile(self, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for the logits of `num_rows` rows, or for their derivatives in another dtype."""
        return self.hidden_TH.new_empty((num_rows, self.weight_VH.shape[0]), dtype=dtype or self.dtype)

    def logits(self, chunk: slice, out: Tensor) -> Tensor:
        """[C, V] logits of the rows in `chunk`, written to the first rows of `out`."""
        hidden_CH = self.hidden_TH[chunk]
        logits_CV = out[: hidden_CH.shape[0]]
        if self.is_mixed:
            torch.ops.aten.mm.dtype_out(hidden_CH, self.weight_VH.T, self.dtype, out=logits_CV)
        elif self.bias_V is not None:
            return torch.addmm(self.bias_V, hidden_CH, self.weight_VH.T, out=logits_CV)
        else:
            torch.mm(hidden_CH, self.weight_VH.T, out=logits_CV)
        return logits_CV if self.bias_V is None else logits_CV.add_(self.bias_V)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, accumulated in the dtype of the loss."""
        if self.is_mixed:
            torch.ops.aten.addmm.dtype_out(total, left, right, self.dtype, out=total)
        else:
            total.addmm_(left, right)
