"""What an export promises to readers that are not this project: plain transformers, and programs like llama.cpp's
converter, which read ``config.json`` and the headers of safetensors files and expect a family's own names and shapes.

The tables below are written by hand from the families' published checkpoints; nothing here asks the project for a name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadistill.checkpoint import hf_export, hf_files
from tests.support.runs import run_layout, settings

Shapes = dict[str, tuple[int, ...]]
BYTES = {"F32": 4, "BF16": 2}
NAMES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}
# Exports in fp32 pass it and become several files; those in bf16 do not.
LIMIT = 100_000


def _llama(c: dict[str, Any], *, has_biases: bool = False, has_norms: bool = False) -> Shapes:
    h, m, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim") or h // c["num_attention_heads"]
    q, kv = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (h,),
            f"{layer}.post_attention_layernorm.weight": (h,),
            f"{layer}.self_attn.q_proj.weight": (q, h),
            f"{layer}.self_attn.k_proj.weight": (kv, h),
            f"{layer}.self_attn.v_proj.weight": (kv, h),
            f"{layer}.self_attn.o_proj.weight": (h, q),
            f"{layer}.mlp.gate_proj.weight": (m, h),
            f"{layer}.mlp.up_proj.weight": (m, h),
            f"{layer}.mlp.down_proj.weight": (h, m),
        }
        if has_biases:
            shapes |= {f"{layer}.self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if has_norms:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (head,) for x in ("q", "k")}
    return shapes


def _qwen2(c: dict[str, Any]) -> Shapes:
    return _llama(c, has_biases=True)


def _qwen3(c: dict[str, Any]) -> Shapes:
    return _llama(c, has_norms=True)


def _phi3(c: dict[str, Any]) -> Shapes:
    """Queries, keys and values in one matrix, gate and up in another."""
    h, m, head = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    shapes = {name: shape for name, shape in _llama(c).items() if not name.endswith(_PHI3_LACKS)}
    for i in range(c["num_hidden_layers"]):
        rows = head * (c["num_attention_heads"] + 2 * c["num_key_value_heads"])
        shapes |= {f"model.layers.{i}.self_attn.qkv_proj.weight": (rows, h)}
        shapes |= {f"model.layers.{i}.mlp.gate_up_proj.weight": (2 * m, h)}
    return shapes


_PHI3_LACKS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))


def _olmo2(c: dict[str, Any]) -> Shapes:
    """Norms after attention and MLP, and of all queries and all keys."""
    shapes = {name: shape for name, shape in _llama(c).items() if "input_layernorm" not in name}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.post_feedforward_layernorm.weight": (c["hidden_size"],)}
        shapes |= {f"{layer}.self_attn.{x}_norm.weight": shapes[f"{layer}.self_attn.{x}_proj.weight"][:1] for x in "qk"}
    return shapes


def _gemma2(c: dict[str, Any], *, has_norms: bool = False) -> Shapes:
    shapes, norms = _llama(c, has_norms=has_norms), ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    layers = range(c["num_hidden_layers"])
    return shapes | {f"model.layers.{i}.{norm}.weight": (c["hidden_size"],) for i in layers for norm in norms}


def _gemma3(c: dict[str, Any]) -> Shapes:
    return _gemma2(c, has_norms=True)


def _gpt_neox(c: dict[str, Any]) -> Shapes:
    h, m, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (v, h), "embed_out.weight": (v, h)}
    shapes |= {f"gpt_neox.final_layer_norm.{x}": (h,) for x in ("weight", "bias")}
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        matrices = {"attention.query_key_value": (3 * h, h), "attention.dense": (h, h), "mlp.dense_h_to_4h": (m, h),
                    "mlp.dense_4h_to_h": (h, m)}  # fmt: skip
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
    return shapes


def _opt(c: dict[str, Any]) -> Shapes:
    h, m, v = c["hidden_size"], c["ffn_dim"], c["vocab_size"]
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (v, h),
        "model.decoder.embed_positions.weight": (c["max_position_embeddings"] + 2, h),
        "model.decoder.final_layer_norm.weight": (h,),
        "model.decoder.final_layer_norm.bias": (h,),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}"
        matrices = {f"self_attn.{x}_proj": (h, h) for x in ("q", "k", "v", "out")} | {"fc1": (m, h), "fc2": (h, m)}
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
    return shapes


def _gpt2(c: dict[str, Any]) -> Shapes:
    """``Conv1D``: every matrix of a layer is [in, out]."""
    h, v = c["n_embd"], c["vocab_size"]
    m = c.get("n_inner") or 4 * h
    shapes: Shapes = {
        "transformer.wte.weight": (v, h),
        "transformer.wpe.weight": (c["n_positions"], h),
        "transformer.ln_f.weight": (h,),
        "transformer.ln_f.bias": (h,),
    }
    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}"
        matrices = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, m), "mlp.c_proj": (m, h)}
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
    return shapes


FAMILIES: dict[str, tuple[Callable[[dict[str, Any]], Shapes], str]] = {
    "llama": (_llama, "LlamaForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
    "opt": (_opt, "OPTForCausalLM"),
    "gpt2": (_gpt2, "GPT2LMHeadModel"),
    "mistral": (_llama, "MistralForCausalLM"),
    "smollm3": (_llama, "SmolLM3ForCausalLM"),
    "granite": (_llama, "GraniteForCausalLM"),
    "phi3": (_phi3, "Phi3ForCausalLM"),
    "olmo2": (_olmo2, "Olmo2ForCausalLM"),
    "gemma": (_llama, "GemmaForCausalLM"),
    "gemma2": (_gemma2, "Gemma2ForCausalLM"),
    "gemma3_text": (_gemma3, "Gemma3ForCausalLM"),
    "gpt_neox": (_gpt_neox, "GPTNeoXForCausalLM"),
}
IN_BOTH_TYPES = ("llama", "qwen2", "qwen3", "opt", "gpt2")  # the others train in fp32 alone
EXPORTS = [
    (family, dtype)
    for family in FAMILIES
    for dtype in (("fp32", "bf16", "cast") if family in IN_BOTH_TYPES else ("fp32", "cast"))
]
# llama.cpp's name of an architecture, where it is another one.
GGUF_NAMES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against its specification: whole, without gaps, aligned."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + length) % 8 == 0
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
        assert end - entry["data_offsets"][0] == math.prod(entry["shape"]) * BYTES[entry["dtype"]]
    assert 8 + length + end == len(raw)
    return header


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Name -> header entry, and name -> file, as other programs find them: by the index where there is one."""
    index = folder / "model.safetensors.index.json"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    entries, places = {}, {}
    for name in files:
        for tensor, entry in _header(folder / name).items():
            assert tensor not in entries, f"{tensor} is in two files"
            entries[tensor], places[tensor] = entry, name
    if files == ["model.safetensors"]:
        assert not index.exists()
        return entries, places
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    content = json.loads(index.read_text(encoding="utf-8"))
    assert content["weight_map"] == places
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries.values())
    assert content["metadata"]["total_size"] == total
    return entries, places


