"""Sampling from logits that are sharded over the vocabulary (docs/method.md, "Sampling").

Inverse CDF in global class order with one counter-based uniform number per example: exact softmax sampling whose tokens
do not depend on the layout. Everything after the logits is float64, so that the arithmetic here cannot move a token
from one class to the next where the logits did not.

Suffixes: B examples, Vs this rank's slice of the vocabulary, G groups of M classes each.
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

# Stands for a token where there is no distribution to draw from; drawn on every rank alike.
NO_TOKEN = -1

# The top-p threshold is found digit by digit in the ordered bits of the logits.
_DIGIT_BITS = 4  # the highest digit of 64 wraps around, as two's complement should
# Slack against round-off when classes add up to top_p exactly (four equal ones and top_p=0.5).
_MASS_SLACK = 1e-12
# M: classes whose masses are added up before the cumulative sum, which is slow: one over groups, one within a group.
_GROUP = 128
# Elements of the float64 masses that exist at once.
_MAX_ELEMENTS_CPU = 2**18
_MAX_ELEMENTS_ACCELERATOR = 2**22


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        seed: Keys the random numbers.
        temperature: Divides the logits; 0 is greedy (the lowest class where several are the most likely).
        options: Which classes are kept.

    Raises:
        ConfigError: The temperature is out of range.
    """

    seed: int = 0
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
    """Draws a class per example from softmax(logits / temperature).

    Communicates over ``shard.group``, per example: 2 floats and 1 integer; top_k adds k floats, top_p 8 exchanges of 15
    floats (16 for float64 logits) and 3 exchanges of 5 floats in all. Logits are never gathered.

    Args:
        logits_shard: [B, Vs] this rank's logits; -inf excludes a class.
        shard: This rank's slice of the vocabulary.
        seed: Keys the random numbers, together with ``sequence_ids``, ``positions`` and ``stream``.
        sequence_ids: [B] integers.
        positions: [B] integers.
        temperature: Divides the logits; 0 is greedy (the lowest class where several are the most likely).
        top_k: Keeps the k most likely classes; 0 keeps all. Among equals at the threshold the lowest classes are kept.
        top_p: Of these, keeps the smallest set of most likely classes whose mass reaches it; 1 keeps all.
        stream: Separates draws of different purpose.

    Returns:
        [B] int64 classes, the same on every rank of ``shard.group``; as ``draw_tokens``.

    Raises:
        ConfigError: An argument is out of range.
        ValueError: Shapes do not fit.
    """
    if sequence_ids.shape != logits_shard.shape[:1] or positions.shape != logits_shard.shape[:1]:
        raise ValueError(
            f"sequence_ids {tuple(sequence_ids.shape)} and positions {tuple(positions.shape)} must be "
            f"({len(logits_shard)},)"
        )
    numbers = None if temperature == 0 else sampling_numbers(seed, sequence_ids, positions, stream=stream)
    return draw_tokens(logits_shard, shard, numbers, Sampling(seed, temperature, _options(top_k=top_k, top_p=top_p)))


def sampling_numbers(seed: int, sequence_ids: Tensor, positions: Tensor, *, stream: int = 0) -> Tensor:
    """``uniform`` for ``draw_tokens``: [B] in (0, 1 - 2^-52], so that a product with a mass is below the mass."""
    return uniform(seed, sequence_ids, positions, stream=stream).clamp_max_(1 - 2.0**-52)


