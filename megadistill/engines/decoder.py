"""The project's own decoder: a plan's weights, run over a preallocated cache.

``PlanReader`` reads text, layer by layer for all rows at once: under ZeRO-3 each layer is gathered once a reading,
however many rows there are. ``PlanWriter`` also decodes, with every weight present and laid out for small products.

Shapes: n tokens of all rows one behind the other, k active rows, H hidden size, d head size. ``turns`` are rotary
positions as complex numbers, ``room`` is a layer's part of the cache, ``seen`` what attention gives, heads side by
side. The only communication besides gathering are the model's own reductions: two all-reduces a layer (and one of the
embedding where it is cut) over the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from megadistill.engines.decode_graph import ATTENTIONS, DecodeGraph, Place
from megadistill.engines.kv_cache import KVCache, Reading
from megadistill.engines.products import Logits, Norm, Product, rotate
from megadistill.models.decoder_plan import DecoderPlan, LayerPlan
from megadistill.parallel.collectives import all_reduce_sum
from megadistill.parallel.vocab import VocabShard

Present = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
# Steps that a cache is decoded before one is recorded: short texts do not pay for it.
_STEPS_BEFORE_GRAPH = 2
# Tokens whose activations inside a layer exist at once.
_MAX_TOKENS = 8192


def all_present(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """For models whose parameters are whole all the time."""
    return nullcontext()


class _Layer:
    """The weights of one layer, ready to be multiplied with."""

    def __init__(self, plan: LayerPlan, is_cut: bool) -> None:
        self.attention_norm, self.mlp_norm = Norm(plan.attention_norm), Norm(plan.mlp_norm)
        self.qkv, self.up = Product(plan.qkv), Product(plan.up)
        # The bias of a product whose inputs are cut is added once, after the sum over the shards.
        self.out, self.down = Product([plan.out], has_bias=not is_cut), Product([plan.down], has_bias=not is_cut)
        self.out_bias, self.down_bias = (
            getattr(module, "bias", None) if is_cut else None for module in (plan.out, plan.down)
        )
        self.q_norm = None if plan.q_norm is None else Norm(plan.q_norm)
        self.k_norm = None if plan.k_norm is None else Norm(plan.k_norm)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PlanReader:
    """Reads text with a decoder whose parameters ``present(modules)`` makes whole for a while.

    ``read`` makes the same collective calls whatever it reads: every rank of the data-parallel group must call it
    equally often.
    """

    keeps_cache = True

    def __init__(
        self, plan: DecoderPlan, shard: VocabShard, device: torch.device, present: Present = all_present
    ) -> None:
        tp_size = shard.tp_size
        self.plan, self.shard, self.device, self._present = plan, shard, device, present
        self.num_heads, self.num_kv_heads = plan.num_heads // tp_size, plan.num_kv_heads // tp_size
        self._scale = plan.head_dim**-0.5
        self._table = torch.zeros(0, dtype=torch.complex64, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.embedding.weight.dtype

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache for rows whose first columns are ``offsets``."""
        shape = (self.num_kv_heads, columns, self.plan.head_dim)
        return KVCache(len(self.plan.layers), offsets, shape, self.dtype, self.device)

    @torch.no_grad()
    def read(self, readings: Sequence[Reading], state: KVCache | None = None) -> list[Tensor]:
        """Hidden states [number of tokens, H] of each reading.

        With a ``state`` what is read is kept there, and readings see what their slots hold before their column;
        without, every reading starts its row. Gathers every part of the model once, even when there is nothing to read.
        """
        offsets = [0 if state is None else state.offsets[reading.slot] for reading in readings]
        sizes = [len(reading.tokens) for reading in readings]
        assert all(sizes), "a reading without tokens"
        spans = [range(r.column - o, r.column - o + n) for r, o, n in zip(readings, offsets, sizes, strict=True)]
        tokens = torch.tensor([t for reading in readings for t in reading.tokens], dtype=torch.int64).to(self.device)
        positions = torch.tensor([p for span in spans for p in span], dtype=torch.int64).to(self.device)
        plan, packing = self.plan, self._packing(readings, offsets)
        with self._present([plan.embedding, *([] if plan.positions is None else [plan.positions])]):
            x = self._embed(tokens, positions)
        turns = self._turns(max((span[-1] for span in spans), default=0), positions)
        for number, layer in enumerate(self._layers()):
            if readings:
                room = None if state is None else state.layers[number]
                attend = partial(self._attend_readings, room=room, readings=readings, offsets=offsets, packing=packing)
                x = _joined(list(self._layer_in_parts(layer, x, turns, attend)))
        with self._final_norm() as norm:
            x = x if norm is None else norm(x)
        return list(x.split(sizes)) if readings else []

    def _layers(self) -> Iterator[_Layer]:
        """One layer after the other, gathered and laid out while it is used."""
        for plan in self.plan.layers:
            with self._present([plan.module]):
                yield _Layer(plan, self.shard.tp_size > 1)

    @contextmanager
    def _final_norm(self) -> Iterator[Norm | None]:
        if self.plan.final_norm is None:
            yield None
            return
        with self._present([self.plan.final_norm.module]):
            yield Norm(self.plan.final_norm)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[n, H] from whole or cut embeddings (one all-reduce when they are cut, as a tied head cuts them)."""
        weight, shard = self.plan.embedding.weight, self.shard
        if weight.shape[0] >= shard.total:  # an embedding that is not tied may have padded rows
            x = F.embedding(tokens, weight)
        else:
            local = tokens - shard.start
            is_here = (local >= 0) & (local < shard.size)
            x = F.embedding(local.clamp(0, shard.size - 1), weight) * is_here.unsqueeze(-1)
            x = all_reduce_sum(x, shard.group)
        if self.plan.positions is not None:
            x = x + F.embedding(positions + self.plan.position_offset, self.plan.positions.weight)
        return x

    def _turns(self, last: int, positions: Tensor | int) -> Tensor | None:
        """Rotations [n, 1, d / 2] of tokens at ``positions`` ([n], none above ``last``, or one for all); None with
        learned positions."""
        if self.plan.inv_freq is None:
            return None
        if last >= len(self._table):
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            angles = torch.arange(max(last + 1, 2 * len(self._table), 256), device=self.device).float()
            angles = torch.outer(angles, self.plan.inv_freq.to(self.device, torch.float32)).to(wide)
            self._table = torch.polar(torch.full_like(angles, self.plan.rope_scale), angles)
        return self._table[positions].unsqueeze(-2)

    def _layer_in_parts(
        self, layer: _Layer, x: Tensor, turns: Tensor | None, attend: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The outputs of a layer for x [n, H], a number of tokens at a time where nothing looks at other tokens."""
        parts = x.split(_MAX_TOKENS)
        turned = [None] * len(parts) if turns is None else turns.split(_MAX_TOKENS)
        heads = _joined([self._heads(layer, part, turn) for part, turn in zip(parts, turned, strict=True)])
        for part, seen in zip(parts, attend(heads).split(_MAX_TOKENS), strict=True):
            yield self._after_attention(layer, part, seen)

    def _heads(self, layer: _Layer, x: Tensor, turns: Tensor | None) -> Tensor:
        """Queries, keys and values [n, heads + 2 key-value heads, d] of x [n, H], positions applied."""
        plan, num_heads = self.plan, self.num_heads
        heads = layer.qkv(layer.attention_norm(x)).view(len(x), num_heads + 2 * self.num_kv_heads, plan.head_dim)
        if layer.q_norm is None and turns is None:
            return heads
        split = num_heads + self.num_kv_heads
        turned = heads[:, :split]
        if layer.q_norm is not None and layer.k_norm is not None:
            turned = torch.cat([layer.q_norm(turned[:, :num_heads]), layer.k_norm(turned[:, num_heads:])], 1)
        if turns is not None:
            turned = rotate(turned, turns)
        return torch.cat([turned, heads[:, split:]], 1)

    def _after_attention(self, layer: _Layer, x: Tensor, seen: Tensor) -> Tensor:
        """The rest of a layer: x [n, H], what attention saw [n, heads * d]."""
        x = x + self._reduced(layer.out(seen), layer.out_bias)
        up = layer.up(layer.mlp_norm(x))
        if self.plan.is_gated:
            gate, up = up.chunk(2, -1)
            up = self.plan.activation(gate) * up
        else:
            up = self.plan.activation(up)
        return x + self._reduced(layer.down(up), layer.down_bias)

    def _reduced(self, partial_sum: Tensor, bias: Tensor | None) -> Tensor:
        if self.shard.group is None:
            return partial_sum
        total = all_reduce_sum(partial_sum, self.shard.group)
        return total if bias is None else total + bias

    def _attend_readings(
        self,
        heads: Tensor,
        *,
        room: Tensor | None,
        readings: Sequence[Reading],
        offsets: Sequence[int],
        packing: _Packing | None,
    ) -> Tensor:
        """Causal attention [n, heads * d] of every reading to its row, whose keys and values are kept in ``room``."""
        sizes, split = [len(reading.tokens) for reading in readings], self.num_heads + self.num_kv_heads
        is_fresh = all(reading.column == offset for reading, offset in zip(readings, offsets, strict=True))
        parts = heads.split(sizes)
        if room is not None:
            for reading, part, size in zip(readings, parts, sizes, strict=True):
                columns = slice(reading.column, reading.column + size)
                room[0, reading.slot, :, columns] = part[:, self.num_heads : split].transpose(0, 1)
                room[1, reading.slot, :, columns] = part[:, split:].transpose(0, 1)
        if packing is not None:
            return self._attend_packed(heads, None if is_fresh else room, readings, offsets, packing)
        if is_fresh and len(set(sizes)) == 1:
            parts = [heads.view(len(readings), sizes[0], *heads.shape[1:])]
        seen = []
        for number, part in enumerate(parts):
            part = part.unsqueeze(0) if part.dim() == 3 else part
            query, key, value = part.transpose(1, 2).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
            mask, length = None, query.shape[2]
            if not is_fresh and room is not None:
                slot, first = readings[number].slot, offsets[number]
                end = readings[number].column + length
                key, value = room[0, slot, :, first:end][None], room[1, slot, :, first:end][None]
                mask = torch.ones(length, end - first, dtype=torch.bool, device=heads.device).tril(end - first - length)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )  # fmt: skip
            seen.append(out.transpose(1, 2).reshape(-1, self.num_heads * self.plan.head_dim))
        return _joined(seen)

    def _packing(self, readings: Sequence[Reading], offsets: Sequence[int]) -> _Packing | None:
        """Where the CUDA kernel for texts of any length finds each reading; None where it is not used."""
        head_dim, is_half = self.plan.head_dim, self.dtype in (torch.bfloat16, torch.float16)
        if self.device.type != "cuda" or not is_half or head_dim % 8 or head_dim > 256 or len(readings) < 2:
            return None
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            return None
        sizes = [len(reading.tokens) for reading in readings]
        seen = [r.column - offset + size for r, offset, size in zip(readings, offsets, sizes, strict=True)]
        bounds = [torch.tensor([0, *accumulate(part)], dtype=torch.int32).to(self.device) for part in (sizes, seen)]
        return _Packing(*bounds, max(sizes), max(seen))

    def _attend_packed(
        self,
        heads: Tensor,
        room: Tensor | None,
        readings: Sequence[Reading],
        offsets: Sequence[int],
        packing: _Packing,
    ) -> Tensor:
        """All readings in one call; with a ``room`` their keys and values are there."""
        split = self.num_heads + self.num_kv_heads
        key, value = heads[:, self.num_heads : split], heads[:, split:]
        if room is not None:
            key, value = (
                torch.cat([
                    side[r.slot, :, offset : r.column + len(r.tokens)].transpose(0, 1)
                    for r, offset in zip(readings, offsets, strict=True)
                ])
                for side in room
            )  # fmt: skip
        seen = torch.ops.aten._flash_attention_forward(
            heads[:, : self.num_heads], key, value, *packing, 0.0, True, False, scale=self._scale
        )[0]
        return seen.reshape(len(heads), self.num_heads * self.plan.head_dim)


