"""A model that DeepSpeed partitions: what the frozen teacher and the student share, and the frozen engine itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from megadistill.config.parallel import ZeroSection
from megadistill.data.collate import right_padded
from megadistill.decoding.decoder import PlanDecoder, PlanPrefiller, Present
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.layouts import Setting, choose_layouts, product_shapes
from megadistill.decoding.products import PACKED
from megadistill.decoding.static_step import stepping_on
from megadistill.engines.ds_config import teacher_config
from megadistill.engines.empty_weights import NothingToCopy
from megadistill.engines.gathered import gathered_module, gathered_parameters, kept_parameters
from megadistill.engines.host_memory import HostMemory
from megadistill.engines.lm_forward import use_head_fn_forward
from megadistill.engines.local_state import set_weights, shard_shape, weight_tensors
from megadistill.engines.secondary_partition import forget_secondary_partitions, secondary_partitions
from megadistill.engines.zero_parameter import partitioned_ones
from megadistill.models.loading import LoadedModel, WeightSource
from megadistill.models.lora import LoraLinear, adapted_layers, merged_weights
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import LogitMap, OutputHead
from megadistill.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PartitionedModel:
    """A DeepSpeed engine around a sharded model, and this rank's slice of its head.

    Implements ``decoding.protocols.TextModel``. Made on all ranks at once: how parameters are sharded is learned by one
    object all-gather over the tensor-parallel group, and on CPUs the layouts of products that rank 0 chooses are
    broadcast.

    Args:
        engine: What ``initialize`` made of the model.
        loaded: The model as it was loaded.
        context: The grid of processes.
        cpu_products: ``generation.cpu_products``.
        cuda_graphs: ``generation.cuda_graphs``.
        offload_weights: Keep the weights in host memory while they are not used. They must not change then.

    Attributes:
        engine: The engine.
        loaded: The model as it was loaded; shapes and configuration are those of the whole model.
        context: The grid of processes.
        shard: This rank's slice of the vocabulary.
        shard_specs: Name of each parameter -> how tensor parallelism shards it.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        loaded: LoadedModel,
        context: ParallelContext,
        cpu_products: Setting = "auto",
        cuda_graphs: bool = True,
        *,
        offload_weights: bool = False,
    ) -> None:
        self.engine, self.loaded, self.context = engine, loaded, context
        self._stepping = stepping_on(context.device, cuda_graphs=cuda_graphs)
        if context.tp_size > 1 and loaded.family.post_shard is not None:
            loaded.family.post_shard(engine.module, context)
        if context.tp_size > 1 and engine.first_dataloader_check is not None:
            # It pickles the arguments, head functions included, and asks globals that another engine may have set.
            engine.first_dataloader_check.remove()
        self.shard = head_shard(engine.module.get_output_embeddings(), context)
        self.shard_specs = _shard_specs(engine.module, loaded, context)
        self._plan = loaded.family.plan_or_say(engine.module, context.rank)
        self._layouts = PACKED
        if context.device.type == "cpu":
            head = engine.module.get_output_embeddings().weight
            shapes = product_shapes(self._plan, head, shard_shape)
            self._layouts = context.run_on_rank0(lambda: choose_layouts(cpu_products, shapes, head.dtype))
        if loaded.weights is not None:
            self.fill(loaded.weights, WEIGHT)
            self.loaded = replace(loaded, weights=None)
        self._weights: HostMemory | None = None
        if offload_weights:
            for parameter in engine.module.parameters():
                if not parameter.untyped_storage().resizable():  # a file is mapped there
                    parameter.data = parameter.data.clone()
            self._weights = HostMemory(lambda: weight_tensors(engine.module.parameters()), writable=False)

    def fill(self, weights: WeightSource, kind: str) -> None:
        """Loads all weights, one parameter after the other, of each what this rank keeps.

        Communicates only where a node reads its files once (``TensorReader.stream``).

        Args:
            weights: Whole tensors, or files of any layout.
            kind: Which tensors of theirs are the weights.

        Raises:
            CheckpointError: The files are those of another model, or incomplete.
        """
        parameters = dict(self.module.named_parameters())
        for name in weights.stream(self._names_of(kind)):
            self._fill_parameter(name, parameters[name], weights, kind)
        forget_secondary_partitions(partitioned_ones(parameters.values()))

    def _names_of(self, kind: str) -> list[str]:
        """Parameters of which a source with tensors of this kind has one."""
        return list(self.loaded.shapes)

    def _fill_parameter(self, name: str, parameter: nn.Parameter, weights: WeightSource, kind: str) -> None:
        spec, tp_rank = self.shard_specs[name], self.context.tp_rank
        set_weights(parameter, lambda start, end: weights.read(kind, name, spec, tp_rank, start, end))

    @property
    def module(self) -> PreTrainedModel:
        """The sharded model."""
        module: PreTrainedModel = self.engine.module
        return module

    @contextmanager
    def decoder(self) -> Iterator[PlanDecoder | HFDecoder]:
        """A decoder with all parameters gathered once (over the data-parallel group) for as long as it is used."""
        was_training, runs_forward = self.module.training, self._plan is None
        layers = [] if runs_forward else list(adapted_layers([self.module]))
        is_released = released_afterwards(layers)
        with (
            self._brought_in([self.module]),
            gathered_module(self.engine, runs_forward=runs_forward) as module,
            merged_weights(layers, is_released),
        ):
            module.eval()
            try:
                yield make_decoder(module, self._plan, self.shard, self.context.device, self._layouts, self._stepping)
            finally:
                module.train(was_training)

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """This rank's slice of the head, gathered once over the data-parallel group for as long as it is used.

        Passes of the engine meanwhile neither gather nor release it.
        """
        module = self.module.get_output_embeddings()
        with self._brought_in([module]), kept_parameters([module.weight, getattr(module, "bias", None)]):
            yield OutputHead.of(module, self.shard, LogitMap.of(self.loaded.config))

    def prefiller(self, examples_per_pass: int) -> PlanPrefiller | EnginePrefiller:
        """Reads given text.

        It reads layer by layer, each gathered once per call over the data-parallel group; a model without a plan reads
        ``examples_per_pass`` examples at a time by its own forward pass.
        """
        if self._plan is None:
            return EnginePrefiller(self.engine, self.context.device, examples_per_pass, self._brought_in)
        return PlanPrefiller(self._plan, self.shard, self.context.device, self._present, self._layouts)

    @contextmanager
    def _present(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """The parameters of some modules whole (one gathering over the data-parallel group)."""
        layers = list(adapted_layers(modules))
        is_released = released_afterwards(layers)
        with (
            self._brought_in(modules),
            gathered_parameters(_parameters(modules)),
            merged_weights(layers, is_released),
        ):
            yield

    def _brought_in(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """What this rank keeps of the parameters of some modules, on the device."""
        return nullcontext() if self._weights is None else self._weights.present(weight_tensors(_parameters(modules)))


def _shard_specs(module: nn.Module, loaded: LoadedModel, context: ParallelContext) -> dict[str, ShardSpec]:
    """How DeepSpeed sharded every parameter (one object all-gather over the tensor-parallel group)."""
    shapes = {name: shard_shape(parameter) for name, parameter in module.named_parameters()}
    assert list(shapes) == list(loaded.shapes), "AutoTP renamed parameters"
    ranks = context.gather_shapes_over_tp(shapes, loaded.shapes)
    return {
        name: ShardSpec.from_shard_shapes(whole, [rank[name] for rank in ranks], loaded.family.blocks(name))
        for name, whole in loaded.shapes.items()
    }


def released_afterwards(layers: Sequence[LoraLinear]) -> Callable[[nn.Parameter], bool]:
    """Tells of a layer's weight whether it is absent now (ZeRO-3), and so given up by whoever brings it in next.

    A weight that will have a secondary partition is not given up at first: that one is made of it.
    """
    absent = {
        id(weight)
        for weight in partitioned_ones(layer.base_weight for layer in layers)
        if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
        and (weight.ds_zero_param_process_group is None or weight.ds_secondary_tensor is not None)
    }
    return lambda weight: id(weight) in absent


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


class EnginePrefiller:
    """Implements ``decoding.protocols.Prefiller`` by the engine's forward pass, which reads whole examples.

    Under ZeRO-3 every data-parallel rank must read as many examples.

    Args:
        engine: The engine.
        device: Where its inputs go.
        examples_per_pass: Examples of one forward pass.
        brought_in: ``brought_in(modules)`` is a context in which what this rank keeps of them is on the device.
    """

    keeps_cache = False

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, device: torch.device, examples_per_pass: int, brought_in: Present
    ) -> None:
        self._engine, self._device, self._examples_per_pass = engine, device, examples_per_pass
        self._brought_in = brought_in

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        """There is none: this prefiller keeps nothing."""
        raise AssertionError("this prefiller keeps nothing")

    @torch.no_grad()
    def read(self, chunks: Sequence[PrefillChunk], state: Any = None) -> list[torch.Tensor]:
        """Hidden states [number of tokens, H] of each chunk."""
        hidden: list[torch.Tensor] = []
        for start in range(0, len(chunks), self._examples_per_pass):
            together = chunks[start : start + self._examples_per_pass]
            batch = right_padded([(chunk.tokens, None) for chunk in together], 0).to(self._device)
            with self._brought_in([self._engine.module]):
                states = self._engine(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
                )
            hidden += [row[: len(chunk.tokens)] for row, chunk in zip(states, together, strict=True)]
        return hidden


def frozen_model(
    loaded: LoadedModel,
    context: ParallelContext,
    *,
    zero_stage: int,
    dtype: str,
    zero: ZeroSection | None = None,
    offload: bool = False,
    deepspeed_settings: Mapping[str, Any] | None = None,
    cpu_products: Setting = "auto",
    cuda_graphs: bool = True,
) -> PartitionedModel:
    """Partitions a model that is never trained (collective over the world).

    Args:
        loaded: The model.
        context: The grid of processes.
        zero_stage: ZeRO stage of the run.
        dtype: Type of the weights, "fp32" or "bf16".
        zero: The run's ``parallel.zero``; None: its defaults.
        offload: Keep its weights in host memory while they are not used.
        deepspeed_settings: The run's ``deepspeed`` section.
        cpu_products: ``generation.cpu_products``.
        cuda_graphs: ``generation.cuda_graphs``.

    Raises:
        ConfigError: DeepSpeed does not take a setting that is passed on.
    """
    model = loaded.model
    use_head_fn_forward(model)
    model.eval()
    zero = zero or ZeroSection()
    config = teacher_config(
        zero_stage=zero_stage,
        tp_size=context.tp_size,
        dtype=dtype,
        family=loaded.family,
        zero=zero,
        device_type=context.device.type,
        passed=deepspeed_settings,
    )
    engine = initialize(model, config, context, hpz_partition_size=zero.hpz_partition_size)
    # Not before: AutoTP registers gradient hooks on Qwen3's norms, which a frozen parameter refuses.
    model.requires_grad_(False)
    return PartitionedModel(engine, loaded, context, cpu_products, cuda_graphs, offload_weights=offload)


def initialize(
    model: PreTrainedModel,
    config: dict[str, Any],
    context: ParallelContext,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    hpz_partition_size: int = 1,
) -> deepspeed.DeepSpeedEngine:
    """``deepspeed.initialize`` with corrections: float32 buffers, timeouts, and the head as an external parameter.

    Collective over the world.

    Args:
        model: The whole model, whose weights are filled in afterwards.
        config: DeepSpeed's configuration (``ds_config``).
        context: The grid of processes, whose timeout DeepSpeed's own groups get, too.
        optimizer: The optimizer of a model that is trained.
        hpz_partition_size: Of ``parallel.zero``.

    Raises:
        TopologyError: The processes cannot be divided like that.
    """
    # DeepSpeed casts buffers too, and rotary frequencies in bfloat16 put every angle off by one percent.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    with NothingToCopy(model), secondary_partitions(context, hpz_partition_size):
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    context.set_all_timeouts()
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.data = buffers[name].to(buffer.device)
    if engine.zero_optimization_stage() == 3:
        head = model.get_output_embeddings()
        for parameter in (head.weight, getattr(head, "bias", None)):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(model, parameter)
    return engine


def head_shard(head: Any, context: ParallelContext) -> VocabShard:
    """This rank's slice of the vocabulary, checked against the project's own rule.

    Args:
        head: The head as AutoTP left it: ``nn.Linear`` in one piece, or a module of DeepSpeed that knows its bounds.
        context: The grid of processes.
    """
    if context.tp_size == 1:
        return VocabShard(0, head.out_features, head.out_features, None)
    shard = context.vocab_shard(head.vocab_size)
    bounds = (head.vocab_start_index, head.vocab_end_index, torch.distributed.get_world_size(head.mp_group))
    expected = (shard.start, shard.stop, context.tp_size)
    assert bounds == expected, f"DeepSpeed sharded the head as {bounds}, expected {expected}"
    return shard
