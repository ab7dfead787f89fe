"""The project's own decoder: the weights of a plan, run over a preallocated cache.

``PlanPrefiller`` reads given text, layer by layer and all examples at once: under ZeRO-3 each layer is gathered once
per call, however many examples there are. ``PlanDecoder`` also decodes, with all weights present and laid out for small
products.

Shapes: T tokens of all examples, one example after the other; B examples, in ``decode`` those still being written;
S columns of the cache; H hidden size, D head size, Vs this rank's slice of the vocabulary. "heads" counts this rank's.
A layer's cache is [2 (keys, values), B, key-value heads, S, D]. The only communication besides gathering are the
model's own reductions over the tensor-parallel group: two all-reduces per layer, and one of the embedding where it is
sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadistill.decoding.kv_cache import KVCache, LayerViews, PrefillChunk
from megadistill.decoding.layer import Layer
from megadistill.decoding.linear import Logits, Norm
from megadistill.decoding.packed_attention import Packing, kept_keys_and_values, pack_chunks, packed_attention
from megadistill.decoding.plan import DecoderPlan, weight_of
from megadistill.decoding.products import PACKED, ProductLayouts
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.static_step import StaticSteps, StepInputs, stepping_on
from megadistill.decoding.token_steps import EagerSteps, Stepping, TokenSteps
from megadistill.parallel.collectives import all_reduce_sum
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard

Present = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
# Not cuDNN's attention, which makes a plan for every shape, 0.1 s or more each: every token of decoding is a new shape.
_ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Tokens whose activations inside a layer exist at once.
_MAX_TOKENS = 8192


def all_present(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """The ``present`` of models whose parameters are whole all the time: does nothing."""
    return nullcontext()


def _concatenated(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class PlanPrefiller:
    """Implements ``decoding.protocols.Prefiller`` with the modules of a plan.

    Args:
        plan: The modules that hold the weights.
        shard: This rank's slice of the vocabulary; its group is the tensor-parallel group.
        device: Where the cache is made.
        present: ``present(modules)`` is a context in which the parameters of the modules are whole.
        layouts: Of the weights.
    """

    keeps_cache = True

    def __init__(
        self,
        plan: DecoderPlan,
        shard: VocabShard,
        device: torch.device,
        present: Present = all_present,
        layouts: ProductLayouts = PACKED,
    ) -> None:
        tp_size = shard.tp_size
        self.plan, self.shard, self.device, self._present, self._layouts = plan, shard, device, present, layouts
        self.num_heads, self.num_kv_heads = plan.num_heads // tp_size, plan.num_kv_heads // tp_size
        self._rope_table = torch.zeros(0, dtype=torch.complex64, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the cache."""
        return weight_of(self.plan.embedding).dtype

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache of ``columns`` columns for examples whose first columns are ``offsets``."""
        shape = (self.num_kv_heads, columns, self.plan.head_dim)
        return KVCache(len(self.plan.layers), offsets, shape, self.dtype, self.device)

    @torch.no_grad()
    def read(self, chunks: Sequence[PrefillChunk], state: KVCache | None = None) -> list[Tensor]:
        """Reads chunks of text.

        Gathers every layer, embeddings and final norm once, even when there is nothing to read: all ranks of the
        data-parallel group must call it equally often.

        Args:
            chunks: What to read. None of them may be empty.
            state: Where keys and values are kept: a chunk attends to what its slot holds before its column. Without it
                every chunk must be the beginning of its example.

        Returns:
            Hidden states [number of tokens, H] of each chunk.
        """
        offsets = [0 if state is None else state.offsets[chunk.slot] for chunk in chunks]
        sizes = [len(chunk.tokens) for chunk in chunks]
        assert all(sizes), "a chunk without tokens"
        spans = [range(c.column - o, c.column - o + n) for c, o, n in zip(chunks, offsets, sizes, strict=True)]
        tokens = torch.tensor([t for chunk in chunks for t in chunk.tokens], dtype=torch.int64).to(self.device)
        positions = torch.tensor([p for span in spans for p in span], dtype=torch.int64).to(self.device)
        plan, device = self.plan, self.device
        packing = pack_chunks(chunks, offsets, head_dim=plan.head_dim, dtype=self.dtype, device=device)
        with self._present([plan.embedding, *([] if plan.positions is None else [plan.positions])]):
            x = self._embed(tokens, positions)
        rope = self._rope(max((span[-1] for span in spans), default=0), positions)
        for i, layer in enumerate(self._layers()):
            if chunks:
                layer_cache = None if state is None else state.layers[i]
                attend = partial(
                    self._attend_chunks, scale=layer.scale, layer_cache=layer_cache, chunks=chunks, offsets=offsets,
                    packing=packing,
                )  # fmt: skip
                x = _concatenated(list(self._run_layer(layer, x, rope, attend)))
        with self._final_norm() as norm:
            x = x if norm is None else norm(x)
        return list(x.split(sizes)) if chunks else []

    def _layers(self) -> Iterator[Layer]:
        """One layer after the other, gathered and laid out while it is used."""
        layouts = ProductLayouts.reading(self._layouts.read)
        for plan in self.plan.layers:
            with self._present([plan.module]):
                yield Layer(self.plan, plan, self.shard, layouts)

    @contextmanager
    def _final_norm(self) -> Iterator[Norm | None]:
        if self.plan.final_norm is None:
            yield None
            return
        with self._present([self.plan.final_norm.module]):
            yield Norm(self.plan.final_norm)

    def _embed(self, tokens: Tensor, positions: Tensor | int) -> Tensor:
        """[T, H] of tokens [T] at ``positions``: [T], or one of all.

        One all-reduce where the embedding is sharded, as a tied head shards it.
        """
        weight, shard = weight_of(self.plan.embedding).detach(), self.shard
        if weight.shape[0] >= shard.total:  # an embedding that is not tied may have padded rows
            x = F.embedding(tokens, weight)
        else:
            local = tokens - shard.start
            is_here = (local >= 0) & (local < shard.size)
            x = F.embedding(local.clamp(0, shard.size - 1), weight) * is_here.unsqueeze(-1)
            x = all_reduce_sum(x, shard.group)
        if self.plan.embedding_scale != 1:
            x = x * self.plan.embedding_scale
        if self.plan.positions is not None:
            index = torch.full_like(tokens, positions) if isinstance(positions, int) else positions
            x = x + F.embedding(index + self.plan.position_offset, weight_of(self.plan.positions).detach())
        return x

    def _rope(self, last: int, positions: Tensor | int) -> Tensor | None:
        """Rotary positions as complex numbers [T, 1, D / 2] (of one position for all: [1, D / 2]).

        No position is above ``last``. None with learned positions.
        """
        if self.plan.inv_freq is None:
            return None
        if last >= len(self._rope_table):
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            angles = torch.arange(max(last + 1, 2 * len(self._rope_table), 256), device=self.device).float()
            angles = torch.outer(angles, self.plan.inv_freq.to(self.device, torch.float32)).to(wide)
            self._rope_table = torch.polar(torch.full_like(angles, self.plan.rope_scale), angles)
        return self._rope_table[positions].unsqueeze(-2)

    def _run_layer(
        self, layer: Layer, x: Tensor, rope: Tensor | None, attend: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The outputs of a layer for x [T, H]; outside of attention ``_MAX_TOKENS`` tokens at a time."""
        x_pieces = x.split(_MAX_TOKENS)
        rope_pieces: Sequence[Tensor | None] = [None] * len(x_pieces) if rope is None else rope.split(_MAX_TOKENS)
        qkv = _concatenated([layer.qkv(*piece) for piece in zip(x_pieces, rope_pieces, strict=True)])
        for x_piece, attn_out in zip(x_pieces, attend(qkv).split(_MAX_TOKENS), strict=True):
            yield layer.after_attention(x_piece, attn_out)

    def _attend_chunks(
        self,
        qkv: Tensor,
        *,
        scale: float,
        layer_cache: Tensor | None,
        chunks: Sequence[PrefillChunk],
        offsets: Sequence[int],
        packing: Packing | None,
    ) -> Tensor:
        """Causal attention [T, heads * D] of each chunk to its example; keys and values go into ``layer_cache``."""
        sizes = [len(chunk.tokens) for chunk in chunks]
        # Chunks that begin their examples attend to nothing but themselves.
        is_fresh = all(chunk.column == offset for chunk, offset in zip(chunks, offsets, strict=True))
        pieces: Sequence[Tensor] = qkv.split(sizes)
        if layer_cache is not None:
            for chunk, piece in zip(chunks, pieces, strict=True):
                self._keep(piece, layer_cache, chunk)
        if packing is not None:
            query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
            if not is_fresh and layer_cache is not None:
                key, value = kept_keys_and_values(layer_cache, chunks, offsets)
            packed = packed_attention(query, key, value, packing, scale)
            return packed.reshape(len(qkv), self.num_heads * self.plan.head_dim)
        if is_fresh and len(set(sizes)) == 1:
            pieces = [qkv.view(len(chunks), sizes[0], *qkv.shape[1:])]
        attn_out = []
        for i, piece in enumerate(pieces):
            piece = piece.unsqueeze(0) if piece.dim() == 3 else piece
            query, key, value = piece.transpose(1, 2).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
            mask = None
            if not is_fresh and layer_cache is not None:
                first, end = offsets[i], chunks[i].column + sizes[i]
                key, value = layer_cache[:, chunks[i].slot, :, first:end].unsqueeze(1)
                mask = torch.ones(sizes[i], end - first, dtype=torch.bool, device=qkv.device)
                mask = mask.tril(end - first - sizes[i])
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )  # fmt: skip
            attn_out.append(out.transpose(1, 2).reshape(-1, self.num_heads * self.plan.head_dim))
        return _concatenated(attn_out)

    def _keep(self, qkv: Tensor, layer_cache: Tensor, chunk: PrefillChunk) -> None:
        """Writes the keys and values of a chunk into its columns."""
        split, columns = self.num_heads + self.num_kv_heads, slice(chunk.column, chunk.column + len(qkv))
        layer_cache[0, chunk.slot, :, columns] = qkv[:, self.num_heads : split].transpose(0, 1)
        layer_cache[1, chunk.slot, :, columns] = qkv[:, split:].transpose(0, 1)