@pytest.fixture(scope="module")
def exports(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/DTYPE: exports of runs of one step, so small that weights stay as transformers wrote them; "cast" is the
    one in fp32 cast to bf16 afterwards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path_factory.mktemp("exports")
    runs = []
    for family in FAMILIES:
        student = assets / family / "student"
        tree = json.loads((student / "config.json").read_text(encoding="utf-8"))
        if "num_key_value_heads" in tree:
            tree["num_key_value_heads"] = 2  # keys and values narrower than queries
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))
        for parameter in model.parameters():  # biases and norms too: equal ones could change places
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(student)
        for dtype in ("fp32", "bf16") if family in IN_BOTH_TYPES else ("fp32",):
            more = ("train.max_steps=1", "optim.lr=1e-12", "generation.mode=dataset", "data.prompts_path=null",
                    "data.prompts_ratio=0", f"model.student.path={student}",
                    f"model.student.dtype={dtype}")  # fmt: skip
            runs.append((str(out / "runs" / family / dtype), settings(assets, family, *more)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_files, "_MAX_FILE_BYTES", LIMIT)
        run_layout(1, runs)
    for family in FAMILIES:
        run = out / "runs" / family
        for name in (kind for each, kind in EXPORTS if each == family):
            dtype = "bf16" if name == "cast" else None
            source = run / ("bf16" if name == "bf16" else "fp32")
            hf_export.export_checkpoint(source, out / family / name, dtype=dtype, max_shard_bytes=LIMIT)
    return out


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_names_shapes_and_types(exports: Path, family: str, kind: str) -> None:
    """Headers and config.json against the tables; without torch, without transformers."""
    folder = exports / family / kind
    table, architecture = FAMILIES[family]
    dtype, torch_name = NAMES["bf16" if kind == "cast" else kind]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries, _ = _read(folder)
    assert {name: tuple(entry["shape"]) for name, entry in entries.items()} == table(config)
    assert {entry["dtype"] for entry in entries.values()} == {dtype}
    assert config["architectures"] == [architecture] and config["model_type"] == family
    assert config["dtype"] == torch_name
    size = sum(math.prod(shape) * BYTES[dtype] for shape in table(config).values())
    if kind != "cast":  # the cast has as many files as its source
        assert (folder / "model.safetensors").exists() == (size <= LIMIT)
        assert (kind == "bf16") == (size <= LIMIT), "both kinds of layout must occur; change LIMIT"
    for file in folder.glob("*.safetensors"):
        data = sum(math.prod(entry["shape"]) * BYTES[dtype] for entry in _header(file).values())
        assert data <= LIMIT or len(_header(file)) == 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])  # GGUF has no OPT
