"""Text to token ids, in one way for training and evaluation.

A prompt is the tokenizer's own leading special tokens (often BOS, often none) followed by the ids of the rendered text.
A response is the ids of its text *as it continues a line break*, followed by EOS: every template ends in a line break,
so prompt ids + response ids are the ids of the joined text wherever the tokenizer allows a cut there, and a
SentencePiece tokenizer puts no artificial space before the response.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.data.dataset import Example
from megadistill.data.hub import is_hub_name, offline_if_unreachable
from megadistill.data.prompts import render_prompt
from megadistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_PROMPT_POLICIES = ("drop", "truncate", "error")
_ANCHOR = "\n"
_BATCH_ROWS = 512


@dataclass(frozen=True)
class TokenizedExample:
    """`response_ids` is the first reference followed by EOS (cut at the limit, then without EOS), or None for a row
    without references.
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
    """A tokenizer from a local folder or a hub name, with EOS, and with padding (EOS where it has no padding token of
    its own).

    Raises:
        ConfigError: it cannot be had, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    text = os.fspath(path)
    is_folder = Path(text).is_dir()
    if not is_folder and not is_hub_name(text):
        raise ConfigError(f"tokenizer {text!r}: no such folder{_near_folders(Path(text))}")
    is_offline = not is_folder and offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(text)
    # transformers raises errors of many libraries here; all mean that the tokenizer cannot be had.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if is_folder:
            raise ConfigError(f"tokenizer {text!r}: the folder holds no usable tokenizer: {reason}") from None
        hub = "the hub cannot be reached" if is_offline else f"the hub did not provide it: {reason}"
        raise ConfigError(f"tokenizer {text!r}: no such folder, and {hub}{_near_folders(Path(text))}") from None
    if _differs_from_file(tokenizer, Path(text)):
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(text)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {text!r} has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of classes a model needs for this tokenizer: its largest id and one (ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizes_otherwise(folder: str | Path) -> bool:
    """Whether AutoTokenizer cuts text otherwise than ``tokenizer.json`` in a local folder says.

    For some model types (Qwen2) it takes the family's own class, which replaces parts of what the file describes: a
    model trained with another tokenizer would silently read other ids.
    """
    from transformers import AutoTokenizer

    return _differs_from_file(AutoTokenizer.from_pretrained(folder), Path(folder))


def _differs_from_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    file = folder / "tokenizer.json"
    if not file.is_file() or not tokenizer.is_fast:
        return False
    written, loaded = json.loads(file.read_text()), json.loads(tokenizer.backend_tokenizer.to_str())
    return any(written.get(part) != loaded.get(part) for part in ("normalizer", "pre_tokenizer", "decoder"))


def _near_folders(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; nearest folder: {path.parent / near[0]}" if near else ""


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special ids that this tokenizer puts before a text by default: BOS for Llama and OPT, none for GPT-2 and
    Qwen.
    """
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without any special token; "</s>" written in a data file is text, never the control token."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text as the continuation of a line break, without special tokens and without EOS."""
    if not texts:
        return []
    anchor: list[int] = encode_texts(tokenizer, [_ANCHOR])[0]
    joined = encode_texts(tokenizer, [_ANCHOR + text for text in texts])
    cut = [ids[len(anchor) :] if ids[: len(anchor)] == anchor else None for ids in joined]
    # A text that starts with white space can merge with the line break; only then its own ids are taken.
    alone = iter(encode_texts(tokenizer, [text for text, ids in zip(texts, cut, strict=True) if ids is None]))
    return [next(alone) if ids is None else ids for ids in cut]


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Iterable[Sequence[int]]) -> list[str]:
    """Texts of generated ids, special tokens (EOS) left out. The inverse of `encode_responses`."""
    return [
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in responses
    ]


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "alpaca",
    max_prompt_tokens: int = 256,
    max_tokens: int = 512,
    long_prompt: str = "drop",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Tokenized:
    """Render and tokenise rows.

    A prompt over `max_prompt_tokens` (its special tokens counted) is dropped, an error, or truncated: the leading
    special tokens stay and the text loses its beginning, so that the end of the template, which asks for the response,
    survives. A response is cut so that prompt and response together have at most `max_tokens`; a cut response has no
    EOS.

    Raises:
        ConfigError: unknown policy or template, or no room for a response.
        DataError: a prompt is over the limit under `error` (names the row), or no row is left.
    """
    if long_prompt not in LONG_PROMPT_POLICIES:
        raise ConfigError(f"data.long_prompt={long_prompt!r} is unknown; allowed: {', '.join(LONG_PROMPT_POLICIES)}")
    if not 0 < max_prompt_tokens < max_tokens:
        raise ConfigError(
            f"data.max_tokens={max_tokens} must be larger than data.max_prompt_tokens={max_prompt_tokens} > 0"
        )
    prefix = leading_special_ids(tokenizer)
    if len(prefix) >= max_prompt_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens={max_prompt_tokens} leaves no room after {len(prefix)} special token(s)"
        )
    rows: list[TokenizedExample] = []
    num_dropped = num_truncated = num_truncated_responses = 0
    starts: Iterable[int] = range(0, len(examples), _BATCH_ROWS)
    for start in progress(starts) if progress else starts:
        batch = examples[start : start + _BATCH_ROWS]
        prompts = [render_prompt(example, template) for example in batch]
        bodies = encode_texts(tokenizer, prompts)
        responses = iter(encode_responses(tokenizer, [row.references[0] for row in batch if row.references]))
        for example, prompt, body in zip(batch, prompts, bodies, strict=True):
            response = next(responses) + [tokenizer.eos_token_id] if example.references else None
            room = max_prompt_tokens - len(prefix)
            if len(body) > room:
                if long_prompt == "error":
                    raise DataError(_over_limit(example, len(prefix) + len(body), max_prompt_tokens))
                if long_prompt == "drop":
                    num_dropped += 1
                    continue
                num_truncated += 1
                body = body[-room:]
            prompt_ids = prefix + tuple(body)
            if response is not None and len(prompt_ids) + len(response) > max_tokens:
                num_truncated_responses += 1
                response = response[: max_tokens - len(prompt_ids)]
            response_ids = None if response is None else tuple(response)
            rows.append(TokenizedExample(example.id, prompt_ids, response_ids, example.references, prompt))
    if examples and not rows:
        raise DataError(
            f"all {len(examples)} prompts are over data.max_prompt_tokens={max_prompt_tokens}: no row is left"
        )
    num_without_reference = sum(row.response_ids is None for row in rows)
    return Tokenized(rows, num_dropped, num_truncated, num_without_reference, num_truncated_responses)


