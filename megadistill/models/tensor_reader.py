"""Whole tensors, in files or in memory, read as ``models.shards.ShardReader`` reads the files of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT
from megadistill.models.weight_files import StoredTensor
from megadistill.observability.progress import progress_bar
from megadistill.parallel.node import Node


class TensorReader:
    """Reads runs of a model's parameters, of each tensor no byte more than the run has, and casts no more than them.

    Args:
        tensors: Name of each parameter -> the tensor that it is made of. It may have more rows than the parameter.
        dtype: The type of what is read.
        transposed: Ends of the names of parameters that are stored as [in, out].
        what: What is read, for the progress bar; None: no bar.
        rank: The rank, of which 0 shows the bar.
        node: Where set, ``stream`` reads every tensor once a node and sends it to the node's other ranks.

    Attributes:
        bytes_read: Bytes of the files that this process has read.
    """

    kinds = frozenset({WEIGHT})

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        transposed: tuple[str, ...] = (),
        *,
        what: str | None = None,
        rank: int = 0,
        node: Node | None = None,
    ) -> None:
        self.info: dict[str, Any] = {}
        self.bytes_read = 0
        self._tensors, self._dtype, self._transposed = tensors, dtype, transposed
        self._what, self._rank, self._node = what, rank, node
        self._held: dict[str, Any] = {}  # what stream has received for the others
        self._last: tuple[Any, int, int, torch.Tensor] | None = None

    def stream(self, names: Iterable[str]) -> Iterator[str]:
        """Names in the order in which their tensors lie in the files; while one is out, it is the one to be read.

        Where a node reads once, collective over the node for each name: all its ranks take all names.
        """
        ordered = sorted(names, key=lambda name: self._tensors[name].place)
        total = sum(self._tensors[name].nbytes for name in ordered)
        what, rank = self._what or "", self._rank if self._what is not None else 1
        with progress_bar(description=what, total=total, unit="B", rank=rank) as bar:
            for name in ordered:
                self._held = self._received(name)
                yield name
                self._last, self._held = None, {}
                bar.update(self._tensors[name].nbytes)

    def _received(self, name: str) -> dict[str, Any]:
        if self._node is None:
            return {}
        stored = self._tensors[name]
        whole = None
        if self._node.rank == 0:
            whole = stored.content[:]
            self.bytes_read += stored.nbytes
        return {name: self._node.broadcast(whole, stored.shape, stored.dtype)}

    def read(self, kind: str, name: str, spec: ShardSpec, tp_rank: int, start: int, end: int) -> torch.Tensor:
        """A run of a parameter's shard; of mapped files a view, where nothing has to be cast or moved.

        Args:
            kind: ``weight``.
            name: The parameter.
            spec: How it is sharded where the run is needed.
            tp_rank: The shard.
            start: First element of the run in the flat shard.
            end: One past the last element.
        """
        assert kind in self.kinds
        if self._last is not None:  # AdamW's float32 copy of what has just been read
            what, first, last, run = self._last
            if what == (name, spec, tp_rank) and first <= start and end <= last:
                return run[start - first : end - first]
        columns = torch.Size(spec.shard_shape(tp_rank)[1:]).numel()
        pieces = [self._piece(name, spec, tp_rank, rows, between) for rows, between in _rectangles(start, end, columns)]
        run = pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0, dtype=self._dtype), *pieces])
        self._last = ((name, spec, tp_rank), start, end, run)
        return run

    def _piece(
        self, name: str, spec: ShardSpec, tp_rank: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> torch.Tensor:
        """A rectangle of a shard, flat."""
        row_ranges = list(spec.whole_ranges(tp_rank, 0, *rows))
        column_ranges = list(spec.whole_ranges(tp_rank, 1, *columns))
        if len(row_ranges) == len(column_ranges) == 1:
            return self._cut(name, row_ranges[0], column_ranges[0]).to(self._dtype).reshape(-1)
        piece = torch.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype=self._dtype)
        top = 0
        for row_range in row_ranges:
            bottom, left = top + row_range[1] - row_range[0], 0
            for column_range in column_ranges:
                right = left + column_range[1] - column_range[0]
                cut = self._cut(name, row_range, column_range)
                piece[top:bottom, left:right] = cut.view(cut.shape[0], -1)
                left = right
            top = bottom
        return piece.reshape(-1)

    def _cut(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """A rectangle of a whole parameter, as it is stored."""
        stored = self._tensors[name]
        content = self._held.get(name, stored.content)
        if len(stored.shape) == 1:
            cut = content[slice(*rows)]
        elif name.endswith(self._transposed):
            cut = content[slice(*columns), slice(*rows)].t()
        else:
            cut = content[slice(*rows), slice(*columns)]
        if name not in self._held:
            self.bytes_read += cut.nbytes
        return torch.as_tensor(cut)


def _rectangles(start: int, end: int, columns: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The elements [start, end) of a flat matrix as rectangles: the rest of a row, whole rows, the start of a row."""
    while start < end:
        row, column = divmod(start, columns)
        if column == 0 and end - start >= columns:
            last = end // columns
            yield (row, last), (0, columns)
            start = last * columns
        else:
            stop = min(columns, column + end - start)
            yield (row, row + 1), (column, stop)
            start += stop - column
