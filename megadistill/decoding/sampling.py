"""Sampling from logits that are split over the vocabulary (docs/method.md, "Sampling").

Inverse CDF in global class order with one counter-based uniform number a row: exact softmax sampling whose tokens do
not depend on the layout. Everything after the logits is float64, so that the arithmetic here cannot move a token from
one class to the next where the logits did not. Suffixes: B rows, V this rank's classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from megadistill.config.sampling import SamplingOptions
from megadistill.config.section import allowed
from megadistill.errors import ConfigError
from megadistill.parallel.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from megadistill.parallel.rng import uniform
from megadistill.parallel.vocab import VocabShard

# The top-p threshold is found digit by digit in the ordered bits of the logits.
_DIGIT_BITS = 4  # the highest digit of 64 wraps round, as two's complement should
# Slack against round-off when classes add up to top_p exactly (four equal ones and top_p=0.5).
_MASS_SLACK = 1e-12
# Classes whose masses are added up before the cumulative sum, which is slow: one of groups, then one within a group.
_GROUP = 128
# Elements of the float64 masses that exist at once.
_MAX_ELEMENTS_CPU = 2**18
_MAX_ELEMENTS_ACCELERATOR = 2**22


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy.

    Raises:
        ConfigError: The temperature is out of range.
    """

    seed: int = 0
    """Keys the random numbers."""
    temperature: float = 1.0
    options: SamplingOptions = SamplingOptions()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"sampling temperature {self.temperature} must be a finite number >= 0 (0 = greedy)")


_PLAIN = Sampling()


@torch.no_grad()
def sample_tokens(
    logits_shard: Tensor,
    shard: VocabShard,
    *,
    seed: int,
    sequence_ids: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stream: int = 0,
) -> Tensor:
    """[B] int64 classes drawn from softmax(logits / temperature), the same on every rank of `shard.group`.

    logits_shard: [B, stop-start], -inf excludes a class; sequence_ids, positions: [B] integers that key, with `seed`
    and `stream`, the row's random number. temperature 0 is greedy (the lowest class when tied). top_k keeps the k most
    likely classes (0: all), then top_p the smallest set of most likely ones whose mass reaches it (1: all); at a tied
    threshold the lowest classes are kept.
    Communicates over `shard.group`: 2 floats and 1 integer a row; top_k adds k floats, top_p 8 exchanges of 15 floats
    (16 for float64 logits). Logits are never gathered. Raises ConfigError for arguments out of range.
    """
    if sequence_ids.shape != logits_shard.shape[:1] or positions.shape != logits_shard.shape[:1]:
        raise ValueError(
            f"sequence_ids {tuple(sequence_ids.shape)} and positions {tuple(positions.shape)} must be "
            f"({len(logits_shard)},)"
        )
    numbers = None if temperature == 0 else uniform(seed, sequence_ids, positions, stream=stream)
    return draw_tokens(logits_shard, shard, numbers, Sampling(seed, temperature, _options(top_k=top_k, top_p=top_p)))


