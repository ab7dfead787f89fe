"""Products with the weights of a model that is never trained, and which library and layout each of them uses.

Few tokens make narrow products, whose time depends on the library, the layout of the weight and the maker of the CPU.
All of this is float32 on CPUs; elsewhere products are torch's, with weights as they are.

    packed      oneDNN, with a copy of the weight in its own layout
    transposed  torch's, with a copy of the weight as [inputs, outputs]
    plain       torch's, with the weight as it is

The result of a token must not depend on how many others there are, or texts would depend on the layout of a run. That
holds for ``packed``, for ``transposed`` on some machines (it is looked at before it is chosen; a single token is
computed as two) and for ``plain`` with some sixteen tokens or more. So decoding is packed or transposed.

None of them is ``F.linear``, which DeepSpeed replaces by a Python function once an engine of ZeRO-3 exists.

Shapes: T tokens; a weight is [outputs, inputs].
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["packed", "transposed", "plain"]


class ProductLayouts(NamedTuple):
    """The layout of each weight where few tokens are decoded, and that of all weights where text is read."""

    qkv: Layout = "packed"
    out: Layout = "packed"
    up: Layout = "packed"
    down: Layout = "packed"
    head: Layout = "packed"
    read: Layout = "packed"

    @classmethod
    def reading(cls, layout: Layout) -> ProductLayouts:
        """One layout for everything."""
        return cls(layout, layout, layout, layout, layout, layout)


PACKED = ProductLayouts()


class Product:
    """A linear layer: x [T, inputs] -> x W^T + b [T, outputs].

    Args:
        weight: W.
        bias: b, or None.
        layout: How W is kept; where oneDNN cannot take W, as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
        weight = weight.detach()
        self.outputs, self.bias = weight.shape[0], None if bias is None else bias.detach()
        layout = layout if is_packable(weight) and len(weight) else "plain"
        self._is_packed, self._is_transposed = layout == "packed", layout == "transposed"
        # [inputs, outputs], in whatever order it lies in memory.
        self._matrix = weight.T.contiguous() if self._is_transposed else weight.T
        if self._is_packed:
            self._matrix = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Maps x [T, inputs] to [T, outputs], into ``out`` where it is given."""
        if self._is_packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._matrix, self.bias, "none", [], "")
            return y if out is None else out.copy_(y)
        if self._is_transposed and len(x) == 1:
            y = self._product(torch.cat([x, x]), None)[:1]
            return y if out is None else out.copy_(y)
        return self._product(x, out)

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self._matrix, out=out)
        return torch.addmm(self.bias, x, self._matrix, out=out)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total`` [T, outputs] plus the product; the storage of ``total`` may be reused."""
        if self._is_packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, self._matrix, self.bias, "add")
            return y
        if self._is_transposed and len(x) == 1:
            return total.add_(self(x))
        total = total.addmm_(x, self._matrix)
        return total if self.bias is None else total.add_(self.bias)


def is_packable(weight: Tensor) -> bool:
    """Whether oneDNN can take the weight in its own layout."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
