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
from torch.nn.attention import sdpa_kernel

from megadistill.decoding.decode_graph import ATTENTION_KERNELS, DecodeGraph, StepInputs
from megadistill.decoding.kv_cache import KVCache, PrefillChunk
from megadistill.decoding.linear import FusedLinear, Logits, Norm, apply_rope
from megadistill.decoding.packed_attention import Packing, kept_keys_and_values, pack_chunks, packed_attention
from megadistill.decoding.plan import DecoderPlan, LayerPlan, bias_of, weight_of
from megadistill.parallel.collectives import all_reduce_sum
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard

Present = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
# Steps of a cache before one is recorded as a CUDA graph: short responses do not pay for the recording.
_STEPS_BEFORE_GRAPH = 2
# Tokens whose activations inside a layer exist at once.
_MAX_TOKENS = 8192


def all_present(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """The ``present`` of models whose parameters are whole all the time: does nothing."""
    return nullcontext()


class _LayerWeights:
    """The weights of one layer, laid out for its products."""

    def __init__(self, plan: LayerPlan, is_sharded: bool) -> None:
        self.attention_norm, self.mlp_norm = Norm(plan.attention_norm), Norm(plan.mlp_norm)
        self.qkv, self.up = FusedLinear(plan.qkv), FusedLinear(plan.up)
        # Where its inputs are sharded, a layer's bias is added once, after the sum over the shards.
        self.out = FusedLinear([plan.out], has_bias=not is_sharded)
        self.down = FusedLinear([plan.down], has_bias=not is_sharded)
        self.out_bias = bias_of(plan.out) if is_sharded else None
        self.down_bias = bias_of(plan.down) if is_sharded else None
        self.q_norm = None if plan.q_norm is None else Norm(plan.q_norm)
        self.k_norm = None if plan.k_norm is None else Norm(plan.k_norm)


def _concatenated(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class PlanPrefiller:
    """Implements ``decoding.protocols.Prefiller`` with the modules of a plan.

    Args:
        plan: The modules that hold the weights.
        shard: This rank's slice of the vocabulary; its group is the tensor-parallel group.
        device: Where the cache is made.
        present: ``present(modules)`` is a context in which the parameters of the modules are whole.
    """

    keeps_cache = True

    def __init__(
        self, plan: DecoderPlan, shard: VocabShard, device: torch.device, present: Present = all_present
    ) -> None:
        tp_size = shard.tp_size
        self.plan, self.shard, self.device, self._present = plan, shard, device, present
        self.num_heads, self.num_kv_heads = plan.num_heads // tp_size, plan.num_kv_heads // tp_size
        self._scale = plan.head_dim**-0.5
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
                    self._attend_chunks, layer_cache=layer_cache, chunks=chunks, offsets=offsets, packing=packing
                )
                x = _concatenated(list(self._run_layer(layer, x, rope, attend)))
        with self._final_norm() as norm:
            x = x if norm is None else norm(x)
        return list(x.split(sizes)) if chunks else []

    def _layers(self) -> Iterator[_LayerWeights]:
        """One layer after the other, gathered and laid out while it is used."""
        for plan in self.plan.layers:
            with self._present([plan.module]):
                yield _LayerWeights(plan, self.shard.tp_size > 1)

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
        weight, shard = weight_of(self.plan.embedding), self.shard
        if weight.shape[0] >= shard.total:  # an embedding that is not tied may have padded rows
            x = F.embedding(tokens, weight)
        else:
            local = tokens - shard.start
            is_here = (local >= 0) & (local < shard.size)
            x = F.embedding(local.clamp(0, shard.size - 1), weight) * is_here.unsqueeze(-1)
            x = all_reduce_sum(x, shard.group)
        if self.plan.positions is not None:
            index = torch.full_like(tokens, positions) if isinstance(positions, int) else positions
            x = x + F.embedding(index + self.plan.position_offset, weight_of(self.plan.positions))
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
        self, layer: _LayerWeights, x: Tensor, rope: Tensor | None, attend: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The outputs of a layer for x [T, H]; outside of attention ``_MAX_TOKENS`` tokens at a time."""
        x_pieces = x.split(_MAX_TOKENS)
        rope_pieces: Sequence[Tensor | None] = [None] * len(x_pieces) if rope is None else rope.split(_MAX_TOKENS)
        qkv = _concatenated([self._qkv(layer, *piece) for piece in zip(x_pieces, rope_pieces, strict=True)])
        for x_piece, attn_out in zip(x_pieces, attend(qkv).split(_MAX_TOKENS), strict=True):
            yield self._after_attention(layer, x_piece, attn_out)

    def _qkv(self, layer: _LayerWeights, x: Tensor, rope: Tensor | None) -> Tensor:
        """Queries, keys and values [T, heads + 2 key-value heads, D] of x [T, H], rotary positions applied."""
        plan, num_heads = self.plan, self.num_heads
        qkv = layer.qkv(layer.attention_norm(x)).view(len(x), num_heads + 2 * self.num_kv_heads, plan.head_dim)
        if layer.q_norm is None and rope is None:
            return qkv
        split = num_heads + self.num_kv_heads
        qk = qkv[:, :split]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat([layer.q_norm(qk[:, :num_heads]), layer.k_norm(qk[:, num_heads:])], 1)
        if rope is not None:
            qk = apply_rope(qk, rope)
        return torch.cat([qk, qkv[:, split:]], 1)

    def _after_attention(self, layer: _LayerWeights, x: Tensor, attn_out: Tensor) -> Tensor:
        """The rest of a layer: x [T, H], attention output [T, heads * D]."""
        x = x + self._sum_over_shards(layer.out(attn_out), layer.out_bias)
        up = layer.up(layer.mlp_norm(x))
        if self.plan.is_gated:
            gate, up = up.chunk(2, -1)
            up = self.plan.activation(gate) * up
        else:
            up = self.plan.activation(up)
        return x + self._sum_over_shards(layer.down(up), layer.down_bias)

    def _sum_over_shards(self, partial_sum: Tensor, bias: Tensor | None) -> Tensor:
        if self.shard.group is None:
            return partial_sum
        total = all_reduce_sum(partial_sum, self.shard.group)
        return total if bias is None else total + bias

    def _attend_chunks(
        self,
        qkv: Tensor,
        *,
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
            packed = packed_attention(query, key, value, packing, self._scale)
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
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale,
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
    """

    def __init__(self, plan: DecoderPlan, device: torch.device, head: OutputHead) -> None:
        super().__init__(plan, head.shard, device)
        self.head = head
        with torch.no_grad():
            self._layer_weights = [_LayerWeights(layer, head.shard.tp_size > 1) for layer in plan.layers]
            self._norm = None if plan.final_norm is None else Norm(plan.final_norm)
            self._logits = Logits(head.weight, head.bias)

    def _layers(self) -> Iterator[_LayerWeights]:
        return iter(self._layer_weights)

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache of ``columns`` columns for examples whose first columns are ``offsets``."""
        shape = (self.num_kv_heads, columns, self.plan.head_dim)
        # Collectives are not recorded.
        has_spare = self.device.type == "cuda" and self.shard.group is None
        return KVCache(len(self.plan.layers), offsets, shape, self.dtype, self.device, has_spare=has_spare)

    def prefill(self, state: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of slots 0, 1, ... into the cache; returns the hidden state [B, H] of each last token."""
        chunks = [PrefillChunk(slot, state.offsets[slot], prompt) for slot, prompt in enumerate(prompts)]
        return torch.stack([hidden[-1] for hidden in self.read(chunks, state)])

    @torch.inference_mode()
    def decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        """Reads one token [B] into ``column`` of each of the first B slots; returns their hidden states [B, H].

        On a GPU without tensor parallelism the third step of a cache is recorded as a CUDA graph and replayed from then
        on: one launch per token instead of some forty per layer.
        """
        if self.device.type != "cuda":
            return self._decode(state, tokens, column)
        state.num_decoded += 1
        if state.spare is not None and state.num_decoded > _STEPS_BEFORE_GRAPH:
            if state.graph is None:
                self._rope(state.spare, 0)  # the table is long enough from now on
                step = partial(self._decode_all, state)
                state.graph = DecodeGraph(step, len(state.offsets), self._rope_table)
            return state.graph.replay(tokens, column, state.starts())
        with sdpa_kernel(ATTENTION_KERNELS):
            return self._decode(state, tokens, column)

    def _decode_all(self, state: KVCache, inputs: StepInputs) -> Tensor:
        """``_decode`` of all slots, without anything that depends on what tensors hold, for a DecodeGraph."""
        assert state.spare is not None
        num_slots, columns = len(inputs.tokens), torch.arange(state.spare, device=self.device)
        slots = torch.arange(num_slots, device=self.device)
        written = torch.where(slots < inputs.num_active, inputs.column, state.spare)
        is_attended = (columns >= inputs.starts[:, None]) & (columns <= inputs.column)
        mask = torch.zeros(num_slots, 1, 1, len(columns), dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(~is_attended[:, None, None], -torch.inf)
        positions = (inputs.column - inputs.starts).clamp_min(0)
        x, rope = self._embed(inputs.tokens, positions), self._rope(0, positions)
        for layer, layer_cache in zip(self._layer_weights, state.layers, strict=True):
            qkv = self._qkv(layer, x, rope)
            layer_cache[:, slots, :, written] = qkv[:, self.num_heads :].view(num_slots, 2, self.num_kv_heads, -1)
            keys, values = layer_cache[:, :, :, :-1]
            x = self._after_attention(layer, x, self._attend_grouped(qkv, keys, values, mask))
        return x if self._norm is None else self._norm(x)

    def _decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        starts = state.starts()
        positions = column if starts is None else column - starts[: len(tokens)]
        x = self._embed(tokens, positions)
        rope = self._rope(column, positions)
        if rope is not None and starts is None:
            rope = rope.unsqueeze(0)
        padding = None if starts is None else state.padding()[: len(tokens), : column + 1]
        for layer, layer_cache in zip(self._layer_weights, state.layers, strict=True):
            qkv = self._qkv(layer, x, rope)
            x = self._after_attention(layer, x, self._attend_column(qkv, layer_cache, column, padding))
        return x if self._norm is None else self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits [B, Vs] of hidden states [B, H]; float32 or better."""
        return self._logits(hidden)

    def _attend_column(self, qkv: Tensor, layer_cache: Tensor, column: int, padding: Tensor | None) -> Tensor:
        """One query an example [B, heads * D] against all columns up to ``column``; leaves out ``padding`` [B, S]."""
        num_examples, num_heads, num_kv_heads = len(qkv), self.num_heads, self.num_kv_heads
        split, head_dim = num_heads + num_kv_heads, self.plan.head_dim
        keys = layer_cache[0, :num_examples, :, : column + 1]
        values = layer_cache[1, :num_examples, :, : column + 1]
        keys[:, :, column] = qkv[:, num_heads:split]
        values[:, :, column] = qkv[:, split:]
        if qkv.device.type == "cpu" and qkv.dtype in (torch.float32, torch.float64):
            # Less than half the time of the general kernel, which is made for many queries.
            query = qkv[:, :num_heads].reshape(num_examples * num_kv_heads, num_heads // num_kv_heads, head_dim)
            scores = torch.baddbmm(
                query.new_zeros(1, 1, 1), query, keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=self._scale
            )
            if padding is not None:
                scores.view(num_examples, -1, column + 1).masked_fill_(padding.unsqueeze(1), -torch.inf)
            return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(num_examples, num_heads * head_dim)
        return self._attend_grouped(qkv, keys, values, None if padding is None else ~padding[:, None, None])

    def _attend_grouped(self, qkv: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One query per example: attention output [B, heads * D].

        Heads that share their keys are one sequence of queries to the kernel, which then need not know of groups
        (kernels that take a mask do not).
        """
        query = qkv[:, : self.num_heads].reshape(len(qkv), self.num_kv_heads, -1, self.plan.head_dim)
        attn_out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale)
        return attn_out.reshape(len(qkv), -1)
