"""The demo's corpus and its tokenizer: deterministic, disjoint, exact."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megadistill.data import PromptSettings, load_examples, load_tokenizer, render_prompt, tokenize_examples
from megadistill.data.synthetic import KINDS, OPPOSITE, TRADES, VERBS, CorpusSizes, generate_corpus, write_corpus
from megadistill.demo.tokenizer import train_tokenizer
from megadistill.errors import DataError

SMALL = CorpusSizes(teacher=400, references=32, prompts=200, valid=24, test=24)
VOCAB_SIZE = 640


def texts_of(corpus):
    return [text for row in corpus["teacher_train"] for text in (row["instruction"], row["input"], row["output"])]


@pytest.fixture(scope="module")
def corpus():
    return generate_corpus(3, SMALL)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts_of(corpus), folder, vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_splits_have_the_sizes_asked_for_and_only_prompts_lack_outputs(corpus):
    sizes = {key: len(rows) for key, rows in corpus.items()}
    assert sizes == {"test": 24, "valid": 24, "train": 32, "prompts": 200, "teacher_train": 400}
    for key, rows in corpus.items():
        assert all(bool(row["output"]) == (key != "prompts") for row in rows)


def test_no_prompt_is_shared_and_no_task_sees_an_input_twice():
    kind_of = {instruction: kind for kind, (_, instructions) in KINDS.items() for instruction in instructions}
    rows = [row for rows in generate_corpus(0, CorpusSizes()).values() for row in rows]
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({(kind_of[row["instruction"]], row["input"]) for row in rows}) == len(rows)


def test_every_kind_is_equally_frequent_in_every_split(corpus):
    kind_of = {instruction: kind for kind, (_, instructions) in KINDS.items() for instruction in instructions}
    for rows in corpus.values():
        counts = Counter(kind_of[row["instruction"]] for row in rows)
        assert set(counts) == set(KINDS) and max(counts.values()) == min(counts.values())


def test_seeds_differ_and_one_seed_repeats(corpus):
    assert generate_corpus(3, SMALL) == corpus
    assert generate_corpus(4, SMALL)["test"] != corpus["test"]


def test_held_out_rows_do_not_depend_on_the_size_of_the_training_splits(corpus):
    bigger = generate_corpus(3, CorpusSizes(teacher=500, references=40, prompts=0, valid=24, test=24))
    assert (bigger["test"], bigger["valid"], bigger["prompts"]) == (corpus["test"], corpus["valid"], [])


def answers(kind, seed, count=40):
    from random import Random

    rng = Random(seed)
    return [KINDS[kind][0](rng) for _ in range(count)]


def test_answers_follow_from_their_prompts():
    thirds = {verb.third: verb for verb in [*VERBS, *(trade.verb for trade in TRADES)]}
    trades = {trade.person: trade for trade in TRADES}
    for prompt, answer in answers("past", 0):
        words = prompt.split()
        assert answer.split() == [*words[:3], thirds[words[3]].past, *words[4:]]
    for prompt, answer in answers("opposite", 0):
        words = prompt.split()
        assert answer.split() == [words[0], OPPOSITE[words[1]], *words[2:]]
    for prompt, answer in answers("plural", 0):
        words = prompt.split()
        assert answer.split() == [*words[:2], trades[words[2]].people, thirds[words[3]].base, *words[4:]]
    for prompt, answer in answers("question", 0):
        words = prompt[:-1].split()
        assert answer == f"Does the {' '.join([*words[1:3], thirds[words[3]].base, *words[4:]])}?"
    for prompt, answer in answers("negative", 0):
        words = prompt.split()
        assert answer.split() == [*words[:3], "does", "not", thirds[words[3]].base, *words[4:]]
    for prompt, answer in answers("passive", 0):
        words = prompt[:-1].split()
        subject, thing, tail = ["the", *words[1:3]], words[5:7], words[7:]
        assert answer[:-1].split() == ["The", *thing, "is", thirds[words[3]].participle, "by", *subject, *tail]
    for prompt, answer in [*answers("work", 0), *answers("correction", 0)]:
        person = next(trade for name, trade in trades.items() if name in prompt.replace(",", "").split())
        assert f"{person.person} {person.verb.third} {person.product} {person.place}" in answer
        assert answer != prompt


def test_grammar_tables_are_consistent():
    people = [trade.person for trade in TRADES]
    assert len(set(people)) == len(people)
    assert all(OPPOSITE[OPPOSITE[word]] == word != OPPOSITE[word] for word in OPPOSITE)
    assert len({verb.base for verb in VERBS}) == len(VERBS)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (CorpusSizes(teacher=60_000, references=0, prompts=0, valid=0, test=0), "no new prompts of kind"),
        (CorpusSizes(test=-1), "test needs at least 0 rows, got -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(DataError, match=message):
        generate_corpus(0, sizes)


def test_written_files_load_as_examples(corpus, tmp_path):
    write_corpus(tmp_path / "new" / "corpus", corpus)
    for key, rows in corpus.items():
        loaded = load_examples(str(tmp_path / "new" / "corpus" / f"{key}.jsonl")).examples
        assert [(e.instruction, e.input) for e in loaded] == [(row["instruction"], row["input"]) for row in rows]
        assert [e.references for e in loaded] == [(row["output"],) if row["output"] else () for row in rows]


def test_tokenizer_is_fast_with_its_special_tokens(tokenizer):
    assert tokenizer.is_fast and len(tokenizer) <= VOCAB_SIZE
    specials = tokenizer.convert_ids_to_tokens([0, 1, 2, 3])
    assert specials == ["<pad>", "<unk>", "<s>", "</s>"]
    named = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token]
    assert named == specials
    assert tokenizer("Turn")["input_ids"][0] == tokenizer.bos_token_id


AWKWARD = [
    "",
    " ",
    " The",
    "The ",
    "  two  spaces ",
    "\n\nx\n",
    "tab\there",
    "été 日本 🙂",
    "a.b,c",
    "e\u0301\u00a0x",
    "\r\n",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_corpus_round_trip_offsets_and_joined_prompt_and_response(tokenizer, corpus):
    for row in corpus["test"] + corpus["train"]:
        prompt, response = f"{row['instruction']}\n{row['input']}\n", row["output"]
        encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        pieces = [response[start:end] for start, end in encoded["offset_mapping"]]
        assert "".join(pieces) == response
        assert pieces == [tokenizer.decode([id_]) for id_ in encoded["input_ids"]]
        both = tokenizer(prompt)["input_ids"] + encoded["input_ids"]
        assert tokenizer.decode(both, skip_special_tokens=True) == prompt + response


def test_ids_equal_those_of_sentencepiece(tokenizer, folder, corpus):
    sentencepiece = pytest.importorskip("sentencepiece")
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    unseen = ["Xylophones quickly vexed the zebra.", "  two  spaces ", "été 日本", "aaaaaaa bakersbakers 12345"]
    for text in [*texts_of(corpus), *unseen]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)


def test_project_loader_and_tokenisation_accept_it(folder, corpus, tmp_path):
    write_corpus(tmp_path, corpus)
    tokenizer = load_tokenizer(str(folder))
    examples = load_examples(str(tmp_path / "train.jsonl")).examples
    done = tokenize_examples(
        examples, tokenizer, PromptSettings("plain", max_prompt_tokens=64, max_tokens=96, long_prompt="error")
    )
    assert len(done.rows) == len(examples) and done.num_truncated_responses == 0
    for example, row in zip(examples, done.rows, strict=True):
        assert row.response_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(row.prompt_ids + row.response_ids, skip_special_tokens=True)
        assert text == render_prompt(example, "plain") + example.references[0]


@pytest.mark.parametrize(("texts", "vocab_size", "message"), [([], 640, "no text"), (["abc"], 200, "too small")])
def test_hopeless_tokenizer_training_is_refused(texts, vocab_size, message, tmp_path):
    with pytest.raises(DataError, match=message):
        train_tokenizer(texts, tmp_path, vocab_size=vocab_size)


def test_smallest_vocabulary_and_too_little_text_still_work(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(["ab ba"], tmp_path / "little", vocab_size=5000)
    little = AutoTokenizer.from_pretrained(tmp_path / "little")
    assert little.decode(little("ab ba xyz", add_special_tokens=False)["input_ids"]) == "ab ba xyz"
    with pytest.raises(DataError) as refusal:
        train_tokenizer(["ab ba"], tmp_path / "least", vocab_size=1)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    train_tokenizer(["ab ba"], tmp_path / "least", vocab_size=least)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "least")) <= least


_MAKE = """
import sys
from megadistill.data.synthetic import CorpusSizes, generate_corpus, write_corpus
from megadistill.demo.tokenizer import train_tokenizer
corpus = generate_corpus(5, CorpusSizes(teacher=200, references=16, prompts=64, valid=8, test=8))
write_corpus(sys.argv[1], corpus)
train_tokenizer((row["output"] for row in corpus["teacher_train"]), sys.argv[1], vocab_size=500)
"""


def test_another_process_writes_the_same_bytes(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", _MAKE, str(tmp_path / "there")], check=True, env=environment, cwd=root)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "here")])
    exec(_MAKE, {})
    there, here = ({f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())} for name in ("there", "here"))
    assert there == here
    assert {"train.jsonl", "tokenizer.json", "tokenizer.model"} <= set(here)
    first = json.loads((tmp_path / "here" / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {"instruction", "input", "output"}
