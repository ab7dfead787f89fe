"""Counter-based random numbers: the value depends on what is drawn, never on where, when or with how many ranks.

Philox4x32-10 (J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) in int64 tensor operations, so that every device and every layout gives the same bits.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_HALF_BITS = 26


def uniform(seed: int, sequence_ids: Tensor, positions: Tensor, *, stream: int = 0) -> Tensor:
    """Random numbers that depend on (seed, sequence id, position, stream) alone. No communication, no state.

    Args:
        seed: 64 bits.
        sequence_ids: [B] integers of 64 bits.
        positions: [B] integers of 32 bits.
        stream: 32 bits; separates draws of different purpose at the same place.

    Returns:
        [B] float64, strictly inside (0, 1), with 52 random bits each.
    """
    sequence_ids, positions = sequence_ids.to(torch.int64), positions.to(torch.int64)
    counter = (
        sequence_ids & _MASK,
        (sequence_ids >> 32) & _MASK,
        positions & _MASK,
        torch.full_like(positions, stream & _MASK),
    )
    high, low, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    bits = ((high >> (32 - _HALF_BITS)) << _HALF_BITS) | (low >> (32 - _HALF_BITS))
    # The middle of each of the 2^52 cells: 2 * bits + 1 < 2^53 is exact in float64, so neither 0 nor 1 appears.
    return (bits.to(torch.float64) + 0.5) * 2.0 ** (-2 * _HALF_BITS)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The ten-round bijection of four 32-bit words under a 64-bit key; words are int64 tensors in [0, 2^32)."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(word0, _MULTIPLIERS[0])
        high1, low1 = _multiply(word2, _MULTIPLIERS[1])
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return word0, word1, word2, word3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, from 48-bit partial products: int64 never overflows."""
    by_low, by_high = word * (constant & 0xFFFF), word * (constant >> 16)
    high = (by_high + (by_low >> 16)) >> 16
    low = (by_low + ((by_high & 0xFFFF) << 16)) & _MASK
    return high, low


class Stream(IntEnum):
    """Keeps the random numbers of different purposes apart. A round of SCRG adds its index to its stream."""

    ROLLOUT = 0
    TEACHER_TOKEN = 1_000
    CONTINUATION = 2_000
    TEXT_SOURCE = 3_000
    REPLAY = 3_001
    TEXT_SOURCE_OF_ROW = 3_002
    EVALUATION = 4_000
    TEACHER_TEXT = 5_000
