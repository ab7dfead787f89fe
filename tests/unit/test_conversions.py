"""Conversions prove themselves: sharding, merging and exporting refuse what is another model than they read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megadistill.checkpoint import hf_export, hf_files, merge, reshard
from megadistill.checkpoint.hf_export import export_checkpoint
from megadistill.checkpoint.hf_files import write_safetensors
from megadistill.checkpoint.probe import check_same_logits, probe_logits
from megadistill.checkpoint.reshard import shard_model
from megadistill.errors import CheckpointError
from tests.support.model_folders import HEAD, adapter_folder, configure, is_tied, llama_folder


def test_the_probe_sees_another_model_and_not_rounding(tmp_path: Path) -> None:
    model, other = (
        AutoModelForCausalLM.from_pretrained(llama_folder(tmp_path / str(i), seed=i)).eval() for i in (1, 2)
    )
    expected = probe_logits(model, 500)
    assert expected.shape == (32, 500)
    check_same_logits(expected, expected + 3, "m", torch.float32)  # softmax does not see a constant
    check_same_logits(expected, probe_logits(model.bfloat16(), 500), "m", torch.float32, torch.bfloat16)
    for found, dtype in ((probe_logits(other, 500), torch.bfloat16), (expected * 1.01, torch.float32)):
        with pytest.raises(CheckpointError, match="m: what was written is another model"):
            check_same_logits(expected, found, "m", dtype)
    check_same_logits(expected * torch.nan, expected * torch.nan, "m", torch.float32)  # the model's own fault
    for one, two in ((expected * torch.nan, expected), (expected, expected * torch.nan)):
        with pytest.raises(CheckpointError):
            check_same_logits(one, two, "m", torch.bfloat16)


def test_a_wrong_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, load = llama_folder(tmp_path / "m"), reshard.load_model

    def spoiled(path: str, **options: Any) -> Any:
        loaded = load(path, **options)
        if path == str(model):
            tensors: Any = loaded.weights._tensors
            stored = tensors[HEAD]
            tensors[HEAD] = dataclasses.replace(stored, content=stored.content[:].flip(0))
        return loaded

    monkeypatch.setattr(reshard, "load_model", spoiled)
    with pytest.raises(CheckpointError, match="is another model"):
        shard_model(str(model), tmp_path / "sharded", tp_size=1, dp_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_wrong_merge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama_folder(tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter")
    tensors = merge._tensors
    monkeypatch.setattr(
        merge, "_tensors", lambda *given: ((n, t * 2 if "q_proj" in n else t) for n, t in tensors(*given))
    )
    with pytest.raises(CheckpointError, match="is another model"):
        merge.merge_adapter(str(base), adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_written_files_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor(3.0)}
    write_safetensors(tensors.items(), tmp_path)  # NaN is not equal to itself, and still what was written
    save = hf_files.save_tensors
    monkeypatch.setattr(hf_files, "save_tensors", lambda given, path: save({n: t + 1 for n, t in given.items()}, path))
    with pytest.raises(CheckpointError, match=r"does not hold what was written to it \(b\)"):
        write_safetensors([("b", torch.tensor(3.0))], tmp_path)


def test_export_is_compared_with_the_student_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ``hf/`` and a layout of one rank are all that an export reads."""
    from megadistill.checkpoint.manifest import digest, files_below, write_manifest
    from megadistill.models.shard_spec import ShardSpec
    from megadistill.models.shards import MASTER, shard_file, write_layout, write_shard

    step = tmp_path / "step_1"
    hf = configure(llama_folder(step / "hf"), tie_word_embeddings=True)  # as older versions wrote it
    weights = load_file(hf / "model.safetensors")
    (step / "student").mkdir()
    specs = {name: ShardSpec(tuple(tensor.shape)) for name, tensor in weights.items()}
    write_layout(step / "student", specs, tp_size=1, dp_size=1)
    runs = {f"{MASTER}/{name}": (0, tensor.flatten()) for name, tensor in weights.items()}
    write_shard(step / "student", shard_file(0, 0), runs)
    layout = {"tp_size": 1, "dp_size": 1, "zero_stage": 0, "model": "m", "gate": 0}
    write_manifest(step, 1, layout, {name: digest(step / name) for name in files_below(step)})
    export_checkpoint(step, tmp_path / "good")
    assert not is_tied(tmp_path / "good")
    written = hf_export._standard_weights
    monkeypatch.setattr(
        hf_export, "_standard_weights", lambda *a: ((n, t.flip(0) if n == HEAD else t) for n, t in written(*a))
    )
    with pytest.raises(CheckpointError, match="is another model"):
        export_checkpoint(step, tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "step_1"]