def test_llama_cpps_converter_finds_a_place_for_every_tensor(exports: Path, family: str) -> None:
    """Its table of names (the package gguf): one GGUF name for each tensor, none twice; merges and special tokens."""
    import gguf

    folder = exports / family / "fp32"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    num_blocks = config.get("num_hidden_layers") or config["n_layer"]
    table = gguf.get_tensor_name_map(architectures[GGUF_NAMES.get(family, family)], num_blocks)
    names = list(_read(folder)[0])
    found = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
    assert None not in found, [name for name, place in zip(names, found, strict=True) if place is None]
    assert len(set(found)) == len(names) and {"token_embd.weight", "output_norm.weight"} <= set(found)
    assert table.get_name("model.layers.0.self_attn.no_proj.weight", try_suffixes=(".weight",)) is None
    special = gguf.SpecialVocab(folder, load_merges=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert special.merges and special.special_token_ids["eos"] == config["eos_token_id"]
    assert len(special.merges) == len(tokenizer["model"]["merges"])


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_what_lies_beside_the_weights(exports: Path, assets: Path, family: str, kind: str) -> None:
    folder = exports / family / kind
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    original = json.loads((assets / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["model"]["vocab"] == original["model"]["vocab"]
    assert tokenizer["model"]["merges"] == original["model"]["merges"]
    special = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    eos = tokenizer["model"]["vocab"][special]
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    before = json.loads((assets / family / "student" / "generation_config.json").read_text(encoding="utf-8"))
    # The student's own end token (its class's default) counts where it is a special token of the run's tokenizer.
    special_ids = {token["id"] for token in tokenizer["added_tokens"]}
    ends = sorted({eos, *{before.get("eos_token_id", eos)} & special_ids})
    assert sorted(generation["eos_token_id"] if len(ends) > 1 else [generation["eos_token_id"]]) == ends
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == eos
    given = json.loads((assets / family / "student" / "config.json").read_text(encoding="utf-8"))
    names = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd",
             "n_layer", "n_head", "vocab_size", "max_position_embeddings", "n_positions", "rope_parameters",
             "rms_norm_eps", "tie_word_embeddings", "intermediate_size", "ffn_dim"}  # fmt: skip
    assert {name: config.get(name) for name in names} == {name: given.get(name) for name in names}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    others = {path.name for path in folder.iterdir() if ".safetensors" not in path.name}
    assert wanted <= others <= wanted | {"special_tokens_map.json", "tokenizer.model", "chat_template.jinja"}


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_plain_transformers_reads_the_values_it_wrote(exports: Path, assets: Path, family: str, kind: str) -> None:
    """Every weight, by name, against the file that transformers wrote before the run: orientation of square matrices,
    order inside fused ones, padded rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exports / family / kind
    AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = AutoModelForCausalLM.from_pretrained(assets / family / "student")
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    for name, tensor in original.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == dtype
        # One step moves a weight by 1e-12; a value on the edge between two in bf16 may go to either.
        assert torch.allclose(found.float(), tensor.to(dtype).float(), rtol=0 if kind == "fp32" else 2**-7, atol=1e-9)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000
    if kind == "fp32":
        tokens = torch.arange(10, 30)[None]
        logits, expected = (each.eval()(input_ids=tokens).logits for each in (model, original))
        assert float(expected.std()) > 0.05 and torch.allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_exports_the_same(exports: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory, a checkpoint, and exports in one and in several files; Conv1D, tied heads, padded rows."""
    from megadistill.cli.main import main

    run, small = exports / "runs" / family, ["--rows", "2", "--max-tokens", "40", "--greedy-tokens", "12"]

    def verify(a: Path, b: Path, *more: str) -> int:
        return main(["verify", str(a), str(b), *small, *more])

    assert verify(run / "fp32", exports / family / "fp32", "--tolerance", "0") == 0
    bf16 = ("--dtype", "bf16", "--tolerance", "0")
    assert verify(run / "fp32" / "checkpoints" / "step_1", exports / family / "cast", *bf16) == 0
    assert "equal greedy texts" in capsys.readouterr().out
    assert verify(run / "fp32", exports / family / "cast", "--tolerance", "0") == 1
    assert "different: row" in capsys.readouterr().out


def test_hf_of_several_ranks_is_what_they_hold(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``hf/`` comes from the ranks' memory and ``student/`` from the same moment: equal bit for bit, at every ZeRO
    stage; several ranks write it, and the manifest's checksums, which were taken while writing, fit the files."""
    import torch
    from safetensors import safe_open

    from megadistill.checkpoint.manifest import check_files, files_below, read_manifest
    from megadistill.models.families import FAMILIES as PROJECT_FAMILIES
    from megadistill.models.shards import MASTER, ShardReader

    cases = [("gpt2", 1, "fp32"), ("llama", 3, "bf16"), ("qwen2", 0, "bf16")]
    runs = []
    for family, stage, dtype in cases:
        more = ("parallel.tp_size=2", f"parallel.zero_stage={stage}", f"model.student.dtype={dtype}",
                "train.max_steps=1", "generation.mode=dataset", "data.prompts_path=null",
                "data.prompts_ratio=0")  # fmt: skip
        runs.append((str(tmp_path / family), settings(assets, family, *more)))
    monkeypatch.setattr(hf_files, "_MIN_SHARE_BYTES", 10_000)
    run_layout(4, runs)
    for family, _, dtype in cases:
        step = tmp_path / family / "checkpoints" / "step_1"
        manifest = read_manifest(step)
        assert sorted(manifest["files"]) == files_below(step)
        check_files(step, manifest, files_below(step))
        _, places = _read(step / "hf")
        assert len(set(places.values())) > 1
        reader, export = ShardReader(step / "student"), PROJECT_FAMILIES[family].export
        for name in reader.shard_specs:
            expected = reader.whole(MASTER, name)
            expected = expected if export is None else export(name, expected)
            with safe_open(step / "hf" / places[name], framework="pt") as file:
                found = file.get_tensor(name)
            assert found.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
            assert torch.equal(found[: len(expected)], expected.to(found.dtype)), name