@torch.no_grad()
def draw_tokens(logits_shard: Tensor, shard: VocabShard, numbers: Tensor | None, sampling: Sampling = _PLAIN) -> Tensor:
    """`sample_tokens` with the examples' random numbers [B] in (0, 1) at hand; greedy needs none.

    Some examples at a time (the same on all ranks), because what is made of their logits is in float64.
    """
    _check_shapes(logits_shard, shard)
    if sampling.temperature == 0:
        return _greedy(logits_shard, shard)
    assert numbers is not None
    elements = _MAX_ELEMENTS_CPU if logits_shard.device.type == "cpu" else _MAX_ELEMENTS_ACCELERATOR
    size = min(max(1, elements // max(1, -(-shard.total // shard.tp_size))), max(1, len(logits_shard)))
    # One buffer for all parts: new memory of this size costs more than the exponentials on CPUs.
    buffer = torch.empty(size, _groups(shard.size) * _GROUP, dtype=torch.float64, device=logits_shard.device)
    parts = zip(logits_shard.split(size), numbers.split(size), strict=True)
    drawn = [_sample(part, shard, number, buffer, sampling) for part, number in parts]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def _sample(logits_shard: Tensor, shard: VocabShard, numbers: Tensor, buffer: Tensor, sampling: Sampling) -> Tensor:
    options, scaled_BV = sampling.options, logits_shard
    if sampling.temperature != 1:
        scaled_BV = scaled_BV.to(torch.float64) / sampling.temperature
    if 0 < options.top_k < shard.total:
        scaled_BV = _keep_top_k(scaled_BV, shard, options.top_k)
    if options.top_p < 1:
        scaled_BV = _keep_top_p(scaled_BV.to(torch.float64), _ordered_bits(logits_shard), shard, options.top_p)
    return _draw(scaled_BV, shard, numbers, buffer)


def _options(**values: Any) -> SamplingOptions:
    """Options given from Python; an error names the one that is out of range and what is allowed."""
    try:
        return SamplingOptions(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        expected = allowed(SamplingOptions.model_fields[name])
        raise ConfigError(f"{name}={values[name]!r}: must be {expected}") from None


def _check_shapes(logits: Tensor, shard: VocabShard) -> None:
    if shard.group is None and shard.size != shard.total:
        raise ConfigError(f"a shard of {shard.size} of {shard.total} classes needs its process group")
    if logits.dim() != 2 or logits.shape[1] != shard.size:
        raise ValueError(f"logits_shard has shape {tuple(logits.shape)}, expected [B, {shard.size}]")


def _greedy(logits_BV: Tensor, shard: VocabShard) -> Tensor:
    largest = _largest(logits_BV)
    best = all_gather_rows(largest, shard.group).amax(0)
    # The first local maximum, then the first rank that holds one: the lowest class in the vocabulary.
    index = logits_BV.argmax(-1) if shard.size else torch.zeros_like(largest, dtype=torch.int64)
    candidate = torch.where(largest == best, index + shard.start, shard.total)
    return all_gather_rows(candidate, shard.group).amin(0).clamp_max(shard.total - 1)


def _draw(scaled_BV: Tensor, shard: VocabShard, number: Tensor, buffer: Tensor) -> Tensor:
    """The class whose piece of the cumulative distribution holds number [B]."""
    largest = _largest(scaled_BV).to(torch.float64)
    mass_BGC, bounds_BG = _masses(scaled_BV, _finite(largest), buffer)
    local_mass = bounds_BG[:, -1]
    gathered = all_gather_rows(torch.stack([largest, local_mass], -1), shard.group)
    scales = torch.exp(gathered[..., 0] - _finite(gathered[..., 0].amax(0)))
    bounds = (gathered[..., 1] * scales).cumsum(0)
    zero = torch.zeros_like(number)
    target = torch.minimum(number * bounds[-1], torch.nextafter(bounds[-1], zero))
    owner = (bounds <= target).sum(0)
    if shard.size == 0:
        return all_reduce_sum(torch.zeros_like(owner), shard.group)
    before = bounds[shard.tp_rank - 1] if shard.tp_rank else zero
    local_target = (target - before) / scales[shard.tp_rank]
    index = _find(mass_BGC, bounds_BG, local_target)
    token = torch.where(owner == shard.tp_rank, index.clamp_max(shard.size - 1) + shard.start, 0)
    return all_reduce_sum(token, shard.group)


def _groups(num_classes: int) -> int:
    return max(1, -(-num_classes // _GROUP))


def _masses(scaled_BV: Tensor, largest: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scaled - largest) in groups of classes [B, G, C], and the mass up to the end of each group [B, G]."""
    num_rows, num_classes = scaled_BV.shape
    num_groups, mass = _groups(num_classes), buffer[:num_rows]
    mass[:, num_classes:] = 0
    kept = mass[:, :num_classes]
    torch.sub(scaled_BV, largest.unsqueeze(-1), out=kept)
    kept.exp_()
    mass_BGC = mass.view(num_rows, num_groups, _GROUP)
    return mass_BGC, mass_BGC.sum(-1).cumsum_(-1)


def _find(mass_BGC: Tensor, bounds_BG: Tensor, target: Tensor) -> Tensor:
    """[B] the class in whose piece of the shard's mass the target lies: first its group, then its place there."""

    def first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
        # Within the last piece with mass, whatever round-off did to the target.
        wanted = torch.minimum(wanted, torch.nextafter(cumulative[:, -1], torch.zeros_like(wanted)))
        found = torch.searchsorted(cumulative, wanted.unsqueeze(-1), right=True)
        return found.clamp_max(cumulative.shape[1] - 1)

    group = first_above(bounds_BG, target)
    before = torch.where(group > 0, bounds_BG.gather(-1, (group - 1).clamp_min(0)), 0.0).squeeze(-1)
    inside = mass_BGC.gather(1, group.unsqueeze(-1).expand(-1, 1, _GROUP)).squeeze(1).cumsum_(-1)
    return group.squeeze(-1) * _GROUP + first_above(inside, target - before).squeeze(-1)


def _keep_top_k(scaled_BV: Tensor, shard: VocabShard, top_k: int) -> Tensor:
    """Excludes all but the k largest; k candidates of each shard decide."""
    values = scaled_BV.topk(min(top_k, shard.size), -1)[0]
    candidates = all_gather_rows(F.pad(values, (0, top_k - values.shape[-1]), value=-math.inf), shard.group)
    threshold = candidates.transpose(0, 1).flatten(1).topk(top_k, -1)[0][:, -1]
    num_above = (candidates > threshold.unsqueeze(-1)).sum((0, 2))
    # A shard may hold more ties than it sent, but never more than it sent can be kept.
    num_ties = (candidates == threshold.unsqueeze(-1)).sum(-1)
    is_tie = scaled_BV == threshold.unsqueeze(-1)
    kept = (scaled_BV > threshold.unsqueeze(-1)) | _first_ties(is_tie, num_ties, top_k - num_above, shard)
    return scaled_BV.masked_fill(~kept, -math.inf)


def _keep_top_p(scaled_BV: Tensor, bits_BV: Tensor, shard: VocabShard, top_p: float) -> Tensor:
    """Excludes all but the smallest set of most likely classes whose mass reaches top_p.

    The threshold is the largest value such that the classes at or above it have enough mass. Sorted once, each shard
    answers "mass at or above x" by a search, so the threshold takes a few small exchanges and no candidates.
    """
    largest = all_reduce_max(_largest(scaled_BV), shard.group)
    mass_BV = torch.exp(scaled_BV - _finite(largest).unsqueeze(-1))
    sorted_bits, order = bits_BV.sort(-1)
    # mass_from[:, i] is the local mass of the sorted classes i, i + 1, ...
    mass_from = F.pad(mass_BV.gather(-1, order).flip(-1).cumsum(-1).flip(-1), (0, 1))

    def mass_at_or_above(bits: Tensor) -> Tensor:
        local = mass_from.gather(-1, torch.searchsorted(sorted_bits, bits))
        return all_gather_rows(local, shard.group).sum(0)

    width = 32 if bits_BV.dtype == torch.int32 else 64
    threshold = torch.full_like(largest, -(2 ** (width - 1)), dtype=torch.int64).unsqueeze(-1)
    needed = top_p * (1 - _MASS_SLACK) * mass_at_or_above(threshold.to(bits_BV.dtype))
    digits = torch.arange(1, 2**_DIGIT_BITS, device=bits_BV.device)
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        masses = mass_at_or_above((threshold + (digits << shift)).to(bits_BV.dtype))
        threshold = threshold + ((masses >= needed).sum(-1, keepdim=True) << shift)

    is_above = bits_BV > threshold
    is_tie = (bits_BV == threshold) & (mass_BV > 0)
    tie_mass = _largest(torch.where(is_tie, mass_BV, 0.0))
    local = torch.stack([(mass_BV * is_above).sum(-1), is_tie.sum(-1).to(torch.float64), tie_mass], -1)
    gathered = all_gather_rows(local, shard.group)
    missing = needed.squeeze(-1) - gathered[..., 0].sum(0)
    quota = torch.ceil(missing / gathered[..., 2].amax(0)).clamp_min(1)
    kept = is_above | _first_ties(is_tie, gathered[..., 1], quota, shard)
    return scaled_BV.masked_fill(~kept, -math.inf)


def _first_ties(is_tie_BV: Tensor, num_ties: Tensor, quota: Tensor, shard: VocabShard) -> Tensor:
    """Marks the first `quota` [B] ties in class order; num_ties: [tp, B] of each shard."""
    left = quota - num_ties[: shard.tp_rank].sum(0)
    return is_tie_BV & (is_tie_BV.cumsum(-1) <= left.unsqueeze(-1))


def _ordered_bits(logits: Tensor) -> Tensor:
    """Integers in the order of the logits: the bits of a float, with those of negative numbers turned round."""
    if logits.dtype == torch.float64:
        bits, mask = (logits + 0.0).view(torch.int64), 2**63 - 1
    else:
        bits, mask = (logits.to(torch.float32) + 0.0).view(torch.int32), 2**31 - 1
    return torch.where(bits >= 0, bits, bits ^ mask)


def _largest(values_BV: Tensor) -> Tensor:
    if values_BV.shape[-1] == 0:
        return values_BV.new_full(values_BV.shape[:1], -math.inf)
    return values_BV.amax(-1)


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isneginf(values), 0.0, values)
