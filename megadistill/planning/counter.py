"""Counts what code uses while it runs: live bytes by owner, FLOPs, dispatched operations, collective calls.

``Counting`` is a TorchDispatchMode, so it sees every operation below autograd, those of DeepSpeed and of backward
passes too. Memory is live storage, rounded as CUDA's allocator rounds it: what ``torch.cuda.memory_allocated`` says.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.planning.flops import count_flops
from megadistill.planning.owners import OTHER, owner_of_frame
from megadistill.planning.tensors import tensors_in
from megadistill.planning.traffic import Groups, call_of
from megadistill.planning.use import PHASES, Group, PhaseUse, Traffic

# What CUDA's caching allocator rounds a block up to.
_BLOCK_BYTES = 512
# Smaller storages have no owner of their own: asking for one walks the stack.
_OWNED_BYTES = 2**14
# Not views by their schema, but no launch on a GPU either.
_NO_LAUNCH = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift", "lift_fresh")
    + ("resize_", "set_")
)


@dataclass
class Tally:
    """Calls and operations of a stretch of code.

    Attributes:
        flops: Floating-point operations of products and attention.
        operations: Dispatched operations, without views and allocations.
        traffic: (group, collective) -> [calls, bytes].
    """

    flops: int = 0
    operations: int = 0
    traffic: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, other: Tally, sign: int = 1) -> None:
        """Adds (or subtracts, with ``sign`` -1) what another stretch did."""
        self.flops += sign * other.flops
        self.operations += sign * other.operations
        for key, (calls, num_bytes) in other.traffic.items():
            mine = self.traffic[key]
            mine[0], mine[1] = mine[0] + sign * calls, mine[1] + sign * num_bytes

    def copy(self) -> Tally:
        """An independent copy."""
        copied = Tally()
        copied.add(self)
        return copied

    def same_calls(self, other: Tally) -> bool:
        """Whether both made the same numbers of operations and the same collective calls."""
        return self.operations == other.operations and _busy(self.traffic) == _busy(other.traffic)


@dataclass
class _Phase:
    tally: Tally = field(default_factory=Tally)
    peak: int = 0
    owners: dict[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    size: int
    owner: str


class Counter:
    """What has been counted so far, phase by phase.

    Args:
        groups: Names the groups of collectives; None before there are any.

    Attributes:
        live: Bytes alive.
        tally: What has been counted since the start, for ``Tally`` differences.
    """

    def __init__(self, groups: Groups | None = None) -> None:
        self.live, self.tally, self.groups = 0, Tally(), groups
        self._blocks: dict[int, _Block] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._owners: dict[str, int] = defaultdict(int)
        self._phases: dict[str, _Phase] = {}
        self._waiting = _Phase()  # what happens before a phase is that phase's
        self._current = self._waiting
        self._is_in_phase = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block, and what has happened since the phase before it, as phase ``name`` of ``PHASES``.

        Other names are no phases: what happens in them belongs to the next one.
        """
        if name not in PHASES or self._is_in_phase:
            yield
            return
        found = self._phases.setdefault(name, _Phase())
        _merge(found, self._waiting)
        self._current, self._is_in_phase = found, True
        self._note_peak()
        try:
            yield
        finally:
            self._waiting = self._current = _Phase()
            self._is_in_phase = False
            self._note_peak()

    def start(self) -> None:
        """Forgets all phases, not what is alive."""
        self._phases.clear()
        self._waiting = self._current = _Phase()
        self._note_peak()

    def phases(self) -> tuple[PhaseUse, ...]:
        """The phases since ``start``; what came after the last one is counted to it."""
        used = [name for name in PHASES if name in self._phases]
        if used and not self._is_in_phase:
            _merge(self._phases[used[-1]], self._waiting)
            self._waiting = self._current = _Phase()
        return tuple(_phase_use(name, self._phases[name]) for name in used)

    def owners(self) -> dict[str, int]:
        """Owner -> bytes alive now."""
        return {owner: size for owner, size in self._owners.items() if size}

    def own(self, tensors: Iterable[Any], owner: str) -> None:
        """Names the owner of tensors that are alive."""
        for tensor in tensors:
            block = self._blocks.get(_key_of(tensor)[0]) if isinstance(tensor, torch.Tensor) else None
            if block is not None:
                self._owners[block.owner] -= block.size
                block.owner = owner
                self._owners[owner] += block.size

    def count(self, flops: int, operations: int) -> None:
        """Counts operations that were made."""
        for tally in (self.tally, self._current.tally):
            tally.flops += flops
            tally.operations += operations

    def count_call(self, group: str, op: str, num_bytes: int) -> None:
        """Counts a collective call."""
        for tally in (self.tally, self._current.tally):
            entry = tally.traffic[group, op]
            entry[0], entry[1] = entry[0] + 1, entry[1] + num_bytes

    def repeat(self, made: Tally, sign: int = 1) -> None:
        """Counts a stretch that was made before once more (or takes it back, with ``sign`` -1)."""
        self.tally.add(made, sign)
        self._current.tally.add(made, sign)

    def since(self, before: Tally) -> Tally:
        """What was counted since ``before``, a copy of ``tally``."""
        made = self.tally.copy()
        made.add(before, -1)
        return made

    def track(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage for as long as it is alive."""
        key, holder, num_bytes = _key_of(tensor)
        if num_bytes == 0 or key in self._blocks:
            return
        size = _rounded(num_bytes)
        block = _Block(size, owner_of_frame(sys._getframe(2)) if size >= _OWNED_BYTES else OTHER)
        self._blocks[key] = block
        self._references[key] = weakref.ref(holder, lambda _: self._free(key))
        self.live += size
        self._owners[block.owner] += size
        if self.live > self._current.peak:
            self._note_peak()

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Does not count a tensor's storage, which is in another memory."""
        key, holder, _ = _key_of(tensor)
        self.resize(key, 0)
        if key not in self._blocks:
            self._blocks[key] = _Block(0, OTHER)
            self._references[key] = weakref.ref(holder, lambda _: self._free(key))

    def resize(self, key: int, num_bytes: int) -> None:
        """A storage, named by its ``_cdata``, was given other bytes."""
        block = self._blocks.get(key)
        if block is None:
            return
        grown = _rounded(num_bytes) - block.size
        block.size += grown
        self.live += grown
        self._owners[block.owner] += grown
        if self.live > self._current.peak:
            self._note_peak()

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        del self._references[key]
        self.live -= block.size
        self._owners[block.owner] -= block.size

    def _note_peak(self) -> None:
        if self.live >= self._current.peak:
            self._current.peak, self._current.owners = self.live, dict(self._owners)


def _busy(traffic: Mapping[Any, list[int]]) -> dict[Any, list[int]]:
    return {key: entry for key, entry in traffic.items() if any(entry)}


def _merge(into: _Phase, other: _Phase) -> None:
    into.tally.add(other.tally)
    if other.peak > into.peak:
        into.peak, into.owners = other.peak, other.owners


def _phase_use(name: str, phase: _Phase) -> PhaseUse:
    traffic = (
        Traffic(cast(Group, group), op, calls, num_bytes)
        for (group, op), (calls, num_bytes) in sorted(phase.tally.traffic.items())
        if calls
    )
    owners = {owner: size for owner, size in sorted(phase.owners.items()) if size}
    return PhaseUse(name, phase.peak, owners, phase.tally.flops, phase.tally.operations, tuple(traffic))


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _key_of(tensor: torch.Tensor) -> tuple[int, Any, int]:
    """What stands for the tensor's memory, an object that lives as long as it, and its bytes."""
    if tensor.layout != torch.strided:  # oneDNN's own layout has no storage
        return id(tensor), tensor, tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage._cdata, storage, storage.nbytes()


_is_launch: dict[Any, bool] = {}


def is_view(func: Any) -> bool:
    """Whether an operation gives another view of its input's memory."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _launches(func: Any) -> bool:
    known = _is_launch.get(func)
    if known is None:
        known = _is_launch[func] = not is_view(func) and func._schema.name.split("::")[1] not in _NO_LAUNCH
    return known


_composite: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    known = _composite.get(func)
    if known is None:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        known = _composite[func] = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return known


class Counting(TorchDispatchMode):
    """Counts what runs in its context; this class runs it for real.

    Args:
        counter: Where it is counted.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what tensors answer here must be the truth
            if func.namespace == "c10d":
                return self._collective(func, args, kwargs)
            if _is_composite(func):  # autograd takes it apart before it comes here, inference mode does not
                with self:
                    return func.decompose(*args, **kwargs)
            out = self.compute(func, args, kwargs)
            self.counter.count(count_flops(func, args, kwargs, out), int(_launches(func)))
            for tensor in tensors_in(out):
                self.counter.track(tensor)
            return out

    def compute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result."""
        return func(*args, **kwargs)

    def communicate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The collective's result."""
        return func(*args, **kwargs)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = call_of(func, args)
        if call is not None and self.counter.groups is not None:
            self.counter.count_call(self.counter.groups.name_of(call.group), call.op, call.num_bytes)
        return self.communicate(func, args, kwargs)
