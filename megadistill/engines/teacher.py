"""The frozen engine: a partitioned model that scores text and, for evaluation, writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn

from megadistill.data.collate import right_padded
from megadistill.decoding.decoder import PlanDecoder, PlanPrefiller
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.engines.ds_config import teacher_config
from megadistill.engines.gathered import gathered_module, gathered_parameters, kept_parameters
from megadistill.engines.lm_forward import use_head_fn_forward
from megadistill.engines.local_state import set_weights, shard_shape
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean
from megadistill.models.loading import LoadedModel
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT, ShardReader
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard


class PartitionedModel:
    """What teacher and student share: a DeepSpeed engine around a cut model, and this rank's slice of its head."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, loaded: LoadedModel, context: ParallelContext) -> None:
        self.engine, self.loaded, self.context = engine, loaded, context
        if context.tp_size > 1 and loaded.family.post_shard is not None:
            loaded.family.post_shard(engine.module, context.tp_size)
        if context.tp_size > 1 and engine.first_dataloader_check is not None:
            # It pickles the arguments, objectives included, and asks globals that another engine may have set.
            engine.first_dataloader_check.remove()
        self.shard = head_shard(engine.module.get_output_embeddings(), context)
        self.shard_specs = _shard_specs(engine.module, loaded, context)
        self._plan = loaded.family.plan(engine.module)
        if loaded.shards is not None:
            self.fill(ShardReader(loaded.shards), WEIGHT)

    def fill(self, shards: ShardReader, kind: str) -> None:
        """Takes all weights from files of any layout; no communication. Raises CheckpointError for another model's."""
        for name, parameter in self.module.named_parameters():

            def read(start: int, end: int, name: str = name) -> torch.Tensor:
                return shards.read(kind, name, self.shard_specs[name], self.context.tp_rank, start, end)

            set_weights(parameter, read)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @contextmanager
    def decoder(self) -> Iterator[PlanDecoder | HFDecoder]:
        """A Decoder with all parameters gathered once (over the data-parallel group) for as long as it is used."""
        was_training = self.module.training
        with gathered_module(self.engine, runs_forward=self._plan is None) as module:
            module.eval()
            try:
                yield make_decoder(module, self._plan, self.shard, self.context.device)
            finally:
                module.train(was_training)

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """This rank's head shard, weight [Vs, H] and bias, gathered once over the data-parallel group; passes of the
        engine meanwhile neither gather nor release it."""
        head = OutputHead.of(self.module.get_output_embeddings(), self.shard)
        with kept_parameters([head.weight, head.bias]):
            yield head

    def prefiller(self, rows_per_pass: int) -> PlanPrefiller | EnginePrefiller:
        """Reads text layer by layer, each part of the model gathered once a reading (over the data-parallel group);
        models without a plan are read ``rows_per_pass`` rows at a time by their own forward pass."""
        if self._plan is None:
            return EnginePrefiller(self.engine, self.context.device, rows_per_pass)
        return PlanPrefiller(self._plan, self.shard, self.context.device, _present)


def _shard_specs(module: nn.Module, loaded: LoadedModel, context: ParallelContext) -> dict[str, ShardSpec]:
    """How DeepSpeed cut every parameter (one object all-gather over the tensor-parallel group)."""
    shapes = {name: shard_shape(parameter) for name, parameter in module.named_parameters()}
    assert list(shapes) == list(loaded.shapes), "AutoTP renamed parameters"
    ranks = context.gather_objects_over_tp(shapes)
    return {
        name: ShardSpec.from_shard_shapes(whole, [rank[name] for rank in ranks], loaded.family.blocks(name))
        for name, whole in loaded.shapes.items()
    }


def _present(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    return gathered_parameters([parameter for module in modules for parameter in module.parameters()])


class EnginePrefiller:
    """Reads whole rows through a DeepSpeed engine: under ZeRO-3 every data-parallel rank must read as many rows."""

    keeps_cache = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, device: torch.device, rows_per_pass: int) -> None:
        self._engine, self._device, self._rows_per_pass = engine, device, rows_per_pass

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        raise AssertionError("this reader keeps nothing")

    @torch.no_grad()
    def read(self, readings: Sequence[PrefillChunk], state: Any = None) -> list[torch.Tensor]:
        """Hidden states [number of tokens, H] of each reading."""
        found: list[torch.Tensor] = []
        for start in range(0, len(readings), self._rows_per_pass):
            part = readings[start : start + self._rows_per_pass]
            batch = right_padded([(reading.tokens, None) for reading in part], 0).to(self._device)
            states = self._engine(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            )
            found += [row[: len(reading.tokens)] for row, reading in zip(states, part, strict=True)]
        return found


def frozen_model(
    loaded: LoadedModel,
    context: ParallelContext,
    *,
    zero_stage: int,
    dtype: str,
    deepspeed_settings: Mapping[str, Any] | None = None,
) -> PartitionedModel:
    """Partitions a model that is never trained (collective over the world)."""
    model = loaded.model
    use_head_fn_forward(model)
    model.eval()
    config = teacher_config(
        zero_stage=zero_stage,
        tp_size=context.tp_size,
        dtype=dtype,
        family=loaded.family,
        passed=deepspeed_settings,
    )
    engine = initialize(model, config, context)
    # Not before: AutoTP hangs gradient hooks on Qwen3's norms, which a frozen parameter refuses.
    model.requires_grad_(False)
    return PartitionedModel(engine, loaded, context)


def initialize(
    model: nn.Module, config: dict[str, Any], context: ParallelContext, optimizer: Any = None
) -> deepspeed.DeepSpeedEngine:
    """``deepspeed.initialize`` with the check that DeepSpeed cut the model over the ranks that ``context`` names."""
    # DeepSpeed casts buffers too, and rotary frequencies in bfloat16 are off by a per cent of every angle.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    except ValidationError as error:
        raise ConfigError(_refused(error)) from None
    context.set_all_timeouts()  # DeepSpeed's own groups, too
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.data = buffers[name].to(buffer.device)
    if engine.zero_optimization_stage() == 3:
        head = model.get_output_embeddings()
        for parameter in (head.weight, getattr(head, "bias", None)):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(model, parameter)
    return engine


def _refused(error: ValidationError) -> str:
    """DeepSpeed's first objection to the settings that were passed to it, as one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    names = [name for name in DeepSpeedZeroConfig.model_fields]
    return f"deepspeed.zero_optimization.{key}: {first['msg']}{did_you_mean(key, names)}"


def head_shard(head: nn.Module, context: ParallelContext) -> VocabShard:
    """This rank's slice of the vocabulary, read off the cut head and checked against the project's own rule."""
    if context.tp_size == 1:
        return VocabShard(0, head.out_features, head.out_features, None)
    shard = context.vocab_shard(head.vocab_size)
    found = (head.vocab_start_index, head.vocab_end_index, torch.distributed.get_world_size(head.mp_group))
    assert found == (shard.start, shard.stop, context.tp_size), f"DeepSpeed cut the head as {found}, expected {shard}"
    return shard
