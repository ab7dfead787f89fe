"""From quantiles of the teacher's mass to the mask's thresholds (docs/method.md, "Token level", "Quantile").

A lower edge at theta cuts the mass F(theta) = sum over c != c* of p_c sigmoid((theta - log p_c)/s), and its threshold
is where F is l; where less lies beside the top class c*, all of it is cut. The upper threshold lies ``UPPER_EDGE``
softnesses above the place where an edge would cut 1 - u, c* included. Both are found between exact masses, which all
shards add up: a few rounds, each of which asks for the masses at some places between the two that hold the threshold.
Nothing depends on how the vocabulary is sharded, permuted, or padded.

Suffixes: E edges (lower, or lower and upper), C tokens, D nodes of a round. Values in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.tiles import UPPER_EDGE

NUM_NODES = 7  # of a round
_FARTHEST = 1e4  # a threshold at infinity is one that every class is on the right side of
_SMALLEST = math.log(1e-6)  # log of the mass below which an edge cuts nothing
_LOWEST = -200.0  # log of a mass that is nothing
_NEARLY_ALL = 0.99
_MARGIN = 0.5  # by which the first interval is wider than it must be: more than a last one
_BEYOND = 8.0  # softnesses above the top class at which a lower edge leaves 3e-4 of what lies beside it
_WIDEST = 30.0  # width of the first interval for 1e6 classes and the smallest mass, rounded up
_FITTING = 120.0  # softnesses between the first and the last node that one exponential can span in float32

MassesAt = Callable[[Tensor, Tensor | None, bool], Tensor]
"""(lower nodes [C, D], upper nodes [C, D] or None, whether they are far apart) -> masses [C, D] or [C, 2 D] of all
shards, the top class left out."""


class Thresholds(NamedTuple):
    """Where the mask's edges are, per token [C], and what of them depends on the quantiles.

    Attributes:
        theta_l: Lower threshold of log p.
        theta_u: Upper threshold; infinitely far without an upper edge.
        moves_l: Whether l moves it: not where l is 0, nor where all that lies beside the top class is cut already.
        moves_u: Whether u moves the upper one.
        is_all_cut: Whether l is no less than what lies beside the top class.
        cut_share: What that is of l where it is all cut; 1 elsewhere.
    """

    theta_l: Tensor
    theta_u: Tensor
    moves_l: Tensor
    moves_u: Tensor
    is_all_cut: Tensor
    cut_share: Tensor


def num_rounds(softness: float) -> int:
    """Rounds of a search: the last intervals are about as long as the softness."""
    return max(1, math.ceil(math.log((16.0 / softness + 8.0) / 1.125) / math.log(NUM_NODES + 1) - 1e-9))


def find_thresholds(
    masses_at: MassesAt,
    lambda_l: Tensor,
    lambda_u: Tensor | None,
    *,
    log_top: Tensor,
    log_beside: Tensor,
    softness: float,
    num_classes: int,
) -> Thresholds:
    """Thresholds of each token, without a graph.

    Args:
        masses_at: The teacher's masses beyond some places; called ``num_rounds`` times.
        lambda_l: [C] logits of the lower quantiles; -inf cuts nothing.
        lambda_u: The same of the upper ones, inf for none; None: there is no upper edge.
        log_top: [C] log-probability of the top class.
        log_beside: [C] log of the probability of all others.
        softness: s.
        num_classes: V.
    """
    log_top, log_beside = log_top.detach().double(), log_beside.detach().double()
    lambda_l = lambda_l.detach().double()
    lambda_u = None if lambda_u is None else lambda_u.detach().double()
    # Upper places are negated, so that mass rises along both.
    targets, lows, highs, log_alls = [F.logsigmoid(lambda_l)], [], [], [log_beside]
    target = targets[0].clamp_min(_SMALLEST)
    # At theta a class has at most exp(theta) of its mass cut away, or its s-th root where s is more than 1.
    lows.append(max(1.0, softness) * (target - math.log(num_classes)) - _MARGIN)
    highs.append(log_top + _BEYOND * softness)
    if lambda_u is not None:
        targets.append(F.logsigmoid(-lambda_u))
        lows.append(-(log_top + softness * lambda_u.clamp(max=-_SMALLEST)) - _MARGIN)
        lowest = F.logsigmoid(lambda_u).clamp_min(_SMALLEST) - math.log(num_classes)
        highs.append(_MARGIN - max(1.0, softness) * lowest)
        log_alls.append(torch.zeros_like(log_beside))
    target_EC = torch.stack(targets)
    place_EC = _search(
        masses_at,
        target_EC,
        torch.stack(lows),
        torch.stack(highs),
        torch.stack(log_alls),
        softness,
        None if lambda_u is None else log_top,
    )
    is_on_EC = target_EC > _SMALLEST
    is_all_cut = is_on_EC[0] & (target_EC[0] >= log_beside)
    theta_l = torch.where(is_all_cut, highs[0], torch.where(is_on_EC[0], place_EC[0], -_FARTHEST))
    cut_share = torch.where(is_all_cut, (log_beside - target_EC[0]).exp(), 1.0)
    # At the lowest place is a threshold where what is not listed (TeacherTopK) is more than l.
    moves_l = is_on_EC[0] & ~is_all_cut & (place_EC[0] > lows[0])
    if lambda_u is None:
        theta_u, moves_u = torch.full_like(theta_l, _FARTHEST), torch.zeros_like(moves_l)
        return Thresholds(theta_l, theta_u, moves_l, moves_u, is_all_cut, cut_share)
    theta_u = torch.where(is_on_EC[1], -place_EC[1] + UPPER_EDGE * softness, _FARTHEST)
    # Where everything is cut below, nothing is left to cut above.
    moves_u = is_on_EC[1] & (theta_u > theta_l)
    return Thresholds(theta_l, torch.maximum(theta_l, theta_u), moves_l, moves_u, is_all_cut, cut_share)


def _search(
    masses_at: MassesAt,
    target_EC: Tensor,
    low_EC: Tensor,
    high_EC: Tensor,
    log_all_EC: Tensor,
    softness: float,
    log_top: Tensor | None,
) -> Tensor:
    """Places [E, C] with the masses exp(target): linear on ``_mass_scale`` between the two nearest known masses."""
    target_EC1, log_all_EC1 = _mass_scale(target_EC, log_all_EC).unsqueeze(-1), log_all_EC.unsqueeze(-1)
    known_low_EC1, known_high_EC1 = target_EC1, _mass_scale(log_all_EC1, log_all_EC1)
    low_EC1, high_EC1 = low_EC.unsqueeze(-1), high_EC.unsqueeze(-1)
    step_D = torch.arange(1, NUM_NODES + 1, dtype=torch.float64, device=target_EC.device) / (NUM_NODES + 1)
    for number in range(num_rounds(softness)):
        inner_ECD = low_EC1 + (high_EC1 - low_EC1) * step_D
        is_wide = _WIDEST / softness / (NUM_NODES + 1) ** number > _FITTING
        masses = masses_at(inner_ECD[0], -inner_ECD[1] if len(inner_ECD) > 1 else None, is_wide).double()
        mass_ECD = torch.stack(masses.split(NUM_NODES, -1))
        if log_top is not None:  # an upper edge cuts from the top of the whole distribution
            of_top = log_top.unsqueeze(-1) + F.logsigmoid((log_top.unsqueeze(-1) + inner_ECD[1]) / softness)
            mass_ECD = torch.stack([mass_ECD[0], mass_ECD[1] + of_top.exp()])
        known_ECD = _mass_scale(mass_ECD.log(), log_all_EC1)
        # Masses rise with their places; the highest one below the target starts the next interval.
        left = (known_ECD < target_EC1).sum(-1, keepdim=True).clamp_(0, NUM_NODES)
        places = torch.cat([low_EC1, inner_ECD, high_EC1], -1)
        known = torch.cat([known_low_EC1, known_ECD, known_high_EC1], -1)
        low_EC1, high_EC1 = places.gather(-1, left), places.gather(-1, left + 1)
        known_low_EC1, known_high_EC1 = known.gather(-1, left), known.gather(-1, left + 1)
    rise_EC1 = known_high_EC1 - known_low_EC1
    share_EC1 = (target_EC1 - known_low_EC1) / torch.where(rise_EC1 > 0, rise_EC1, 1.0)
    inside_EC1 = torch.where(rise_EC1 > 0, share_EC1, 0.0).clamp(0.0, 1.0)
    return (low_EC1 + (high_EC1 - low_EC1) * inside_EC1).squeeze(-1)


def _mass_scale(log_mass: Tensor, log_all: Tensor) -> Tensor:
    """The mass as a logit of its share of all there is; from 99 % on nothing but its log.

    An edge that moves through one class, or through equal ones, is a straight line on this scale.
    """
    log_mass = log_mass.clamp_min(_LOWEST)
    return log_mass - torch.log1p(-(log_mass - log_all).exp().clamp(max=_NEARLY_ALL))
