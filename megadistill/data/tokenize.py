"""Text to token ids, the same way for training and evaluation.

A prompt is the tokenizer's leading special tokens (BOS, or none) followed by the ids of the rendered text. A response
is the ids of its text *as the continuation of a line break*, and EOS. Every template ends in a line break, so prompt
ids + response ids are the ids of the joined text wherever the tokenizer allows a boundary there, and a SentencePiece
tokenizer puts no artificial space before the response.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.data.dataset import Example
from megadistill.data.hub import check_name, offline_if_unreachable
from megadistill.data.prompts import render_prompt
from megadistill.errors import ConfigError, DataError
from megadistill.files import did_you_mean_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_PROMPT_POLICIES = ("drop", "truncate", "error")
# Files of a folder with a tokenizer: one of the first is enough for a tokenizer; the others belong to them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_MAX_PROMPT, _MAX_TOKENS = "data.max_prompt_tokens", "data.max_tokens"
_ANCHOR = "\n"
_BATCH_ROWS = 512


@dataclass(frozen=True)
class TokenizedExample:
    """One row as token ids.

    Attributes:
        id: Number of the row.
        prompt_ids: Tokens of the prompt, special tokens included.
        response_ids: The first reference followed by EOS, or its beginning without EOS where it was truncated; None for
            a row without references.
        references: Texts of all references.
        prompt: Text of the prompt.
    """

    id: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    references: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class Tokenized:
    """Rows in the order of the examples, and what happened to them."""

    rows: list[TokenizedExample]
    num_dropped: int
    num_truncated: int
    num_without_reference: int
    num_truncated_responses: int


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
        tokenizer = AutoTokenizer.from_pretrained(text)
    # transformers raises errors of many libraries here; all mean that the tokenizer cannot be loaded.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
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


def response_limit(prompt_length: int, *, max_new_tokens: int, max_tokens: int) -> int:
    """Longest response to a prompt, in tokens, where prompt and response together have at most ``max_tokens``."""
    return min(max_new_tokens, max_tokens - prompt_length)


def auto_tokenizer_differs(folder: str | Path) -> bool:
    """Whether AutoTokenizer tokenizes differently from what ``tokenizer.json`` in a local folder describes.

    For some model types (Qwen2) it takes the family's own class, which replaces parts of what the file describes: a
    model trained with another tokenizer would silently read other ids.
    """
    from transformers import AutoTokenizer

    return _differs_from_file(AutoTokenizer.from_pretrained(folder), Path(folder))


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


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text as the continuation of a line break, without special tokens and without EOS."""
    if not texts:
        return []
    anchor: list[int] = encode_texts(tokenizer, [_ANCHOR])[0]
    joined = encode_texts(tokenizer, [_ANCHOR + text for text in texts])
    continued = [ids[len(anchor) :] if ids[: len(anchor)] == anchor else None for ids in joined]
    # A text that starts with white space can merge with the line break; only then is it encoded alone.
    alone = iter(encode_texts(tokenizer, [text for text, ids in zip(texts, continued, strict=True) if ids is None]))
    return [next(alone) if ids is None else ids for ids in continued]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ids without special tokens (EOS)."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Iterable[Sequence[int]]) -> list[str]:
    """``decode_response`` of each; the inverse of ``encode_responses``."""
    return [decode_response(tokenizer, ids) for ids in responses]


def check_limits(max_prompt_tokens: int, max_tokens: int) -> None:
    """Raises ConfigError where prompts within ``max_prompt_tokens`` leave no token of ``max_tokens`` for a response."""
    if not 0 < max_prompt_tokens < max_tokens:
        raise ConfigError(
            f"prompts of up to {max_prompt_tokens} tokens leave no token for a response: prompt and response are "
            f"limited to {max_tokens} tokens",
            setting=f"{_MAX_PROMPT}, {_MAX_TOKENS}",
        )


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "alpaca",
    max_prompt_tokens: int = 256,
    max_tokens: int = 512,
    long_prompt: str = "drop",
) -> Tokenized:
    """Renders and tokenizes rows.

    Args:
        examples: The rows.
        tokenizer: One from ``load_tokenizer``.
        template: Name of a prompt template.
        max_prompt_tokens: Longest prompt, special tokens included.
        max_tokens: Longest prompt and response together. A longer response is truncated and has no EOS.
        long_prompt: What happens to longer prompts: "drop", "error", or "truncate", which keeps the special tokens
            and removes the beginning of the text, because the end of the template asks for the response.

    Raises:
        ConfigError: Unknown policy or template, or limits that leave no token for a response.
        DataError: A prompt is over the limit under "error", or no row is left.
    """
    prefix = leading_special_ids(tokenizer)
    _check_settings(long_prompt, max_prompt_tokens, max_tokens, len(prefix))
    max_body = max_prompt_tokens - len(prefix)
    rows: list[TokenizedExample] = []
    num_dropped = num_truncated = num_truncated_responses = 0
    for example, prompt, body, response in _encoded(examples, tokenizer, template):
        if len(body) > max_body:
            if long_prompt == "error":
                raise _over_limit(example, len(prefix) + len(body), max_prompt_tokens)
            if long_prompt == "drop":
                num_dropped += 1
                continue
            num_truncated += 1
            body = body[-max_body:]
        prompt_ids = prefix + tuple(body)
        if response is not None and len(prompt_ids) + len(response) > max_tokens:
            num_truncated_responses += 1
            response = response[: max_tokens - len(prompt_ids)]
        response_ids = None if response is None else tuple(response)
        rows.append(TokenizedExample(example.id, prompt_ids, response_ids, example.references, prompt))
    if examples and not rows:
        raise DataError(
            f"all {len(examples)} prompts are over the limit of {max_prompt_tokens} tokens: no row is left",
            setting=_MAX_PROMPT,
        )
    num_without_reference = sum(row.response_ids is None for row in rows)
    return Tokenized(rows, num_dropped, num_truncated, num_without_reference, num_truncated_responses)


def _check_settings(long_prompt: str, max_prompt_tokens: int, max_tokens: int, num_special: int) -> None:
    if long_prompt not in LONG_PROMPT_POLICIES:
        raise ConfigError(
            f"unknown policy {long_prompt!r} for long prompts; allowed: {', '.join(LONG_PROMPT_POLICIES)}",
            setting="data.long_prompt",
        )
    check_limits(max_prompt_tokens, max_tokens)
    if num_special >= max_prompt_tokens:
        raise ConfigError(
            f"a limit of {max_prompt_tokens} tokens leaves no token for a prompt after {num_special} special token(s)",
            setting=_MAX_PROMPT,
        )


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[Example, str, list[int], list[int] | None]]:
    """(example, prompt text, its ids without special tokens, ids of the first reference with EOS), batch by batch."""
    for start in range(0, len(examples), _BATCH_ROWS):
        batch = examples[start : start + _BATCH_ROWS]
        prompts = [render_prompt(example, template) for example in batch]
        bodies = encode_texts(tokenizer, prompts)
        responses = iter(encode_responses(tokenizer, [row.references[0] for row in batch if row.references]))
        for example, prompt, body in zip(batch, prompts, bodies, strict=True):
            yield example, prompt, body, next(responses) + [tokenizer.eos_token_id] if example.references else None


def _over_limit(example: Example, num_tokens: int, limit: int) -> DataError:
    where = example.where or f"row {example.id}"
    start = " ".join(example.instruction.split())[:40]
    return DataError(
        f"{where} ({start!r}...): the prompt has {num_tokens} tokens, over the limit of {limit}",
        setting=f"{_MAX_PROMPT}, data.long_prompt",
    )
