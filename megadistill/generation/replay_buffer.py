"""Student text of earlier steps, to train on again (DistiLLM's replay buffer), sharded over data-parallel ranks.

The logical buffer is one FIFO of whole global batches, the same at every layout; a rank holds its own samples of each,
as the sampler deals them: place i of a batch belongs to rank i % dp_size. Appending, evicting and drawing need no
communication, because every rank does the same to its own samples of the same batches.

A replayed batch takes, for every place, the sample that one stored batch has at that place (ours; DistiLLM draws any
entries, from a separate buffer of each rank). The stored batch is drawn again for each place, with replacement, so
every entry is as likely as every other. A drawn sample is then on the rank that trains on it at every dp_size, no entry
comes twice in a batch, and a replayed batch has as many rows of data.prompts_path as a new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megadistill.data.sample import Sample
from megadistill.errors import CheckpointError, ConfigError, TopologyError
from megadistill.parallel.rng import uniform

# An entry in a state: sequence id, step, error position, corrections; then the lengths of its three token lists.
_NUM_NUMBERS, _NUM_COLUMNS = 4, 7
_NO_REFERENCE = -1


class ReplayBuffer:
    """This rank's shard of the buffer; ``len``, ``capacity`` and ``is_full`` speak of the whole buffer.

    Args:
        capacity: Samples of the whole buffer, a multiple of ``global_batch_size``.
        global_batch_size: Samples of a step.
        dp_rank: Which shard this is.
        dp_size: Number of shards.

    Raises:
        ConfigError: ``capacity`` is not whole batches.
        TopologyError: ``dp_size`` does not divide a batch.
    """

    def __init__(self, capacity: int, global_batch_size: int, *, dp_rank: int = 0, dp_size: int = 1) -> None:
        # The oldest batch leaves on all ranks at once, so that shards stay aligned without communication.
        if capacity < 1 or capacity % global_batch_size:
            below = max(1, capacity // global_batch_size) * global_batch_size
            raise ConfigError(
                f"a replay buffer of {capacity} samples must hold a positive multiple of "
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
        self._batches: deque[tuple[Sample, ...]] = deque(maxlen=capacity // global_batch_size)

    def __len__(self) -> int:
        """Entries on all ranks together."""
        return len(self._batches) * self.global_batch_size

    @property
    def is_full(self) -> bool:
        """Whether the next batch evicts the oldest one."""
        return len(self) == self.capacity

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been appended."""
        return not self._batches

    def samples(self) -> Iterator[Sample]:
        """This rank's samples, the oldest first."""
        return (sample for batch in self._batches for sample in batch)

    def append(self, batch: Sequence[Sample]) -> None:
        """Adds this rank's samples of one global batch; a full buffer drops the oldest batch.

        Kept are prompt, reference and response ids and what SCRG did; the teacher's states are read again. Every
        data-parallel rank must do so for the same steps.

        Args:
            batch: The samples in the order of their sequence ids.

        Raises:
            ValueError: The sequence ids are not this rank's share of one batch (step * global_batch_size + place, as
                BatchSampler counts), or not later than the last batch.
        """
        size = self.global_batch_size
        ids = [sample.sequence_id for sample in batch]
        first = ids[0] // size * size if ids else 0
        expected = list(range(first + self.dp_rank, first + size, self.dp_size))
        if ids != expected:
            raise ValueError(
                f"rank {self.dp_rank} of {self.dp_size} appends the samples {expected} of a batch, got {ids}"
            )
        if self._batches and first <= self._batches[-1][-1].sequence_id:
            raise ValueError(f"batches are appended in order: {ids[0]} after {self._batches[-1][0].sequence_id}")
        self._batches.append(tuple(_kept(sample) for sample in batch))

    def draw(self, seed: int, step: int, *, stream: int) -> list[Sample]:
        """This rank's samples of a replayed batch, in the order of their places. No communication.

        A function of the arguments and of the buffer: what the ranks draw together is the same at every layout.

        Args:
            seed: Keys the random numbers, together with ``step`` and ``stream``.
            step: The step, 0-based.
            stream: Separates draws of different purpose.

        Raises:
            ValueError: The buffer is empty.
        """
        if self.is_empty:
            raise ValueError("nothing can be drawn from an empty replay buffer")
        places = torch.arange(self.dp_rank, self.global_batch_size, self.dp_size)
        draws = uniform(seed, torch.full_like(places, step), places, stream=stream)
        # A draw is at most 1 - 2^-53, and its product with n < 2^52 rounds to less than n.
        chosen = (draws * len(self._batches)).long().tolist()
        return [self._batches[batch][place] for place, batch in enumerate(chosen)]

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard as numbers and two tensors, for torch.save and a load with weights_only=True.

        ``rows`` [samples, 7] int64: sequence id, step, error position, number of corrections, and the lengths of
        prompt, reference (-1: none) and response. ``tokens`` [sum of lengths] int32: the three of each sample in turn.
        """
        rows: list[list[int]] = []
        tokens: list[int] = []
        for sample in self.samples():
            prompt, reference, response = sample.prompt_ids, sample.reference_ids, sample.response_ids or ()
            lengths = [len(prompt), _NO_REFERENCE if reference is None else len(reference), len(response)]
            step = sample.sequence_id // self.global_batch_size
            rows.append([sample.sequence_id, step, sample.error_position, sample.num_corrections, *lengths])
            tokens += (*prompt, *(reference or ()), *response)
        return {
            "capacity": self.capacity,
            "global_batch_size": self.global_batch_size,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "rows": torch.tensor(rows, dtype=torch.int64).view(-1, _NUM_COLUMNS),
            "tokens": torch.tensor(tokens, dtype=torch.int32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the buffer that ``state`` was taken from.

        Raises:
            CheckpointError: That had another capacity, batch size or shard (see ``merge`` and ``split``), or is
                damaged; the buffer is then as it was.
        """
        for key in ("capacity", "global_batch_size", "dp_rank", "dp_size"):
            if state[key] != getattr(self, key):
                raise CheckpointError(f"the saved replay buffer has {key}={state[key]}, this run {getattr(self, key)}")
        samples, per_batch = _decode(state), self.global_batch_size // self.dp_size
        batches = [samples[at : at + per_batch] for at in range(0, len(samples), per_batch)]
        # Through append, which checks the order and the places of all samples.
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
    """The state of the whole buffer, as a run with dp_size 1 has it. No communication: the caller gathers.

    Args:
        states: Those of all data-parallel ranks, in rank order.

    Raises:
        CheckpointError: They are not the shards of one buffer in rank order.
    """
    common = [(s["capacity"], s["global_batch_size"], s["dp_size"], s["rows"].shape[0]) for s in states]
    if [s["dp_rank"] for s in states] != list(range(common[0][2] if common else 1)) or len(set(common)) > 1:
        given = ", ".join(f"rank {s['dp_rank']} of {s['dp_size']} with {s['rows'].shape[0]} samples" for s in states)
        raise CheckpointError(f"these are not the shards of one replay buffer, in rank order: {given or 'none'}")
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
    """The shard of one rank of any layout.

    Args:
        state: The state of the whole buffer (``merge``).
        dp_rank: The rank.
        dp_size: Number of ranks.

    Raises:
        CheckpointError: ``state`` is a shard itself.
        TopologyError: ``dp_size`` does not divide its batches.
    """
    if state["dp_size"] != 1:
        raise CheckpointError(f"this is a shard of the replay buffer (rank {state['dp_rank']} of {state['dp_size']})")
    if not 0 <= dp_rank < dp_size or state["global_batch_size"] % dp_size:
        raise TopologyError(
            f"the batches of {state['global_batch_size']} samples in the saved replay buffer cannot be dealt to "
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
    """The tokens of each sample, as views. Raises CheckpointError when the lengths do not add up."""
    rows, tokens = state["rows"], state["tokens"]
    sizes = rows[:, _NUM_NUMBERS:].clamp(min=0).sum(dim=1).tolist()
    if sum(sizes) != tokens.numel():
        raise CheckpointError(f"the saved replay buffer is damaged: {tokens.numel()} tokens, expected {sum(sizes)}")
    return list(tokens.split(sizes)) if sizes else []


def _decode(state: dict[str, Any]) -> list[Sample]:
    samples = []
    for row, piece in zip(state["rows"].tolist(), _pieces(state), strict=True):
        sequence_id, _, error_position, num_corrections, num_prompt, num_reference, _ = row
        tokens, end = tuple(piece.tolist()), num_prompt + max(0, num_reference)
        samples.append(
            Sample(
                sequence_id,
                tokens[:num_prompt],
                reference_ids=None if num_reference == _NO_REFERENCE else tokens[num_prompt:end],
                response_ids=tokens[end:],
                error_position=error_position,
                num_corrections=num_corrections,
            )
        )
    return samples


def _kept(sample: Sample) -> Sample:
    """What is worth keeping of a sample that was trained on."""
    return replace(sample, prompt="", rollout_ids=None, teacher_hidden=None, pair_mask=())
