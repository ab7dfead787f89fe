"""Checksums of tokenizers and of tokenized rows: to notice that a path holds something else than before."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadistill.data.encode import TokenizedExample
from megadistill.data.row_file import digest_of
from megadistill.files import checksum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIGEST_BYTES = 8
_KIND = "row checksums"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of everything that a tokenizer does to text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return checksum([[type(tokenizer).__name__, tokenizer.special_tokens_map, rules]])


def rows_fingerprint(rows: Sequence[TokenizedExample]) -> str:
    """Number of rows and a checksum of what a run trains on: ids of prompts and references, and targets.

    Of prepared rows, it is that of the files: no row is read.
    """
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for digests in digest_of(rows):
        total.update(digests)
    return f"{len(rows)} rows, {_KIND} {total.hexdigest()}"


def is_fingerprint_of(before: str, rows: Sequence[TokenizedExample]) -> bool:
    """Whether rows have this fingerprint; it may be one of an earlier release, which read every row."""
    return before == (rows_fingerprint(rows) if f", {_KIND} " in before else _earlier_fingerprint(rows))


def _earlier_fingerprint(rows: Sequence[TokenizedExample]) -> str:
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for row in rows:
        spans = [position for span in row.targets for position in span]
        lengths = [len(row.prompt_ids), -1 if row.response_ids is None else len(row.response_ids), len(spans)]
        total.update(array("q", [*lengths, *row.prompt_ids, *(row.response_ids or ()), *spans]).tobytes())
    return f"{len(rows)} rows, checksum {total.hexdigest()}"
