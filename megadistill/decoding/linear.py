"""Output heads, norms and rotary positions of a decoder that is never trained.

Shapes: T tokens, H hidden size, D head size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.decoding.plan import NormPlan, bias_of, weight_of
from megadistill.decoding.products import Layout, Product
from megadistill.parallel.output_head import IDENTITY, LogitMap


class Logits:
    """An output head that gives float32 logits (float64 for a float64 head): bf16 ones would bias what is sampled.

    Args:
        weight: [Vs, H].
        bias: [Vs], or None.
        layout: Of the weight.
        logit_map: What becomes of the products.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layout: Layout = "packed", logit_map: LogitMap = IDENTITY
    ) -> None:
        weight, self._map = weight.detach(), logit_map
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._bias = None if bias is None else bias.detach().to(self._dtype)
        self._mixed = weight.T if weight.is_cuda and weight.dtype == torch.bfloat16 else None
        self._product = None if self._mixed is not None else Product(weight.to(self._dtype), self._bias, layout)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [T, H] to logits [T, Vs]."""
        if self._product is not None:
            return self._map.apply_(self._product(hidden.to(self._dtype)))
        assert self._mixed is not None
        logits = torch.mm(hidden, self._mixed, out_dtype=torch.float32)
        return self._map.apply_(logits if self._bias is None else logits.add_(self._bias))


class Norm:
    """A norm over the last dimension, with the weights of a plan.

    Args:
        plan: Names the weights.
        is_paired: What it normalizes is in the order of ``paired``.

    Attributes:
        fold: [size] what ``without_weight`` leaves to the next product; None for norms that have a bias and in half
            precision, where the order of the two products would matter.
    """

    def __init__(self, plan: NormPlan, *, is_paired: bool = False) -> None:
        bias = bias_of(plan.module)
        self._weight, self._bias = weight_of(plan.module).detach(), None if bias is None else bias.detach()
        self._is_rms, self._eps = plan.is_rms, plan.eps
        if is_paired:
            self._weight = paired(self._weight[None])[0]
        is_wide, size = self._weight.dtype in (torch.float32, torch.float64), self._weight.shape[-1]
        self._least: Tensor | None = None
        if plan.is_rms and is_wide and not self._weight.is_cuda:
            # x / sqrt(mean(x^2) + eps) is x sqrt(size) / hypot(|x|, sqrt(size eps)): three operations.
            self._least = self._weight.new_tensor((size * plan.eps) ** 0.5)
            self._weight = self._weight * size**0.5
        self.fold = self._weight if plan.is_rms and is_wide else None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalizes x [..., size]."""
        if not self._is_rms:
            return F.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)
        if x.is_cuda:  # one kernel
            return F.rms_norm(x, x.shape[-1:], self._weight, self._eps)
        if self.fold is not None:
            return self.without_weight(x).mul_(self.fold)
        # As the families do it: statistics in float32, the weight in the model's type.
        wide = x.float()
        inverse_root = torch.linalg.vecdot(wide, wide).unsqueeze(-1).mul_(1 / x.shape[-1]).add_(self._eps).rsqrt_()
        return self._weight * (wide * inverse_root).to(x.dtype)

    def without_weight(self, x: Tensor) -> Tensor:
        """Normalizes x [..., size]; its product with ``fold`` is missing."""
        if self._least is None:
            return F.rms_norm(x, x.shape[-1:], None, self._eps)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._least)


class HeadNorms:
    """The norms of queries and keys, each over the D values of a head.

    Args:
        q_norm: That of the queries.
        k_norm: That of the keys; of the same epsilon.
        num_heads: Queries of a token.
        num_kv_heads: Keys of a token.
        is_paired: The D values are in the order of ``paired``.
    """

    def __init__(
        self, q_norm: NormPlan, k_norm: NormPlan, num_heads: int, num_kv_heads: int, *, is_paired: bool
    ) -> None:
        assert q_norm.eps == k_norm.eps
        self._q, self._k = Norm(q_norm, is_paired=is_paired), Norm(k_norm, is_paired=is_paired)
        self._num_heads, self._weights = num_heads, None
        if self._q.fold is not None and self._k.fold is not None:
            self._weights = torch.cat([self._q.fold.expand(num_heads, -1), self._k.fold.expand(num_kv_heads, -1)])

    def scale(self, num_heads: int, factor: float) -> None:
        """Multiplies the first heads; in float32 and float64."""
        assert self._weights is not None
        self._weights[:num_heads] *= factor

    def normalize_(self, qk: Tensor) -> None:
        """Normalizes queries and keys [T, heads + key-value heads, D] in place."""
        if self._weights is not None:
            torch.mul(self._q.without_weight(qk), self._weights, out=qk)
            return
        for norm, part in ((self._q, qk[:, : self._num_heads]), (self._k, qk[:, self._num_heads :])):
            part.copy_(norm(part))


def paired(halves: Tensor) -> Tensor:
    """[n, D, ...] whose second dimension, first all real and then all imaginary parts, becomes (r0, i0, r1, ...)."""
    return halves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def rotate_(x: Tensor, rope: Tensor, *, is_paired: bool) -> None:
    """Rotates queries or keys by their positions, in place.

    Queries and keys are ordered alike, so their order moves no attention score; in pairs this is one operation.

    Args:
        x: [T, n, D]; becomes pairs of real and imaginary parts, in the order of ``paired``.
        rope: [T or 1, 1, D / 2] complex rotations.
        is_paired: Whether x has that order already; otherwise its halves are real and imaginary parts.
    """
    is_wide = x.dtype in (torch.float32, torch.float64)
    wide = x if is_wide else x.float()
    pairs = wide.unflatten(-1, (-1, 2)) if is_paired else wide.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()
    torch.view_as_complex(pairs).mul_(rope)
    if not (is_wide and is_paired):
        x.copy_(pairs.flatten(-2))
