"""Likelihood of references: the totals of any partition of the rows add up to the same result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megadistill.errors import DataError


@dataclass(frozen=True)
class LikelihoodTotal:
    """Negative log-likelihood of references in nats (EOS included), and their numbers of tokens and sequences."""

    nats: float = 0.0
    num_tokens: int = 0
    num_sequences: int = 0

    def __add__(self, other: LikelihoodTotal) -> LikelihoodTotal:
        return LikelihoodTotal(
            self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_sequences + other.num_sequences
        )

    @property
    def nll(self) -> float:
        """Nats per reference token: the sum over all rows divided by their number of tokens, never a mean of means.

        Raises:
            DataError: No row has a reference.
        """
        if self.num_tokens < 1:
            raise DataError("no row of the evaluation set has a reference: its likelihood is undefined")
        return self.nats / self.num_tokens


def total_likelihood(parts: Iterable[LikelihoodTotal]) -> LikelihoodTotal:
    """The sum of parts; exactly rounded (``math.fsum``), so their order does not matter."""
    known = list(parts)
    return LikelihoodTotal(
        math.fsum(part.nats for part in known),
        sum(part.num_tokens for part in known),
        sum(part.num_sequences for part in known),
    )
