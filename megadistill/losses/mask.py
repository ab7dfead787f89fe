"""Where the mask of DAC-KL ends: quantiles from the gate or from what takes its place, and their thresholds.

Paper: Eq. 6-7; docs/method.md, "Token level". Suffixes: C tokens, K merged top classes. Values in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadistill.config.loss import LossConfig
from megadistill.errors import ConfigError
from megadistill.losses.quantile import MassesAt, Thresholds, find_thresholds
from megadistill.losses.quantile_gate import logit
from megadistill.losses.statistics import TokenStatistics


@dataclass(frozen=True)
class Mask:
    """Per token [C].

    Attributes:
        lambda_l: Logit of the lower quantile, with its graph.
        lambda_u: The same of the upper one; None without an upper edge.
        place: The thresholds.
        log_top: Log-probability of the teacher's top class.
        log_beside: Log of the probability of all others.
    """

    lambda_l: Tensor
    lambda_u: Tensor | None
    place: Thresholds
    log_top: Tensor
    log_beside: Tensor


def find_mask(
    config: LossConfig, gate: nn.Module | None, stats: TokenStatistics, masses_at: MassesAt, num_classes: int
) -> Mask:
    """The quantiles of each token and their thresholds.

    Raises:
        ConfigError: The gate gives an upper quantile and the configuration asks for none, or the other way round.
    """
    lambda_l, lambda_u = _quantiles(config, gate, stats.top_log_probs, stats.log_tail, num_classes)
    others = torch.cat([stats.top_log_probs[:, 1:], stats.log_tail.unsqueeze(-1)], -1)
    log_top, log_beside = stats.top_log_probs[:, 0], others.logsumexp(-1)
    place = find_thresholds(
        masses_at,
        lambda_l,
        lambda_u,
        log_top=log_top,
        log_beside=log_beside,
        softness=config.softness,
        num_classes=num_classes,
    )
    return Mask(lambda_l, lambda_u, place, log_top, log_beside)


def _quantiles(
    config: LossConfig, gate: nn.Module | None, top_log_probs: Tensor, log_tail: Tensor, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of the lower and the upper quantiles [C]."""
    if config.clip == "entropy":
        return entropy_quantiles(config, top_log_probs, log_tail, num_classes)
    if config.clip == "fixed":
        return constant_quantiles(config, log_tail)
    assert gate is not None
    lambda_l, lambda_u = gate(top_log_probs, log_tail)
    if (lambda_u is None) != (config.upper == 1):
        raise ConfigError(
            f"the gate gives {'no' if lambda_u is None else 'an'} upper quantile, and loss.upper={config.upper:g} asks "
            f"for {'none' if config.upper == 1 else 'one'}"
        )
    return lambda_l, lambda_u


def constant_quantiles(config: LossConfig, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Quantile logits of clip=fixed for tokens [C] like ``like``; 0 is -inf, and an upper quantile of 1 is None."""
    upper = None if config.upper == 1 else torch.full_like(like, logit(config.upper))
    return torch.full_like(like, logit(config.lower)), upper


def entropy_quantiles(
    config: LossConfig, sorted_log_probs: Tensor, log_tail: Tensor, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """Quantile logits of clip=entropy: l = lower H / log V, with the teacher's entropy H; the upper one is constant.

    H is that of the K largest probabilities, with what is left spread evenly over all other classes: known to every
    shard, and at most log V.

    Args:
        config: For lower and upper.
        sorted_log_probs: [C, K] the teacher's largest log-probabilities.
        log_tail: [C] log of the sum of all others, -inf for none.
        num_classes: V.
    """
    listed, tail = sorted_log_probs.double(), log_tail.double()
    num_others = max(1, num_classes - listed.shape[-1])
    spread = torch.where(torch.isneginf(tail), 0.0, tail) - math.log(num_others)
    entropy = -(listed.exp() * listed).sum(-1) - tail.exp() * spread
    share = (entropy / math.log(max(2, num_classes))).clamp(0.0, 1.0)
    return torch.logit(config.lower * share), constant_quantiles(config, log_tail)[1]


def coverage_slope(config: LossConfig, clipped_mass: Tensor, log_beside: Tensor) -> Tensor:
    """Derivative [C] of the coverage penalty by the clipped mass Rp.

    The penalty is coverage_weight relu(x - coverage_target)^2 with x = Rp, or with what Rp is of all that lies beside
    the top class (loss.coverage=relative).
    """
    unit = torch.ones_like(clipped_mass)
    if config.coverage == "relative":
        beside = log_beside.exp().to(clipped_mass.dtype)
        unit = torch.where(beside > 0, 1 / beside, 0.0)
    return 2 * config.coverage_weight * torch.relu(clipped_mass * unit - config.coverage_target) * unit
