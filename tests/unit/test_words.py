"""Words from a table have the ids that the tokenizer gives them in any text."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megadistill.data import words
from megadistill.data.tokenize import encode_texts, load_tokenizer
from tests.support.tokenizers import TEXTS, byte_level, sentence_piece, word_piece

# Pieces that texts are made of: every sort of character that a pattern or a normalizer treats in its own way.
PIECES = [
    *[" "] * 5, "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\x1c", "\x85", "\u200b", "\ufeff",
    "dog", "the", "Straße", "naïve", "e\u0301", "\u0301", "A\u030a", "\ufb01", "가", "\u1100\u1161", "你好", "мир",
    "Ǆ", "ʰ", "🙂", "👩\u200d💻", "'s", "'LL", "don't", "1", "12345", "²", "٣", ".", "...", "?!", "/", "\\", "_", "#",
    "</s>", "<|end|>", "<think>", "<tool", ">", "\x00", "\ufffd", "x" * 60,
]  # fmt: skip


def with_pattern(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
KNOWN = {"gpt2": BYTES, "digits": DIGITS} | {
    f"pattern {at}": with_pattern(p) for at, p in enumerate(sorted(words.PATTERNS))
}


def made(folder: Path, pre_tokenizer: Any, *added: Any, nfc: bool = False, dropout: float | None = None) -> Any:
    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.train_from_iterator([*TEXTS, "  the   dog\n\n  ?!\n12345"], trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    tokenizer.add_tokens(list(added))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return load_tokenizer(folder)


def texts(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    return ["", " ", "  ", "\n", *("".join(rng.choices(PIECES, k=rng.randrange(1, 25))) for _ in range(number))]


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_ids_are_those_of_the_tokenizer(tmp_path: Path, name: str, nfc: bool) -> None:
    thinking = AddedToken("<think>", special=False, normalized=nfc)
    tokenizer = made(
        tmp_path, KNOWN[name], thinking, AddedToken("</s>", special=True, lstrip=True, rstrip=True), nfc=nfc
    )
    table = words.WordTable(tokenizer)
    assert table.is_used
    for seed in range(6):  # later texts have words of earlier ones in other places
        some = texts(seed, 400)
        assert table.encode(some) == encode_texts(tokenizer, some)
    assert table.encode([]) == []


def test_a_full_table_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 20)
    tokenizer = byte_level(tmp_path)
    table = words.WordTable(tokenizer)
    for seed in range(4):
        some = texts(seed, 50)
        assert table.encode(some) == encode_texts(tokenizer, some)


@pytest.mark.parametrize("name", KNOWN)
def test_every_character_is_apart_from_the_word_after_a_space(name: str) -> None:
    """What no white space to Python is none to the pattern: a place between it and a space is a place to split."""
    characters = [c for c in map(chr, range(sys.maxunicode + 1)) if not c.isspace() and not "\ud800" <= c <= "\udfff"]
    characters = characters[:: 1 if name == "gpt2" else 7]
    splitter = KNOWN[name]
    for start in range(0, len(characters), 1000):
        block = characters[start : start + 1000]
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(" ".join(f"{c} {c}" for c in block))]
        assert not [p for p in pieces if "Ġ" in p[1:]]  # a space is the first character of what it is in


OTHERS = {
    "sentence piece": sentence_piece,
    "word piece": word_piece,
    "another pattern": lambda folder: made(folder, with_pattern(r"\w+ |.")),
    "a first space": lambda folder: made(folder, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a token with a space": lambda folder: made(folder, BYTES, AddedToken("the dog", special=False)),
    "a token that takes spaces": lambda folder: made(folder, BYTES, AddedToken("<t>", special=False, lstrip=True)),
    "dropout": lambda folder: made(folder, BYTES, dropout=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_encode_for_themselves(tmp_path: Path, name: str) -> None:
    tokenizer = OTHERS[name](tmp_path)
    table = words.WordTable(tokenizer)
    assert not table.is_used
    if name != "dropout":
        some = texts(0, 30)
        assert table.encode(some) == encode_texts(tokenizer, some)
