"""Small engines inside a forked gloo job, one after the other, without the rest of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megadistill.data.collate import SequenceBatch
from megadistill.parallel.collectives import all_reduce_sum
from tests.support.runs import FAMILY_CONFIGS, join_deepspeed

V, HIDDEN = 101, 32


def write_config(folder: Path, family: str = "llama") -> Path:
    """The configuration of a tiny model, whose weights are then random."""
    tree = {**FAMILY_CONFIGS[family], "hidden_size": HIDDEN, "vocab_size": V, "initializer_range": 0.2}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def on_grid(rank: int, tp_size: int) -> Any:
    """This rank's ``ParallelContext``; DeepSpeed forgets the layout of the engines before."""
    from deepspeed.utils import groups

    from megadistill.parallel.context import ParallelContext

    join_deepspeed(rank)
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
        setattr(groups, name, None)
    return ParallelContext.build(tp_size, 120, torch.device("cpu"))


def make_student(path: Path, context: Any, *, dtype: str, micro_batches: int = 1, **options: Any) -> Any:
    """A student with an AdamW (lr and epsilon 1) whose first update is g / (|g| + 1)."""
    from megadistill.config.lora import LoraSection
    from megadistill.config.optim import OptimSection
    from megadistill.config.schema import TrainSection
    from megadistill.engines.student import trained_model
    from megadistill.models.loading import load_model
    from megadistill.models.lora import with_adapters

    loaded = load_model(
        str(path), dtype=dtype, vocab_size=V, seed=0, attention="sdpa", where="student", rank=context.rank
    )
    if (lora := options.pop("lora", None)) is not None:
        loaded = with_adapters(loaded, LoraSection(**lora), seed=0, where="lora", base=str(path))
    optim = {"lr": 1.0, "eps": 1.0, "gradient_clipping": 0.0, **options.pop("optim", {})}
    return trained_model(
        loaded,
        context,
        dtype=dtype,
        optim=OptimSection(**optim),
        train=TrainSection(global_batch_size=micro_batches * context.dp_size, micro_batch_size=1),
        **options,
    )


def train_step(student: Any, passes: int, step: int = 0, lr: float = 1.0, rows_a_pass: int = 1) -> list[float]:
    """One update from random rows of this data-parallel rank, the same ones in any number of passes; their losses."""
    losses: list[float] = []
    context, rows = student.context, passes * rows_a_pass
    generator = torch.Generator().manual_seed(step * 1000 + context.dp_rank)
    batch = torch.randint(0, V, (rows, 9), generator=generator)
    for tokens in batch.split(rows_a_pass):
        positions = torch.arange(9).expand_as(tokens)
        whole = SequenceBatch(tokens, torch.ones_like(tokens), positions, tokens, (9,) * len(tokens))
        is_last = len(losses) + 1 == passes
        loss = student.forward(whole, squares(tokens, context, rows), is_last=is_last)
        student.backward(loss)
        losses.append(float(loss.detach()))
    student.step(lr)
    return losses


def squares(tokens: torch.Tensor, context: Any, rows: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """A loss that needs no communication between vocabulary shards: how far each logit is from its target."""

    def loss_fn(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        if hidden.requires_grad:  # each rank has the share of its own classes
            hidden.register_hook(lambda gradient: all_reduce_sum(gradient, context.tp_group))
        target = F.one_hot(tokens.roll(-1, 1), V)[..., head.shard.start : head.shard.stop]
        logits = F.linear(hidden, head.weight).float()
        return (logits - 4 * target).square().sum() / (V * rows * context.dp_size)

    return loss_fn


def masters(student: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Parameter -> (first element in its shard, this rank's run of its float32 weights)."""
    from megadistill.engines.local_state import local_parts
    from megadistill.models.shards import MASTER

    return {part.name: (part.start, part.tensors[MASTER].clone()) for part in local_parts(student.engine)}


def random_adapters(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Adapters that are not zero: a B of zeros would leave A without a gradient."""
    generator = torch.Generator().manual_seed(5)
    return {name: 0.1 * torch.randn(shapes[name], generator=generator) for name in sorted(names)}


def fill_adapters(student: Any) -> None:
    """Gives a student the adapters of ``random_adapters``, as a checkpoint would."""
    from megadistill.models.shards import MASTER
    from megadistill.models.tensor_reader import TensorReader
    from megadistill.models.weight_files import StoredTensor

    class Masters(TensorReader):
        kinds = frozenset({MASTER})

    made = random_adapters(student.loaded.shapes, student.loaded.lora.names)
    stored = {name: StoredTensor(name, tuple(x.shape), x.dtype, x) for name, x in made.items()}
    student.fill(Masters(stored, torch.float32), MASTER)
