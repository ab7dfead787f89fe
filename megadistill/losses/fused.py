"""What every chunked loss shares: the tokens that count, the chunks, and gradients computed in the forward pass.

With a large vocabulary, a [T, Vs] tensor of logits that is held until the backward pass exhausts the memory. A scalar
loss needs no such tensor: the gradient of a chunk is known as soon as the chunk is, and only has to be scaled later.
Suffixes: T tokens that count, C tokens of one chunk, H hidden size, Vs this rank's classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megadistill import IGNORE_INDEX
from megadistill.config.loss import LossConfig
from megadistill.errors import ConfigError, DataError
from megadistill.losses.head import Head, LogitsProjector
from megadistill.parallel.collectives import Group, all_reduce_max, all_reduce_sum
from megadistill.parallel.vocab import VocabShard

# Elements of one [C, Vs] tile under chunk_tokens="auto": enough tokens for matrix products at full speed. Two or three
# tiles exist at once. A tile never takes more than one part in _MEMORY_PARTS of the memory.
_TILE_ELEMENTS_CPU = 2**23
_TILE_ELEMENTS_ACCELERATOR = 2**27
_MEMORY_PARTS = 64
_MIN_CHUNK, _MAX_CHUNK = 16, 4096

Normalizer = int | float | Tensor


def check_shard(shard: VocabShard) -> None:
    """Raises ConfigError for a slice of a vocabulary without the process group that holds the rest."""
    if shard.group is None and shard.size != shard.total:
        raise ConfigError(
            f"a vocabulary shard [{shard.start}, {shard.stop}) of {shard.total} classes needs its process group"
        )


def check_labels(labels: Tensor) -> None:
    """Raises ValueError for labels that are not int64 [T]."""
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape [T], got {labels.dtype} {tuple(labels.shape)}")


def check_weights(weights: Tensor | None, num_tokens: int) -> None:
    """Raises ValueError for weights that are not one number a token."""
    if weights is not None and weights.shape != (num_tokens,):
        raise ValueError(f"token_weights must have shape ({num_tokens},), got {tuple(weights.shape)}")


def check_skews(skews: Tensor | None, num_tokens: int, config: LossConfig) -> None:
    """Raises ValueError for skews that are not one number a token, or that the divergence does not have."""
    if skews is None:
        return
    if skews.shape != (num_tokens,):
        raise ValueError(f"skews must have shape ({num_tokens},), got {tuple(skews.shape)}")
    if not config.is_skewed:
        raise ValueError(f"skews are for skewed divergences, not for loss.divergence={config.divergence}")


def weights_of(weights: Tensor | None, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factors of the tokens at these positions, where any are given."""
    return None if weights is None else weights[positions].to(dtype)


def valid_positions(labels: Tensor, total: int) -> Tensor:
    """Positions whose label is not ignored. Raises DataError for a label outside the vocabulary."""
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    if len(positions):
        lowest, highest = (int(label) for label in labels[positions].aminmax())
        if lowest < 0 or highest >= total:
            wrong = lowest if lowest < 0 else highest
            raise DataError(f"label {wrong} is not a class: allowed are 0 to {total - 1}, and {IGNORE_INDEX} to ignore")
    return positions


