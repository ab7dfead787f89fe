"""Likelihood of references, aggregated: totals of any partition of the rows add up to the same result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megadistill.errors import DataError


@dataclass(frozen=True)
class LikelihoodTotal:
    """Sum of the references' negative log-likelihood in nats (EOS included), and the tokens and sequences that it
    covers.
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_sequences: int = 0

    def __add__(self, other: LikelihoodTotal) -> LikelihoodTotal:
        return LikelihoodTotal(
            self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_sequences + other.num_sequences
        )

    @property
    def nll(self) -> float:
        """Nats per reference token: the sum over all rows divided by the token count of all rows, never a mean of
        means.

        Raises:
            DataError: no row has a reference.
        """
        if self.num_tokens < 1:
            raise DataError("no row of the evaluation set has a reference: its likelihood is undefined")
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(nll), infinite where that overflows."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def total_likelihood(parts: Iterable[LikelihoodTotal]) -> LikelihoodTotal:
    """One total of the parts of micro-batches and data-parallel ranks; sums with `math.fsum`, so the order of the parts
    does not matter.
    """
    known = list(parts)
    return LikelihoodTotal(
        math.fsum(part.nats for part in known),
        sum(part.num_tokens for part in known),
        sum(part.num_sequences for part in known),
    )
