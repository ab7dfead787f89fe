"""What a model is made of, whole and as one tensor-parallel rank holds it: read off the family's real parameters.

Suffix-free sizes are elements. H hidden size, D head size, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from megadistill.decoding.plan import key_value_shape, weight_of
from megadistill.models.families import LORA_A, LORA_B, Family, family_of, has_own_head
from megadistill.models.meta import meta_model
from megadistill.models.shard_spec import ShardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megadistill.config.lora import LoraSection

# Intermediate results of an ungated MLP that autograd keeps, the input of its last layer included.
_KEPT_OF_ACTIVATION = {"relu": 1, "gelu_new": 5}
_KEPT_OF_OTHER_ACTIVATIONS = 2
_KEPT_OF_GATED_MLP = 4  # gate, up, activation(gate), product


@dataclass(frozen=True)
class Linear:
    """A linear layer on one rank, without its bias.

    Attributes:
        inputs: Width of its input.
        outputs: Width of its output.
    """

    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A model on tensor-parallel rank 0, whose shards are the largest.

    Attributes:
        sizes: Elements of each parameter.
        largest_tensor: Elements of the largest parameter of the whole model.
        qkv: The linear layers before attention, of one layer.
        out: The one after attention.
        up: The first ones of the MLP; two where it is gated.
        down: The last one of the MLP.
        layer_sizes: Elements of each parameter of one layer.
        num_layers: Number of layers.
        hidden: H.
        heads: Attention heads of this rank.
        kv_heads: Key-value heads of this rank.
        head_dim: D.
        classes: This rank's classes.
        embedding: Elements of all embeddings, positions included; the head's where it is tied.
        is_tied: Embedding and head are one parameter, which is sharded.
        has_rotary: Positions are rotary.
        is_rms: Norms are of the root-mean-square kind.
        has_head_norms: Queries and keys have norms of their own.
        kept_of_mlp: Intermediate results of the MLP, each as wide as ``down`` has inputs, that autograd keeps.
        rank: Of the adapters; 0 where all weights are trained.
        adapters: Elements of each parameter of the adapters; these are among ``sizes`` and ``layer_sizes``, too.
        adapted: The linear layers of one layer that have adapters: those along outputs, and those along inputs.
    """

    sizes: tuple[int, ...]
    largest_tensor: int
    qkv: tuple[Linear, ...]
    out: Linear
    up: tuple[Linear, ...]
    down: Linear
    layer_sizes: tuple[int, ...]
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    classes: int
    embedding: int
    is_tied: bool
    has_rotary: bool
    is_rms: bool
    has_head_norms: bool
    kept_of_mlp: int
    rank: int = 0
    adapters: tuple[int, ...] = ()
    adapted: tuple[tuple[Linear, ...], tuple[Linear, ...]] = ((), ())

    @property
    def trained(self) -> tuple[int, ...]:
        """Elements of each parameter that is trained."""
        return self.adapters or self.sizes

    @property
    def num_trained(self) -> int:
        """Elements of all parameters that are trained."""
        return sum(self.trained)

    @property
    def trained_layer(self) -> int:
        """Elements of one layer that are trained."""
        return sum(self.adapters) // self.num_layers if self.adapters else self.layer

    @property
    def trained_head(self) -> int:
        """Elements of the head's weight where it is trained."""
        return 0 if self.adapters else self.head

    @property
    def merged(self) -> int:
        """Elements of the weights that adapters are merged into while text is written."""
        return self.num_layers * sum(linear.size for linears in self.adapted for linear in linears)

    @property
    def size(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    @property
    def layer(self) -> int:
        """Elements of one layer."""
        return sum(self.layer_sizes)

    @property
    def head(self) -> int:
        """Elements of the head's weight."""
        return self.classes * self.hidden

    @property
    def products(self) -> int:
        """Elements of the weights that a token is multiplied with in all layers."""
        return self.num_layers * sum(linear.size for linear in (*self.qkv, self.out, *self.up, self.down))

    @property
    def trained_products(self) -> int:
        """``products`` of a forward and a backward pass: those for the gradients of weights are of trained ones."""
        return 2 * self.products + (3 * self.num_trained if self.adapters else self.products)

    @property
    def num_adapted(self) -> int:
        """Linear layers with adapters, in all layers."""
        return len(self.adapters) // 2

    @property
    def query(self) -> int:
        """Width of this rank's queries."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of this rank's keys; that of its values is the same."""
        return self.kv_heads * self.head_dim

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.key_value * itemsize

    def joined_bytes(self, itemsize: int, limit: int) -> int:
        """Bytes of the copies that ``decoding/layer.py`` makes of layers with one input, up to ``limit`` each."""
        return self.num_layers * self.joined_layer_bytes(itemsize, limit)

    def joined_layer_bytes(self, itemsize: int, limit: int) -> int:
        """``joined_bytes`` of one layer."""
        together = (sum(part.size for part in parts) * itemsize for parts in (self.qkv, self.up) if len(parts) > 1)
        return sum(size for size in together if size <= limit)

    def kept_by_layer(self, itemsize: int) -> int:
        """Bytes that autograd keeps of one layer for each token."""
        # RMS norms of transformers: the input in float32, the normalized one, the output; torch's layer norm: in, out.
        norm = (4 + 2 * itemsize if self.is_rms else 2 * itemsize) * self.hidden
        # Keys and values are repeated where heads share them, because batches have masks.
        attention = 4 * self.query if self.heads != self.kv_heads else 2 * self.query + 2 * self.key_value
        head_norms = (4 + itemsize) * (self.query + self.key_value) if self.has_head_norms else 0
        mlp = self.kept_of_mlp * self.down.inputs
        return 2 * norm + itemsize * (attention + mlp) + head_norms + 4 * self.heads

    def backward_of_layer(self, itemsize: int) -> int:
        """Bytes of the gradients that exist at once in the backward pass of a layer, for each token."""
        # Through an RMS norm: two float32 gradients; the residual stream's and the one that joins it.
        return ((8 if self.is_rms else itemsize) + 2 * itemsize) * self.hidden


@dataclass(frozen=True)
class ModelOutline:
    """A whole model.

    Attributes:
        config: Its transformers configuration.
        family: Its family.
        shapes: Parameter -> shape, padded rows of the head included.
        head_name: The head's weight; the embedding's where both are one.
        layer_names: Parameters of the first layer.
        embedding_names: Parameters of the embeddings, those of learned positions included.
        is_rms: Norms are of the root-mean-square kind.
        lora: Its adapters, where they alone are trained.
    """

    config: PreTrainedConfig
    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    head_name: str
    layer_names: tuple[str, ...]
    embedding_names: tuple[str, ...]
    is_rms: bool
    lora: LoraSection | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, where: str, lora: LoraSection | None = None) -> ModelOutline:
        """Reads the parameters off a model on the meta device.

        Args:
            config: The configuration.
            where: The key or option that names the model; errors begin with it.
            lora: Its adapters; None: it has none.

        Raises:
            ConfigError: The family is not supported.
        """
        model = meta_model(config, where)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        modules = list(model.modules())
        layers = next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
        return cls(
            config=config,
            family=family_of(config, where),
            shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            head_name=names[id(weight_of(model.get_output_embeddings()))],
            layer_names=tuple(names[id(parameter)] for parameter in layers[0].parameters()),
            embedding_names=tuple(names[id(m.weight)] for m in modules if isinstance(m, nn.Embedding)),
            is_rms=not any(isinstance(module, nn.LayerNorm) for module in modules),
            lora=lora if lora is not None and lora.enabled else None,
        )

    @property
    def adapters(self) -> dict[str, tuple[int, ...]]:
        """Parameter of an adapter -> its whole shape."""
        if self.lora is None:
            return {}
        return {
            f"{layer}.{part}.weight": (self.lora.r, shape[1]) if part == LORA_A else (shape[0], self.lora.r)
            for layer, shape in self._adapted(self.shapes).items()
            for part in (LORA_A, LORA_B)
        }

    def _adapted(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Layer with an adapter -> whole shape of its weight, of those to which the parameters belong."""
        family, lora = self.family, self.lora
        targets = lora.targets if lora is not None and lora.targets else (*family.column_parallel, *family.row_parallel)
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        return {layer: self.shapes[f"{layer}.weight"] for layer in layers if layer.rpartition(".")[2] in targets}

    @property
    def rows(self) -> int:
        """Rows of the head."""
        return self.shapes[self.head_name][0]

    @property
    def size(self) -> int:
        """Elements of all parameters but adapters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_trained(self) -> int:
        """Elements of all parameters that are trained."""
        return sum(math.prod(shape) for shape in self.adapters.values()) or self.size

    def on_rank0(self, tp_size: int, vocab_size: int) -> ModelShape:
        """The model on rank 0 of ``tp_size``.

        Args:
            tp_size: Tensor-parallel size; it divides the counts of heads.
            vocab_size: V: the head, and an embedding tied to it, keep so many rows.
        """
        is_tied = not has_own_head(self.shapes)
        of_head = {self.head_name, self.head_name.removesuffix("weight") + "bias"}
        shards: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            whole = (vocab_size, *shape[1:]) if name in of_head else shape
            shards[name] = self._shard(name, whole, tp_size, is_tied)
        adapters = {
            name: math.prod(self._shard(name, shape, tp_size, is_tied)) for name, shape in self.adapters.items()
        }
        first = set(self._adapted(self.layer_names)) if adapters else set()
        of_first = [size for name, size in adapters.items() if name.rsplit(".", 2)[0] in first]
        qkv, out, up, down = self._linears(shards)
        num_kv_heads, head_dim = key_value_shape(self.config)
        return ModelShape(
            sizes=(*(math.prod(shape) for shape in shards.values()), *adapters.values()),
            largest_tensor=max(math.prod(shape) for shape in self.shapes.values()),
            qkv=qkv,
            out=out,
            up=up,
            down=down,
            layer_sizes=(*(math.prod(shards[name]) for name in self.layer_names), *of_first),
            num_layers=int(self.config.num_hidden_layers),
            hidden=shards[self.head_name][1],
            heads=int(self.config.num_attention_heads) // tp_size,
            kv_heads=num_kv_heads // tp_size,
            head_dim=head_dim,
            classes=shards[self.head_name][0],
            embedding=sum(math.prod(shards[name]) for name in self.embedding_names),
            is_tied=is_tied,
            has_rotary=len(self.embedding_names) == 1,
            is_rms=self.is_rms,
            has_head_norms=any(name.endswith("q_norm.weight") for name in self.layer_names),
            kept_of_mlp=self._kept_of_mlp(is_gated=sum(each.outputs for each in up) == 2 * down.inputs),
            rank=0 if self.lora is None else self.lora.r,
            adapters=tuple(adapters.values()),
            adapted=self._adapted_linears(first, shards),
        )

    def _shard(self, name: str, whole: tuple[int, ...], tp_size: int, is_tied: bool) -> tuple[int, ...]:
        dim = self.family.shard_dim(name, is_tied=is_tied)
        return ShardSpec.even(whole, dim, self.family.blocks(name), tp_size).shard_shape(0)

    def _adapted_linears(
        self, layers: Iterable[str], shards: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
        """Of these layers, those that are sharded along their outputs and along their inputs."""
        by_dim: dict[int | None, list[Linear]] = {0: [], 1: []}
        for layer in layers:
            dim = self.family.shard_dim(f"{layer}.weight", is_tied=False)
            by_dim[dim].append(Linear(*reversed(shards[f"{layer}.weight"])))
        return tuple(by_dim[0]), tuple(by_dim[1])

    def _linears(
        self, shards: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[Linear, ...], Linear, tuple[Linear, ...], Linear]:
        """A layer is column-parallel layers and a row-parallel one, twice: attention and MLP."""
        halves: list[list[Linear]] = [[], []]
        rows: list[Linear] = []
        for name in self.layer_names:
            dim = self.family.shard_dim(name, is_tied=False)
            if dim is None or not name.endswith("weight"):
                continue
            linear = Linear(*reversed(shards[name]))
            if dim == 0:
                halves[len(rows)].append(linear)
            else:
                rows.append(linear)
        (out, down), (qkv, up) = rows, halves
        return tuple(qkv), out, tuple(up), down

    def _kept_of_mlp(self, *, is_gated: bool) -> int:
        if is_gated:
            return _KEPT_OF_GATED_MLP
        name = getattr(self.config, "activation_function", None) or getattr(self.config, "hidden_act", None)
        return _KEPT_OF_ACTIVATION.get(str(name), _KEPT_OF_OTHER_ACTIVATIONS)