def chunk_size(chunk_tokens: int | Literal["auto"], shard: VocabShard, device: torch.device) -> int:
    """Tokens of a chunk, the same on all ranks of ``shard.group``, which call a collective per chunk.

    "auto" depends on the widest shard and the memory; one all-reduce of one number gives all ranks the smallest value.

    Raises:
        ConfigError: ``chunk_tokens`` is not a positive integer or "auto".
    """
    if chunk_tokens != "auto":
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ConfigError(f"loss.chunk_tokens={chunk_tokens!r} must be 'auto' or an integer >= 1")
        return chunk_tokens
    widest = -(-shard.total // shard.tp_size)
    size = auto_chunk_size(widest, is_cpu=device.type == "cpu", memory=_total_memory(device))
    if shard.group is None:
        return size
    return -int(all_reduce_max(torch.tensor(-size, device=device), shard.group))


def auto_chunk_size(widest: int, *, is_cpu: bool, memory: int) -> int:
    """Tokens of a chunk on a device.

    Args:
        widest: Classes of the widest shard.
        is_cpu: The device is a CPU.
        memory: Its bytes.
    """
    elements = _TILE_ELEMENTS_CPU if is_cpu else _TILE_ELEMENTS_ACCELERATOR
    elements = min(elements, memory // (_MEMORY_PARTS * 4))
    return min(max(elements // max(1, widest), _MIN_CHUNK), _MAX_CHUNK)


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def chunks(num_tokens: int, size: int, halo: int = 0) -> Iterator[tuple[slice, int]]:
    """Chunks of ``size`` tokens, each with up to ``halo`` tokens before it: (slice with the halo, size of the halo)."""
    for begin in range(0, num_tokens, size):
        num_halo = min(halo, begin)
        yield slice(begin - num_halo, min(begin + size, num_tokens)), num_halo


def inverse_count(count: Normalizer, device: torch.device) -> Tensor:
    """The inverse of a count as a float64 scalar on the device; 0 for a count of 0.

    Raises:
        ValueError: ``count`` is not one finite number >= 0.
    """
    is_wrong = not isinstance(count, int | float | Tensor) or (isinstance(count, Tensor) and count.numel() != 1)
    if is_wrong or (not isinstance(count, Tensor) and not 0 <= count < float("inf")):
        raise ValueError(f"num_tokens and num_pairs must be counts: one finite number >= 0, got {count!r}")
    number = torch.as_tensor(count, dtype=torch.float64, device=device).detach().reshape(())
    return torch.where(number > 0, 1.0 / number, 0.0)


def bias_shifts(heads: Sequence[Head], group: Group) -> list[Tensor | None]:
    """The largest bias of each head, None without one. Where there is a bias: one all-reduce of a number per head."""
    is_shifted = [head.bias is not None and head.logit_map.cap is None for head in heads]  # a cap sees the bias
    if not any(is_shifted):
        return [None] * len(heads)
    device = heads[0].hidden.device
    largest = torch.full((len(heads),), -torch.inf, dtype=torch.float64, device=device)
    for i, head in enumerate(heads):
        if head.bias is not None and len(head.bias):
            largest[i] = head.bias.detach().max()
    largest = all_reduce_max(largest, group)
    return [largest[i] if shifted else None for i, shifted in enumerate(is_shifted)]


class StudentGradients:
    """Gradients of one head, in the dtype of the loss.

    Args:
        head: The head.
        wanted: Which of (hidden, weight, bias) need a gradient; that of the others is None and costs nothing.
    """

    def __init__(self, head: LogitsProjector, wanted: tuple[bool, bool, bool]) -> None:
        self._head = head
        sources = (head.hidden_TH, head.weight_VsH, head.bias_Vs)
        self.hidden_TH, self.weight_VsH, self.bias_Vs = (
            torch.zeros_like(source, dtype=head.dtype) if want and source is not None else None
            for source, want in zip(sources, wanted, strict=True)
        )
        head.keeps_slope = self.is_wanted and not head.is_plain

    @property
    def is_wanted(self) -> bool:
        """Whether any part needs a gradient."""
        return any(part is not None for part in (self.hidden_TH, self.weight_VsH, self.bias_Vs))

    def add(self, chunk: slice, gradient_CVs: Tensor) -> None:
        """Adds a chunk's contribution, given the derivative by its logits, whose storage is reused."""
        head = self._head
        if head.keeps_slope:
            gradient_CVs = gradient_CVs.mul_(head.slope)
        if self.bias_Vs is not None:
            self.bias_Vs += gradient_CVs.sum(0)
        factor_CVs = gradient_CVs.to(head.hidden_TH.dtype)
        if self.hidden_TH is not None:
            head.add_product(self.hidden_TH[chunk], factor_CVs, head.weight_VsH)
        if self.weight_VsH is not None:
            head.add_product(self.weight_VsH, factor_CVs.T, head.hidden_TH[chunk])

    def reduce(self, group: Group) -> None:
        """Completes the hidden gradient, to which every shard contributes: one all-reduce."""
        if self.hidden_TH is not None and len(self.hidden_TH):
            self.hidden_TH = all_reduce_sum(self.hidden_TH, group)


def needs_gradient(head: Head, is_grad_enabled: bool) -> tuple[bool, bool, bool]:
    """Which of (hidden, weight, bias) need a gradient."""
    parts = (head.hidden, head.weight, head.bias)
    return tuple(is_grad_enabled and part is not None and part.requires_grad for part in parts)  # type: ignore[return-value]


def keep_for_backward(
    ctx: Any, head: Head, positions: Tensor, gradients: StudentGradients, others: list[Tensor]
) -> None:
    """Leaves the finished gradients for ``scaled_gradients``; ``others`` are those of further inputs."""
    bias_dtype = None if head.bias is None else head.bias.dtype
    ctx.formed = (gradients, others)
    ctx.positions, ctx.hidden_shape = positions, head.hidden.shape
    ctx.dtypes = (head.hidden.dtype, head.weight.dtype, bias_dtype)


def scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (hidden, weight, bias, *others) for the upstream derivative of the loss; works once."""
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative: call backward without create_graph")
    if ctx.formed is None:
        raise RuntimeError(
            "the gradients of this loss were formed in its forward pass and used up by the first backward; "
            "compute the loss again for a second one (retain_graph does not help)"
        )
    gradients, others = ctx.formed
    ctx.formed = None
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    hidden = weight = bias = None
    if upstream.device.type != "cpu" or upstream != 1:  # a pass over the head's gradient; on GPUs asking would wait
        for part in (gradients.hidden_TH, gradients.weight_VsH, gradients.bias_Vs):
            if part is not None:
                part.mul_(upstream)
    if gradients.hidden_TH is not None:
        hidden = torch.zeros(ctx.hidden_shape, dtype=hidden_dtype, device=upstream.device)
        hidden[ctx.positions] = gradients.hidden_TH.to(hidden_dtype)
    if gradients.weight_VsH is not None:
        weight = gradients.weight_VsH.to(weight_dtype)
    if gradients.bias_Vs is not None:
        bias = gradients.bias_Vs.to(bias_dtype)
    return hidden, weight, bias, *(other * upstream.to(other.dtype) for other in others)
