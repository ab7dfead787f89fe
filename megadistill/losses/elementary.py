"""Exponentials and sums over classes, in the form that compiled code computes fastest on a CPU.

Inductor calls a library for ``exp``, outside of the loop's registers, and keeps long sums in memory (its cascade):
together they took more than half of a pass. Elsewhere these are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG2_E = 1.4426950408889634
# (2^f - 1) / f on |f| <= 1/2 as a product: its leading coefficient, and a and b of each factor (f + a)^2 + b (a
# weighted minimax fit, to 9e-8 of 2^f). As a sum of powers it would take longer to compile, see ``bounded_exp``.
_LEADING = 0.001326472718431712
_FACTORS = ((-0.25606435275683714, 24.53643528155371), (3.9016397597000902, 6.017305502593656))
_EXPONENT_BIAS, _EXPONENT_SHIFT = 127, 23  # of float32
_ARTANH_TERMS = 7  # of its series; the next is 1e-8 of 1/3
_PART = 512  # classes that are added up at a time
_SHORT = 4096  # classes of a sum that Inductor keeps in registers


def floored_exp(values: Tensor, floor: float = 41.0) -> Tensor:
    """Computes exp, not below exp(-floor), of values up to 88; in float64 not below its eighth power.

    The floors are such that what they add is far below round-off, and that no product here is a denormal number, with
    which computing is many times slower.
    """
    return bounded_exp(values.clamp(min=exp_floor(values, floor)))


def exp_floor(values: Tensor, floor: float) -> float:
    """The least exponent, in the dtype of ``values``."""
    return -floor * (8.0 if values.dtype == torch.float64 else 1.0)


def bounded_exp(values: Tensor) -> Tensor:
    """Computes exp of values between -87 and 88; NaN for NaN.

    In compiled float32 to 3e-7 of it near 0, and to 2e-6 at -41: like those of logits of that size, the error is that
    of one rounding of the exponent. Inductor computes the argument again wherever it is used, so it is used seldom.
    """
    if not _is_compiled_for_cpu(values):
        return values.exp()
    exponent = values * _LOG2_E
    whole = torch.round(exponent)
    fraction = exponent - whole
    (first, first_rest), (second, second_rest) = _FACTORS
    rise = fraction * (((fraction + first).square() + first_rest) * _LEADING)
    power = ((whole.to(torch.int32) + _EXPONENT_BIAS) << _EXPONENT_SHIFT).view(torch.float32)
    return (rise * ((fraction + second).square() + second_rest) + 1.0) * power


def log1p_of_share(values: Tensor) -> Tensor:
    """Computes log(1 + x) for x from 0 to 1."""
    if not _is_compiled_for_cpu(values):
        return values.log1p()
    # 2 artanh(x / (2 + x)), whose argument is no more than 1/3.
    root = values / (values + 2.0)
    square = root * root
    series: Tensor | float = 1.0 / (2 * _ARTANH_TERMS - 1)
    for term in range(_ARTANH_TERMS - 2, -1, -1):
        series = series * square + 1.0 / (2 * term + 1)
    return 2.0 * root * series


def sum_classes(values: Tensor) -> Tensor:
    """Sum over the last dimension: in compiled code of ``_PART`` classes at a time, which also rounds less."""
    num_classes = values.shape[-1]
    if not _is_compiled_for_cpu(values) or num_classes <= _SHORT:
        return values.sum(-1)
    whole = num_classes // _PART * _PART
    total = values[..., :whole].unflatten(-1, (whole // _PART, _PART)).sum(-1).sum(-1)
    return total if whole == num_classes else total + values[..., whole:].sum(-1)


def _is_compiled_for_cpu(values: Tensor) -> bool:
    return torch.compiler.is_compiling() and values.device.type == "cpu" and values.dtype == torch.float32
