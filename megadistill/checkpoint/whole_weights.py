"""``hf/`` of a checkpoint, written by all ranks at once: each brings together its share of whole parameters.

What ranks hold are runs of tensor-parallel shards. Writing those into shared files would be many small pieces side by
side from several machines, and no rank could tell a file's checksum. So the ranks exchange runs first, in the type that
is written, and every file has one writer, which takes its checksum while it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megadistill.checkpoint.hf_files import HFFile, plan_files
from megadistill.engines.student import Student
from megadistill.models.adapter_files import ADAPTER_WEIGHTS, PREFIX
from megadistill.models.loading import LoadedModel
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import MASTER
from megadistill.models.tensor_file import Entry, as_bytes, write_tensors
from megadistill.parallel.context import ParallelContext

_ROUND_BYTES = 64 << 20  # of what a rank takes in one exchange, unless one parameter is larger


class Run(NamedTuple):
    """A run of the flat tensor-parallel shard number ``tp_rank``, from element ``start`` on."""

    tp_rank: int
    start: int
    numbers: torch.Tensor


def exported_names(loaded: LoadedModel) -> dict[str, str]:
    """Name of each tensor of ``hf/`` -> the parameter that it is; of a model with adapters theirs alone, as in peft."""
    if loaded.lora is not None:
        return {PREFIX + name: name for name in loaded.lora.names}
    return {loaded.family.stored_name(name): name for name in loaded.shapes}


def exported_entries(loaded: LoadedModel, dtype: torch.dtype) -> list[Entry]:
    """The tensors of a student's Hugging Face folder: the family's layout, with the padded rows of the loaded model."""
    family, removed, entries = loaded.family, loaded.removed_rows, []
    for stored, name in exported_names(loaded).items():
        whole = torch.empty(loaded.shapes[name], device="meta")
        rows, *rest = family.export(name, whole).shape
        entries.append(Entry(stored, (rows + (len(removed[name]) if name in removed else 0), *rest), dtype))
    return entries


def _files(loaded: LoadedModel, dtype: torch.dtype, num_ranks: int) -> list[HFFile]:
    entries = exported_entries(loaded, dtype)
    return plan_files(entries, num_ranks) if loaded.lora is None else [HFFile(ADAPTER_WEIGHTS, 0, tuple(entries))]


class WholeWeights:
    """Makes whole parameters of what the ranks hold.

    Args:
        student: The student.
        context: Ranks and groups.

    Attributes:
        files: The files of ``hf/``, the same on all ranks.
    """

    def __init__(self, student: Student, context: ParallelContext) -> None:
        self._student, self._context = student, context
        self._dtype = next(student.module.parameters()).dtype
        self.files = _files(student.loaded, self._dtype, context.world_size)
        self._parameters = exported_names(student.loaded)
        self._rounds = [_rounds(self.files, rank, self._parameters) for rank in range(context.world_size)]
        # Of each rank: parameter -> (start, number of elements) of its run.
        self._held: list[dict[str, tuple[int, int]]] | None = None

    def collect(self, snapshot: Mapping[str, tuple[int, torch.Tensor]]) -> Share:
        """Brings this rank's share to host memory.

        Collective over the world: one all-to-all for every 64 MiB of a rank's share; once, an object all-gather of who
        holds what. None in a world of one.

        Args:
            snapshot: ``Student.snapshot()``: a world of one needs nothing else.
        """
        context, loaded = self._context, self._student.loaded
        files = [file for file in self.files if file.rank == context.rank]
        runs: dict[str, list[Run]] = {self._parameters[entry.name]: [] for file in files for entry in file.entries}
        if context.world_size == 1:
            runs = {name: [Run(0, *snapshot[f"{MASTER}/{name}"])] for name in runs}
        else:
            with self._student.state_present():
                self._exchange(runs)
        return Share(files, runs, loaded, self._parameters, self._student.shard_specs)

    @torch.no_grad()
    def _exchange(self, runs: dict[str, list[Run]]) -> None:
        context, dtype = self._context, self._dtype
        own = {part.name: part for part in self._student.parts_to_write()}
        if self._held is None:
            self._held = context.gather_objects({name: (part.start, part.numel) for name, part in own.items()})
        for number in range(max(map(len, self._rounds))):
            wanted = [rounds[number] if number < len(rounds) else [] for rounds in self._rounds]
            given = [[own[name].tensors[MASTER] for name in names if name in own] for names in wanted]
            flat = [tensor.to(context.device, dtype) for tensors in given for tensor in tensors]
            mine = wanted[context.rank]
            taken = [sum(held[name][1] for name in mine if name in held) for held in self._held]
            received = context.exchange(
                as_bytes(torch.cat([torch.empty(0, dtype=dtype, device=context.device), *flat])),
                [dtype.itemsize * sum(tensor.numel() for tensor in tensors) for tensors in given],
                [dtype.itemsize * numel for numel in taken],
            )
            rest = received.cpu().view(dtype)
            for rank, held in enumerate(self._held):
                for name in mine:
                    if name in held:
                        start, numel = held[name]
                        numbers, rest = rest[:numel], rest[numel:]
                        runs[name].append(Run(rank % context.tp_size, start, numbers))


class Share(NamedTuple):
    """The files that one rank writes, and the runs that their tensors are made of; nothing of it communicates."""

    files: Sequence[HFFile]
    runs: Mapping[str, Sequence[Run]]
    loaded: LoadedModel
    parameters: Mapping[str, str]
    specs: Mapping[str, ShardSpec]

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Writes the files into an existing folder; returns the entry of each in a manifest."""
        return {file.name: write_tensors(folder / file.name, file.entries, self._tensors(file)) for file in self.files}

    def _tensors(self, file: HFFile) -> Iterator[torch.Tensor]:
        family, removed = self.loaded.family, self.loaded.removed_rows
        for entry in file.entries:
            name = self.parameters[entry.name]
            tensor = whole(self.specs[name], self.runs[name])
            tensor = family.export(name, tensor).to(entry.dtype)
            rows = removed.get(name)
            yield tensor if rows is None else torch.cat([tensor, rows.to(tensor)])


def whole(spec: ShardSpec, runs: Sequence[Run]) -> torch.Tensor:
    """A whole parameter.

    Args:
        spec: How it is sharded.
        runs: All runs of all shards, in any order.
    """
    shards = []
    for tp_rank in range(max(1, len(spec.sizes))):
        mine = sorted((run for run in runs if run.tp_rank == tp_rank), key=lambda run: run.start)
        end = 0
        for run in mine:
            assert run.start == end, f"elements {end} to {run.start} of shard {tp_rank} are in no rank's runs"
            end += run.numbers.numel()
        shape = spec.shard_shape(tp_rank)
        assert end == torch.Size(shape).numel(), f"shard {tp_rank} has {end} elements, expected shape {shape}"
        numbers = [run.numbers for run in mine]
        if numbers:
            shards.append((numbers[0] if len(numbers) == 1 else torch.cat(numbers)).view(shape))
    return spec.unshard(shards)


def _rounds(files: Sequence[HFFile], rank: int, parameters: Mapping[str, str]) -> list[list[str]]:
    """The parameters that a rank writes, cut into what it takes at a time."""
    rounds: list[list[str]] = []
    size = 0
    for entry in (entry for file in files if file.rank == rank for entry in file.entries):
        if not rounds or size + entry.bytes > _ROUND_BYTES:
            rounds.append([])
            size = 0
        rounds[-1].append(parameters[entry.name])
        size += entry.bytes
    return rounds
