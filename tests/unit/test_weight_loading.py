"""Weights from a model's files: names, slices, bytes that are read, refusals. The reference is transformers."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.checkpoint.probe import probe_logits, streamed_logits
from megadistill.checkpoint.reshard import family_shards
from megadistill.errors import ConfigError
from megadistill.models.loading import LoadedModel, load_model, whole_model
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT
from megadistill.models.tensor_reader import TensorReader
from megadistill.models.weight_files import StoredTensor, check_weight_files, open_tensors, weight_files
from megadistill.observability import progress
from tests.support.runs import FAMILY_CONFIGS

ROWS, V = 27, 23  # of the files, of the run
CPU = torch.device("cpu")
VARIANTS = [(family, tied) for family in FAMILY_CONFIGS for tied in (True, False)]


def _write(folder: Path, family: str, tied: bool, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    torch.manual_seed(0)
    tree = {**FAMILY_CONFIGS[family], "vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tree |= {"n_embd": 24} if family == "gpt2" else {"hidden_size": 24, "intermediate_size": 36, "ffn_dim": 36}
    tree |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if family == "gpt_neox" else {}
    tree |= {"word_embed_proj_dim": 24} if family == "opt" else {}
    tree |= {"num_attention_heads": 4, "num_key_value_heads": 2} if family in ("olmo2", "phi3") else {}
    config = AutoConfig.for_model(**{**tree, "tie_word_embeddings": tied, "initializer_range": 0.2, "init_std": 0.2})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **how)
    return folder


def _load(folder: Path, dtype: str = "fp32", **more: Any) -> LoadedModel:
    return load_model(str(folder), dtype=dtype, vocab_size=V, seed=0, attention="sdpa", where="x", **more)


def _refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        _load(folder)
    line = str(refused.value)
    assert "\n" not in line and line.startswith("x: ")
    return line


# The numbers are those of transformers.


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    """From one file and from many, of float16, without padded rows, mapped and copied."""
    folder = _write(tmp_path, family, tied, torch.float16, max_shard_size="9KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = probe_logits(plain, V)
    for loaded in (_load(folder), _load(folder, read="copy")):
        assert torch.equal(probe_logits(whole_model(loaded, CPU), V), expected)
    assert torch.equal(streamed_logits(_load(folder), V), expected)
    head = plain.get_output_embeddings().weight.data[V:]
    assert [torch.equal(rows, head) for rows in _load(folder).removed_rows.values()] == [True]


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_every_rank_reads_its_slices_and_no_more(tmp_path: Path, family: str, tied: bool, tp_size: int) -> None:
    folder = _write(tmp_path, family, tied, torch.bfloat16)
    whole = whole_model(_load(folder), CPU)
    read = 0
    for tp_rank in range(tp_size):
        loaded = _load(folder)
        reader: Any = loaded.weights
        specs = family_shards(loaded.shapes, loaded.family, tp_size)
        for name, parameter in whole.named_parameters():
            shard = specs[name].shard(parameter.data, tp_rank).reshape(-1)
            assert torch.equal(reader.read(WEIGHT, name, specs[name], tp_rank, 0, len(shard)), shard), name
            read += 2 * len(shard)
            cut = slice(len(shard) // 3, len(shard) - 1)  # as ZeRO-3 cuts, and AdamW's float32 copy after it
            for _ in range(2):
                again = reader.read(WEIGHT, name, specs[name], tp_rank, cut.start, cut.stop)
                assert torch.equal(again, shard[cut]), name
        read -= reader.bytes_read
    assert read == 0, "what has just been read is not read again"


@given(
    st.integers(1, 4), st.sampled_from([None, 0, 1]), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 2),
    st.integers(1, 6), st.integers(1, 5), st.sampled_from([torch.float32, torch.float16]), st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_run_of_any_shard(
    tp_size: int, dim: int | None, blocks: int, transposed: bool, padding: int, rows: int, columns: int,
    dtype: torch.dtype, data: st.DataObject,
) -> None:  # fmt: skip
    shape = (rows * (blocks if dim == 0 else 1), columns * (blocks if dim == 1 else 1))
    whole = torch.arange(float((shape[0] + padding) * shape[1])).view(-1, shape[1])
    spec = ShardSpec.even(shape, dim, blocks, tp_size)
    rank = data.draw(st.integers(0, tp_size - 1))
    flat = spec.shard(whole[: shape[0]], rank).reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    end = data.draw(st.integers(start, len(flat)))
    kept = (whole.t() if transposed else whole).to(dtype)
    stored = StoredTensor("w", tuple(kept.shape), dtype, kept)
    reader = TensorReader({"w": stored}, torch.float32, ("w",) if transposed else ())
    assert torch.equal(reader.read(WEIGHT, "w", spec, rank, start, end), flat[start:end])
    assert reader.bytes_read == (end - start) * dtype.itemsize


# Names and files.


def _edit(folder: Path, rename: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({rename(n): t for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", list(FAMILY_CONFIGS))
def test_files_of_a_base_model_and_of_torch(tmp_path: Path, family: str) -> None:
    """Names without "model." or "transformer.", and pytorch_model.bin with and without an index."""
    folder = _write(tmp_path / "m", family, True)
    expected = probe_logits(AutoModelForCausalLM.from_pretrained(folder).eval(), V)
    weights = load_file(folder / "model.safetensors")
    _edit(folder, lambda name: name.removeprefix("model.").removeprefix("transformer."))
    assert not any(name.startswith(("model.", "transformer.")) for name in load_file(folder / "model.safetensors"))
    assert torch.equal(probe_logits(whole_model(_load(folder), CPU), V), expected)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(probe_logits(whole_model(_load(folder), CPU), V), expected)
    (folder / "pytorch_model.bin").unlink()
    parts = [dict(list(weights.items())[i::2]) for i in range(2)]
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    index = {"weight_map": {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert torch.equal(probe_logits(whole_model(_load(folder), CPU), V), expected)


def test_buffers_of_old_versions_are_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, "gpt2", True)
    weights = load_file(folder / "model.safetensors")
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _load(folder)
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m", "llama", False)
    whole, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    norm = "model.norm.weight"

    def refused(**changed: torch.Tensor) -> str:
        save_file({**whole, **changed}, file, metadata={"format": "pt"})
        return _refusal(folder)

    assert "model.norm.weight has shape [25], but its config.json makes model.norm.weight [24]" in refused(
        **{norm: torch.ones(25)}
    )
    assert "holds torch.int64, not floating-point numbers" in refused(**{norm: torch.ones(24, dtype=torch.int64)})
    assert "has 1 weights that have no place" in refused(**{"model.layers.0.odd.weight": torch.ones(2)})
    save_file({n: t for n, t in whole.items() if n != norm}, file, metadata={"format": "pt"})
    assert f"lacks 1 weights of its model, {norm} among them" in _refusal(folder)
    file.write_bytes(file.read_bytes()[:-1])
    assert "cannot load the weights in" in _refusal(folder) and "model.safetensors: " in _refusal(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK nonsense")
    assert "pytorch_model.bin: " in _refusal(folder)


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path, "llama", False)
    weights = load_file(folder / "model.safetensors")
    key = "layers.0.mlp.up_proj.weight"
    save_file({**weights, key: weights[f"model.{key}"] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"has both {key} and model.{key}" in _refusal(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 0}, "has num_hidden_layers=0; at least 1 is needed"),
        ({"hidden_size": -24}, "has hidden_size=-24; at least 1 is needed"),
        ({"num_attention_heads": "four"}, "'num_attention_heads': TypeError: Field 'num_attention_heads' expected int"),
        ({"pad_token_id": 9999}, "can make no model of its configuration: AssertionError: Padding_idx must be within"),
        ({"transformers_weights": 5}, "transformers_weights=5 is no file's name"),
    ],
)  # fmt: skip
def test_configurations_of_no_model_are_one_line(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = _write(tmp_path, "llama", False)
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(tree | settings), encoding="utf-8")
    assert said in _refusal(folder)


def test_a_missing_file_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = _write(tmp_path, "llama", False, max_shard_size="9KB")
    check_weight_files(str(folder), "x")
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="of which 1 are missing"):
        check_weight_files(str(folder), "x")
    check_weight_files(str(folder / "config.json"), "x")  # random weights, and a hub name, have none to look for
    check_weight_files("owner/name", "x")


def test_a_folder_of_which_a_file_is_missing(tmp_path: Path) -> None:
    folder = _write(tmp_path, "llama", False, max_shard_size="9KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    line = _refusal(folder)
    assert "of which 1 are missing" in line and last.name in line and "interrupted" in line
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../other/model.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
        assert "model.safetensors.index.json is damaged" in _refusal(folder)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    """As where an older download left a file: transformers takes the one of the last file."""
    folder = _write(tmp_path, "llama", False, max_shard_size="9KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor + 1}, second, metadata={"format": "pt"})
    line = _refusal(folder)
    assert f"{key} is in {first.name} and in {second.name}" in line and "two checkpoints" in line


def test_a_tied_model_with_two_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two that are equal in the run's type are one, as for transformers."""
    folder = _write(tmp_path, "qwen2", True)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"] * (1 + 1e-6)
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert _load(folder, "bf16").config.tie_word_embeddings is True and capsys.readouterr().out == ""
    loaded = _load(folder)
    assert loaded.config.tie_word_embeddings is False and "its own head is there" in capsys.readouterr().out
    assert "lm_head.weight" in loaded.shapes
    expected = probe_logits(AutoModelForCausalLM.from_pretrained(folder).eval(), V)
    assert torch.equal(probe_logits(whole_model(loaded, CPU), V), expected)


