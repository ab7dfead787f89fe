"""Sharding and joining parameters, and the files that any layout reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.errors import CheckpointError
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import ShardReader, rewrite, shard_file, write_layout, write_shard


@given(st.integers(1, 5), st.integers(0, 1), st.sampled_from([1, 3]), st.integers(1, 7), st.integers(1, 4))
@settings(deadline=None)
def test_shards_make_up_the_whole(tp_size: int, dim: int, blocks: int, block: int, other: int) -> None:
    shape = (blocks * block, other) if dim == 0 else (other, blocks * block)
    whole = torch.arange(float(blocks * block * other)).view(shape)
    spec = ShardSpec.even(shape, dim, blocks, tp_size)
    shards = [spec.shard(whole, rank) for rank in range(tp_size)] if tp_size > 1 else [whole]
    assert torch.equal(spec.unshard(shards), whole)
    assert [tuple(shard.shape) for shard in shards] == [spec.shard_shape(rank) for rank in range(tp_size)]
    if spec.dim is not None:
        assert ShardSpec.from_shard_shapes(shape, [shard.shape for shard in shards], blocks) == spec


def test_fused_parameters_are_sharded_one_by_one() -> None:
    """Query, key and value of GPT-2: a rank's shard holds a part of each."""
    whole = torch.arange(12.0)
    spec = ShardSpec.even((12,), 0, 3, 2)
    assert spec.shard(whole, 1).tolist() == [2, 3, 6, 7, 10, 11]


def test_shards_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not make up"):
        ShardSpec.from_shard_shapes((4, 4), [(1, 4), (2, 4)], 1)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model of three parameters, saved by tp 2 x dp 3."""
    tensors = {name: torch.randn(shape) for name, shape in (("a", (7, 2)), ("b", (6, 5)), ("norm", (3,)))}
    specs = {"a": ShardSpec.even((7, 2), 0, 1, 2), "b": ShardSpec.even((6, 5), 0, 3, 2), "norm": ShardSpec((3,))}
    first = tmp_path / "whole"
    first.mkdir()
    write_layout(
        first, {name: ShardSpec(spec.shape) for name, spec in specs.items()}, tp_size=1, dp_size=1, note="kept"
    )
    write_shard(
        first, shard_file(0, 0), {f"master/{name}": (0, tensor.reshape(-1)) for name, tensor in tensors.items()}
    )
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_layout(folder, specs, tp_size=2, dp_size=3, note="kept")
    assert list(rewrite(ShardReader(first), folder, specs, 2, 3)) == [
        shard_file(t, d) for t in (0, 1) for d in (0, 1, 2)
    ]
    return folder, tensors


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_any_layout_reads_any_run(written: tuple[Path, dict[str, torch.Tensor]], tp_size: int) -> None:
    folder, tensors = written
    reader = ShardReader(folder)
    assert reader.kinds == {"master"} and reader.info["note"] == "kept"
    for name, blocks, dim in (("a", 1, 0), ("b", 3, 0), ("norm", 1, None)):
        assert torch.equal(reader.whole("master", name), tensors[name])
        spec = ShardSpec.even(tensors[name].shape, dim, blocks, tp_size)
        for rank in range(tp_size):
            flat = (spec.shard(tensors[name], rank) if spec.dim is not None else tensors[name]).reshape(-1)
            for start in range(len(flat)):
                for end in range(start + 1, len(flat) + 1):
                    assert torch.equal(reader.read("master", name, spec, rank, start, end), flat[start:end])


def test_what_is_missing_or_foreign_is_named(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = written
    reader = ShardReader(folder)
    with pytest.raises(CheckpointError, match="has no parameter c"):
        reader.whole("master", "c")
    with pytest.raises(CheckpointError, match=r"a has shape \[7, 2\], expected \[8, 2\]"):
        reader.read("master", "a", ShardSpec((8, 2)), 0, 0, 1)
    with pytest.raises(CheckpointError, match="exp_avg/a"):
        reader.whole("exp_avg", "a")
    (folder / shard_file(1, 2)).unlink()
    with pytest.raises(CheckpointError, match=r"elements 4 to 6 of master/a \(tensor-parallel rank 1\) are missing"):
        ShardReader(folder).whole("master", "a")
    (folder / shard_file(1, 1)).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        ShardReader(folder)
    with pytest.raises(CheckpointError, match="no layout.json"):
        ShardReader(tmp_path)


def test_what_is_not_of_the_model_is_named(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    reader = ShardReader(written[0])
    reader.refuse_others(reader.shard_specs)
    with pytest.raises(CheckpointError, match=r"has 1 parameters that the model of config.json does not have, a among"):
        reader.refuse_others(reader.shard_specs.keys() - {"a"})
    for content in (None, b"nothing"):
        if content is not None:
            (tmp_path / "rows.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"rows\.safetensors is missing or damaged: "):
            reader.whole_file(str(tmp_path / "rows.safetensors"))


def test_whoever_reads_the_layout_reads_the_weights(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """safetensors' own files are readable by their owner alone, whatever the umask."""
    folder, _ = written
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "layout.json").stat().st_mode}
