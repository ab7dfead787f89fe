"""What ends a text: tokenizer, generation_config.json, config.json, model.eos_tokens; and who uses it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from megadistill.cli.main import main
from megadistill.config.loss import LossConfig
from megadistill.config.schema import RunConfig
from megadistill.data.sample import Sample
from megadistill.data.spans import NoPrior, WindowPrior
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError
from megadistill.generation.teacher_cache import _open, _settings, teacher_responses
from megadistill.models.end_tokens import cut_end, describe_end_tokens, end_tokens, named_end_tokens
from megadistill.parallel.context import ParallelContext
from megadistill.training.components import Components
from megadistill.training.setup import _end_tokens, span_prior_of
from megadistill.training.step import find_spans
from tests.support.tokenizers import byte_level

TURN, PLAIN = "<|im_end|>", "[DONE]"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with EOS 0, and two more tokens at its end: a special and a plain one."""
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level(root / "bare")
    tokenizer = load_tokenizer(root / "bare")
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.add_tokens([PLAIN])
    tokenizer.save_pretrained(root / "more")
    return root / "more"


@pytest.fixture
def tokenizer(source: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(source)


def write(folder: Path, name: str, eos: Any) -> None:
    (folder / name).write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}), encoding="utf-8")


def model(folder: Path, source: Path, *, config: Any = None, generation: Any = None) -> str:
    shutil.copytree(source, folder)
    write(folder, "config.json", config)
    if generation is not None:
        write(folder, "generation_config.json", generation)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, (0,)),
        (0, None, (0,)),
        (7, None, (0, 7)),
        ([7, 0], None, (0, 7)),
        (7, [5, 6], (0, 5, 6)),
        (7, 5, (0, 5)),
        ([7, 8], [], (0, 7, 8)),
        (-1, None, (0,)),
        (10**6, [7, 10**6], (0, 7)),
    ],
)
def test_the_union_of_tokenizer_and_files(
    tmp_path: Path, source: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    path = model(tmp_path / "m", source, config=config, generation=generation)
    assert end_tokens(path, load_tokenizer(source), vocab_size=100) == set(expected)


def test_more_ids_join_and_asked_ones_replace(tmp_path: Path, source: Path, tokenizer: Any) -> None:
    path, size = model(tmp_path / "m", source, generation=[7]), len(tokenizer)
    assert end_tokens(path, tokenizer, vocab_size=size, more=(9, size)) == {0, 7, 9}
    asked: list[int | str] = [TURN, 5, "T"]
    ids = {tokenizer.convert_tokens_to_ids(TURN), 5, tokenizer.convert_tokens_to_ids("T")}
    assert end_tokens(path, tokenizer, vocab_size=size, asked=asked, more=(9,)) == ids


def test_references_that_end_otherwise_than_asked_are_warned_of(
    tmp_path: Path, source: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"model.student.path": model(tmp_path / "student", source)}
    turn, size = tokenizer.convert_tokens_to_ids(TURN), len(tokenizer)
    for asked, is_warned in ((None, False), ((0, turn), False), ((0,), True)):
        config: Any = SimpleNamespace(model=SimpleNamespace(eos_tokens=asked))
        assert _end_tokens(config, paths, tokenizer, size, turn) == {
            "model.student.path": {0, turn} - ({turn} if is_warned else set())
        }
        assert (
            f"references end with {TURN} ({turn}), which is not among model.eos_tokens" in capsys.readouterr().out
        ) == is_warned


def test_a_text_that_encodes_to_one_token_may_be_asked_for(tmp_path: Path, source: Path, tokenizer: Any) -> None:
    path = model(tmp_path / "m", source)
    assert end_tokens(path, tokenizer, vocab_size=len(tokenizer), asked=["\n"]) == {
        tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("<|im_ends|>", r"'<\|im_ends\|>' is not one token of the tokenizer; did you mean <\|im_end\|>\?"),
        (10**6, "no token has the id 1000000; ids are 0 to"),
        (TURN, "is not one token"),
    ],
)
def test_what_is_no_token_is_refused(
    tmp_path: Path, source: Path, tokenizer: Any, asked: int | str, message: str
) -> None:
    path = model(tmp_path / "m", source)
    size = tokenizer.convert_tokens_to_ids(TURN) if asked == TURN else len(tokenizer)
    with pytest.raises(ConfigError, match=message) as error:
        end_tokens(path, tokenizer, vocab_size=size, asked=[asked])
    assert error.value.setting == "model.eos_tokens"


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, [True], 1.5, {"a": 1}, [-1]])
def test_damaged_files_are_refused(tmp_path: Path, source: Path, value: Any) -> None:
    path = model(tmp_path / "m", source, generation=value)
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id must be a token's id, a list of ids"):
        named_end_tokens(path)
    (tmp_path / "m" / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="generation_config.json is not valid JSON"):
        named_end_tokens(path)