def _sparse_13b(folder: Path) -> dict[str, tuple[int, ...]]:
    """A LLaMA-13B of float16 files that take no space: headers, and lengths. Returns the shapes."""
    config = {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    config |= {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weight_map = {}
    for number in range(3):
        name, header, end = f"model-{number + 1:05d}-of-00003.safetensors", {}, 0
        for key in sorted(shapes)[number::3]:  # a layer's tensors are in several files
            begin, end = end, end + 2 * torch.Size(shapes[key]).numel()
            header[key] = {"dtype": "F16", "shape": shapes[key], "data_offsets": [begin, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            os.truncate(file.fileno(), 8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shapes


def test_the_files_of_a_13b_model(tmp_path: Path) -> None:
    """26 GB, of which this test reads one layer's slices of one rank of eight; nothing else takes memory."""
    shapes = _sparse_13b(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 26e9
    if sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 > 50e6:
        pytest.skip("this file system has no sparse files")
    loaded = load_model(str(tmp_path), dtype="bf16", vocab_size=32000, seed=0, attention="sdpa", where="x")
    reader: Any = loaded.weights
    assert {name: tuple(shape) for name, shape in loaded.shapes.items()} == shapes and reader.bytes_read == 0
    specs = family_shards(loaded.shapes, loaded.family, 8)
    order = list(reader.stream(name for name in loaded.shapes if name.startswith("model.layers.17.")))
    assert [reader._tensors[name].place for name in order] == sorted(reader._tensors[name].place for name in order)
    expected = 0
    for name in order:
        numel = torch.Size(specs[name].shard_shape(3)).numel()
        assert not reader.read(WEIGHT, name, specs[name], 3, 0, numel).any()
        expected += 2 * numel
    assert reader.bytes_read == expected == 2 * ((4 * 5120 * 5120 + 3 * 5120 * 13824) // 8 + 2 * 5120)


def test_progress_in_bytes_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write(tmp_path, "llama", False)
    capsys.readouterr()
    monkeypatch.setattr(progress, "BYTES_DELAY_S", 3600.0)
    whole_model(_load(folder), CPU)
    assert capsys.readouterr().err == "", "what is quick shows nothing"
    monkeypatch.setattr(progress, "BYTES_DELAY_S", 0.0)
    whole_model(_load(folder, rank=1), CPU)
    assert "load" not in capsys.readouterr().err
    whole_model(_load(folder), CPU)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"load {folder}: ") and "B (100 %)" in last and "B/s" in last


def test_open_files_are_read_by_system_calls_where_asked(tmp_path: Path) -> None:
    folder = _write(tmp_path, "llama", False)
    files = weight_files(str(folder), "x")
    for read, is_mapped in (("map", True), ("copy", False)):
        tensors = open_tensors(files, str(folder), "x", read)  # type: ignore[arg-type]
        run = tensors["model.embed_tokens.weight"].content[:1]
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert run.numel() and (str(files[0]) in maps) == is_mapped
        del tensors, run
    shutil.rmtree(folder)
