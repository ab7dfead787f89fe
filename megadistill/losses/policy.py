"""The policy gradient of the reverse KL on sampled tokens (docs/method.md, "Policy gradient").

It needs the labels' log-probabilities alone, so a teacher that gives one number a token will do. Suffix: C tokens of
one chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.config.loss import LossConfig


def importance(log_p: Tensor, log_q: Tensor, teacher_share: float) -> Tensor:
    """Importance weights q / (a p + (1 - a) q) [C] of tokens drawn from this mixture; a is the teacher's share."""
    if teacher_share == 0:
        return torch.ones_like(log_q)
    mixture = torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log1p(-teacher_share))
    return (log_q - mixture).exp()


def clipped_value(weight: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(w A, clip(w) A) [C] and its derivative by log q, at the weights w that the text was written with."""
    free, bounded = weight * advantage, weight.clamp(1 - clip, 1 + clip) * advantage
    return -torch.minimum(free, bounded), torch.where(free <= bounded, -free, 0.0)


class PolicyTerm:
    """The term of one call, chunk by chunk.

    What follows a token in its row may lie in the next chunk: with ``policy_reward: return`` chunks go from the last to
    the first, and three numbers of a row that goes on are kept between two of them. Nothing waits for the device.

    Args:
        config: Reward, clip and weight.
        rows: [T'] int64, not falling: the row of each token of the call; None: all are one row.
        teacher_share: The teacher's share in the distribution that the tokens were drawn from.
        positions: [T] the tokens that count.
    """

    def __init__(self, config: LossConfig, rows: Tensor | None, teacher_share: float, positions: Tensor) -> None:
        self._config, self._teacher_share, device = config, teacher_share, positions.device
        self._rows = torch.zeros_like(positions) if rows is None else rows[positions]
        # Of the row that the chunks before have begun with: its number, and the sum and the count of its tokens there.
        self._row = torch.full((), -1, dtype=torch.int64, device=device)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def term(
        self, label_logs: tuple[Tensor, Tensor], chunk: slice, num_halo: int, weights: Tensor, inv_num_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum over the chunk, and minus its weighted derivative by log q of the labels [C].

        Args:
            label_logs: [C] log p(label) and log q(label), halo tokens included.
            chunk: Which tokens these are.
            num_halo: How many of the first ones belong to another chunk.
            weights: [C] factors of the tokens; 0 for the halo.
            inv_num_tokens: One over the global count.
        """
        config, (log_p, log_q) = self._config, label_logs
        gain = log_p - log_q
        if config.policy_reward == "return":
            own = self._returns(gain[num_halo:], self._rows[chunk.start + num_halo : chunk.stop])
            gain = F.pad(own, (num_halo, 0))
        value, slope = clipped_value(importance(log_p, log_q, self._teacher_share), gain, config.policy_clip)
        label = -slope * weights * (config.policy * inv_num_tokens)
        return (value * weights).sum(dtype=torch.float64), label.to(weights.dtype)

    def _returns(self, gain: Tensor, rows: Tensor) -> Tensor:
        """Mean gain of the tokens that follow each one in its row; 0 where none does."""
        num_tokens = len(gain)
        if num_tokens == 0:
            return gain
        from_here = F.pad(gain.flip(0).cumsum(0).flip(0), (0, 1))
        ends = torch.searchsorted(rows, rows, right=True)
        place = torch.arange(num_tokens, device=gain.device)
        goes_on = rows == self._row
        behind = from_here[1:] - from_here[ends] + torch.where(goes_on, self._sum, 0.0)
        count = ends - place - 1 + torch.where(goes_on, self._count, 0)
        self._row, self._sum, self._count = rows[0], gain[0] + behind[0], count[0] + 1
        return behind / count.clamp_min(1)