class _Packing(NamedTuple):
    """Ends of the readings [n + 1] among all queries and among all keys, and the longest of each."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


class PlanWriter(PlanReader):
    """Implements ``generation.protocols.StepModel``: all parameters are present, and laid out once for many small
    products."""

    def __init__(
        self, plan: DecoderPlan, shard: VocabShard, device: torch.device, head: tuple[Tensor, Tensor | None]
    ) -> None:
        super().__init__(plan, shard, device)
        self.head = head
        with torch.no_grad():
            self._ready = [_Layer(layer, shard.tp_size > 1) for layer in plan.layers]
            self._norm = None if plan.final_norm is None else Norm(plan.final_norm)
            self._logits = Logits(*head)

    def _layers(self) -> Iterator[_Layer]:
        return iter(self._ready)

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache for rows whose first columns are ``offsets``."""
        shape = (self.num_kv_heads, columns, self.plan.head_dim)
        # What the shards say to each other is not recorded.
        has_spare = self.device.type == "cuda" and self.shard.group is None
        return KVCache(len(self.plan.layers), offsets, shape, self.dtype, self.device, has_spare=has_spare)

    def prefill(self, state: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of slots 0, 1, ... into the cache; returns the hidden state [B, H] of each last token."""
        readings = [Reading(slot, state.offsets[slot], prompt) for slot, prompt in enumerate(prompts)]
        return torch.stack([hidden[-1] for hidden in self.read(readings, state)])

    @torch.inference_mode()
    def decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        """Reads one token [k] into ``column`` of the first k slots; returns their hidden states [k, H]."""
        if self.device.type != "cuda":
            return self._decode(state, tokens, column)
        state.num_decoded += 1
        if state.spare is not None and state.num_decoded > _STEPS_BEFORE_GRAPH:
            if state.recorded is None:
                self._turns(state.spare, 0)  # the table is long enough from now on
                state.recorded = DecodeGraph(partial(self._decode_all, state), len(state.offsets), self._table)
            return state.recorded.replay(tokens, column, state.starts())
        with sdpa_kernel(ATTENTIONS):
            return self._decode(state, tokens, column)

    def _decode_all(self, state: KVCache, place: Place) -> Tensor:
        """``_decode`` of all slots with nothing that depends on what tensors hold, for a DecodeGraph."""
        rows, columns = len(place.tokens), torch.arange(state.spare, device=self.device)
        slots = torch.arange(rows, device=self.device)
        where = torch.where(slots < place.num_active, place.column, state.spare)
        is_seen = (columns >= place.starts[:, None]) & (columns <= place.column)
        mask = torch.zeros(rows, 1, 1, len(columns), dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(~is_seen[:, None, None], -torch.inf)
        positions = (place.column - place.starts).clamp_min(0)
        x, turns = self._embed(place.tokens, positions), self._turns(0, positions)
        for layer, room in zip(self._ready, state.layers, strict=True):
            heads = self._heads(layer, x, turns)
            room[:, slots, :, where] = heads[:, self.num_heads :].view(rows, 2, self.num_kv_heads, -1)
            x = self._after_attention(layer, x, self._attend_grouped(heads, *room[:, :, :, :-1], mask))
        return x if self._norm is None else self._norm(x)

    def _decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        k = len(tokens)
        starts = state.starts()
        positions = column if starts is None else column - starts[:k]
        embedded = torch.full_like(tokens, column) if starts is None and self.plan.positions is not None else positions
        x = self._embed(tokens, embedded)  # type: ignore[arg-type]
        turns = self._turns(column, positions)
        if turns is not None and starts is None:
            turns = turns.unsqueeze(0)
        padding = None if starts is None else state.padding()[:k, : column + 1]
        for layer, room in zip(self._ready, state.layers, strict=True):
            heads = self._heads(layer, x, turns)
            x = self._after_attention(layer, x, self._attend_column(heads, room, column, padding))
        return x if self._norm is None else self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits [k, Vs] of hidden states [k, H]; float32 or better."""
        return self._logits(hidden)

    def _attend_column(self, heads: Tensor, room: Tensor, column: int, padding: Tensor | None) -> Tensor:
        """One query a row [k, heads * d] against all columns up to ``column``; ``padding`` [k, columns] is left out."""
        k, num_heads, num_kv_heads = len(heads), self.num_heads, self.num_kv_heads
        split, head_dim = num_heads + num_kv_heads, self.plan.head_dim
        keys, values = room[0, :k, :, : column + 1], room[1, :k, :, : column + 1]
        keys[:, :, column] = heads[:, num_heads:split]
        values[:, :, column] = heads[:, split:]
        if heads.device.type == "cpu" and heads.dtype in (torch.float32, torch.float64):
            # Less than half the time of the general kernel, which is made for many queries.
            query = heads[:, :num_heads].reshape(k * num_kv_heads, num_heads // num_kv_heads, head_dim)
            scores = torch.baddbmm(
                query.new_zeros(1, 1, 1), query, keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=self._scale
            )
            if padding is not None:
                scores.view(k, -1, column + 1).masked_fill_(padding.unsqueeze(1), -torch.inf)
            return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(k, num_heads * head_dim)
        return self._attend_grouped(heads, keys, values, None if padding is None else ~padding[:, None, None])

    def _attend_grouped(self, heads: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One query a row [k, heads * d]. Heads that share their keys are one text to the kernel, so that it need not
        know of groups (those that take a mask do not)."""
        query = heads[:, : self.num_heads].reshape(len(heads), self.num_kv_heads, -1, self.plan.head_dim)
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale)
        return seen.reshape(len(heads), -1)
