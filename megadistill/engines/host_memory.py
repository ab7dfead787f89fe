"""Tensors that wait in host memory: their storage on the device is freed while nobody uses them.

Storages, not tensors, are emptied and filled again, so every view of them (DeepSpeed holds many) is right afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch


class HostMemory:
    """Keeps storages in host memory (pinned, where the device is a GPU) except while they are used. No communication.

    Args:
        tensors: Gives the tensors whose storages wait. Those that are new are taken when the last user is done.
        writable: Users change the tensors, so that they are copied back each time; else once.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, writable: bool) -> None:
        self._tensors, self._writable = tensors, writable
        self._copies: dict[int, _Copy] = {}
        self._users: Counter[int] = Counter()
        self._send_out()

    @contextmanager
    def present(self, tensors: Sequence[torch.Tensor] | None = None) -> Iterator[None]:
        """The tensors may be used, by any number of users at a time.

        Args:
            tensors: Which of them; others are ignored. None: all.
        """
        keys = list(self._copies) if tensors is None else list({_key(tensor) for tensor in tensors} & set(self._copies))
        for key in keys:
            if not self._users[key]:
                self._copies[key].bring_in()
            self._users[key] += 1
        try:
            yield
        finally:
            for key in keys:
                self._users[key] -= 1
            self._send_out()

    @property
    def num_bytes(self) -> int:
        """What waits in host memory while nothing is used."""
        return sum(copy.num_bytes for copy in self._copies.values())

    def _send_out(self) -> None:
        if self._writable or not self._copies:
            for tensor in self._tensors():
                if tensor.numel():
                    self._copies.setdefault(_key(tensor), _Copy(tensor))
        for key, copy in self._copies.items():
            if not self._users[key]:
                copy.send_out(self._writable)


class _Copy:
    """A storage of the device and its copy in host memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage, self._dtype, self._device = tensor.untyped_storage(), tensor.dtype, tensor.device
        self.num_bytes = self._storage.nbytes()
        self._host: torch.Tensor | None = None

    def bring_in(self) -> None:
        assert self._host is not None
        self._storage.resize_(self.num_bytes)
        self._whole().copy_(self._host, non_blocking=True)  # later work of the stream waits for it

    def send_out(self, is_changed: bool) -> None:
        if self._storage.nbytes() == 0:
            return
        if self._host is None:
            self._host = host_buffer(self.num_bytes // self._dtype.itemsize, self._dtype, self._device)
            is_changed = True
        if is_changed:
            self._host.copy_(self._whole())  # waits: the storage is freed next
        self._storage.resize_(0)

    def _whole(self) -> torch.Tensor:
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        return empty.set_(self._storage, 0, (self.num_bytes // self._dtype.itemsize,), (1,))


def host_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory [numel] from which ``device`` is filled: pinned for a GPU."""
    return torch.empty(numel, dtype=dtype, pin_memory=device.type == "cuda")


def _key(tensor: torch.Tensor) -> int:
    """Stands for the storage of a tensor, whether it is emptied or not."""
    return int(tensor.untyped_storage()._cdata)