def test_a_vocabulary_without_any_end_token_is_refused(tmp_path: Path, source: Path, tokenizer: Any) -> None:
    tokenizer.eos_token = PLAIN
    with pytest.raises(ConfigError, match="nothing would end its text"):
        end_tokens(model(tmp_path / "m", source), tokenizer, vocab_size=5)


def test_ids_of_a_model_without_a_tokenizer_count_where_they_are_no_text(tmp_path: Path, tokenizer: Any) -> None:
    """A configuration with its family's numbers, and another tokenizer: 7 is a letter there."""
    file, turn = tmp_path / "config.json", tokenizer.convert_tokens_to_ids(TURN)
    write(tmp_path, "config.json", [7, turn])
    for path in (file, tmp_path):
        assert end_tokens(str(path), tokenizer, vocab_size=len(tokenizer)) == {0, turn}


def test_hub_names_are_read_from_the_cache(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(model(tmp_path / "cache", source, config=3, generation=[7, 8]))
    asked: list[tuple[str, str]] = []

    def cached_file(path: str, name: str, **_: Any) -> str | None:
        asked.append((path, name))
        return str(cache / name) if (cache / name).is_file() else None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert named_end_tokens("owner/name") == (7, 8)
    (cache / "generation_config.json").unlink()
    assert named_end_tokens("owner/name") == (3,)
    assert ("owner/name", "config.json") in asked


def test_the_token_that_ended_a_text_is_cut_off_and_shown_nowhere(tokenizer: Any) -> None:
    plain = tokenizer.convert_tokens_to_ids(PLAIN)
    assert cut_end((5, plain), {0, plain}) == (5,) and cut_end((plain, 5), {0, plain}) == (plain, 5)
    assert cut_end((), {0}) == ()
    assert describe_end_tokens({plain, 0}, tokenizer) == f"<|endoftext|> (0), [DONE] ({plain})"
    ids = tokenizer("The dog", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*ids, plain], skip_special_tokens=True) == "The dog[DONE]", "decoding does not hide it"
    components: Any = SimpleNamespace(tokenizer=tokenizer, eos_ids={0}, teacher_eos_ids={plain})
    assert Components.decode(components, (*ids, plain)) == "The dog"


def test_an_end_token_is_part_of_no_span(tokenizer: Any) -> None:
    plain = tokenizer.convert_tokens_to_ids(PLAIN)
    ids = tuple(tokenizer("The dog", add_special_tokens=False)["input_ids"])
    components: Any = SimpleNamespace(
        tokenizer=tokenizer, eos_ids=frozenset({0}), teacher_eos_ids=frozenset(), span_prior=WindowPrior(9), teacher=1,
        loss=LossConfig(),
    )  # fmt: skip
    (sample,) = find_spans([Sample(0, (1,), response_ids=(*ids, plain))], components)
    assert list(sample.pair_mask) == [True] * len(ids) + [False]
    components.eos_ids = frozenset({0, plain})
    (sample,) = find_spans([Sample(0, (1,), response_ids=(*ids, plain))], components)
    assert list(sample.pair_mask) == [True] * (len(ids) - 1) + [False, False]


def test_without_a_span_loss_nothing_is_parsed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    components: Any = SimpleNamespace(eos_ids={0}, teacher_eos_ids={0}, teacher=1, loss=LossConfig(span=0))
    (sample,) = find_spans([Sample(0, (1,), response_ids=(5, 6, 7))], components)
    assert list(sample.pair_mask) == [False] * 3
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    models = {"run": {"dir": "r"}, "model": {"teacher": {"path": "owner/t"}, "student": {"path": "owner/s"}}}
    assert isinstance(span_prior_of(RunConfig.model_validate(models | {"loss": {"span": 0}})), NoPrior)
    with pytest.raises(ConfigError, match="phrases"):
        span_prior_of(RunConfig.model_validate(models))


