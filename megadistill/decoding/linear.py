"""The linear layers and norms of a decoder that is never trained.

On CPUs float32 products go through oneDNN with weights laid out for it: 2.3 times as fast as what torch's linear calls
on the AMD machine of docs/log.md, and the result of a token does not depend on how many other tokens there are.

Shapes: T tokens, H hidden size, D head size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadistill.decoding.plan import NormPlan, bias_of, weight_of

# Weights up to this size are joined on accelerators: one launch instead of two or three. Larger ones are not copied.
_MAX_JOINED_BYTES = 2**24


class FusedLinear:
    """Several linear layers of one input as one: x [T, inputs] -> x W^T + b [T, outputs].

    Args:
        modules: The linear layers, whose weights and biases are stacked in W and b in this order.
        has_bias: Whether b is added.
    """

    def __init__(self, modules: Sequence[nn.Module], *, has_bias: bool = True) -> None:
        weights = [weight_of(module).detach() for module in modules]
        biases = [bias.detach() for bias in map(bias_of, modules) if bias is not None]
        assert not biases or len(biases) == len(modules)
        self.bias = torch.cat(biases) if biases and has_bias else None
        self._packed: Tensor | None = None
        is_small = sum(weight.nbytes for weight in weights) <= _MAX_JOINED_BYTES
        if is_packable(weights[0]):
            self._packed = pack(torch.cat(weights) if len(weights) > 1 else weights[0])
        elif len(weights) > 1 and is_small:
            weights = [torch.cat(weights)]
        self._weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        """Maps x [T, inputs] to [T, outputs]."""
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        if len(self._weights) == 1:
            return F.linear(x, self._weights[0], self.bias)
        joined = torch.cat([F.linear(x, weight) for weight in self._weights], -1)
        return joined if self.bias is None else joined.add_(self.bias)


class Logits:
    """An output head that gives float32 logits (float64 for a float64 head): bf16 ones would bias what is sampled.

    Args:
        weight: [Vs, H].
        bias: [Vs], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        self._is_mixed = weight.is_cuda and weight.dtype == torch.bfloat16
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight = weight if self._is_mixed else weight.to(self._dtype)
        self._packed = pack(self._weight) if is_packable(self._weight) and len(weight) else None
        self._bias = None if bias is None else bias.detach().to(self._dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [T, H] to logits [T, Vs]."""
        if self._is_mixed:
            logits = torch.mm(hidden, self._weight.T, out_dtype=torch.float32)
            return logits if self._bias is None else logits.add_(self._bias)
        hidden = hidden.to(self._dtype)
        if self._packed is not None:
            return packed_linear(hidden, self._packed, self._bias)
        return F.linear(hidden, self._weight, self._bias)


class Norm:
    """A norm over the last dimension, with the weights that ``plan`` names."""

    def __init__(self, plan: NormPlan) -> None:
        self._weight, self._bias = weight_of(plan.module).detach(), bias_of(plan.module)
        self._is_rms, self._eps = plan.is_rms, plan.eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalizes x [..., size]."""
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


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates queries or keys by their positions.

    Args:
        x: [..., D], whose halves are real and imaginary parts.
        rope: [..., D / 2] complex rotations.

    Returns:
        [..., D] with the parts side by side (r0, i0, r1, ...). Queries and keys are permuted in the same way, so no
        attention score changes, and this is one product instead of five operations.
    """
    half = x.shape[-1] // 2
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    rotated = torch.view_as_real(torch.complex(wide[..., :half], wide[..., half:]) * rope).flatten(-2)
    return rotated.to(x.dtype)


def is_packable(weight: Tensor) -> bool:
    """Whether oneDNN can take the weight in its own layout."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [outputs, inputs] in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a packed weight."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
