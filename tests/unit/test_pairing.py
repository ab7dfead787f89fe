"""Which tokenizers may differ in what: two models of a run, and two models that ``verify`` compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AddedToken, PreTrainedTokenizerBase

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.pairing import assert_same_vocabulary, check_ids, pair_tokenizers
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError
from megadistill.training.setup import run_tokenizer
from tests.support.tokenizers import byte_level, edited, sentence_piece

NAMES = ("base", "instruct")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level(root / "byte_level")
    byte_level(root / "byte_level_bos", bos=True)
    sentence_piece(root / "sentence_piece")
    edited(root / "byte_level_bos", root / "other_eos", eos_token="<s>")
    longer = load_tokenizer(root / "byte_level")
    longer.add_tokens(["<extra>", "<more>"])
    longer.save_pretrained(root / "longer")
    shutil.copytree(root / "byte_level", root / "unmerged")
    path = root / "unmerged" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:1]
    path.write_text(json.dumps(content), encoding="utf-8")
    return root


def pair(folders: Path, used: str, other: str) -> list[str]:
    return pair_tokenizers(load_tokenizer(folders / used), load_tokenizer(folders / other), NAMES)


def test_equal_tokenizers_have_no_differences(folders: Path) -> None:
    assert pair(folders, "byte_level_bos", "byte_level_bos") == []


def test_special_tokens_may_differ_in_a_run(folders: Path) -> None:
    """As Qwen2.5 and Qwen2.5-Instruct do; padding follows EOS where there is no padding token."""
    assert pair(folders, "byte_level_bos", "other_eos") == [
        "eos_token is '<|endoftext|>' for base and '<s>' for instruct",
        "pad_token is '<|endoftext|>' for base and '<s>' for instruct",
    ]


def test_a_reserved_special_token_may_have_another_name(folders: Path) -> None:
    """As in Llama 3.0 and 3.1; a token of the vocabulary proper may not."""

    def with_token(name: str, special: bool) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(folders / "byte_level")
        tokenizer.add_tokens([AddedToken(name, special=special)])
        return tokenizer

    reserved, used = with_token("<|reserved_0|>", True), with_token("<|eom|>", True)
    id_ = len(used) - 1
    assert pair_tokenizers(reserved, used, NAMES) == [
        f"the special token {id_} is '<|reserved_0|>' for base and '<|eom|>' for instruct"
    ]
    for other in (with_token("<|eom|>", False), with_token("word", False)):
        with pytest.raises(ConfigError, match=rf"id {id_} is '<\|reserved_0\|>' for base and"):
            pair_tokenizers(reserved, other, NAMES)
    with pytest.raises(ConfigError, match=rf"id {id_} is '<\|reserved_0\|>' for teacher and '<\|eom\|>' for student"):
        assert_same_vocabulary(reserved, used)


def test_what_a_text_starts_with_may_differ_in_a_run(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "byte_level_bos", tmp_path / "bare")
    path = tmp_path / "bare" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "post_processor": None}), encoding="utf-8")
    first, bare = load_tokenizer(folders / "byte_level_bos"), load_tokenizer(tmp_path / "bare")
    assert pair_tokenizers(first, bare, NAMES) == ["a text starts with <s> for base and no token for instruct"]
    with pytest.raises(ConfigError, match="tokenize the same text differently"):
        assert_same_vocabulary(first, bare)


def test_one_side_may_have_more_tokens_at_the_end(folders: Path) -> None:
    size = len(load_tokenizer(folders / "byte_level"))
    assert pair(folders, "byte_level", "longer") == [f"base has {size} tokens and instruct {size + 2}"]
    assert pair(folders, "longer", "byte_level") == [f"base has {size + 2} tokens and instruct {size}"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("sentence_piece", r"base and instruct have different vocabularies .*: id \d+ is '.*' for base and"),
        ("byte_level_bos", r"id 1 is '!' for base and '<s>' for instruct"),
        ("unmerged", "tokenize the same text differently"),
    ],
)
def test_other_differences_are_refused(folders: Path, other: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair(folders, "byte_level", other)
    with pytest.raises(ConfigError, match=message):
        assert_same_vocabulary(load_tokenizer(folders / "byte_level"), load_tokenizer(folders / other), NAMES)


def test_verify_allows_padding_alone_to_differ(folders: Path, tmp_path: Path) -> None:
    first = load_tokenizer(folders / "byte_level_bos")
    padded = load_tokenizer(edited(folders / "byte_level_bos", tmp_path / "padded", pad_token="<s>"))
    assert padded.pad_token_id != first.pad_token_id
    assert_same_vocabulary(first, padded)
    with pytest.raises(ConfigError, match="eos_token is"):
        assert_same_vocabulary(first, load_tokenizer(folders / "other_eos"))
    short, longer = load_tokenizer(folders / "byte_level"), load_tokenizer(folders / "longer")
    with pytest.raises(ConfigError, match=rf"id {len(short)} is absent for teacher and '<extra>' for student"):
        assert_same_vocabulary(short, longer)


def test_rows_that_need_a_token_beyond_the_shared_ones_are_refused(folders: Path) -> None:
    longer = load_tokenizer(folders / "longer")
    size = len(longer)

    def row(id_: int, prompt: Sequence[int], response: Sequence[int] | None) -> TokenizedExample:
        return TokenizedExample(id_, tuple(prompt), None if response is None else tuple(response), (), "")

    fine = [row(0, [1, size - 3], [2]), row(1, [1], None)]
    check_ids(fine, size - 2, longer, "data.jsonl")
    for bad in (row(7, [1, size - 2], None), row(7, [1], [size - 2, 0])):
        with pytest.raises(ConfigError, match=r"data.jsonl, row 7: token '<extra>' has the id \d+, but the"):
            check_ids([*fine, bad], size - 2, longer, "data.jsonl")


def model_with(folder: Path, tokenizer: Path, rows: int) -> PreTrainedTokenizerBase:
    """A configuration and the name of a weight file beside a copy of a tokenizer."""
    shutil.copytree(tokenizer, folder)
    tree = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "model.safetensors").touch()
    return load_tokenizer(folder)


@pytest.mark.parametrize(("student_rows", "teacher_rows", "more"), [(0, 9, 0), (9, 9, 2), (1, 5, 1)])
def test_the_shared_vocabulary_is_what_both_have_rows_for(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], student_rows: int, teacher_rows: int, more: int
) -> None:
    """Numbers of rows, and V, beyond the smaller tokenizer; the larger one has two tokens more."""
    size = len(load_tokenizer(folders / "byte_level"))
    model_with(tmp_path / "student", folders / "byte_level", size + student_rows)
    model_with(tmp_path / "teacher", folders / "longer", size + teacher_rows)
    models = {name: {"path": str(tmp_path / name)} for name in ("teacher", "student")}
    tokenizer, vocab_size = run_tokenizer(RunConfig.model_validate({"run": {"dir": "x"}, "model": models}))
    assert len(tokenizer) == size and vocab_size == size + more
    (line,) = capsys.readouterr().out.splitlines()
    assert f"has {size} tokens and {tmp_path / 'teacher'} {size + 2}" in line
    assert line.endswith(f"The run uses the tokenizer of {tmp_path / 'student'}.")
