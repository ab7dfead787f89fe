"""Rows of a micro-batch that differ in their token loss: a call of the objective for each divergence.

Tensor-parallel ranks have the same rows, so they make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megadistill.data.sample import RowLoss
from megadistill.losses import LossConfig


@dataclass(frozen=True)
class RowPart:
    """Rows of one divergence.

    Attributes:
        config: The losses, with that divergence.
        tokens: [T] places of their tokens among those of all rows; None: the rows are all there are.
        weights: [T] factors of the tokens; None: 1.
        skews: [T] what the tokens have in place of ``loss.skew``; None: that.
    """

    config: LossConfig
    tokens: torch.Tensor | None
    weights: torch.Tensor | None
    skews: torch.Tensor | None


def row_parts(
    lengths: Sequence[int], losses: Sequence[RowLoss | None], config: LossConfig, device: torch.device
) -> Iterator[RowPart]:
    """The parts of a micro-batch; one, which may be empty, where no row has a loss of its own.

    Args:
        lengths: Tokens of each row.
        losses: What each row has in place of the configuration; for all rows or for none.
        config: The configuration.
        device: Where the tensors go.
    """
    own = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
    if not own:
        yield RowPart(config, None, row_weights(lengths, device) if config.average == "row" else None, None)
        return
    assert len(own) == len(lengths), "all rows have a loss of their own, or none has"
    row_means = _row_means(lengths) if config.average == "row" else [1.0] * len(lengths)
    places = torch.arange(sum(lengths), device=device).split(list(lengths))
    for divergence in dict.fromkeys(loss.divergence for _, loss in own):
        rows = [(i, loss) for i, loss in own if loss.divergence == divergence]
        of_rows = [lengths[i] for i, _ in rows]
        skews = [loss.skew for _, loss in rows if loss.skew is not None]
        yield RowPart(
            config.replace(divergence=divergence),
            torch.cat([places[i] for i, _ in rows]),
            per_token([loss.weight * row_means[i] for i, loss in rows], of_rows, device),
            per_token(skews, of_rows, device) if skews else None,
        )


def row_weights(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """For each token of sequences that follow one another, one over its sequence's length (float64)."""
    return per_token(_row_means(lengths), lengths, device)


def row_numbers(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """For each token of sequences that follow one another, the number of its sequence (int64)."""
    return per_token(range(len(lengths)), lengths, device, torch.int64)


def per_token(
    values: Sequence[float], lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """[T]: a value of each row for each of its tokens."""
    of_rows = torch.tensor(values, dtype=dtype, device=device)
    numbers = torch.tensor(lengths, dtype=torch.int64, device=device)
    return of_rows.repeat_interleave(numbers, output_size=sum(lengths))


def _row_means(lengths: Sequence[int]) -> list[float]:
    return [1.0 / max(1, length) for length in lengths]