class Drawer:
    """Draws tokens again and again, by ``draw_tokens``; keeps its buffers, whose addresses never change.

    Nothing here waits for the device or depends on what tensors hold, so a call can be recorded as a CUDA graph.

    Args:
        shard: This rank's slice of the vocabulary.
        sampling: How tokens are drawn; its seed is not used.
        most_examples: The most examples of a call.
    """

    def __init__(self, shard: VocabShard, sampling: Sampling, most_examples: int) -> None:
        self._shard, self._sampling, self._most_examples = shard, sampling, most_examples
        self._buffers: _Buffers | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether no random numbers are needed."""
        return self._sampling.temperature == 0

    @torch.no_grad()
    def __call__(self, logits_shard: Tensor, numbers: Tensor | None) -> Tensor:
        """As ``draw_tokens``."""
        shard = self._shard
        _check_shapes(logits_shard, shard)
        if self.is_greedy:
            return _greedy_alone(logits_shard) if shard.group is None else _greedy(logits_shard, shard)
        assert numbers is not None
        if self._buffers is None:
            is_cpu = logits_shard.device.type == "cpu"
            elements = _MAX_ELEMENTS_CPU if is_cpu else _MAX_ELEMENTS_ACCELERATOR
            size = min(max(1, elements // max(1, -(-shard.total // shard.tp_size))), max(1, self._most_examples))
            with torch.inference_mode(False):  # written in and out of inference mode
                self._buffers = _Buffers(size, shard, logits_shard.device)
        pieces = zip(logits_shard.split(self._buffers.size), numbers.split(self._buffers.size), strict=True)
        drawn = [_sample(logits, shard, number, self._buffers, self._sampling) for logits, number in pieces]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def draw_tokens(logits_shard: Tensor, shard: VocabShard, numbers: Tensor | None, sampling: Sampling = _PLAIN) -> Tensor:
    """Draws a class per example, as ``sample_tokens``, with random numbers that are given.

    Takes some examples at a time (as many on all ranks), because what is made of their logits is float64.

    Args:
        logits_shard: [B, Vs] this rank's logits; -inf excludes a class.
        shard: This rank's slice of the vocabulary.
        numbers: [B] in (0, 1 - 2^-52] (``sampling_numbers``); greedy sampling needs none.
        sampling: How tokens are drawn; its seed is not used.

    Returns:
        [B] int64 classes, the same on every rank of ``shard.group``; ``NO_TOKEN`` where a logit of any rank is NaN or
        +inf, or all are -inf.
    """
    return Drawer(shard, sampling, len(logits_shard))(logits_shard, numbers)


class _Buffers:
    """Memory of the masses of some examples: new memory of this size costs more than the exponentials on CPUs.

    Classes are in groups. Searches count what lies below a target, the zero before the first group included, so what
    they find is one more than a group's number; there are views for these numbers, and for one more, where searches
    for what is not a number end.

    Args:
        size: The most examples.
        shard: This rank's slice of the vocabulary.
        device: Where its logits are.

    Attributes:
        size: The most examples.
        mass: [size, G * M] for masses, zeros behind the last class.
        bounds: [size, G + 1] for the masses before each group and of all.
        bounds_from_1: [size, G + 2] where group g has the number g + 1.
        mass_from_1: [size, G + 2, M], likewise.
        first: [G + 2] the first class of each group, likewise; ``NO_TOKEN`` with the M behind a group's last class.
    """

    def __init__(self, size: int, shard: VocabShard, device: torch.device) -> None:
        self.size, groups = size, max(1, -(-shard.size // _GROUP))
        row = groups * _GROUP
        memory = torch.zeros(_GROUP + size * row + _GROUP, dtype=torch.float64, device=device)
        self.mass = memory[_GROUP:-_GROUP].view(size, row)
        self.mass_from_1 = memory.as_strided((size, groups + 2, _GROUP), (row, _GROUP, 1))
        bounds = torch.zeros(1 + size * (groups + 1), dtype=torch.float64, device=device)
        self.bounds = bounds[1:].view(size, groups + 1)
        self.bounds_from_1 = bounds.as_strided((size, groups + 2), (groups + 1, 1))
        self.first = torch.arange(-_GROUP, row + _GROUP, _GROUP, device=device)
        self.first[-1:] = NO_TOKEN - _GROUP


def _sample(logits_shard: Tensor, shard: VocabShard, numbers: Tensor, buffers: _Buffers, sampling: Sampling) -> Tensor:
    options, scaled_BVs = sampling.options, logits_shard
    if sampling.temperature != 1:
        scaled_BVs = scaled_BVs.to(torch.float64) / sampling.temperature
    if 0 < options.top_k < shard.total:
        scaled_BVs = _keep_top_k(scaled_BVs, shard, options.top_k)
    if options.top_p < 1:
        scaled_BVs = _keep_top_p(scaled_BVs.to(torch.float64), _ordered_bits(logits_shard), shard, options.top_p)
    draw = _draw_alone if shard.group is None else _draw
    return draw(scaled_BVs, shard, numbers, buffers)


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


def _greedy(logits_BVs: Tensor, shard: VocabShard) -> Tensor:
    largest = _largest(logits_BVs)
    best = all_gather_rows(largest, shard.group).amax(0)
    # The first local maximum, then the first rank that holds one: the lowest class in the vocabulary.
    index = logits_BVs.argmax(-1) if shard.size else torch.zeros_like(largest, dtype=torch.int64)
    candidate = torch.where(largest == best, index + shard.start, shard.total)
    return _where_finite(best, all_gather_rows(candidate, shard.group).amin(0))


def _greedy_alone(logits_BV: Tensor) -> Tensor:
    """``_greedy`` of a vocabulary in one piece."""
    largest, index = logits_BV.max(-1)
    return _where_finite(largest, index)


def _draw_alone(scaled_BVs: Tensor, shard: VocabShard, number: Tensor, buffers: _Buffers) -> Tensor:
    """``_draw`` of a vocabulary in one piece, with a third of its operations."""
    total = _masses(scaled_BVs, _largest(scaled_BVs), buffers)  # NaN where no logit or no largest one is finite
    return _find(buffers, number * total)


def _draw(scaled_BVs: Tensor, shard: VocabShard, number: Tensor, buffers: _Buffers) -> Tensor:
    """The class whose piece of the cumulative distribution holds number [B]."""
    largest = _largest(scaled_BVs).to(torch.float64)
    local_mass = _masses(scaled_BVs, _finite(largest), buffers)
    gathered = all_gather_rows(torch.stack([largest, local_mass], -1), shard.group)
    best = gathered[..., 0].amax(0)
    scales = torch.exp(gathered[..., 0] - _finite(best))
    bounds = (gathered[..., 1] * scales).cumsum(0)
    target = number * bounds[-1]
    owner = (bounds < target).sum(0)
    if shard.size == 0:
        return _where_finite(best, all_reduce_sum(torch.zeros_like(owner), shard.group))
    before = bounds[shard.tp_rank - 1] if shard.tp_rank else torch.zeros_like(number)
    local_target = (target - before) / scales[shard.tp_rank]
    # Inside this shard's mass, whatever round-off did to it; what lies outside is another rank's.
    index = _find(buffers, torch.minimum(local_target, local_mass))
    token = torch.where(owner == shard.tp_rank, index + shard.start, 0)
    return _where_finite(best, all_reduce_sum(token, shard.group))


def _where_finite(best: Tensor, token: Tensor) -> Tensor:
    """The tokens [B] where the largest logit of all shards is finite: it is NaN where any logit is (no wait)."""
    return torch.where(best.abs() < math.inf, token, NO_TOKEN)


def _masses(scaled_BVs: Tensor, largest: Tensor, buffers: _Buffers) -> Tensor:
    """Writes exp(scaled - largest), and what lies before each group; returns the mass of all [B]."""
    num_examples, num_classes = scaled_BVs.shape
    mass, bounds = buffers.mass[:num_examples], buffers.bounds[:num_examples]
    # One after the other: together they would convert while they compute, which takes longer (softmax does, too).
    mass[:, :num_classes].copy_(scaled_BVs).sub_(largest.unsqueeze(-1)).exp_()
    torch.cumsum(mass.unflatten(1, (-1, _GROUP)).sum(-1), -1, out=bounds[:, 1:])
    return bounds[:, -1]


def _find(buffers: _Buffers, target: Tensor) -> Tensor:
    """[B] the class in whose piece of the mass the target lies, which is above 0 and at most the mass of all.

    A piece holds its upper end and not its lower one. First its group is found, then its place there. ``NO_TOKEN``
    where the target is not a number: no search finds anything above it.
    """
    num_examples, target = len(target), target.unsqueeze(-1)
    group = torch.searchsorted(buffers.bounds[:num_examples], target)
    mass = buffers.mass_from_1[:num_examples].gather(1, group.unsqueeze(-1).expand(-1, 1, _GROUP))
    inside = mass.squeeze(1).cumsum_(-1)
    rest = target - buffers.bounds_from_1[:num_examples].gather(1, group)
    # Within the last class with mass, whatever round-off did to the target.
    index = torch.searchsorted(inside, torch.minimum(rest, inside[:, -1:]))
    return index.add_(buffers.first.take(group)).squeeze(-1)


def _keep_top_k(scaled_BVs: Tensor, shard: VocabShard, top_k: int) -> Tensor:
    """Excludes all but the k largest classes; k candidates of each shard decide."""
    values = scaled_BVs.topk(min(top_k, shard.size), -1)[0]
    candidates = all_gather_rows(F.pad(values, (0, top_k - values.shape[-1]), value=-math.inf), shard.group)
    threshold = candidates.transpose(0, 1).flatten(1).topk(top_k, -1)[0][:, -1]
    num_above = (candidates > threshold.unsqueeze(-1)).sum((0, 2))
    # A shard may hold more ties than it sent, but never are more kept than it sent.
    num_ties = (candidates == threshold.unsqueeze(-1)).sum(-1)
    is_tie = scaled_BVs == threshold.unsqueeze(-1)
    # Not ">": a NaN stays, to be noticed.
    kept = ~(scaled_BVs <= threshold.unsqueeze(-1)) | _first_ties(is_tie, num_ties, top_k - num_above, shard)
    return scaled_BVs.masked_fill(~kept, -math.inf)


def _keep_top_p(scaled_BVs: Tensor, bits_BVs: Tensor, shard: VocabShard, top_p: float) -> Tensor:
    """Excludes all but the smallest set of most likely classes whose mass reaches top_p.

    The threshold is the largest value such that the classes at or above it have enough mass. Sorted once, each shard
    answers "mass at or above x" by a search, so the threshold takes a few small exchanges and no candidates.
    """
    largest = all_reduce_max(_largest(scaled_BVs), shard.group)
    mass_BVs = torch.exp(scaled_BVs - _finite(largest).unsqueeze(-1))
    sorted_bits, order = bits_BVs.sort(-1)
    # mass_from[:, i] is the local mass of the sorted classes i, i + 1, ...
    mass_from = F.pad(mass_BVs.gather(-1, order).flip(-1).cumsum(-1).flip(-1), (0, 1))

    def mass_at_or_above(bits: Tensor) -> Tensor:
        local = mass_from.gather(-1, torch.searchsorted(sorted_bits, bits))
        return all_gather_rows(local, shard.group).sum(0)

    width = 32 if bits_BVs.dtype == torch.int32 else 64
    threshold = torch.full_like(largest, -(2 ** (width - 1)), dtype=torch.int64).unsqueeze(-1)
    needed = top_p * (1 - _MASS_SLACK) * mass_at_or_above(threshold.to(bits_BVs.dtype))
    digits = torch.arange(1, 2**_DIGIT_BITS, device=bits_BVs.device)
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        masses = mass_at_or_above((threshold + (digits << shift)).to(bits_BVs.dtype))
        threshold = threshold + ((masses >= needed).sum(-1, keepdim=True) << shift)

    is_above = bits_BVs > threshold
    is_tie = (bits_BVs == threshold) & (mass_BVs > 0)
    tie_mass = _largest(torch.where(is_tie, mass_BVs, 0.0))
    local = torch.stack([(mass_BVs * is_above).sum(-1), is_tie.sum(-1).to(torch.float64), tie_mass], -1)
    gathered = all_gather_rows(local, shard.group)
    missing = needed.squeeze(-1) - gathered[..., 0].sum(0)
    quota = torch.ceil(missing / gathered[..., 2].amax(0)).clamp_min(1)
    # What is not a number stays, to be noticed.
    kept = is_above | _first_ties(is_tie, gathered[..., 1], quota, shard) | mass_BVs.isnan()
    return scaled_BVs.masked_fill(~kept, -math.inf)


def _first_ties(is_tie_BVs: Tensor, num_ties: Tensor, quota: Tensor, shard: VocabShard) -> Tensor:
    """Marks the first ``quota`` [B] ties in class order; num_ties: [tp_size, B] of each shard."""
    left = quota - num_ties[: shard.tp_rank].sum(0)
    return is_tie_BVs & (is_tie_BVs.cumsum(-1) <= left.unsqueeze(-1))


def _ordered_bits(logits: Tensor) -> Tensor:
    """Integers in the order of the logits: the bits of a float, with those of negative numbers reversed."""
    if logits.dtype == torch.float64:
        bits, mask = (logits + 0.0).view(torch.int64), 2**63 - 1
    else:
        bits, mask = (logits.to(torch.float32) + 0.0).view(torch.int32), 2**31 - 1
    return torch.where(bits >= 0, bits, bits ^ mask)


def _largest(values_BVs: Tensor) -> Tensor:
    if values_BVs.shape[-1] == 0:
        return values_BVs.new_full(values_BVs.shape[:1], -math.inf)
    return values_BVs.amax(-1)


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isneginf(values), 0.0, values)
