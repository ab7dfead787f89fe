"""Token ids to tensors: B rows, S columns; padded, or one row in which sequences follow one another.

Labels are shifted: ``labels[b, i]`` is what column i predicts, the token in column i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megadistill import IGNORE_INDEX


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses: padded on the right, one a row, or one behind the other in a single row.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 0 for padding.
        position_ids: [B, S] int64, counted from each sequence's first token.
        labels: [B, S] int64: ``labels[b, i]`` is the response token that column i predicts; IGNORE_INDEX in the prompt,
            the padding and the last column of each sequence.
        lengths: Of the sequences.
        bounds: [len(lengths) + 1] int32: where sequences that follow one another begin and end; None where each has a
            row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    bounds: Tensor | None = None

    @property
    def starts(self) -> list[int]:
        """The first column of each sequence, in the flattened [B * S]."""
        if self.bounds is not None:
            return list(accumulate(self.lengths[:-1], initial=0))
        return [row * self.input_ids.shape[1] for row in range(len(self.lengths))]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same on another device."""
        return SequenceBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.labels.to(device),
            self.lengths,
            None if self.bounds is None else self.bounds.to(device),
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, for decoding: [B, S] int64 each, and ``lengths`` [B] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same on another device."""
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


def right_padded(sequences: Sequence[tuple[Sequence[int], Sequence[int] | None]], pad_id: int) -> SequenceBatch:
    """Batches (prompt_ids, response_ids) pairs; S is the longest sequence. A response may be empty or None."""
    joined = [_with_labels(*sequence) for sequence in sequences]
    lengths = tuple(len(tokens) for tokens, _ in joined)
    width = max(lengths)
    shape = (len(joined), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, (tokens, predicted) in enumerate(joined):
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = predicted
    position_ids = torch.arange(width).expand(shape).contiguous()
    return SequenceBatch(input_ids, attention_mask, position_ids, labels, lengths)


def concatenated(sequences: Sequence[tuple[Sequence[int], Sequence[int] | None]]) -> SequenceBatch:
    """The same pairs as one row of B = 1, without padding; S is the sum of their lengths."""
    joined = [_with_labels(*sequence) for sequence in sequences]
    lengths = tuple(len(tokens) for tokens, _ in joined)
    input_ids = torch.cat([tokens for tokens, _ in joined]).unsqueeze(0)
    return SequenceBatch(
        input_ids,
        torch.ones_like(input_ids),
        torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        torch.cat([labels for _, labels in joined]).unsqueeze(0),
        lengths,
        torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
    )


def _with_labels(prompt: Sequence[int], response: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Tokens of a sequence, and for each the response token that follows it."""
    assert prompt, "every sequence needs a prompt"
    tokens = torch.tensor([*prompt, *(response or ())], dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[len(prompt) - 1 : -1] = tokens[len(prompt) :]
    return tokens, labels


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> PromptBatch:
    """Batches prompts so that all end in the last column; positions count from each prompt's first token."""
    assert prompts and all(prompts), "every prompt needs a token"
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        attention_mask[row, width - len(prompt) :] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    return PromptBatch(input_ids, attention_mask, position_ids, attention_mask.sum(dim=1))
