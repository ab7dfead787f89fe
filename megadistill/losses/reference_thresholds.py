"""The mask's thresholds of the dense reference: where a soft edge has a mass below itself, found as kernels find it.

Suffixes: T tokens, V classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.quantile import NUM_NODES, num_rounds

_LOG_SMALLEST = math.log(1e-6)  # log of the mass below which an edge cuts nothing


def find_places(
    places: Tensor, p: Tensor, target: Tensor, low: Tensor, high: Tensor, log_all: Tensor, softness: float
) -> Tensor:
    """Where a soft edge has a mass below itself [T]: linear on ``_mass_scale`` in the last interval.

    Args:
        places: [T, V] where the classes are.
        p: [T, V] their probabilities.
        target: [T] log of the mass.
        low: [T] a place below which there is less.
        high: [T] where the search ends; all mass counts as being below.
        log_all: [T] log of all mass.
        softness: s.
    """
    scale_target = scale_low = _mass_scale(target, log_all)
    scale_high = _mass_scale(log_all, log_all)
    steps = torch.arange(1, NUM_NODES + 1, dtype=p.dtype) / (NUM_NODES + 1)
    for _ in range(num_rounds(softness)):
        knots, known = [low], [scale_low]
        for step in steps:
            knots.append(low + (high - low) * step)
            mass = (p * torch.sigmoid((knots[-1].unsqueeze(-1) - places) / softness)).sum(-1)
            known.append(_mass_scale(mass.log(), log_all))
        knots_TD, known_TD = torch.stack([*knots, high], -1), torch.stack([*known, scale_high], -1)
        left = (known_TD[:, 1:-1] < scale_target.unsqueeze(-1)).sum(-1, keepdim=True)
        low, high = (knots_TD.gather(-1, left + end).squeeze(-1) for end in (0, 1))
        scale_low, scale_high = (known_TD.gather(-1, left + end).squeeze(-1) for end in (0, 1))
    rise = scale_high - scale_low
    share = ((scale_target - scale_low) / torch.where(rise > 0, rise, 1.0)).clamp(0, 1)
    return torch.where(rise > 0, low + (high - low) * share, low)


def _mass_scale(log_mass: Tensor, log_all: Tensor) -> Tensor:
    """The mass as a logit of its share of all there is; from 99 % on nothing but its log."""
    log_mass = log_mass.clamp_min(-200)
    return log_mass - torch.log1p(-(log_mass - log_all).exp().clamp(max=0.99))


def lower_thresholds(
    log_p: Tensor, quantile_logit: Tensor, softness: float, has_rest: bool, num_classes: int
) -> tuple[Tensor, Tensor]:
    """theta_l [T], differentiable in the quantiles, and whether all that lies beside the top class is cut.

    The derivative is that of an inverse function: dtheta = dl / F'(theta). What is not listed is below everything.
    """
    listed = log_p[:, :-1] if has_rest else log_p
    top, index = listed.max(-1, keepdim=True)
    others = listed.scatter(-1, index, -math.inf)
    quantile = torch.sigmoid(quantile_logit.to(log_p.dtype))
    log_l = F.logsigmoid(quantile_logit.detach().to(log_p.dtype))
    places, masses = listed, others
    if has_rest:
        places = torch.cat([listed, torch.full_like(log_p[:, -1:], -1e6)], -1)
        masses = torch.cat([others, log_p[:, -1:]], -1)
    log_beside = masses.logsumexp(-1)
    low = max(1.0, softness) * (log_l.clamp_min(_LOG_SMALLEST) - math.log(num_classes)) - 0.5
    high = top.squeeze(-1) + 8 * softness
    is_on = log_l > _LOG_SMALLEST
    is_all_cut = is_on & (log_l >= log_beside)
    theta = find_places(places, masses.exp(), log_l, low, high, log_beside, softness)
    density = _density(listed, others.exp(), theta, softness)
    moves = (theta > low) & (density > 0)
    theta = theta + torch.where(moves, (quantile - quantile.detach()) / torch.where(moves, density, 1.0), 0.0)
    return torch.where(is_all_cut, high, torch.where(is_on, theta, -math.inf)), is_all_cut


def upper_thresholds(
    log_p: Tensor, quantile_logit: Tensor, softness: float, has_rest: bool, num_classes: int
) -> Tensor:
    """theta_u [T], differentiable in the quantiles: four softnesses above where an edge cuts 1 - u."""
    listed = log_p[:, :-1] if has_rest else log_p
    p = listed.exp()
    point = quantile_logit.detach().to(log_p.dtype)
    quantile, log_above, log_u = (
        torch.sigmoid(quantile_logit.to(log_p.dtype)),
        F.logsigmoid(-point),
        F.logsigmoid(point),
    )
    is_on = log_above > _LOG_SMALLEST
    low = -(listed.amax(-1) + softness * point.clamp(max=-_LOG_SMALLEST)) - 0.5
    high = 0.5 - max(1.0, softness) * (log_u.clamp_min(_LOG_SMALLEST) - math.log(num_classes))
    place = -find_places(-listed, p, log_above, low, high, torch.zeros_like(low), softness)
    density = torch.where(is_on, _density(listed, p, place, softness), 1.0)
    return torch.where(is_on, place + 4 * softness + (quantile - quantile.detach()) / density, math.inf)


def _density(places: Tensor, p: Tensor, edge: Tensor, softness: float) -> Tensor:
    """Derivative [T] of the mass below a soft edge by its place."""
    below = torch.sigmoid((edge.unsqueeze(-1) - places) / softness)
    return (p * below * (1 - below)).sum(-1) / softness
