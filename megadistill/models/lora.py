"""Low-rank adapters (LoRA, Hu et al., 2106.09685) of a student, under tensor parallelism and ZeRO.

A target layer y = W x + b becomes y = W x + b + s B A x. Tensor parallelism shards B as it shards W along the outputs,
and A as W along the inputs; the other of the two is whole on every rank. Both are layers of DeepSpeed's own kinds then,
which reduce r numbers a token.

``LoraLinear`` has no ``weight``: AutoTP takes every module that has one for a linear layer, and would lose the adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megadistill.errors import ConfigError
from megadistill.files import did_you_mean
from megadistill.models.families import BASE, LORA_A, LORA_B, Family
from megadistill.models.fingerprint import fingerprint_of, model_fingerprint
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT
from megadistill.models.tensor_reader import TensorReader
from megadistill.models.weight_files import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megadistill.config.lora import LoraSection
    from megadistill.models.loading import LoadedModel, WeightSource


class LoraLinear(nn.Module):
    """y = W x + b + s B A x.

    Args:
        base: The layer with W [out, in] and b.
        r: Rank: A is [r, in], B is [out, r].
        scale: s.
    """

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        like: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.base_layer = base
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, r, **like)
        self.lora_B = nn.utils.skip_init(nn.Linear, r, base.out_features, **like)
        self.scale = scale

    @property
    def base_weight(self) -> nn.Parameter:
        """W, or this rank's shard of it."""
        return cast(nn.Parameter, self.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; reduces as the layers do that AutoTP has put in place of its parts."""
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scale
        return out

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A of what this rank holds of each [out, in]; computed in float32, in the type of W. No communication.

        A shard of a layer along its outputs has its rows of B and all of A; one along its inputs all of B and its
        columns of A.
        """
        weight = self.base_weight
        added = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return (weight.float() + self.scale * added).to(weight.dtype)


def adapted_layers(modules: Iterable[nn.Module]) -> Iterator[LoraLinear]:
    """The layers with adapters in some modules."""
    for module in modules:
        yield from (child for child in module.modules() if isinstance(child, LoraLinear))


@contextmanager
def merged_weights(layers: Iterable[LoraLinear], is_released: Callable[[nn.Parameter], bool]) -> Iterator[None]:
    """W of each layer is W + s B A meanwhile; all parameters must be present. No communication.

    Args:
        layers: The layers.
        is_released: Whether a weight is given up afterwards (ZeRO-3), so that no copy of it has to be kept.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            weight = layer.base_weight
            if not is_released(weight):
                kept.append((weight, weight.data))
            weight.data = layer.merged()
        yield
    finally:
        for weight, data in kept:
            weight.data = data


@dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
        config: Rank, scale and targets.
        layers: Names of the layers that have one, as the base names them.
        base: Folder or hub name of the model that they belong to.
        base_files: What ``model_fingerprint`` says of it.
    """

    config: LoraSection
    layers: tuple[str, ...]
    base: str
    base_files: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [f"{layer}.{part}.weight" for layer in self.layers for part in (LORA_A, LORA_B)]


def with_adapters(
    loaded: LoadedModel,
    config: LoraSection,
    *,
    seed: int,
    where: str,
    base: str,
    trained: tuple[WeightSource, str] | None = None,
) -> LoadedModel:
    """The model with adapters, which alone are to be trained; it computes what it did, as every B is 0 at first.

    Args:
        loaded: A model that is not sharded and not filled yet; it is changed.
        config: Rank, scale and targets.
        seed: Every A is drawn with it, whatever the layout (uniform, as in peft: within 1 / sqrt(in)).
        where: The key of the section; errors begin with it.
        base: Folder or hub name of the model.
        trained: Where adapters come from that are no new ones, and which tensors of that they are.

    Raises:
        ConfigError: A target is no linear layer of the model.
    """
    model, family = loaded.model, loaded.family
    known = (*family.column_parallel, *family.row_parallel)
    targets = config.targets or known
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"{where}.targets: {model.config.model_type} has no linear layer {target}"
                f"{did_you_mean(target, known)}; allowed: {', '.join(known)}"
            )
    layers = _inject(model, targets, config)
    lora, weights = Lora(config, tuple(layers), base, model_fingerprint(base)), loaded.weights
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert weights is not None
    new = TensorReader(first_adapters(shapes, lora.names, seed), parameters[lora.names[0]].dtype), WEIGHT
    return replace(
        loaded,
        family=replace(family, partition_config=partition_config(family)),
        shapes=shapes,
        fingerprint=fingerprint_of(loaded.config, shapes, config.scale),
        weights=_WithAdapters(weights, *(trained or new)),
        lora=lora,
    )


