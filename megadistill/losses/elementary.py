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
# log(1 + x) / x on [0, 1] in the same form, to 3e-8 of it.
_LOG1P_LEADING = 0.005232694123847753
_LOG1P_FACTORS = (
    (-2.321686441580007, 0.4324068086912738),
    (-1.424735675416771, 2.702103294923106),
    (-0.0822517710093636, 3.2574683750212485),
    (1.009357727419447, 1.106062244985373),
)
_PARTS = (512, 256, 128, 64)  # classes that are added up at a time
_SHORT = 4096  # classes of a sum that Inductor keeps in registers


def floored_exp(values: Tensor, floor: float = 41.0, *, is_nested: bool = False) -> Tensor:
    """Computes exp, not below exp(-floor), of values up to 88; in float64 not below its eighth power.

    The floors are such that what they add is far below round-off, and that no product here is a denormal number, with
    which computing is many times slower. ``is_nested``: see ``bounded_exp``.
    """
    return bounded_exp(values.clamp(min=exp_floor(values, floor)), is_nested=is_nested)


def exp_floor(values: Tensor, floor: float) -> float:
    """The least exponent, in the dtype of ``values``."""
    return -floor * (8.0 if values.dtype == torch.float64 else 1.0)


def bounded_exp(values: Tensor, *, is_nested: bool = False) -> Tensor:
    """Computes exp of values between -87 and 88; NaN for NaN.

    In compiled float32 to 3e-7 of it near 0, and to 2e-6 at -41: like those of logits of that size, the error is that
    of one rounding of the exponent. Inductor computes the argument again wherever it is used, seven times here. Where
    that argument has other exponentials in it, compiling takes minutes: ``is_nested`` takes the library's exp2, which
    is slower and uses it once.
    """
    if not is_compiled_for_cpu(values):
        return values.exp()
    exponent = values * _LOG2_E
    if is_nested:
        return exponent.exp2()
    whole = torch.round(exponent)
    fraction = exponent - whole
    (first, first_rest), (second, second_rest) = _FACTORS
    rise = fraction * (((fraction + first).square() + first_rest) * _LEADING)
    power = ((whole.to(torch.int32) + _EXPONENT_BIAS) << _EXPONENT_SHIFT).view(torch.float32)
    return (rise * ((fraction + second).square() + second_rest) + 1.0) * power


def log1p_of_share(values: Tensor) -> Tensor:
    """Computes log(1 + x) for x from 0 to 1; to 6e-7 of it in compiled float32."""
    if not is_compiled_for_cpu(values):
        return values.log1p()
    result = values * _LOG1P_LEADING
    for shift, rest in _LOG1P_FACTORS:
        result = result * ((values + shift).square() + rest)
    return result


def sum_classes(values: Tensor) -> Tensor:
    """Sum over the last dimension.

    In compiled code of some classes at a time first, where their number is a multiple of 64: that also rounds less. A
    rest would be a loop of its own, which takes as long again to compile.
    """
    num_classes = values.shape[-1]
    if is_compiled_for_cpu(values) and num_classes > _SHORT:
        for part in _PARTS:
            if num_classes % part == 0:
                return values.unflatten(-1, (num_classes // part, part)).sum(-1).sum(-1)
    return values.sum(-1)


def exp_of_gap(values: Tensor) -> Tensor:
    """Computes exp of how far logits are below their largest; e^-41 is no less than nothing in a sum with a 1."""
    return floored_exp(values) if is_compiled_for_cpu(values) else values.exp()


def is_compiled_for_cpu(values: Tensor) -> bool:
    """Whether this is traced for compiled code of a CPU in float32."""
    return torch.compiler.is_compiling() and values.device.type == "cpu" and values.dtype == torch.float32
