"""Safetensors files that are written tensor by tensor, with their checksum taken on the way.

The library's own writer needs all tensors of a file at once and tells no checksum, so files would have to be read back.
The format is 8 bytes of the header's length, a JSON header, and the numbers one after the other
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadistill.files import write_digested

_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, before there are any numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor], **metadata: str
) -> dict[str, Any]:
    """Writes a safetensors file; one tensor is needed at a time.

    Args:
        path: The file.
        entries: What it holds, in this order.
        tensors: The tensors of ``entries``, on the CPU.
        metadata: Further entries of its header.

    Returns:
        Its entry in a manifest.
    """
    return write_digested(path, _blocks(entries, tensors, {"format": "pt", **metadata}))


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, **metadata: str) -> dict[str, Any]:
    """``write_tensors`` of tensors that are there; those of wide types come first, so that all are aligned."""
    items = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in items]
    return write_tensors(path, entries, (tensor for _, tensor in items), **metadata)


def _blocks(
    entries: Sequence[Entry], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for entry, tensor in zip(entries, tensors, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), f"{entry} is {tensor.shape}"
        yield as_bytes(tensor).numpy().data


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor as uint8 [bytes]; a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
