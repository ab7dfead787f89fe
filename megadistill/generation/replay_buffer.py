"""Student text of earlier steps, to train on again (DistiLLM's replay buffer), sharded over data-parallel ranks.

The logical buffer is one FIFO of whole global batches, the same at every layout; a rank holds its own rows of each, as
the sampler deals them: place i of a batch belongs to rank i % dp_size. Appending, evicting and drawing need no
communication, because every rank does the same to its own rows of the same batches.

A replayed batch takes, for every place, the row that one stored batch has at that place (ours; DistiLLM draws any
entries, from a buffer of each rank's own). The stored batch is drawn anew for each place, with replacement, so every
entry is as likely as every other. A drawn row is then on the rank that trains it at every dp_size, no entry comes twice
in a batch, and a replayed batch has as many rows of data.prompts_path as a fresh one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.errors import CheckpointError, ConfigError, TopologyError
from megadistill.parallel.rng import uniform

# An entry in a state: sequence id, step, error position, corrections; then the lengths of its three token lists.
_NUM_NUMBERS, _NUM_COLUMNS = 4, 7
_NO_REFERENCE = -1


@dataclass(frozen=True)
class ReplayEntry:
    """One row as it was trained on at ``step``: ``text`` is the student's response after correction, EOS included.

    ``error_position`` and ``num_corrections`` are those of SCRG. ``reference`` is None for a row without one.
    """

    sequence_id: int
    step: int
    prompt: tuple[int, ...]
    reference: tuple[int, ...] | None
    text: tuple[int, ...]
    error_position: int
    num_corrections: int


class ReplayBuffer:
    """This rank's shard of the buffer; ``len``, ``capacity`` and ``is_full`` speak of the whole one.

    Raises ConfigError when ``capacity`` is not whole batches, TopologyError when dp_size does not divide a batch.
    """

    def __init__(self, capacity: int, global_batch_size: int, *, dp_rank: int = 0, dp_size: int = 1) -> None:
        # The oldest batch leaves on all ranks at once, so that shards stay aligned without a word between them.
        if capacity < 1 or capacity % global_batch_size:
            below = max(1, capacity // global_batch_size) * global_batch_size
            raise ConfigError(
                f"a replay buffer of {capacity} rows must hold a positive multiple of "
                f"train.global_batch_size={global_batch_size}; for example {below} or {below + global_batch_size}"
            )
        if not 0 <= dp_rank < dp_size or global_batch_size % dp_size:
            raise TopologyError(
                f"train.global_batch_size={global_batch_size} must be a multiple of the data-parallel size {dp_size} "
                f"(data-parallel rank {dp_rank})"
            )
        self.capacity = capacity
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._batches: deque[tuple[ReplayEntry, ...]] = deque(maxlen=capacity // global_batch_size)

    def __len__(self) -> int:
        """Entries on all ranks together."""
        return len(self._batches) * self.global_batch_size

    @property
    def is_full(self) -> bool:
        return len(self) == self.capacity

    @property
    def is_empty(self) -> bool:
        return not self._batches

    def entries(self) -> Iterator[ReplayEntry]:
        """This rank's entries, the oldest first."""
        return (entry for batch in self._batches for entry in batch)

    def append(self, batch: Sequence[ReplayEntry]) -> None:
        """Adds this rank's rows of one global batch, in the order of sequence ids; when full, drops the oldest batch.

        Every data-parallel rank must do so for the same steps. Raises ValueError when the sequence ids are not this
        rank's share of one batch (step * global_batch_size + place, as BatchSampler counts) or not later than the last.
        """
        size = self.global_batch_size
        ids = [entry.sequence_id for entry in batch]
        first = ids[0] // size * size if ids else 0
        expected = list(range(first + self.dp_rank, first + size, self.dp_size))
        if ids != expected:
            raise ValueError(f"rank {self.dp_rank} of {self.dp_size} appends the rows {expected} of a batch, got {ids}")
        if self._batches and first <= self._batches[-1][-1].sequence_id:
            raise ValueError(f"batches are appended in order: {ids[0]} after {self._batches[-1][0].sequence_id}")
        self._batches.append(tuple(batch))

    def draw(self, seed: int, step: int, *, stream: int) -> list[ReplayEntry]:
        """This rank's rows of the replayed batch of ``step``, in the order of their places; no communication.

        A function of (seed, step, stream) and of the buffer: what the ranks draw together is the same at every layout.
        Raises ValueError when the buffer is empty.
        """
        if self.is_empty:
            raise ValueError("nothing can be drawn from an empty replay buffer")
        places = torch.arange(self.dp_rank, self.global_batch_size, self.dp_size)
        draws = uniform(seed, torch.full_like(places, step), places, stream=stream)
        # A draw is at most 1 - 2^-53, and its product with n < 2^52 rounds to less than n.
        chosen = (draws * len(self._batches)).long().tolist()
        return [self._batches[batch][row] for row, batch in enumerate(chosen)]

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard as numbers and two tensors, for torch.save and a load with weights_only=True.

        ``rows`` [n, 7] int64: sequence id, step, error position, number of corrections, and the lengths of prompt,
        reference (-1: none) and text. ``tokens`` [sum of lengths] int32: prompt, reference, text of each row in turn.
        """
        rows: list[list[int]] = []
        tokens: list[int] = []
        for entry in self.entries():
            reference = entry.reference
            lengths = [len(entry.prompt), _NO_REFERENCE if reference is None else len(reference), len(entry.text)]
            rows.append([entry.sequence_id, entry.step, entry.error_position, entry.num_corrections, *lengths])
            tokens += (*entry.prompt, *(reference or ()), *entry.text)
        return {
            "capacity": self.capacity,
            "global_batch_size": self.global_batch_size,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "rows": torch.tensor(rows, dtype=torch.int64).view(-1, _NUM_COLUMNS),
            "tokens": torch.tensor(tokens, dtype=torch.int32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes the buffer that ``state`` was taken from.

        Raises CheckpointError when that had another capacity, batch size or shard (see ``merge`` and ``split``) or is
        damaged; the buffer is then as it was.
        """
        for key in ("capacity", "global_batch_size", "dp_rank", "dp_size"):
            if state[key] != getattr(self, key):
                raise CheckpointError(f"the saved replay buffer has {key}={state[key]}, this run {getattr(self, key)}")
        entries, per_batch = _decode(state), self.global_batch_size // self.dp_size
        batches = [entries[at : at + per_batch] for at in range(0, len(entries), per_batch)]
        # Through append, which checks the order and the places of all rows.
        fresh = ReplayBuffer(self.capacity, self.global_batch_size, dp_rank=self.dp_rank, dp_size=self.dp_size)
        try:
            for batch in batches:
                fresh.append(batch)
        except ValueError as error:
            raise CheckpointError(f"the saved replay buffer is damaged: {error}") from None
        if len(batches) > len(fresh._batches):
            raise CheckpointError(f"the saved replay buffer is damaged: it holds more than {self.capacity} entries")
        self._batches = fresh._batches


