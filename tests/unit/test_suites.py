"""Evaluation sets and one pass of the protocol, with a generator that needs no model."""

import json

import pytest

from megadistill.config.data import DataSection
from megadistill.config.schema import EvalSection
from megadistill.data.dataset import Example
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError, DataError
from megadistill.evaluation.suites import SUITES, EvalSet, SuiteSpec, load_eval_set, run_suite, select_rows
from tests.support.tokenizers import byte_level

PLAIN = DataSection(template="plain")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder)
    return load_tokenizer(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(words, references=1):
    return {"instruction": f"say {words}", "output": [" ".join(["word"] * words)] * references}


def test_the_protocols_numbers():
    assert EvalSection().seeds == (10, 20, 30, 40, 50)
    assert set(SUITES) == {"dolly", "self_inst", "vicuna", "sni", "unni"}
    assert (SUITES["unni"].min_reference_words, SUITES["unni"].max_rows) == (11, 10_000)
    assert SUITES["sni"].min_reference_words == 11


def test_suites_take_long_references_in_order():
    examples = [Example(i, "x", "", refs) for i, refs in enumerate([("a b c",), (), ("a b",), ("a b c d", "a")])]
    assert [each.id for each in select_rows(examples, SuiteSpec(min_reference_words=3))] == [0, 3]
    assert [each.id for each in select_rows(examples, SuiteSpec(max_rows=2))] == [0, 1]


def test_loading_counts_what_is_left_out(tmp_path, tokenizer):
    rows = [row(3), row(0, references=0), row(200), {"instruction": "dog " * 400, "output": "x"}]
    path = write(tmp_path / "my_set.jsonl", rows)
    loaded = load_eval_set(path, tokenizer, PLAIN)
    assert (loaded.name, len(loaded.rows), loaded.num_dropped, loaded.num_without_references) == ("my_set", 3, 1, 1)
    assert len(load_eval_set(path, tokenizer, PLAIN, max_rows=1).rows) == 1
    assert [len(each.references[0].split()) for each in load_eval_set(path, tokenizer, PLAIN, suite="sni").rows] == [
        200
    ]
    path.write_text(path.read_text(encoding="utf-8") + "broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"my_set\.jsonl:5"):
        load_eval_set(path, tokenizer, PLAIN)
    assert load_eval_set(path, tokenizer, DataSection(template="plain", skip_bad_rows=True)).num_skipped == 1


def test_empty_sets_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "short.jsonl", [row(3)])
    with pytest.raises(DataError, match="the evaluation set is empty .1 of 1 rows are too short for suite 'sni'"):
        load_eval_set(path, tokenizer, PLAIN, suite="sni")
    with pytest.raises(DataError, match="the evaluation set is empty .at most 0 rows"):
        load_eval_set(path, tokenizer, PLAIN, max_rows=0)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="the file is empty"):
        load_eval_set(path, tokenizer, DataSection())
    with pytest.raises(DataError, match="all 1 prompts are over"):
        load_eval_set(write(path, [row(3)]), tokenizer, DataSection(max_prompt_tokens=2, max_tokens=9))
    with pytest.raises(ConfigError, match=r"'dolli'; allowed: dolly.*did you mean dolly\?"):
        load_eval_set(path, tokenizer, DataSection(), suite="dolli")


def test_one_pass_scores_every_seed_and_greedy(tmp_path, tokenizer):
    eval_set = load_eval_set(
        write(tmp_path / "a.jsonl", [row(1), row(1), row(1, references=0)]), tokenizer, DataSection()
    )
    asked = []

    def generate(rows, seed):
        asked.append(seed)
        return ["word", "word" if seed is None or seed >= 20 else "else", "anything"]

    result = run_suite(eval_set, generate, seeds=(10, 20))
    assert asked == [10, 20, None]
    assert (result.sampled.exact_match.mean, result.greedy.exact_match) == (75.0, 100.0)
    assert result.sampled.exact_match.std == pytest.approx(35.355, abs=1e-3)
    assert (result.greedy.num_scored, result.greedy.num_without_references) == (2, 1)
    assert result.predictions == ["word", "word", "anything"]
    sampled_only = run_suite(eval_set, generate, seeds=(10,), greedy=False)
    assert sampled_only.greedy is None and sampled_only.predictions[1] == "else"
    assert run_suite(eval_set, generate, seeds=()).sampled is None
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        run_suite(eval_set, generate, seeds=(), greedy=False)
    with pytest.raises(DataError, match="empty"):
        run_suite(EvalSet("none", [], end_id=0), generate, seeds=(10,))