def _inject(model: PreTrainedModel, targets: Collection[str], config: LoraSection) -> list[str]:
    """Puts ``LoraLinear`` around layers; returns their names."""
    found = []
    for name, module in list(model.base_model.named_modules(prefix=model.base_model_prefix)):
        parent, _, last = name.rpartition(".")
        if last in targets and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), last, LoraLinear(module, config.r, config.scale))
            found.append(name)
    return found


def trained_names(loaded: LoadedModel) -> list[str]:
    """Names of the parameters that are trained and that a checkpoint holds: all, or those of the adapters."""
    return list(loaded.shapes) if loaded.lora is None else loaded.lora.names


def freeze_base(model: nn.Module, lora: Lora) -> None:
    """Of all parameters, those of the adapters alone keep a gradient."""
    trained = set(lora.names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def first_adapters(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], seed: int) -> dict[str, StoredTensor]:
    """Parameter -> its first value: A random, each by its own name and the seed, B zero.

    Args:
        shapes: Shape of each parameter.
        names: The parameters.
        seed: The seed.
    """
    made = {}
    for name in names:
        content = torch.zeros(shapes[name])
        if name.endswith(f".{LORA_A}.weight"):
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
            bound = 1 / math.sqrt(shapes[name][1])
            content.uniform_(-bound, bound, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
        made[name] = StoredTensor(name, shapes[name], content.dtype, content)
    return made


def base_name(name: str) -> str:
    """What the base calls a parameter of the model with adapters."""
    return name.replace(f".{BASE}.", ".")


def _is_adapter(parameter: str) -> bool:
    return parameter.endswith((f".{LORA_A}.weight", f".{LORA_B}.weight"))


class _WithAdapters:
    """The weights of a base, and adapters. Implements ``models.loading.WeightSource``.

    Args:
        base: The weights of the base.
        adapters: The adapters.
        kind: Which tensors of theirs are the weights.
    """

    def __init__(self, base: WeightSource, adapters: WeightSource, kind: str) -> None:
        self._base, self._adapters, self._kind = base, adapters, kind
        self.info = base.info

    @property
    def kinds(self) -> Collection[str]:
        return self._base.kinds

    def stream(self, names: Iterable[str]) -> Iterator[str]:
        of_base: dict[str, str] = {}
        for name in names:
            if _is_adapter(name):
                yield name
            else:
                of_base[base_name(name)] = name
        for name in self._base.stream(of_base):
            yield of_base[name]

    def read(self, kind: str, name: str, spec: ShardSpec, tp_rank: int, start: int, end: int) -> Tensor:
        if _is_adapter(name):
            return self._adapters.read(self._kind, name, spec, tp_rank, start, end)
        return self._base.read(kind, base_name(name), spec, tp_rank, start, end)


def partition_config(family: Family) -> dict[str, Any]:
    """AutoTP's explicit plan for the family with adapters, or without: names of layers, and how each is sharded."""
    specs: list[dict[str, Any]] = []
    for layer in family.column_parallel:
        spec: dict[str, Any] = {
            "patterns": [rf".*\.{layer}\.({BASE}\.|{LORA_B}\.)?weight$"],
            "partition_type": "column",
        }
        if layer in dict(family.fused):
            blocks = dict(family.fused)[layer]
            spec |= {"shape": [blocks if isinstance(blocks, int) else list(blocks), -1], "partition_dim": 0}
        specs.append(spec)
    specs += [
        {"patterns": [rf".*\.{layer}\.({BASE}\.|{LORA_A}\.)?weight$"], "partition_type": "row"}
        for layer in family.row_parallel
    ]
    return {"use_default_specs": False, "layer_specs": specs}