def cache_config(tmp_path: Path, **more: Any) -> RunConfig:
    return RunConfig.model_validate({
        "run": {"dir": str(tmp_path / "run")},
        "model": {"teacher": {"path": "owner/t"}, "student": {"path": "owner/s"}, **more},
        "generation": {"mode": "teacher", "teacher_cache": str(tmp_path / "text.jsonl")},
    })  # fmt: skip


def test_a_teacher_cache_names_its_end_tokens(tmp_path: Path) -> None:
    config, teacher = cache_config(tmp_path), SimpleNamespace(shard=SimpleNamespace(total=50))
    path: Any = tmp_path / "text.jsonl"

    def responses(config: RunConfig, eos_ids: set[int]) -> None:
        anyone: Any = teacher
        teacher_responses(
            config,
            [],
            anyone,
            "owner/t",
            ParallelContext.single(),
            eos_ids=frozenset(eos_ids),
            batch_size=1,
            name_of=str,
        )

    responses(config, {0, 7})
    assert json.loads(path.read_text(encoding="utf-8"))["eos_ids"] == [0, 7]
    responses(config, {0, 7})
    with pytest.raises(ConfigError, match=r"eos_ids=\[0, 7\] there, \[0\] here"):
        responses(config, {0})
    # A file of before: it ended at the tokenizer's EOS alone.
    old = {
        key: value for key, value in _settings(config, teacher, "owner/t", frozenset({0})).items() if key != "eos_ids"
    }
    path.write_text(json.dumps(old) + "\n", encoding="utf-8")
    responses(config, {0})
    with pytest.raises(ConfigError, match=r"eos_ids=None there, \[0, 7\] here"):
        responses(config, {0, 7})
    with pytest.raises(ConfigError, match=r"eos_ids=None there, \[5\] here"):
        responses(cache_config(tmp_path, eos_tokens=[5]), {5})
    assert _open(path, old) == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, source: Path) -> tuple[Path, list[int]]:
    """A random model, and what it writes after "Name a river." without an end."""
    folder = tmp_path_factory.mktemp("written") / "m"
    tokenizer = load_tokenizer(source)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    random = LlamaForCausalLM(config).eval()
    random.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("Name a river.\n", return_tensors="pt")["input_ids"]
    free = random.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    return folder, free[0, ids.shape[1] :].tolist()


def generate(folder: Path, output: Path, *more: str) -> str:
    rows = output.with_name("rows.jsonl")
    rows.write_text(json.dumps({"instruction": "Name a river."}) + "\n", encoding="utf-8")
    arguments = ["--model", str(folder), "--input", str(rows), "--template", "plain", "--temperature", "0"]
    limits = ["--max-prompt-tokens", "32", "--max-new-tokens", "12", "--output", str(output), "--overwrite"]
    assert main(["generate", *arguments, *limits, *more]) == 0
    return str(json.loads(output.read_text(encoding="utf-8"))["response"])


def test_generate_stops_at_every_end_token(written: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, free = written
    tokenizer = load_tokenizer(folder)
    second = next(token for token in free if token != free[0])
    until = tokenizer.decode(free[: free.index(second)])
    assert generate(folder, tmp_path / "free.jsonl") == tokenizer.decode(free)
    assert generate(folder, tmp_path / "asked.jsonl", "--eos-tokens", str(second), "<|endoftext|>") == until
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, second]}), encoding="utf-8")
    assert generate(tmp_path / "m", tmp_path / "list.jsonl") == until


def test_generate_refuses_rows_of_other_end_tokens(
    written: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, free = written
    generate(folder, tmp_path / "o.jsonl")
    monkeypatch.setattr("megadistill.cli.resumable.ResumableFile.finish", lambda self: None)
    (tmp_path / "o.jsonl").unlink()
    rows = ["--model", str(folder), "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    assert main(["generate", *rows, "--max-prompt-tokens", "64", "--max-new-tokens", "2"]) == 0
    again = ["--max-prompt-tokens", "64", "--max-new-tokens", "2", "--eos-tokens", str(free[0])]
    assert main(["generate", *rows, *again]) == 2
    assert "rows with other settings: --eos-tokens was <|endoftext|> (0) and is now" in capsys.readouterr().err
    assert main(["generate", *rows, *again[:-1], "<|nothing|>"]) == 2
    assert "'<|nothing|>' is not one token of the tokenizer" in capsys.readouterr().err
