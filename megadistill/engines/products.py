"""The products and norms of a decoder that only reads and writes.

On CPUs float32 products go through oneDNN with weights laid out for it: 2.3 times as fast as what torch's linear calls
on the AMD machine of docs/log.md, and a row's result does not depend on how many other rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadistill.models.decoder_plan import NormPlan

# Weights up to this size are joined on accelerators: one launch instead of two or three. Larger ones are not copied.
_MAX_JOINED_BYTES = 2**24


class Product:
    """x [n, K] -> x W^T + b [n, N], W and b those of several modules one under the other."""

    def __init__(self, modules: Sequence[nn.Module], *, has_bias: bool = True) -> None:
        weights = [module.weight.detach() for module in modules]
        biases = [module.bias for module in modules if getattr(module, "bias", None) is not None]
        assert not biases or len(biases) == len(modules)
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases and has_bias else None
        self._packed = None
        is_small = sum(weight.nbytes for weight in weights) <= _MAX_JOINED_BYTES
        if is_packable(weights[0]):
            self._packed = pack(torch.cat(weights) if len(weights) > 1 else weights[0])
        elif len(weights) > 1 and is_small:
            weights = [torch.cat(weights)]
        self._weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        if len(self._weights) == 1:
            return F.linear(x, self._weights[0], self.bias)
        joined = torch.cat([F.linear(x, weight) for weight in self._weights], -1)
        return joined if self.bias is None else joined.add_(self.bias)


class Logits:
    """hidden [n, H] -> logits [n, Vs] in float32 (float64 for a float64 head): bf16 logits would bias what is
    sampled."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        self._is_mixed = weight.is_cuda and weight.dtype == torch.bfloat16
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight = weight if self._is_mixed else weight.to(self._dtype)
        self._packed = pack(self._weight) if is_packable(self._weight) and len(weight) else None
        self._bias = None if bias is None else bias.detach().to(self._dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._is_mixed:
            logits = torch.mm(hidden, self._weight.T, out_dtype=torch.float32)
            return logits if self._bias is None else logits.add_(self._bias)
        hidden = hidden.to(self._dtype)
        if self._packed is not None:
            return packed_linear(hidden, self._packed, self._bias)
        return F.linear(hidden, self._weight, self._bias)


class Norm:
    """A norm over the last dimension."""

    def __init__(self, plan: NormPlan) -> None:
        self._weight, self._bias = plan.module.weight.detach(), getattr(plan.module, "bias", None)
        self._is_rms, self._eps = plan.is_rms, plan.eps

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_rms:
            return F.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)
        if x.is_cuda:  # one kernel instead of eight
            return F.rms_norm(x, x.shape[-1:], self._weight, self._eps)
        if x.dtype not in (torch.float32, torch.float64):
            # As the families do it: statistics in float32, the weight in the model's type.
            wide = x.float()
            return self._weight * (wide * _inverse_root(wide, self._eps)).to(x.dtype)
        return (x * _inverse_root(x, self._eps)).mul_(self._weight)


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x, x).unsqueeze(-1).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: x [..., d], its halves being real and imaginary parts, times ``turns`` [..., d / 2] complex.

    The result has the parts side by side (r0, i0, r1, ...). Queries and keys are permuted alike, so no score changes,
    and it is one product instead of five operations.
    """
    half = x.shape[-1] // 2
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    turned = torch.view_as_real(torch.complex(wide[..., :half], wide[..., half:]) * turns).flatten(-2)
    return turned.to(x.dtype)


def is_packable(weight: Tensor) -> bool:
    """Whether oneDNN can take the weight in a layout of its own."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """[N, K] in oneDNN's layout (a copy)."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