def _over_limit(example: Example, num_tokens: int, limit: int) -> str:
    where = example.where or f"row {example.id}"
    start = " ".join(example.instruction.split())[:40]
    return (
        f"{where} ({start!r}...): the prompt has {num_tokens} tokens, over data.max_prompt_tokens={limit} "
        f"(data.long_prompt: {' | '.join(LONG_PROMPT_POLICIES)})"
    )


def assert_same_vocabulary(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("teacher", "student"),
) -> None:
    """Refuse two tokenizers that do not give every token the same id, or that cut text differently.

    The padding token is not compared: padding is masked everywhere, and models of one family often differ in it.

    Raises:
        ConfigError: names the first differing id, special token or text.
    """
    name_a, name_b = names
    ids_a, ids_b = ({id_: token for token, id_ in t.get_vocab().items()} for t in (tokenizer_a, tokenizer_b))
    for id_ in sorted(ids_a.keys() | ids_b.keys()):
        token_a, token_b = ids_a.get(id_), ids_b.get(id_)
        if token_a != token_b:
            raise ConfigError(
                f"{name_a} and {name_b} have different vocabularies ({len(ids_a)} and {len(ids_b)} tokens): id {id_} "
                f"is {_quoted(token_a)} for the {name_a} and {_quoted(token_b)} for the {name_b}; "
                "token-level distillation needs one tokenizer"
            )
    for special in ("bos_token", "eos_token", "unk_token"):
        token_a, token_b = getattr(tokenizer_a, special), getattr(tokenizer_b, special)
        if token_a != token_b:
            raise ConfigError(
                f"{special} is {_quoted(token_a)} for the {name_a} and {_quoted(token_b)} for the {name_b}"
            )
    probe = "The 3 quick foxes didn't jump;\n  naïve Größe — 你好, мир 🙂 for(i=0;i<10;++i){}"
    if tokenizer_a(probe)["input_ids"] != tokenizer_b(probe)["input_ids"]:
        raise ConfigError(
            f"{name_a} and {name_b} have the same tokens but cut the same text differently: use one tokenizer for both"
        )


def _quoted(token: str | None) -> str:
    return "absent" if token is None else repr(token)
