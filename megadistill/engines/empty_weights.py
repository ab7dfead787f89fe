"""DeepSpeed partitions a model before its weights are there."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class NothingToCopy(TorchFunctionMode):
    """Spares AutoTP's copies of its slices and ZeRO-3's broadcasts of them, as long as no weight is there.

    Slices are memory that nothing has touched. Otherwise every rank would hold its whole tensor-parallel shard before
    ZeRO-3 has taken it apart, and receive it over the network. Tensors are known by their storages, not by addresses: a
    later tensor may get an address again, on one rank and not on another, which would then broadcast different sizes.

    Args:
        model: The model, whose weights are memory that nothing has touched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._empty: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        for parameter in model.parameters():
            self._add(parameter)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and kwargs.get("copy") and self._is_empty(args[0]):
            made = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[1])
            self._add(made)
            return made
        if func is torch.Tensor.view and args[1:] == (torch.uint8,) and self._is_empty(args[0]):  # to be broadcast
            return torch.empty(0, dtype=torch.uint8, device=args[0].device)
        return func(*args, **kwargs)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._empty[storage._cdata] = storage

    def _is_empty(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        return self._empty.get(storage._cdata) is storage
