"""A model as the objective sees it: hidden states and this rank's slice of the output head.

Suffixes: T tokens, C tokens of one chunk, H hidden size, Vs this rank's classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.parallel.output_head import IDENTITY, LogitMap, OutputHead


@dataclass(frozen=True)
class Head:
    """A model's hidden states and this rank's slice of its output head: logits = hidden @ weight.T + bias.

    Attributes:
        hidden: [T, H].
        weight: [Vs, H].
        bias: [Vs], or None.
        logit_map: What the family then does to them (Gemma's soft cap, Granite's factor).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_map: LogitMap = IDENTITY

    @classmethod
    def of(cls, hidden: Tensor, output_head: OutputHead) -> Head:
        """Hidden states [T, H] with the output head that they go through."""
        return cls(hidden, output_head.weight, output_head.bias, output_head.logit_map)

    def check(self, name: str, num_tokens: int, num_classes: int) -> None:
        """Raises ValueError when the shapes do not fit each other, the number of tokens or the shard."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.dim() != 2 or hidden.shape[0] != num_tokens:
            raise ValueError(f"{name}.hidden has shape {tuple(hidden.shape)}, expected [{num_tokens}, H]")
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
    """Logits of one head chunk by chunk, in the dtype of the loss.

    On CUDA bfloat16 inputs stay as they are: the products read them, and accumulate and write float32. Elsewhere, and
    for float16 (whose range the scaled derivatives exceed), inputs are converted once.

    Args:
        head: The head.
        positions: Token positions that count; None: all.
        dtype: That of the loss.
        bias_shift: Subtracted from every bias: no loss depends on it, and large logits are imprecise. None where the
            logits are capped.
        scale: Factors [T] of the tokens' logits; None: 1.

    Attributes:
        is_plain: Logits are products.
        keeps_slope: ``slope`` is wanted.
        slope: The derivative [C, Vs] of the last chunk's logits, without ``scale``, by the products; a tile may take
            its own derivative in place.
    """

    def __init__(
        self,
        head: Head,
        positions: Tensor | None,
        dtype: torch.dtype,
        bias_shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self._scale, self._map = scale, head.logit_map
        self.is_plain = head.logit_map.is_identity
        self.keeps_slope, self.slope = False, torch.as_tensor(1.0)
        hidden, weight = head.hidden.detach(), head.weight.detach()
        self.dtype = dtype
        self.is_mixed = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32
        kept = torch.bfloat16 if self.is_mixed else dtype
        self.hidden_TH = (hidden if positions is None else hidden[positions]).to(kept)
        self.weight_VsH = weight.to(kept)
        self.bias_Vs = None if head.bias is None else head.bias.detach().to(dtype)
        if self.bias_Vs is not None and bias_shift is not None:
            self.bias_Vs = self.bias_Vs - bias_shift.to(dtype)

    def new_buffer(self, num_tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialized memory for the logits of ``num_tokens`` tokens, or for their derivatives in another dtype."""
        return self.hidden_TH.new_empty((num_tokens, self.weight_VsH.shape[0]), dtype=dtype or self.dtype)

    def logits(self, chunk: slice, out: Tensor) -> Tensor:
        """Logits [C, Vs] of the tokens in ``chunk``, written to the start of ``out``."""
        logits_CVs = self._map.apply_(self._products(chunk, out))
        if self.keeps_slope:
            self.slope = self._map.slope(logits_CVs)
        return logits_CVs if self._scale is None else logits_CVs.mul_(self._scale[chunk].unsqueeze(-1))

    def _products(self, chunk: slice, out: Tensor) -> Tensor:
        hidden_CH = self.hidden_TH[chunk]
        logits_CVs = out[: hidden_CH.shape[0]]
        if self.is_mixed:
            torch.ops.aten.mm.dtype_out(hidden_CH, self.weight_VsH.T, self.dtype, out=logits_CVs)
        elif self.bias_Vs is not None:
            return torch.addmm(self.bias_Vs, hidden_CH, self.weight_VsH.T, out=logits_CVs)
        else:
            torch.mm(hidden_CH, self.weight_VsH.T, out=logits_CVs)
        return logits_CVs if self.bias_Vs is None else logits_CVs.add_(self.bias_Vs)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds left @ right to ``total``, accumulated in the dtype of the loss."""
        if self.is_mixed:
            torch.ops.aten.addmm.dtype_out(total, left, right, self.dtype, out=total)
        else:
            total.addmm_(left, right)
