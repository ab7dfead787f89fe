"""What an export has beside its weights, from every kind of student and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from megadistill.checkpoint.carried import Carried, carried_files, for_auto_tokenizer
from megadistill.checkpoint.reshard import shard_model
from megadistill.data.tokenize import auto_tokenizer_differs, load_tokenizer
from megadistill.models.end_tokens import end_tokens
from megadistill.models.loading import load_model_config
from tests.support.tokenizers import byte_level

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [7, 0]}


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "bare"
    byte_level(folder)
    return folder


@pytest.fixture
def student(tmp_path: Path, bare: Path) -> Path:
    """A folder with all that a downloaded model may bring, and some litter."""
    folder = tmp_path / "student"
    shutil.copytree(bare, folder)
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": [7, 0], "bos_token_id": 5})
    write_json(folder / "generation_config.json", SAMPLING)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}", encoding="utf-8")
    for name in ("preprocessor_config.json", "modeling_own.py", "LICENSE", "NOTICE.txt", "tool.jinja"):
        (folder / name).write_text(f"own {name}", encoding="utf-8")
    for name in (
        "model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5", "trainer_state.json", "optimizer.pt",
        "events.out.tfevents.1", "train.log", "README.md", ".gitattributes", "all_results.json",
    ):  # fmt: skip
        (folder / name).write_text("litter", encoding="utf-8")
    return folder


def collect(model: Path, tokenizer: Path | None = None, eos_ids: set[int] | None = None) -> Carried:
    path = str(tokenizer or model)
    words = load_tokenizer(path)
    ends = end_tokens(str(model), words, vocab_size=len(words)) if eos_ids is None else frozenset(eos_ids)
    return carried_files(str(model), path, words, ends, load_model_config(str(model), "x"))


def generation(carried: Carried) -> Any:
    return json.loads(carried.files["generation_config.json"])


def test_a_student_keeps_its_files_byte_for_byte(student: Path, tmp_path: Path) -> None:
    write_json(student / "generation_config.json", {**SAMPLING, "pad_token_id": 3})
    carried = collect(student)
    expected = {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
        "preprocessor_config.json", "modeling_own.py", "LICENSE", "NOTICE.txt", "tool.jinja", "generation_config.json",
    }  # fmt: skip
    assert set(carried.files) == expected
    for name, content in carried.files.items():
        assert content == (student / name).read_bytes(), name
    assert carried.special_ids == {"bos_token_id": 5, "eos_token_id": [7, 0], "pad_token_id": 0}
    (tmp_path / "out").mkdir()
    carried.write(tmp_path / "out")
    shutil.copy2(student / "config.json", tmp_path / "out")
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "rag"}


def test_a_large_file_is_not_copied(student: Path) -> None:
    with (student / "flax.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert "flax.json" not in collect(student).files


def test_generation_settings_gain_what_is_missing_and_nothing_else(student: Path) -> None:
    write_json(student / "generation_config.json", {**SAMPLING, "eos_token_id": 7, "_from_model_config": True})
    assert generation(collect(student)) == {**SAMPLING, "eos_token_id": [7, 0], "pad_token_id": 0}
    assert generation(collect(student, eos_ids={7, 9})) == {**SAMPLING, "eos_token_id": [7, 0, 9], "pad_token_id": 0}
    without = {key: value for key, value in SAMPLING.items() if key != "eos_token_id"}
    write_json(student / "generation_config.json", without)
    # config.json named the others.
    assert generation(collect(student)) == {**without, "eos_token_id": [0, 7], "pad_token_id": 0}


def test_a_model_without_generation_settings_gets_some(student: Path, tmp_path: Path) -> None:
    (student / "generation_config.json").unlink()
    made = generation(collect(student))
    assert made["eos_token_id"] == [7, 0] and made["pad_token_id"] == 0 and "_from_model_config" not in made
    write_json(student / "config.json", {"model_type": "llama", "eos_token_id": 7})
    carried = collect(student)
    assert generation(carried)["eos_token_id"] == [7, 0]
    assert carried.special_ids["eos_token_id"] == 0, "a single id is the tokenizer's; the list has both"
    (tmp_path / "generation_config.json").write_bytes(carried.files["generation_config.json"])
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, 0]


def test_a_list_in_the_configuration_gains_the_tokenizers(student: Path) -> None:
    write_json(student / "config.json", {"model_type": "llama", "eos_token_id": [7, 8]})
    assert collect(student).special_ids["eos_token_id"] == [7, 8, 0]


def test_a_configuration_file_brings_nothing(tmp_path: Path, bare: Path) -> None:
    """Its special tokens are of another vocabulary; files beside it are of something else."""
    file = tmp_path / "config.json"
    write_json(file, {"model_type": "llama", "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 9})
    (tmp_path / "LICENSE").write_text("x", encoding="utf-8")
    carried = collect(file, bare)
    assert carried.special_ids == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    assert set(carried.files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert generation(carried)["eos_token_id"] == 0


def test_another_tokenizer_brings_its_files_and_the_student_its_template(student: Path, bare: Path) -> None:
    carried = collect(student, bare)
    assert carried.files["tokenizer_config.json"] == (bare / "tokenizer_config.json").read_bytes()
    assert carried.files["chat_template.jinja"] == TEMPLATE.encode() and "tool.jinja" in carried.files
    assert carried.files["additional_chat_templates/rag.jinja"] == b"{{ documents }}"


def test_a_template_in_the_settings_goes_into_those_of_another_tokenizer(
    student: Path, bare: Path, tmp_path: Path
) -> None:
    shutil.rmtree(student / "additional_chat_templates")
    (student / "chat_template.jinja").unlink()
    settings = json.loads((student / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(student / "tokenizer_config.json", {**settings, "chat_template": TEMPLATE})
    assert json.loads(collect(student, bare).files["tokenizer_config.json"])["chat_template"] == TEMPLATE
    shutil.copytree(bare, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ other }}", encoding="utf-8")
    carried = collect(student, tmp_path / "own")
    assert carried.files["chat_template.jinja"] == b"{{ other }}"
    assert "chat_template" not in json.loads(carried.files["tokenizer_config.json"])


def auto(student: Path, model_type: str, tokenizer_class: str | None, out: Path) -> Carried:
    write_json(student / "config.json", {"model_type": model_type})
    settings = json.loads((student / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(student / "tokenizer_config.json", {**settings, "tokenizer_class": tokenizer_class})
    config = load_model_config(str(student), "x")
    carried = for_auto_tokenizer(collect(student), config, "STUDENT")
    out.mkdir()
    carried.write(out)
    config.save_pretrained(out)
    return carried


def test_exports_name_a_class_that_reads_the_tokenizer_as_it_is(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carried = auto(student, "qwen3", "Qwen2Tokenizer", tmp_path / "out")
    assert auto_tokenizer_differs(student) and not auto_tokenizer_differs(tmp_path / "out")
    assert json.loads(carried.files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    (line,) = capsys.readouterr().out.splitlines()
    assert "INFO checkpoint: AutoTokenizer does not read STUDENT" in line


def test_where_no_class_helps_a_warning_names_the_remedies(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For qwen2, transformers takes its own class whatever the files say."""
    carried = auto(student, "qwen2", "PreTrainedTokenizerFast", tmp_path / "out")
    assert carried.files["tokenizer_config.json"] == (student / "tokenizer_config.json").read_bytes()
    (line,) = capsys.readouterr().out.splitlines()
    assert "WARNING checkpoint: AutoTokenizer does not tokenize as STUDENT/tokenizer.json describes" in line
    assert "PreTrainedTokenizerFast" in line and "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in line
    # The second remedy: what AutoTokenizer reads, saved, is read as it is.
    AutoTokenizer.from_pretrained(student).save_pretrained(student)
    carried = for_auto_tokenizer(collect(student), load_model_config(str(student), "x"), "STUDENT")
    assert not auto_tokenizer_differs(student) and capsys.readouterr().out == ""


def test_a_tokenizer_that_is_read_as_it_is_needs_no_words(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carried = auto(student, "llama", "PreTrainedTokenizerFast", tmp_path / "out")
    assert carried.files["tokenizer_config.json"] == (student / "tokenizer_config.json").read_bytes()
    assert capsys.readouterr().out == ""


def test_a_sharded_model_ends_where_the_whole_one_does(student: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(student)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0,
    )  # fmt: skip
    before = (student / "generation_config.json").read_bytes()
    LlamaForCausalLM(config).save_pretrained(student)
    (student / "model.safetensors.index.json").unlink(missing_ok=True)
    (student / "generation_config.json").write_bytes(before)
    shard_model(str(student), tmp_path / "sharded", tp_size=2, dp_size=1, dtype="fp32")
    size = len(tokenizer)
    assert end_tokens(str(tmp_path / "sharded"), load_tokenizer(tmp_path / "sharded"), vocab_size=size) == {0, 7}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "sharded" / name).read_bytes() == (student / name).read_bytes()
    after = json.loads((tmp_path / "sharded" / "generation_config.json").read_text(encoding="utf-8"))
    assert after == {**SAMPLING, "pad_token_id": 0}
