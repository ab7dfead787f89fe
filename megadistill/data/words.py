"""Texts to ids, word by word from a table, for tokenizers that are known to treat words one by one.

Between a character that is no white space and a single space before another such character, these tokenizers always
split: normalization does not reach across that place, no pre-token holds both sides, and no added token does. So the
ids of a text are those of its words, each with the space before it, one after the other. The tokenizer itself says what
the ids of a word are, once. Whatever is not known to be so goes to the tokenizer as a whole.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megadistill.data.tokenize import encode_pieces, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# No alternative of these patterns has white space behind another character, but line breaks behind punctuation; and
# none looks ahead but in runs of white space, which end at the word that follows.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{0}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{0}"
)
_CASES_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = frozenset(
    {
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen 2 and 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # Llama 3
        _CASES.format("") + r"|\p{N}" + _CASES_REST,  # Mistral
        _CASES.format(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASES_REST,  # o200k
    }
)
_NORMALIZERS = (None, {"type": "NFC"})
_BREAK = re.compile(r"(?<=\S) (?=\S)")
_LONGEST_WORD = 40  # characters; longer ones do not come again
_MOST_WORDS = 1 << 18
_PROBES = (
    "",
    " ",
    "a b",
    "Don't  stop,\n\n it's 12345 km! ",
    "naïve 你好 🙂\u00a0x \u0301y\tz\r\n q",
    "</s> <|end|> a",
)


def splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer is known to treat the words of a text one by one."""
    if not tokenizer.is_fast:
        return False
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return (
        rules["normalizer"] in _NORMALIZERS
        and _is_known(rules["pre_tokenizer"])
        and not rules["model"].get("dropout")
        and all(map(_is_within_words, rules["added_tokens"]))
    )


def _is_known(pre_tokenizer: Any) -> bool:
    """Whether it splits by one of the known patterns."""
    match pre_tokenizer:
        case {"type": "ByteLevel"}:
            return _is_byte_level(pre_tokenizer, with_pattern=True)
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, last]}:
            return _is_byte_level(last, with_pattern=True)
        case {"type": "Sequence", "pretokenizers": [first, last]}:
            wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
            is_known = {**first, "pattern": None} == {**wanted, "pattern": None}
            return is_known and first["pattern"].get("Regex") in PATTERNS and _is_byte_level(last, with_pattern=False)
    return False


def _is_byte_level(part: Any, *, with_pattern: bool) -> bool:
    return part["type"] == "ByteLevel" and part["use_regex"] is with_pattern and not part["add_prefix_space"]


def _is_within_words(added: dict[str, Any]) -> bool:
    """Whether an added token is found in a word as it is in a text; special ones are not looked for."""
    reaches_out = added["lstrip"] or added["rstrip"] or added["single_word"]
    return not any(map(str.isspace, added["content"])) and (added["special"] or not reaches_out)


class WordTable:
    """Encodes texts as ``encode_texts`` does.

    Args:
        tokenizer: One from ``load_tokenizer``.

    Attributes:
        is_used: Whether words are looked up; otherwise the tokenizer encodes each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Ids of words, as bytes of an array, by what is around them in a text: a space behind, on both sides, before.
        self._first: dict[str, bytes] = {}
        self._inner: dict[str, bytes] = {}
        self._last: dict[str, bytes] = {}
        self.is_used = splits_at_spaces(tokenizer)
        added = [f"a{token}b {token} c" for token in map(str, tokenizer.added_tokens_decoder.values())]
        probes = [*_PROBES, *added]
        self.is_used = self.is_used and self.encode(probes) == encode_texts(tokenizer, probes)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens."""
        if not self.is_used:
            return encode_texts(self._tokenizer, texts)
        known = [self._look_up(text) for text in texts]
        missing = [at for at, ids in enumerate(known) if ids is None]
        for at, ids in zip(missing, self._learn([texts[at] for at in missing]), strict=True):
            known[at] = ids
        return [array("i", ids).tolist() for ids in known if ids is not None]

    def _look_up(self, text: str) -> bytes | None:
        """The ids, where the table has all words: it has no inner one that begins or ends in white space."""
        first, *words = text.split(" ")
        try:
            last = words.pop()
            return b"".join([self._first[first], *map(self._inner.__getitem__, words), self._last[last]])
        except (KeyError, IndexError):
            return None

    def _learn(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of texts with other words, which come into the table."""
        tables = (self._first, self._inner, self._last)
        if sum(map(len, tables)) > _MOST_WORDS:
            for table in tables:
                table.clear()
        split = [_BREAK.split(text) for text in texts]
        keys = [_keys(words) for words in split]
        new = list({key for row in keys for key in row if key[0] is None or key[1] not in tables[key[0]]})
        encoded = encode_pieces(self._tokenizer, [word if at in (None, 0) else " " + word for at, word in new])
        found = {key: array("i", ids).tobytes() for key, ids in zip(new, encoded, strict=True)}
        results = [b"".join([found[k] if k in found else tables[k[0] or 0][k[1]] for k in row]) for row in keys]
        for (at, word), ids in found.items():
            if at is not None and len(word) <= _LONGEST_WORD:
                tables[at][word] = ids
        return results


def _keys(words: list[str]) -> list[tuple[int | None, str]]:
    """Number of the table and word; None for a text of one word, which is not kept."""
    if len(words) == 1:
        return [(None, words[0])]
    return [(0, words[0]), *((1, word) for word in words[1:-1]), (2, words[-1])]
