"""The value of the span term (docs/method.md, "Span level").

Of pairs of neighboring distributions (paper: Eq. 10), from the sums of ``SpanSum``; or of whole spans as written, from
the labels' log-probabilities alone (ours). Suffixes: N spans, L tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megadistill.config.loss import LossConfig, SpanRelation
from megadistill.losses.statistics import TokenStatistics


def span_value(square: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The value sqrt(square + eps^2) - eps, computed without the difference, which would cancel; and the root."""
    root = torch.sqrt(square + eps * eps)
    return square / (root + eps), root


def written_value(relation: SpanRelation, log_p: Tensor, log_q: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The value of each span [N] and its derivative by log q.

    Args:
        relation: ``joint`` or ``log``.
        log_p: [N] the teacher's log-probability of the span as written.
        log_q: [N] the student's.
        lengths: [N] tokens of the span.
    """
    if relation == "joint":
        p, q = log_p.exp(), log_q.exp()
        return (p - q).square(), 2.0 * (q - p) * q
    gap = log_q - log_p
    return gap.square() / lengths, 2.0 * gap / lengths


def written_spans(is_pair: Sequence[bool]) -> list[list[int]]:
    """The tokens of each span, a longest run of pairs."""
    spans: list[list[int]] = []
    for first, is_start in enumerate(is_pair):
        if is_start and first and is_pair[first - 1]:
            spans[-1].append(first + 1)
        elif is_start:
            spans.append([first, first + 1])
    return spans


def chunks_of_whole_spans(is_pair: Sequence[bool], size: int) -> Iterator[slice]:
    """Chunks of ``size`` tokens and as many more as it takes to cut no span."""
    begin = 0
    while begin < len(is_pair):
        end = min(begin + size, len(is_pair))
        while end < len(is_pair) and is_pair[end - 1]:
            end += 1
        yield slice(begin, end)
        begin = end


class WrittenSpans:
    """The span term of whole spans as written.

    Args:
        is_pair: [T] bool, pairs among the tokens that count.
        config: The relation, the weight and the temperature.
    """

    def __init__(self, is_pair: Tensor, config: LossConfig) -> None:
        self._pairs: list[bool] = is_pair.tolist()
        self._config = config

    def chunks(self, size: int) -> list[tuple[slice, int]]:
        """Chunks that cut no span, and no halo before any of them."""
        return [(chunk, 0) for chunk in chunks_of_whole_spans(self._pairs, size)]

    def term(self, stats: TokenStatistics, chunk: slice, inv_num_spans: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the chunk's spans, and minus its weighted derivative by the tempered log q of the labels [C]."""
        assert stats.label_logs is not None
        config, spans = self._config, written_spans(self._pairs[chunk])
        if not spans:
            return torch.zeros_like(inv_num_spans), torch.zeros_like(stats.norms.student_max)
        log_p, log_q = stats.label_logs
        num_tokens, sums = len(log_q), SpanSums(spans, log_q.device)
        log_p, log_q = sums.sum(log_p), sums.sum(log_q)
        value, slope = written_value(config.span_relation, log_p, log_q, sums.lengths)
        label = sums.spread(slope, num_tokens) * (-config.span * inv_num_spans / config.temperature)
        return value.sum(), label.to(stats.norms.student_max.dtype)


class SpanSums:
    """Sums over the spans of one chunk, in one order on every rank: adding up by index has none on GPUs.

    Args:
        spans: The tokens of each span.
        device: Where the numbers are.
    """

    def __init__(self, spans: Sequence[Sequence[int]], device: torch.device) -> None:
        longest = max(map(len, spans))
        rows = [[*span, *[-1] * (longest - len(span))] for span in spans]
        self._tokens_NL = torch.tensor(rows, device=device)
        self._is_token_NL = self._tokens_NL >= 0
        self.lengths = self._is_token_NL.sum(-1)

    def sum(self, values: Tensor) -> Tensor:
        """The sums [N] of the chunk's numbers [C]."""
        return torch.where(self._is_token_NL, values[self._tokens_NL.clamp_min(0)], 0.0).sum(-1)

    def spread(self, values: Tensor, num_tokens: int) -> Tensor:
        """Each span's number [N] at all its tokens, 0 at the others [num_tokens]."""
        result = values.new_zeros(num_tokens)
        result[self._tokens_NL[self._is_token_NL]] = values.unsqueeze(-1).expand(self._tokens_NL.shape)[
            self._is_token_NL
        ]
        return result
