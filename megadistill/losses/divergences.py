"""Token-level divergences beside DAC-KL (``loss.divergence``): one entry each, with all of its formulas.

To add one: an entry in ``DIVERGENCES``, and its name in ``megadistill.config.loss.TokenLoss``. No other code depends on
which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill.config.loss import LossConfig

Share = float | Tensor  # one number, or one for each token [T, 1]
Exponents = tuple[float, float]
Setting = float | Exponents  # what a configuration sets in a formula
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
Reference = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Divergence:
    """A divergence sum_c phi(p_c, q_c) of teacher p and student q, in nats.

    Attributes:
        reference: The definition, dense and differentiable: (log p [T, V], log q [T, V], share) -> [T]. Tests compare
            the formula with it in float64.
        formula: (log p, log q, p, q, share) -> (value, slope), elementwise: the terms phi, and q dphi/dq up to a
            multiple of q (which normalization removes), so that the derivative by a logit is slope - q * sum(slope).
            It runs in eager torch, in torch.compile and, from the same source, as a Triton function: write it as a
            ``def`` with arithmetic and the functions ``exp``, ``absolute``, ``sign`` and ``log_mixture`` of this module
            only (another function needs its Triton twin in ``triton_kernels.py``). None for the forward KL, whose sums
            the kernels compute in any case.
        share: The share of the mixture that the formulas get, for divergences that have one: a number, or one for each
            token [T, 1]; or two exponents.
        needs_support: Whether it is infinite where the teacher excludes a class, under a configuration.
    """

    reference: Reference
    formula: Formula | None
    share: Callable[[LossConfig], Setting] = lambda config: 0.0
    needs_support: Callable[[LossConfig], bool] = lambda config: False


# What a formula may call.
exp, absolute, sign = torch.exp, torch.abs, torch.sign


def log_mixture(gap: Tensor, share: Share) -> Tensor:
    """Computes log((1 - share) + share exp(gap)); where the gap is too large for exp, the other side's term is 0.

    With gap = log p - log q this is the log of a mixture over q: near p = q a quotient would lose all digits.
    """
    return (share * gap.clamp(max=saturation(gap)).expm1()).log1p()


def saturation(values: Tensor) -> float:
    """The number of nats beyond which exp is 0 or too large to be used, in the dtype of ``values``."""
    return 640.0 if values.dtype == torch.float64 else 80.0


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) along the last dimension."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: Tensor, log_b: Tensor, share: Share) -> Tensor:
    """Computes log(share a + (1 - share) b)."""
    return (share * log_a.exp() + (1 - share) * log_b.exp()).log()


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    value = q * (log_q - log_p)
    return value, value


def _skewed_forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    mixture = log_mixture(-(log_p - log_q), 1.0 - share)
    return -p * mixture, (share - 1.0) * q * exp(-mixture)


def _skewed_reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    mixture = log_mixture(log_p - log_q, 1.0 - share)
    return -q * mixture, -q * (mixture + share * exp(-mixture))


def _jensen_shannon(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    gap = log_p - log_q
    slope = (share - 1.0) * q * log_mixture(gap, share)
    return slope - share * p * log_mixture(-gap, 1.0 - share), slope


def _jensen_shannon_reference(log_p: Tensor, log_q: Tensor, share: Share) -> Tensor:
    mixture = _mix(log_p, log_q, share)
    return share * kl(log_p, mixture) + (1 - share) * kl(log_q, mixture)


def _total_variation(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    difference = q - p
    return 0.5 * absolute(difference), 0.5 * q * sign(difference)


def _alpha_beta(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: Exponents) -> tuple[Tensor, Tensor]:
    # With A = (p^b - q^b) / b and B = (q^a - p^a) / a, whose limits for 0 are logs, phi = (p^a A + q^b B) / (a + b):
    # differences of like powers are exactly 0 between equal models.
    alpha, beta = share[0], share[1]
    of_teacher, of_student = log_p - log_q, log_q - log_p
    if beta > 0:
        of_teacher = (exp(beta * log_p) - exp(beta * log_q)) / beta
    if alpha > 0:
        of_student = (exp(alpha * log_q) - exp(alpha * log_p)) / alpha
    slope = exp(beta * log_q) * of_student
    return (exp(alpha * log_p) * of_teacher + slope) / (alpha + beta), slope


def _alpha_beta_reference(log_p: Tensor, log_q: Tensor, share: Exponents) -> Tensor:
    alpha, beta = share
    p_a, q_a, p_b, q_b = (alpha * log_p).exp(), (alpha * log_q).exp(), (beta * log_p).exp(), (beta * log_q).exp()
    if beta == 0:
        return ((p_a * alpha * (log_p - log_q)) - p_a + q_a).sum(-1) / alpha**2
    if alpha == 0:
        return ((q_b * beta * (log_q - log_p)) - q_b + p_b).sum(-1) / beta**2
    total = alpha + beta
    terms = p_a * q_b - alpha / total * (total * log_p).exp() - beta / total * (total * log_q).exp()
    return -terms.sum(-1) / (alpha * beta)


def divergence_of(config: LossConfig) -> Divergence:
    """The divergence of a configuration; without one, the forward KL, which is always reported."""
    is_asked = config.dac_kl > 0 and config.divergence != "dac_kl"
    return DIVERGENCES[config.divergence if is_asked else "forward_kl"]


DIVERGENCES: dict[str, Divergence] = {
    # Hinton et al., 2015
    "forward_kl": Divergence(lambda log_p, log_q, share: kl(log_p, log_q), None),
    # MiniLLM
    "reverse_kl": Divergence(
        lambda log_p, log_q, share: kl(log_q, log_p), _reverse_kl, needs_support=lambda config: True
    ),
    # DistiLLM
    "skewed_forward_kl": Divergence(
        lambda log_p, log_q, share: kl(log_p, _mix(log_p, log_q, share)), _skewed_forward_kl, lambda config: config.skew
    ),
    "skewed_reverse_kl": Divergence(
        lambda log_p, log_q, share: kl(log_q, _mix(log_q, log_p, share)), _skewed_reverse_kl, lambda config: config.skew
    ),
    # GKD
    "jensen_shannon": Divergence(_jensen_shannon_reference, _jensen_shannon, lambda config: config.jensen_shannon_beta),
    # f-distill
    "total_variation": Divergence(
        lambda log_p, log_q, share: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), _total_variation
    ),
    # ABKD; with alpha 0 the logs of both models are compared where the student is
    "alpha_beta": Divergence(
        _alpha_beta_reference,
        _alpha_beta,
        lambda config: (config.ab_alpha, config.ab_beta),
        needs_support=lambda config: config.ab_alpha == 0,
    ),
}
