"""``hf/`` made by all ranks: what they write is, bit for bit, the model that they hold together, at any layout."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadistill.checkpoint import hf_files, whole_weights
from megadistill.checkpoint.manifest import digest
from megadistill.checkpoint.whole_weights import WholeWeights
from megadistill.engines.local_state import LocalPart
from megadistill.models.families import FAMILIES
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import MASTER
from megadistill.parallel.context import ParallelContext
from tests.support.spawn import run_ranks

# GPT-2 has transposed matrices and a fused one; 7 and 5 divide by no tp_size, 2 rows of the head were removed.
SHAPES = {
    "transformer.wte.weight": ((7, 6), 0, 1),
    "transformer.h.0.attn.c_attn.weight": ((36, 6), 0, 3),
    "transformer.h.0.attn.c_attn.bias": ((36,), 0, 3),
    "transformer.h.0.mlp.c_proj.weight": ((6, 5), 1, 1),
    "transformer.h.0.ln_1.weight": ((6,), None, 1),
}
HEAD = "transformer.wte.weight"


def _model(tp_size: int) -> tuple[dict[str, torch.Tensor], dict[str, ShardSpec], Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, (shape, _, _) in SHAPES.items()}
    tensors[HEAD][0, 0] = torch.nan  # lost weights are saved as they are
    specs = {name: ShardSpec.even(shape, dim, blocks, tp_size) for name, (shape, dim, blocks) in SHAPES.items()}
    removed = {HEAD: torch.randn(2, 6, generator=generator)}
    shapes = {name: shape for name, (shape, _, _) in SHAPES.items()}
    return tensors, specs, SimpleNamespace(family=FAMILIES["gpt2"], removed_rows=removed, shapes=shapes, lora=None)


def _student(rank: int, tp_size: int, dp_size: int, dtype: torch.dtype, whole_on: int | None) -> Any:
    """Holds even runs of its shards, as ZeRO-3 does; ``whole_on``: data-parallel rank ``i % dp_size`` holds all of
    parameter i, as in ZeRO-0."""
    tensors, specs, loaded = _model(tp_size)
    tp_rank, dp_rank = rank % tp_size, rank // tp_size
    parts = []
    for i, (name, spec) in enumerate(specs.items()):
        flat = (spec.shard(tensors[name], tp_rank) if spec.dim is not None else tensors[name]).reshape(-1)
        width = -(-len(flat) // dp_size)
        start, end = min(len(flat), dp_rank * width), min(len(flat), (dp_rank + 1) * width)
        if whole_on is not None:
            start, end = 0, len(flat) if i % dp_size == dp_rank else 0
        if start < end and (spec.dim is not None or tp_rank == 0):
            parts.append(LocalPart(name, start, end - start, False, {MASTER: flat[start:end]}))
    module = SimpleNamespace(parameters=lambda: iter([torch.empty(0, dtype=dtype)]))
    return SimpleNamespace(
        loaded=loaded, module=module, shard_specs=specs, parts_to_write=lambda: parts, state_present=nullcontext
    )


def _write(rank: int, tp_size: int, folder: Path, dtype: torch.dtype, share: int, whole_on: int | None) -> Any:
    whole_weights._ROUND_BYTES, hf_files._MIN_SHARE_BYTES, hf_files._MAX_FILE_BYTES = 200, share, 900
    world_size = torch.distributed.get_world_size()
    context = ParallelContext.build(tp_size, 60, torch.device("cpu"))
    student = _student(rank, tp_size, world_size // tp_size, dtype, whole_on)
    weights = WholeWeights(student, context)
    snapshot = {f"{MASTER}/{part.name}": (part.start, part.tensors[MASTER]) for part in student.parts_to_write()}
    entries = weights.collect(snapshot).write(folder)
    return entries, {file.name: file.rank for file in weights.files}


LAYOUTS = [(1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tp_size", "dp_size"), LAYOUTS)
def test_the_files_are_the_model(tmp_path: Path, tp_size: int, dp_size: int, dtype: torch.dtype) -> None:
    """Names, values and checksums; every rank writes where there is enough to write, each file is written once."""
    world_size = tp_size * dp_size
    whole_on = 0 if (tp_size, dp_size) == (2, 2) else None
    results = run_ranks(_write, world_size, tp_size, tmp_path, dtype, 100, whole_on)
    planned = results[0][1]
    assert all(result[1] == planned for result in results)
    for rank, (entries, _) in enumerate(results):
        assert {name for name, writer in planned.items() if writer == rank} == entries.keys()
        for name, entry in entries.items():
            assert digest(tmp_path / name) == entry
    assert len(set(planned.values())) >= min(world_size, 3)
    _check(tmp_path, tp_size, dtype, planned)


def test_a_small_model_is_one_file_of_rank_0(tmp_path: Path) -> None:
    results = run_ranks(_write, 2, 1, tmp_path, torch.bfloat16, 128 << 20, None)
    assert results[0][1] == {"model.safetensors": 0} and results[1][0] == {}


def _check(folder: Path, tp_size: int, dtype: torch.dtype, planned: dict[str, int]) -> None:
    from safetensors.torch import load_file

    tensors, _, loaded = _model(tp_size)
    found = {name: tensor for file in planned for name, tensor in load_file(folder / file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = torch.cat([tensor, loaded.removed_rows[name]]) if name in loaded.removed_rows else tensor
        expected = (expected.t() if name.endswith(("c_attn.weight", "c_proj.weight")) else expected).to(dtype)
        assert torch.equal(found[name].view(torch.uint8), expected.contiguous().view(torch.uint8)), name
