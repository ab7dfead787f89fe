"""``megadistill verify``: the same model in other clothes passes, any other one does not, and the numbers are right."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megadistill.cli.main import main
from megadistill.errors import DataError
from megadistill.evaluation.compare import compare_models, text_rows
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
}
COMMON = {"num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.2, "eos_token_id": 0}


def _make(folder: Path, family: str = "llama", *, padded: int = 3, seed: int = 0, **more: Any) -> Path:
    """A model with wide random weights, so that distributions are far from uniform, and its tokenizer."""
    tokenizer = byte_level(folder)
    config = AutoConfig.for_model(family, **{**COMMON, **SIZES[family], "vocab_size": len(tokenizer) + padded, **more})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _changed(source: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a model after ``change``."""
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("base") / "model")


def _verify(a: Path, b: Path, *more: str, small: bool = True) -> int:
    sizes = ["--rows", "2", "--max-tokens", "24", "--greedy-tokens", "8"] if small else []
    return main(["verify", str(a), str(b), *sizes, *more])


def _value(table: str, measure: str) -> str:
    """The cells of the printed table."""
    line = next(line for line in table.splitlines() if line.startswith(measure))
    return line.removeprefix(measure).strip()


@pytest.mark.parametrize("family", SIZES)
def test_other_clothes_are_the_same(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Other padded rows (with other weights), several files, and a tokenizer on one side only."""
    a = _make(tmp_path / "a", family)

    def other_padding(model: Any) -> None:
        torch.manual_seed(5)
        model.resize_token_embeddings(model.config.vocab_size + 8)

    b = _changed(a, tmp_path / "b", other_padding)
    AutoModelForCausalLM.from_pretrained(b).save_pretrained(b, max_shard_size="20KB")
    (b / "model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (b / name).unlink()
    assert len(list(b.glob("model-*.safetensors"))) > 1
    assert _verify(a, b) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "same"
    assert _value(out, "max KL(A||B), nats") == _value(out, "max |logit difference|") == "0"
    assert _value(out, "classes") == str(len(AutoTokenizer.from_pretrained(a)))
    assert "comparing: 4/4 row (100 %)" in err


def test_numbers_against_plain_torch(base: Path, tmp_path: Path) -> None:
    """All numbers, by one dense computation in float64 that shares nothing with the tool."""
    b = _changed(base, tmp_path / "b", lambda model: model.model.norm.weight[0].add_(0.5))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, b)]
    rows = [list(range(5, 45)), [7, 9, 7]]
    found = compare_models(*models, rows, num_greedy=6)
    with torch.no_grad():
        a, other = (torch.cat([m(torch.tensor([row])).logits[0] for row in rows]).double() for m in models)
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-9) and found.mean_kl > 1e-3
    assert found.max_kl == pytest.approx(float(kl.max()), rel=1e-9)
    assert found.max_row * 40 + found.max_position == int(kl.argmax())
    assert found.max_logit_difference == pytest.approx(float((a - other).abs().max()))
    assert found.same_top == pytest.approx(float((a.argmax(-1) == other.argmax(-1)).double().mean()))
    assert (found.num_rows, found.num_positions, found.num_classes) == (2, 43, models[0].config.vocab_size)
    for model, tokens in ((models[0], "tokens_a"), (models[1], "tokens_b")):
        for text in found.greedy:
            prompt = torch.tensor([rows[text.row][: text.prompt_tokens]])
            whole = model.generate(prompt, do_sample=False, min_new_tokens=6, max_new_tokens=6, pad_token_id=0)
            if 0 not in getattr(text, tokens):  # generate may not write EOS where it must continue
                assert tuple(whole[0, prompt.shape[1] :].tolist()) == getattr(text, tokens)


def test_a_changed_weight_is_found(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: Any) -> None:
        model.lm_head.weight[100] += 0.05

    b = _changed(base, tmp_path / "b", change)
    result = tmp_path / "out" / "result.json"
    assert _verify(base, b, "--json", str(result)) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    written = json.loads(result.read_text(encoding="utf-8"))
    assert line == f"different: {written['difference']}" and written["same"] is False
    assert line.startswith(f"different: row {written['max_row']}, position {written['max_position']}: KL ")
    assert _verify(base, b, "--tolerance", str(written["max_kl"] * 10)) == 0
    assert _verify(base, b, "--tolerance", str(written["max_kl"] / 2)) == 1


def test_greedy_text_is_compared_beyond_the_rows(base: Path, tmp_path: Path) -> None:
    """Two models that agree on every row and differ in what they write after them."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    row = [11, 12, 13, 14]
    written = compare_models(model, model, [row], num_greedy=8).greedy[0]
    assert written.tokens_a == written.tokens_b and written.first_difference is None
    token = next(t for t in written.tokens_a if t not in row)
    other = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        other.model.embed_tokens.weight[token] *= -1
    found = compare_models(model, other, [row], num_greedy=8)
    assert found.max_kl == 0.0
    text = found.greedy[0]
    assert text.first_difference is not None and text.first_difference > written.tokens_a.index(token)
    assert f"row 0, greedy token {text.first_difference} after 2 tokens: KL" in str(found.difference(1e-5))
    assert found.difference(1e9) is None


def test_a_broken_weight_is_no_match(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN compares false with everything: it must not pass as small."""
    b = _changed(base, tmp_path / "b", lambda model: model.model.norm.weight[0].fill_(math.nan))
    for a in (base, b):
        assert _verify(a, b, "--greedy-tokens", "0") == 1
        assert "KL nan" in capsys.readouterr().out.splitlines()[-1]


def test_bf16(base: Path, tmp_path: Path) -> None:
    """A cast is the same in bf16, bit for bit, and is not in fp32."""
    b = tmp_path / "b"
    shutil.copytree(base, b)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(b)
    assert _verify(base, b, "--dtype", "bf16", "--tolerance", "0") == 0
    assert _verify(base, b) == 1


def test_tokenizers_that_differ(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = tmp_path / "b"
    shutil.copytree(base, b)
    byte_level(b, bos=True)
    assert _verify(base, b) == 1
    assert capsys.readouterr().out.startswith("different: the tokenizers: A and B have different vocabularies")
    assert _verify(base, b, "--tokenizer", str(base)) == 0


def test_rows_that_one_side_lacks(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: Any) -> None:
        model.resize_token_embeddings(model.config.vocab_size - 13)

    assert _verify(base, _changed(base, tmp_path / "b", change)) == 1
    assert "vocabulary rows" in capsys.readouterr().out.splitlines()[-1]


def test_texts(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 50, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "The quick brown fox."}\n{"text": "jumps"}\n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")

    def read(name: str | None, **more: Any) -> list[list[int]]:
        path = None if name is None else str(tmp_path / name)
        return text_rows(path, tokenizer, **{"max_rows": 3, "max_tokens": 10, **more})

    assert [len(row) for row in read("a.txt")] == [10, 10, 10]
    text = tokenizer.decode([token for row in read("a.txt") for token in row])
    assert ("The quick brown fox. " * 50).startswith(text)
    assert tokenizer.decode(read("a.jsonl", max_tokens=99, text_field="text")[0]) == "The quick brown fox.\n\njumps"
    assert read(None) == read(None) and len(read(None, max_rows=32, max_tokens=256)) == 32
    bos = byte_level(tmp_path / "bos", bos=True)
    rows = text_rows(str(tmp_path / "a.txt"), bos, max_rows=2, max_tokens=10)
    assert [row[0] for row in rows] == [bos.bos_token_id] * 2 and [len(row) for row in rows] == [10, 10]
    for name, words in (("empty.txt", "no text"), ("bad.txt", "invalid UTF-8"), ("no.txt", "no such file or folder: ")):
        with pytest.raises(DataError, match=words):
            read(name)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tolerance", "-1"], "--tolerance"),
        (["--rows", "0"], "--rows"),
        (["--max-tokens", "97"], "reads at most 96 positions"),
        (["--greedy-tokens", "90"], "prompt + --greedy-tokens=102, but A"),
        (["--text", "no.txt"], "no such file or folder: no.txt"),
        (["--json", "."], "is a folder"),
    ],
)
def test_wrong_usage(base: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify(base, base, *more) == 2
    assert words in capsys.readouterr().err


def test_models_that_cannot_be_read(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    for pair, words in (
        ((base, tmp_path / "nothing"), "B: no such "),
        ((tmp_path / "config", base), "A: "),
        ((bare, bare), "give --tokenizer"),
    ):
        assert _verify(*pair) == 2
        assert words in capsys.readouterr().err


def test_the_tool(base: Path) -> None:
    """By default it reads 32 rows of the built-in text, however short the models' positions are."""
    command = [sys.executable, str(ROOT / "tools" / "verify_checkpoint.py")]
    done = subprocess.run([*command, str(base), str(base)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "same", done.stderr
    assert _value(done.stdout, "positions") == "3072 in 32 rows"
    assert _value(done.stdout, "equal greedy texts") == "4 of 4"
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "python tools/verify_checkpoint.py BASE MERGED" in shown
