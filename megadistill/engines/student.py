"""The trained engine: forward with a loss function, backward, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import nn

from megadistill.config.optim import OptimSection
from megadistill.config.parallel import ZeroSection
from megadistill.config.schema import TrainSection
from megadistill.data.collate import SequenceBatch
from megadistill.decoding.layouts import Setting
from megadistill.engines.ds_config import clips_itself, needs_wide_gradients, student_config
from megadistill.engines.host_memory import HostMemory
from megadistill.engines.lm_forward import use_head_fn_forward
from megadistill.engines.local_state import (
    LocalPart,
    local_parts,
    optimizer_steps,
    optimizer_tensors,
    set_optimizer_steps,
)
from megadistill.engines.partitioned import PartitionedModel, initialize
from megadistill.models.attention import use_padding_free_attention
from megadistill.models.loading import LoadedModel, WeightSource
from megadistill.models.lora import freeze_base, trained_names
from megadistill.models.shards import MASTER, MOMENTS
from megadistill.parallel.collectives import all_reduce_sum
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import LogitMap, OutputHead


class Student(PartitionedModel):
    """A partitioned model with an optimizer.

    Losses are sums divided by global counts, so gradients are summed over data-parallel ranks and passes, never
    averaged.

    Args:
        engine: What ``initialize`` made of the model.
        loaded: The model as it was loaded.
        context: The grid of processes.
        adamw: The optimizer inside the engine.
        max_norm: Clips the gradient here, where DeepSpeed does not; 0: not here.
        offload: Keep the optimizer's state in host memory between updates.

    Attributes:
        grad_norm: Norm of the last update's gradient, before clipping.
    """

    grad_norm = 0.0

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        loaded: LoadedModel,
        context: ParallelContext,
        adamw: _GuardedAdamW,
        cpu_products: Setting = "auto",
        cuda_graphs: bool = True,
        *,
        max_norm: float = 0.0,
        offload: bool = False,
    ) -> None:
        self._adamw, self._max_norm = adamw, max_norm
        self._parts: dict[str, LocalPart] = {}  # only while weights are filled in
        self._state: HostMemory | None = None
        super().__init__(engine, loaded, context, cpu_products, cuda_graphs)
        if offload:
            self._state = HostMemory(lambda: optimizer_tensors(engine), writable=True)

    def fill(self, weights: WeightSource, kind: str) -> None:
        """Loads the weights, the optimizer's float32 copies included, and its moments where the files have them.

        Args:
            weights: Whole tensors, or files of any layout.
            kind: Which tensors of theirs are the weights.

        Raises:
            CheckpointError: The files are those of another model, or incomplete.
        """
        with self.state_present():
            self._parts = {part.name: part for part in local_parts(self.engine)}
            super().fill(weights, kind)
            self._parts = {}
        if "optimizer_steps" in weights.info:
            set_optimizer_steps(self.engine, weights.info["optimizer_steps"])

    def _names_of(self, kind: str) -> list[str]:
        return trained_names(self.loaded) if kind == MASTER else super()._names_of(kind)

    def _fill_parameter(self, name: str, parameter: nn.Parameter, weights: WeightSource, kind: str) -> None:
        super()._fill_parameter(name, parameter, weights, kind)
        part = self._parts.get(name)
        if part is None:
            return
        spec, end = self.shard_specs[name], part.start + part.numel
        kinds = {MASTER: kind} | {moment: moment for moment in MOMENTS if moment in weights.kinds}
        for ours, theirs in kinds.items():
            part.tensors[ours].copy_(weights.read(theirs, name, spec, self.context.tp_rank, part.start, end))

    def snapshot(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Copies in host memory of what this rank is to write into its shard file.

        Returns:
            ``KIND/NAME`` -> (first element in the tensor-parallel shard, flat tensor). Each run of the model is in one
            rank's copies.
        """
        with self.state_present():
            return {
                f"{kind}/{part.name}": (part.start, tensor.detach().to("cpu", copy=True))
                for part in self.parts_to_write()
                for kind, tensor in part.tensors.items()
            }

    def parts_to_write(self) -> Iterator[LocalPart]:
        """The parts that this rank is to write: each run of the model is among those of one rank.

        Their tensors are there in ``state_present`` only. No communication.
        """
        context = self.context
        for i, part in enumerate(local_parts(self.engine)):
            is_ours = not part.is_shared or i % context.dp_size == context.dp_rank
            if is_ours and (self.shard_specs[part.name].dim is not None or not context.tp_rank):
                yield part

    def state_present(self) -> AbstractContextManager[None]:
        """The optimizer's state may be read and changed."""
        return nullcontext() if self._state is None else self._state.present()

    @property
    def optimizer_steps(self) -> int:
        """Updates that AdamW has made."""
        return optimizer_steps(self.engine)

    def forward(
        self, batch: SequenceBatch, loss_fn: Callable[[torch.Tensor, OutputHead], torch.Tensor], *, is_last: bool
    ) -> torch.Tensor:
        """A forward pass with a loss.

        Args:
            batch: What the model reads, [B, S].
            loss_fn: ``loss_fn(hidden [B, S, H], head)``, called inside the engine's forward, where the head is present.
            is_last: No other forward pass of this step follows. All data-parallel ranks say so of the same pass.

        Returns:
            What ``loss_fn`` returned.
        """

        def head_fn(hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
            return loss_fn(hidden, OutputHead.of(module, self.shard, LogitMap.of(self.loaded.config)))

        # Said before the pass, because ZeRO asks in the backward pass. DeepSpeed's own count expects equally many
        # passes in every step.
        self.engine.set_gradient_accumulation_boundary(is_last)
        reads = (
            {"attention_mask": batch.attention_mask}
            if batch.bounds is None
            else {"attention_mask": None, "lengths": batch.lengths, "bounds": batch.bounds}
        )
        loss: torch.Tensor = self.engine(
            input_ids=batch.input_ids, position_ids=batch.position_ids, head_fn=head_fn, **reads
        )
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss`` (a local share of a global mean) to the accumulated one.

        DeepSpeed averages over the data-parallel group; multiplying by its size makes that a sum.
        """
        self.engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    @property
    def loss_scale(self) -> int:
        """What losses are multiplied by before the backward pass."""
        return self.context.dp_size if getattr(self.engine.optimizer, "gradient_average", True) else 1

    def step(self, lr: float, skip: bool = False) -> bool:
        """Clips the gradient of all passes and updates.

        Args:
            lr: The learning rate of this update.
            skip: Leave everything as it is.

        Returns:
            Whether there was an update, the same on all ranks: none with ``skip``, nor where the gradient's norm is not
            finite.
        """
        assert self.engine.is_gradient_accumulation_boundary()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # Stage 0 in float32 has no optimizer of DeepSpeed, which would know the norm; that of bfloat16 asks one shard.
        plain_norm = None if self.engine.zero_optimization_stage() else self._plain_grad_norm()
        self._adamw.is_allowed = lambda: not skip and math.isfinite(self._norm(plain_norm))
        self._adamw.clip = self._max_norm / plain_norm if plain_norm and plain_norm > self._max_norm > 0 else 1.0
        with self.state_present():
            self.engine.step()
        self.grad_norm = self._norm(plain_norm)
        return not skip and math.isfinite(self.grad_norm)

    def _norm(self, plain_norm: float | None) -> float:
        """The gradient's norm: DeepSpeed knows it before its optimizer's update."""
        return float(self.engine.optimizer._global_grad_norm if plain_norm is None else plain_norm)

    def _plain_grad_norm(self) -> float:
        """Norm over whole parameters; one all-reduce over the tensor-parallel group, for those that are sharded."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                is_shard = hasattr(parameter, "gather_params")
                squares[int(is_shard)] += parameter.grad.double().square().sum()
        shards = all_reduce_sum(squares[1:].clone(), self.context.tp_group)
        return float((squares[0] + shards[0]).sqrt())


def trained_model(
    loaded: LoadedModel,
    context: ParallelContext,
    *,
    zero_stage: int,
    dtype: str,
    optim: OptimSection,
    train: TrainSection,
    gradient_checkpointing: bool = False,
    zero: ZeroSection | None = None,
    offload: bool = False,
    deepspeed_settings: Mapping[str, Any] | None = None,
    cpu_products: Setting = "auto",
    cuda_graphs: bool = True,
) -> Student:
    """Partitions a model together with its AdamW (collective over the world).

    Args:
        loaded: The model.
        context: The grid of processes.
        zero_stage: ZeRO stage.
        dtype: Type of the weights that forward passes use, "fp32" or "bf16".
        optim: Settings of AdamW.
        train: Settings of the batches.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        zero: The run's ``parallel.zero``; None: its defaults.
        offload: Keep the optimizer's state in host memory between updates.
        deepspeed_settings: The run's ``deepspeed`` section.
        cpu_products: ``generation.cpu_products``.
        cuda_graphs: ``generation.cuda_graphs``.

    Raises:
        ConfigError: DeepSpeed refuses its settings.
    """
    model = loaded.model
    use_head_fn_forward(model)
    if train.padding_free:
        use_padding_free_attention(model)
    model.train()
    if loaded.lora is not None:
        freeze_base(model, loaded.lora)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zero = zero or ZeroSection()
    num_elements = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = student_config(
        optim, train, zero_stage=zero_stage, tp_size=context.tp_size, dp_size=context.dp_size, dtype=dtype,
        family=loaded.family, zero=zero, device_type=context.device.type, num_elements=num_elements,
        passed=deepspeed_settings,
    )  # fmt: skip
    adamw = _adamw(model, optim, context.device)
    engine = initialize(model, config, context, adamw, hpz_partition_size=zero.hpz_partition_size)
    if needs_wide_gradients(dtype, optim):
        _sum_in_float32(engine, zero_stage)
    # Stage 0 in bfloat16 clips by the norm of one tensor-parallel shard.
    max_norm = optim.gradient_clipping if clips_itself(zero_stage, dtype) else 0.0
    return Student(engine, loaded, context, adamw, cpu_products, cuda_graphs, max_norm=max_norm, offload=offload)


def _sum_in_float32(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> None:
    """What DeepSpeed has no settings for."""
    if zero_stage == 0:
        for parameter in engine.module.parameters():
            parameter.grad_dtype = torch.float32  # where autograd adds up
    elif zero_stage == 2:
        engine.optimizer.gradient_average = False  # it would divide bfloat16 numbers: see Student.loss_scale


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW that asks ``is_allowed`` before an update: ZeRO stages 0 to 2 would use gradients that are not finite.

    Nor does DeepSpeed's own first call count, with which it makes the state of stage 0 in bfloat16.

    Attributes:
        clip: Gradients are multiplied by it.
    """

    is_allowed: Callable[[], bool] = staticmethod(lambda: False)
    clip = 1.0

    def step(self, closure: Any = None) -> Any:
        if not self.is_allowed():
            return None
        if self.clip != 1.0:
            torch._foreach_mul_([p.grad for group in self.param_groups for p in group["params"]], self.clip)
        return super().step(closure)


def _adamw(model: nn.Module, optim: OptimSection, device: torch.device) -> _GuardedAdamW:
    """Weight decay on matrices only, as is usual; biases and norms are left alone.

    On GPUs an update is one kernel, without the temporary tensors of torch's default (8 bytes a number).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    is_fused = True if device.type == "cuda" else None
    return _GuardedAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=is_fused)
