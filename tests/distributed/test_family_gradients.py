"""Gradients of families whose layers are more than plain shards: tensor parallelism against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import make_student, masters, on_grid, train_step, write_config
from tests.support.preload import preload
from tests.support.spawn import run_ranks

# Fused products, norms of heads, norms over all heads, shares of a configuration.
FAMILIES = ("gpt2", "gpt_neox", "qwen3", "olmo2", "phi3")


def _updates(rank: int, folder: Path, tp_size: int) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Family -> how its parameters are sharded, and this rank's shards after an update by g / (|g| + 1)."""
    found = {}
    for family in FAMILIES:
        path = write_config(folder / family, family)
        student = make_student(path, on_grid(rank, tp_size), dtype="fp32", zero_stage=3)
        train_step(student, passes=2)
        shards = {name: part for name, (_, part) in masters(student).items()}
        found[family] = (student.shard_specs, shards)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    preload()
    found = run_ranks(_updates, 1, tmp_path_factory.mktemp("one"), 1)[0]
    return {
        family: {n: t.view(specs[n].shape) for n, t in tensors.items()} for family, (specs, tensors) in found.items()
    }


@pytest.mark.parametrize("tp_size", [2, 4])
def test_updates_are_those_of_one_process(expected: Any, tmp_path: Path, tp_size: int) -> None:
    ranks = run_ranks(_updates, tp_size, tmp_path, tp_size)
    for family, whole in expected.items():
        specs = ranks[0][family][0]
        assert specs.keys() == whole.keys()
        for name, tensor in whole.items():
            shards = [found[family][1][name].view(specs[name].shard_shape(rank)) for rank, found in enumerate(ranks)]
            assert all(torch.equal(shard, shards[0]) for shard in shards if specs[name].dim is None), (family, name)
            difference = (specs[name].unshard(shards) - tensor).abs().max()
            assert difference <= 2e-5, (family, name, difference)
