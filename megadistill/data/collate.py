"""Token ids to padded tensors: B examples, S columns.

Labels are shifted: ``labels[b, i]`` is what column i predicts, the token in column i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import IGNORE_INDEX


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses, padded on the right. All [B, S] int64.

    ``labels[b, i]`` is the response token that column i predicts; IGNORE_INDEX in the prompt, the padding and the last
    column of each sequence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same on another device."""
        return SequenceBatch(**{name: value.to(device) for name, value in vars(self).items()})


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
    assert sequences and all(prompt for prompt, _ in sequences), "every sequence needs a prompt"
    joined = [[*prompt, *(response or ())] for prompt, response in sequences]
    width = max(map(len, joined))
    shape = (len(joined), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, (ids, (prompt, _)) in enumerate(zip(joined, sequences, strict=True)):
        tokens = torch.tensor(ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, len(prompt) - 1 : len(ids) - 1] = tokens[len(prompt) :]
    position_ids = torch.arange(width).expand(shape).contiguous()
    return SequenceBatch(input_ids, attention_mask, position_ids, labels)


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
