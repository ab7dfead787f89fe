"""Where each token of a response starts in the decoded text; also for sampled ids and for parts of characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


def token_char_starts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """The text of ``ids`` without special tokens, and for each token the index of the character at which it starts.

    Leading white space of a piece is skipped (" dog" starts at "d") unless the piece is all white space. A piece that
    starts within a character starts at that character; a broken byte is one U+FFFD. Special tokens and pieces without
    text have no position: None.
    """
    pieces = _piece_table(tokenizer)
    if pieces is None:
        return _incremental(tokenizer, ids)
    parts = [pieces(id_) for id_ in ids]
    joined = b"".join(parts)
    byte_starts = list(accumulate(map(len, parts), initial=0))
    if joined.isascii():
        text = joined.decode("ascii")
        return text, _skip_space(text, [(a, b) for a, b in zip(byte_starts, byte_starts[1:], strict=False)])
    escaped = joined.decode("utf-8", errors="surrogateescape")
    char_of_byte: list[int] = []
    for index, char in enumerate(escaped):
        char_of_byte.extend([index] * (1 if "\udc80" <= char <= "\udcff" else len(char.encode("utf-8"))))
    char_of_byte.append(len(escaped))
    text = "".join(REPLACEMENT if "\udc80" <= char <= "\udcff" else char for char in escaped)
    bounds = []
    for a, b in zip(byte_starts, byte_starts[1:], strict=False):
        bounds.append((char_of_byte[a], char_of_byte[b - 1] + 1) if b > a else (0, 0))
    return text, _skip_space(text, bounds)


def _skip_space(text: str, bounds: Iterable[tuple[int, int]]) -> list[int | None]:
    starts: list[int | None] = []
    for start, end in bounds:
        if start == end:
            starts.append(None)
            continue
        inner = end - len(text[start:end].lstrip())
        starts.append(inner if inner < end else start)
    return starts


@lru_cache(maxsize=4)
def _piece_table(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes] | None:
    """The function id -> bytes that the token adds to the text; None for decoders whose pieces depend on neighbors."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    kinds = _decoder_kinds(json.loads(backend.to_str()).get("decoder"))
    tokens = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(id_ for id_, token in tokens.items() if token.special)}
    added = {id_: token.content for id_, token in tokens.items()}
    if kinds == {"ByteLevel"}:
        to_byte = _byte_level_alphabet()
    elif kinds and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        to_byte = None
    else:
        return None

    @cache
    def piece(id_: int) -> bytes:
        if id_ in special:
            return b""
        if id_ in added:
            return added[id_].encode("utf-8")
        token = str(tokenizer.convert_ids_to_tokens(id_) or "")
        if to_byte is not None:
            return b"".join(to_byte[char] if char in to_byte else char.encode("utf-8") for char in token)
        if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    return piece


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoder_kinds(part)}
    return {decoder["type"]}


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's table: printable bytes stand for themselves, the 68 others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + rank): bytes([byte]) for rank, byte in enumerate(others)}


def _incremental(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """Decodes every prefix: right for every decoder, quadratic in the length."""

    def decode(prefix: Sequence[int]) -> str:
        return str(tokenizer.decode(list(prefix), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    special = set(tokenizer.all_special_ids)
    text = decode(ids)
    bounds: list[tuple[int, int]] = []
    end = 0
    for index, id_ in enumerate(ids):
        start = end
        # A prefix that ends inside a character shows U+FFFD there, which the next piece completes.
        end = max(start, min(len(decode(ids[: index + 1]).rstrip(REPLACEMENT)), len(text)))
        shown = end if end > start else min(start + 1, len(text))
        bounds.append((0, 0) if id_ in special else (start, shown))
    return text, _skip_space(text, bounds)
