"""Tokenizers: loading and comparing them, and text to ids and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.data.hub import check_name, offline_if_unreachable, own_code, split_revision
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files of a folder with a tokenizer: one of the first is enough for a tokenizer; the others belong to them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_ANCHOR = "\n"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or a hub name. Where it has no padding token, EOS is used.

    Raises:
        ConfigError: There is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    text = os.fspath(path)
    check_name(text, "tokenizer", setting="model.tokenizer")
    is_local = Path(text).exists()
    is_offline = not is_local and offline_if_unreachable()
    try:
        name, revision = split_revision(text)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    # transformers raises errors of many libraries here; all mean that the tokenizer cannot be loaded.
    except Exception as error:
        reason = own_code(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hub = "the hub cannot be reached" if is_offline else f"the hub did not provide it: {reason}"
        problem = (
            f"{text} has no usable tokenizer: {reason}"
            if is_local
            else f"no such folder: {text}, and {hub}{did_you_mean_path(text)}"
        )
        raise ConfigError(f"tokenizer: {problem}", setting="model.tokenizer") from None
    if _differs_from_file(tokenizer, Path(text)):
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(text)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer: {text} has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(path: str) -> bool:
    """Whether a model may come with a tokenizer: hub names do, a local folder does if it has a tokenizer's files."""
    local = Path(path)
    return not local.exists() or (local.is_dir() and any((local / name).exists() for name in TOKENIZER_FILES))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of classes that a model needs for this tokenizer: its largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special and added tokens: those that are no pieces of text."""
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


def response_limit(prompt_length: int, *, max_new_tokens: int, max_tokens: int) -> int:
    """Longest response to a prompt, in tokens, where prompt and response together have at most ``max_tokens``."""
    return min(max_new_tokens, max_tokens - prompt_length)


def auto_tokenizer_differs(folder: str | Path) -> bool:
    """Whether AutoTokenizer tokenizes differently from what ``tokenizer.json`` in a local folder describes.

    For some model types (Qwen2) it takes the family's own class, which replaces parts of what the file describes: a
    model trained with another tokenizer would silently read other ids.
    """
    from transformers import AutoTokenizer

    return _differs_from_file(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), Path(folder))


def _differs_from_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    file = folder / "tokenizer.json"
    if not file.is_file() or not tokenizer.is_fast:
        return False
    written, loaded = json.loads(file.read_text(encoding="utf-8")), json.loads(tokenizer.backend_tokenizer.to_str())
    return any(written.get(part) != loaded.get(part) for part in ("normalizer", "pre_tokenizer", "decoder"))


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special ids that this tokenizer puts before a text: BOS for Llama and OPT, none for GPT-2 and Qwen."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens; "</s>" in a data file is text, never the control token."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return ids


def encode_pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """``encode_texts`` of a fast tokenizer, in a third of the time where texts are short words."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]] | None = None,
) -> list[list[int]]:
    """Ids of each text as the continuation of a line break, without special tokens and without EOS.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        encode: What does the same as ``encode_texts`` of this tokenizer.
    """
    if not texts:
        return []
    encode = encode or partial(encode_texts, tokenizer)
    anchor: list[int] = encode([_ANCHOR])[0]
    joined = encode([_ANCHOR + text for text in texts])
    continued = [ids[len(anchor) :] if ids[: len(anchor)] == anchor else None for ids in joined]
    # A text that starts with white space can merge with the line break; only then is it encoded alone.
    alone = iter(encode([text for text, ids in zip(texts, continued, strict=True) if ids is None]))
    return [next(alone) if ids is None else ids for ids in continued]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, special tokens included: what a model reads."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ids without special tokens (EOS)."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Iterable[Sequence[int]]) -> list[str]:
    """``decode_response`` of each; the inverse of ``encode_responses``."""
    return [decode_response(tokenizer, ids) for ids in responses]