def merge(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole buffer, as a run with dp_size 1 has it, from those of all data-parallel ranks.

    No communication: the caller gathers. Raises CheckpointError when they are not one buffer's shards in rank order.
    """
    common = [(s["capacity"], s["global_batch_size"], s["dp_size"], s["rows"].shape[0]) for s in states]
    if [s["dp_rank"] for s in states] != list(range(common[0][2] if common else 1)) or len(set(common)) > 1:
        found = ", ".join(f"rank {s['dp_rank']} of {s['dp_size']} with {s['rows'].shape[0]} rows" for s in states)
        raise CheckpointError(f"these are not the shards of one replay buffer, in rank order: {found or 'none'}")
    # Entry j of rank r is entry j * dp_size + r of the whole buffer.
    dealt = [piece for group in zip(*map(_pieces, states), strict=True) for piece in group]
    return {
        **states[0],
        "dp_rank": 0,
        "dp_size": 1,
        "rows": torch.stack([s["rows"] for s in states], dim=1).flatten(0, 1),
        "tokens": torch.cat([states[0]["tokens"][:0], *dealt]),
    }


def split(state: dict[str, Any], dp_rank: int, dp_size: int) -> dict[str, Any]:
    """The shard of one rank of any layout, from the state of the whole buffer (``merge``).

    Raises CheckpointError when ``state`` is itself a shard, TopologyError when dp_size does not divide its batches.
    """
    if state["dp_size"] != 1:
        raise CheckpointError(f"this is a shard of the replay buffer (rank {state['dp_rank']} of {state['dp_size']})")
    if not 0 <= dp_rank < dp_size or state["global_batch_size"] % dp_size:
        raise TopologyError(
            f"the batches of {state['global_batch_size']} rows in the saved replay buffer cannot be dealt to "
            f"data-parallel rank {dp_rank} of {dp_size}"
        )
    return {
        **state,
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        # A copy: torch.save writes all of the memory that a view looks into.
        "rows": state["rows"][dp_rank::dp_size].clone(),
        "tokens": torch.cat([state["tokens"][:0], *_pieces(state)[dp_rank::dp_size]]),
    }


def _pieces(state: dict[str, Any]) -> list[torch.Tensor]:
    """The tokens of each entry, as views. Raises CheckpointError when the lengths do not add up."""
    rows, tokens = state["rows"], state["tokens"]
    sizes = rows[:, _NUM_NUMBERS:].clamp(min=0).sum(dim=1).tolist()
    if sum(sizes) != tokens.numel():
        raise CheckpointError(f"the saved replay buffer is damaged: {tokens.numel()} tokens, expected {sum(sizes)}")
    return list(tokens.split(sizes)) if sizes else []


def _decode(state: dict[str, Any]) -> list[ReplayEntry]:
    entries = []
    for row, piece in zip(state["rows"].tolist(), _pieces(state), strict=True):
        sequence_id, step, error_position, num_corrections, num_prompt, num_reference, _ = row
        tokens, end = tuple(piece.tolist()), num_prompt + max(0, num_reference)
        reference = None if num_reference == _NO_REFERENCE else tokens[num_prompt:end]
        prompt, text = tokens[:num_prompt], tokens[end:]
        entries.append(ReplayEntry(sequence_id, step, prompt, reference, text, error_position, num_corrections))
    return entries
