"""A dry run of real code: shapes are right, integers are real, floats mean nothing.

Under ``Ghost`` no product is computed. A float tensor of more than one element has memory that nobody touches, so a
model of any size costs address space alone. What code may decide by stays sound: integers and booleans are computed,
single numbers are, and a comparison answers as if every float were 1, which is finite. Shapes come from torch's own
kernels for the device "meta", once per kind of call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from megadistill.errors import MegadistillError
from megadistill.planning.counter import Counter, Counting, is_view
from megadistill.planning.flops import packed_weight
from megadistill.planning.tensors import tensors_in

_aten = torch.ops.aten
# Float storages up to this many elements have contents: factories fill them, so that numbers can be read from them.
_FILLED = 4096
_FACTORIES = frozenset(("zeros", "ones", "full", "rand", "randn"))
_PLAIN_WRITES = frozenset((_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default, _aten.copy_.default))
_STORAGE_WRITES = frozenset(("aten::set_", "aten::resize_"))
# Give their input's memory, which their schemas do not say.
_HIDDEN_VIEWS = frozenset(("aten::_unsafe_view", "aten::lift", "aten::lift_fresh"))
_DATA_DEPENDENT = frozenset(("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"))
_PLACES = frozenset(("aten::searchsorted", "aten::bucketize"))
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Ghost(Counting):
    """Counts what runs in its context without computing floats.

    Collectives go to the process group as they are, which should be torch's "fake" one; integers that every rank would
    contribute are taken to be equal on all of them.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__(counter)
        self._layouts: dict[Any, list[_Layout | None]] = {}
        self._kinds: dict[Any, _Kind] = {}

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result, floats left out."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _Kind(func)
        if kind.is_view or kind.writes_storage:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return _number(args[0])
        tensors = list(tensors_in(*args, *kwargs.values()))
        if not tensors:
            return _created(func, kind, args, kwargs)
        if not any(map(is_ghost, tensors)):
            return func(*args, **kwargs)
        if kind.written:
            return _written(func, kind, args, kwargs)
        if kind.name in _DATA_DEPENDENT:
            raise MegadistillError(f"a dry run cannot know the result of {kind.name}, which depends on floats")
        return self._unknown(func, kind, args, kwargs)

    def communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The collective, with this rank's integers in the place of the other ranks'."""
        inputs = list(tensors_in(args[1])) if len(args) > 1 else []
        if len(inputs) == 1 and not is_ghost(inputs[0]) and inputs[0].numel():
            for out in tensors_in(args[0]):
                if out.numel() % inputs[0].numel() == 0:
                    out.view(-1, inputs[0].numel()).copy_(inputs[0].reshape(1, -1))
        # The fake group copies what is gathered, which would touch the memory of ghosts: it gets none of it.
        hollow = tree_map(lambda x: x.new_empty(0) if isinstance(x, Tensor) and is_ghost(x) else x, args)
        result = func(*hollow, **kwargs)
        return (args[0], *result[1:]) if isinstance(result, tuple) else result

    def _unknown(self, func: Any, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """New tensors of the right shapes."""
        if func is _aten.index.Tensor:
            args = (args[0], _integer_indices(args[1]), *args[2:])
        key = _signature(func, args, kwargs)
        layouts = None if key is None else self._layouts.get(key)
        if layouts is None:
            layouts, is_single = _infer(kind, func, args, kwargs)
            kind.is_single = is_single
            if key is not None:
                self._layouts[key] = layouts
        truth = kind.is_pointwise and any(layout is not None and layout[2] == torch.bool for layout in layouts)
        # Code that looks for a place may take one from it: 1 is a place, with something before it.
        value = _answer(func, args, kwargs) if truth else int(kind.name in _PLACES)
        outs = [None if layout is None else _new(layout, value) for layout in layouts]
        return outs[0] if kind.is_single else outs if kind.gives_list else tuple(outs)


class _Kind:
    """What an operation's schema says of it."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name: str = schema.name
        self.short = schema.name.split("::")[1]
        self.is_view = is_view(func) or self.name in _HIDDEN_VIEWS
        self.writes_storage = schema.name in _STORAGE_WRITES
        names = [a.name for a in schema.arguments]
        self.written = [(i, names[i]) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        self.num_returns = len(schema.returns)
        self.is_pointwise = torch.Tag.pointwise in func.tags
        self.gives_list = self.num_returns == 1 and "[]" in str(schema.returns[0].type)
        self.is_single = True


def is_ghost(tensor: Tensor) -> bool:
    """Whether the tensor's contents mean nothing."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if tensor.layout != torch.strided:
        return True
    return tensor.numel() != 1 or tensor.untyped_storage().nbytes() > tensor.element_size()


def _number(tensor: Tensor) -> Any:
    """A single element as Python's number; a float is finite."""
    if tensor.is_floating_point() and tensor.untyped_storage().nbytes() > _FILLED * tensor.element_size():
        return 1.0
    value: Any = tensor.reshape(()).tolist()
    return 1.0 if tensor.is_floating_point() and not math.isfinite(value) else value


def _created(func: Any, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A factory's tensor; large floats are not written to."""
    if kind.short not in _FACTORIES or math.prod(args[0]) <= _FILLED:
        return func(*args, **kwargs)
    filled_with = args[1] if kind.short == "full" else 0.0
    dtype = kwargs.get("dtype") or (torch.get_default_dtype() if isinstance(filled_with, float) else torch.int64)
    is_float = dtype.is_floating_point or dtype.is_complex
    return torch.empty(args[0], dtype=dtype) if is_float else func(*args, **kwargs)


def _written(func: Any, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place or with ``out=``: what is written keeps its contents, but for plain writes to small tensors."""
    targets = [args[i] if i < len(args) else kwargs.get(name) for i, name in kind.written]
    if func in _PLAIN_WRITES and args[0].untyped_storage().nbytes() <= _FILLED * args[0].element_size():
        return func(*args, **kwargs)
    for target in tensors_in(*targets):
        if target.is_floating_point() and not is_ghost(target):
            target.fill_(1.0)
    if kind.num_returns == 0:
        return None
    return targets[0] if kind.num_returns == 1 else tuple(targets)


def _infer(kind: _Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[_Layout | None], bool]:
    """Shapes, strides and types of the results, and whether it is one tensor."""
    if kind.name == "mkldnn::_linear_pointwise":
        shape = (*args[0].shape[:-1], packed_weight(args).shape[0])
        out: Any = torch.empty(shape, dtype=args[0].dtype, device="meta")
    elif kind.name == "mkldnn::_reorder_linear_weight":
        out = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
    else:
        kwargs = {name: torch.device("meta") if isinstance(x, torch.device) else x for name, x in kwargs.items()}
        out = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
    outs = [out] if isinstance(out, Tensor) else list(out)
    # A gradient that nothing needs is None.
    layouts = [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in outs]
    return layouts, isinstance(out, Tensor)


def _meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _new(layout: _Layout, value: int) -> Tensor:
    shape, stride, dtype = layout
    made = torch.empty_strided(shape, stride, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return made.fill_(1.0) if made.numel() <= _FILLED else made
    return made.fill_(value)


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What a comparison says where every float is 1; False where it also asks about tensors of integers."""

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if is_ghost(x):
            return torch.ones((), dtype=x.dtype)
        if x.numel() != 1:
            raise _Unanswered
        return x.reshape(())

    try:
        return int(func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs)))
    except _Unanswered:
        return 0


class _Unanswered(Exception):
    pass


def _integer_indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks replaced by the places where they are true: the number of these decides the shape of the result."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _signature(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides the shapes of a result; None where something of it cannot be a key."""

    def of(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.shape, x.stride(), x.dtype
        if isinstance(x, list | tuple):
            return tuple(map(of, x))
        return x if x is None else (type(x), x)  # True is not 1

    key = (func, tuple(map(of, args)), tuple((name, of(x)) for name, x in kwargs.items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key
