"""Operations that decoding a token dispatches: on a GPU each is about one kernel, anywhere it is a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.decoding.sampling import Drawer, Sampling

if TYPE_CHECKING:
    from megadistill.decoding.decoder import PlanDecoder


class TokenOperations(NamedTuple):
    """Operations of one token: in each layer, outside of the layers, and from its hidden state to the next token."""

    layer: int
    outside: int
    sampling: int


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy; views and new memory are no operations.

    Attributes:
        counted: Operations by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # an operation that is made of others counts as those
            found = func.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        returned = [returns.alias_info for returns in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.counted[name] += 1
        return found


def token_operations(make: Callable[[int], PlanDecoder], sampling: Sampling) -> TokenOperations:
    """The operations of a token whose examples have prompts of unequal length.

    Args:
        make: A decoder with so many layers.
        sampling: How tokens are drawn.
    """
    prompts = ((5, 6, 7, 8), (5, 6))
    width = len(prompts[0])
    totals = []
    for num_layers in (1, 2):
        decoder = make(num_layers)
        tokens = torch.tensor([5, 6], device=decoder.device)
        state = decoder.new_state([width - len(prompt) for prompt in prompts], width + 2)
        decoder.prefill(state, prompts)
        decoder.decode(state, tokens, width)  # what is made once for many tokens
        with Operations() as operations:
            hidden = decoder.decode(state, tokens, width + 1)
        totals.append(operations.counted.total())
    numbers = torch.tensor([0.3, 0.6], dtype=torch.float64, device=decoder.device)
    drawer = Drawer(decoder.shard, sampling, len(prompts))
    drawer(decoder.logits(hidden), numbers)
    with Operations() as operations:
        drawer(decoder.logits(hidden), numbers)
    layer = totals[1] - totals[0]
    return TokenOperations(layer, totals[0] - layer, operations.counted.total())