class PlanDecoder(PlanPrefiller):
    """Implements ``decoding.protocols.Decoder``: all parameters are present, and laid out once for small products.

    Args:
        plan: The modules that hold the weights.
        device: Where the cache is made.
        head: The output head, whose shard is this rank's slice of the vocabulary.
        layouts: Of the weights.
        stepping: How tokens are written; default: as is fast on the device.

    Attributes:
        masks_per_head: A static step masks columns for each key-value head of each slot, not for each slot.
    """

    def __init__(
        self,
        plan: DecoderPlan,
        device: torch.device,
        head: OutputHead,
        layouts: ProductLayouts = PACKED,
        stepping: Stepping | None = None,
    ) -> None:
        super().__init__(plan, head.shard, device, layouts=layouts)
        self.head, self._stepping = head, stepping or stepping_on(device)
        with torch.no_grad():
            self._laid_out = [Layer(plan, layer, head.shard, layouts) for layer in plan.layers]
            self._norm = None if plan.final_norm is None else Norm(plan.final_norm)
            self._logits = Logits(head.weight, head.bias, layouts.head, head.logit_map)
        self.masks_per_head = device.type == "cpu" and self.dtype in (torch.float32, torch.float64)

    def _layers(self) -> Iterator[Layer]:
        return iter(self._laid_out)

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache of ``columns`` columns for examples whose first columns are ``offsets``."""
        shape = (self.num_kv_heads, columns, self.plan.head_dim)
        has_spare = self._stepping.is_static
        return KVCache(len(self.plan.layers), offsets, shape, self.dtype, self.device, has_spare=has_spare)

    def steps(self, state: KVCache, drawer: Drawer, *, keep_hidden: bool) -> TokenSteps:
        """What writes tokens into a cache of this decoder's."""
        if self._stepping.is_static:
            return StaticSteps(self, state, drawer, self._stepping, keep_hidden=keep_hidden)
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=self._stepping.interval)

    def prefill(self, state: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of slots 0, 1, ... into the cache; returns the hidden state [B, H] of each last token."""
        chunks = [PrefillChunk(slot, state.offsets[slot], prompt) for slot, prompt in enumerate(prompts)]
        return torch.stack([hidden[-1] for hidden in self.read(chunks, state)])

    @torch.inference_mode()
    def decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        """Reads one token [B] into ``column`` of each of the first B slots; returns their hidden states [B, H]."""
        starts, end = state.starts(), column + 1
        positions = column if starts is None else column - starts[: len(tokens)]
        x = self._embed(tokens, positions)
        rope = self._rope(column, positions)
        if rope is not None and starts is None:
            rope = rope.unsqueeze(0)
        mask = None if starts is None else state.mask(len(tokens), per_head=self.masks_per_head)[..., :end]
        with self._attention_kernels():
            for layer, views in zip(self._laid_out, state.views(len(tokens)), strict=True):
                qkv = layer.qkv(x, rope)
                views.columns.select(3, column).copy_(self._keys_and_values(qkv).transpose(0, 1))
                x = layer.after_attention(x, self._attend(qkv, views, end, mask, layer.scale))
        return x if self._norm is None else self._norm(x)

    def decode_static(self, state: KVCache, inputs: StepInputs) -> Tensor:
        """``decode`` of the first R slots, without anything that depends on what tensors hold; positions are made."""
        assert state.spare is not None
        x, rope = self._embed(inputs.tokens, inputs.positions), self._rope(0, inputs.positions)
        with self._attention_kernels():
            for layer, views in zip(self._laid_out, state.views(len(inputs.tokens)), strict=True):
                qkv = layer.qkv(x, rope)
                views.columns[:, inputs.slots, :, inputs.written] = self._keys_and_values(qkv)
                x = layer.after_attention(x, self._attend(qkv, views, state.spare, inputs.mask, layer.scale))
        return x if self._norm is None else self._norm(x)

    def make_positions(self, end: int) -> Tensor:
        """The table that ``decode_static`` reads for positions below ``end``: it may be replaced by a longer one."""
        self._rope(max(0, end - 1), 0)
        return self._rope_table

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits [B, Vs] of hidden states [B, H]; float32 or better."""
        return self._logits(hidden)

    def _keys_and_values(self, qkv: Tensor) -> Tensor:
        """[B, 2, key-value heads, D] of what ``Layer.qkv`` returns."""
        return qkv[:, self.num_heads :].unflatten(1, (2, self.num_kv_heads))

    def _attention_kernels(self) -> AbstractContextManager[None]:
        return sdpa_kernel(_ATTENTION_KERNELS) if self.device.type == "cuda" else nullcontext()

    def _attend(self, qkv: Tensor, views: LayerViews, end: int, mask: Tensor | None, scale: float) -> Tensor:
        """One query an example to the columns before ``end``: attention output [B, heads * D]."""
        if self.masks_per_head:
            keys, values = views.keys.narrow(2, 0, end), views.values.narrow(1, 0, end)
            return self._attend_few(qkv, keys, values, mask, scale)
        keys, values = views.columns.narrow(3, 0, end)
        return self._attend_grouped(qkv, keys, values, mask, scale)

    def _attend_few(self, qkv: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """One query an example: attention output [B, heads * D].

        Less than half the time of the general kernel on CPUs, which is made for many queries.

        Args:
            qkv: As ``Layer.qkv`` returns it.
            keys: [B * key-value heads, D, columns].
            values: [B * key-value heads, columns, D].
            mask: [B * key-value heads, 1, columns] added to the scores; None adds nothing.
            scale: Factor on the scores, where the weights do not hold it.
        """
        query = qkv[:, : self.num_heads].reshape(len(keys), -1, self.plan.head_dim)
        query = query if scale == 1 else query * scale
        scores = torch.bmm(query, keys) if mask is None else torch.baddbmm(mask, query, keys)
        return torch.bmm(scores.softmax(-1), values).view(len(qkv), -1)

    def _attend_grouped(self, qkv: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """One query per example: attention output [B, heads * D].

        Heads that share their keys are one sequence of queries to the kernel, which then need not know of groups
        (kernels that take a mask do not).
        """
        query = qkv[:, : self.num_heads].reshape(len(qkv), self.num_kv_heads, -1, self.plan.head_dim)
        attn_out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        return attn_out.reshape(len(qkv), -1)
