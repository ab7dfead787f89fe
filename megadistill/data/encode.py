"""Rows to token ids, the same way for training, generation, evaluation and teacher text.

With a text template, a prompt is the tokenizer's leading special tokens (BOS, or none) followed by the ids of the
rendered text. A response is the ids of its text *as the continuation of a line break*, and EOS. Every text template
ends in a line break, so prompt ids + response ids are the ids of the joined text wherever the tokenizer allows a
boundary there, and a SentencePiece tokenizer puts no artificial space before the response. For chats see
``data/chat_template.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megadistill.data.dataset import Example
from megadistill.data.prompts import (
    CHAT,
    LONG_PROMPT_POLICIES,
    EncodedRow,
    PromptSettings,
    Template,
    choose_template,
    read_chat_template,
    render_prompt,
)
from megadistill.data.readers import BadRow
from megadistill.data.tokenize import decode_text, encode_responses, leading_special_ids
from megadistill.data.words import WordTable
from megadistill.errors import ConfigError, DataError, settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_PROMPT, _MAX_TOKENS = "data.max_prompt_tokens", "data.max_tokens"
_BATCH_ROWS = 512


@dataclass(frozen=True)
class TokenizedExample:
    """One row as token ids.

    Attributes:
        id: Number of the row.
        prompt_ids: Tokens of the prompt, special tokens included.
        response_ids: The first reference and the token that ends it, or its beginning without that token where it was
            truncated; None for a row without references.
        references: Texts of all references.
        prompt: Text of the prompt as the model reads it: without what was truncated.
        targets: Spans [start, end) of ``prompt_ids`` that are earlier turns of the assistant to train on
            (``data.train_on=all``).
        where: FILE:LINE, for messages.
    """

    id: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    references: tuple[str, ...]
    prompt: str
    targets: tuple[tuple[int, int], ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Tokenized:
    """Rows in the order of the examples, and what happened to them.

    Attributes:
        rows: The rows that are left.
        num_dropped: Rows left out, because their prompts are too long.
        num_truncated: Prompts that lost their beginning, or with "truncate_end" their end.
        num_without_reference: Rows with a prompt only.
        num_truncated_responses: References that lost their end.
        skipped: What is wrong with each row that the template cannot hold.
        template: The template that was used: "alpaca", "plain" or "chat".
        end_id: The token that ends a reference.
    """

    rows: list[TokenizedExample]
    num_dropped: int
    num_truncated: int
    num_without_reference: int
    num_truncated_responses: int
    skipped: list[str]
    template: str
    end_id: int


def check_limits(max_prompt_tokens: int, max_tokens: int) -> None:
    """Raises ConfigError where prompts within ``max_prompt_tokens`` leave no token of ``max_tokens`` for a response."""
    if not 0 < max_prompt_tokens < max_tokens:
        raise ConfigError(
            f"prompts of up to {max_prompt_tokens} tokens leave no token for a response: prompt and response are "
            f"limited to {max_tokens} tokens",
            setting=f"{_MAX_PROMPT}, {_MAX_TOKENS}",
        )


class TextTemplate:
    """Implements ``data.prompts.Template`` with a template for one instruction.

    Args:
        tokenizer: One from ``load_tokenizer``.
        name: A key of ``TEXT_TEMPLATES``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name, self.end_id = name, int(tokenizer.eos_token_id)
        self._tokenizer, self._prefix = tokenizer, leading_special_ids(tokenizer)
        self._words = WordTable(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | BadRow]:
        """The ids of each example, or what is wrong with it."""
        prompts = [self._render(example) for example in examples]
        fine = [prompt for prompt in prompts if not isinstance(prompt, BadRow)]
        bodies = iter(self._words.encode(fine))
        answered = [e.references[0] for e, p in zip(examples, prompts, strict=True) if _is_answered(e, p)]
        responses = iter(encode_responses(self._tokenizer, answered, self._words.encode))
        rows: list[EncodedRow | BadRow] = []
        for example, prompt in zip(examples, prompts, strict=True):
            if isinstance(prompt, BadRow):
                rows.append(prompt)
                continue
            response = (*next(responses), self.end_id) if example.references else None
            rows.append(EncodedRow(prompt, (*self._prefix, *next(bodies)), response))
        return rows

    def shortened(self, example: Example, encoded: EncodedRow, limit: int) -> EncodedRow | None:
        """The prompt without the beginning of its text, because the end of the template asks for the response."""
        body = encoded.prompt_ids[len(self._prefix) :][-(limit - len(self._prefix)) :]
        return replace(encoded, prompt=decode_text(self._tokenizer, body), prompt_ids=(*self._prefix, *body))

    def _render(self, example: Example) -> str | BadRow:
        try:
            return render_prompt(example, self.name)
        except BadRow as error:
            return error


def _is_answered(example: Example, prompt: str | BadRow) -> bool:
    return bool(example.references) and not isinstance(prompt, BadRow)


def open_template(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, are_chats: bool) -> Template:
    """The template that the settings mean for these rows.

    Args:
        settings: The settings.
        tokenizer: One from ``load_tokenizer``.
        are_chats: Whether rows are chats, which decides ``auto``.

    Raises:
        ConfigError: There is no such template, or it cannot be used with this tokenizer.
    """
    name = choose_template(settings, tokenizer, are_chats)
    if name != CHAT:
        return TextTemplate(tokenizer, name)
    from megadistill.data.chat_template import ChatTemplate

    text = read_chat_template(settings.chat_template)
    return ChatTemplate(tokenizer, text, settings.chat_template_kwargs, settings.train_on)


class RowTokenizer:
    """Renders and tokenizes rows, batch by batch, and counts what happens to them.

    Args:
        tokenizer: One from ``load_tokenizer``.
        settings: Template and limits.
        template: What ``settings.template`` means for the rows (``open_template``).

    Attributes:
        counts: Rows that were "dropped", prompts that were "truncated", responses that were "cut".
        skipped: What is wrong with each row that the template cannot hold.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, template: Template) -> None:
        self._tokenizer, self._settings, self._template = tokenizer, settings, template
        self.counts = {"dropped": 0, "truncated": 0, "cut": 0}
        self.skipped: list[str] = []

    def rows(self, examples: Sequence[Example]) -> Iterator[TokenizedExample]:
        """The rows that are left of these examples.

        Raises:
            DataError: A prompt is over the limit under "error", or the template cannot hold a row.
        """
        for start in range(0, len(examples), _BATCH_ROWS):
            batch = examples[start : start + _BATCH_ROWS]
            for example, encoded in zip(batch, self._template.encode(batch), strict=True):
                if isinstance(encoded, BadRow):
                    self.skipped.append(refused(example, encoded, self._settings.skip_bad_rows))
                    continue
                row = _within_limits(example, encoded, self._template, self._settings, self.counts, self._tokenizer)
                if row is not None:
                    yield row


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings | None = None,
) -> Tokenized:
    """Renders and tokenizes rows.

    Args:
        examples: The rows.
        tokenizer: One from ``load_tokenizer``.
        settings: Template and limits.

    Raises:
        ConfigError: Unknown policy or template, or limits that leave no token for a response.
        DataError: A prompt is over the limit under "error", the template cannot hold a row, or no row is left.
    """
    settings = settings or PromptSettings()
    check_settings(settings, tokenizer)
    template = open_template(settings, tokenizer, any(example.chat is not None for example in examples))
    work = RowTokenizer(tokenizer, settings, template)
    rows = list(work.rows(examples))
    if examples and not rows:
        raise nothing_left(work.skipped[0] if work.skipped else "", len(work.skipped), len(examples), settings)
    return Tokenized(
        rows,
        num_dropped=work.counts["dropped"],
        num_truncated=work.counts["truncated"],
        num_without_reference=sum(row.response_ids is None for row in rows),
        num_truncated_responses=work.counts["cut"],
        skipped=work.skipped,
        template=template.name,
        end_id=template.end_id,
    )


def _first_tokens(encoded: EncodedRow, limit: int, tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    """The prompt up to a limit, as MiniLLM cuts it: what asks for the answer, at its end, is lost."""
    ids = encoded.prompt_ids[:limit]
    special = leading_special_ids(tokenizer)
    text = decode_text(tokenizer, ids[len(special) :] if ids[: len(special)] == special else ids)
    targets = tuple((start, min(end, limit)) for start, end in encoded.targets if start < limit)
    return replace(encoded, prompt=text, prompt_ids=ids, targets=targets)


def _within_limits(
    example: Example,
    encoded: EncodedRow,
    template: Template,
    settings: PromptSettings,
    counts: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedExample | None:
    """The row with the limits applied, which ``counts`` records; None for a row that is dropped."""
    limit = settings.max_prompt_tokens
    if len(encoded.prompt_ids) > limit:
        if settings.long_prompt == "error":
            raise _over_limit(example, len(encoded.prompt_ids), limit)
        short = None
        if settings.long_prompt == "truncate":
            short = template.shortened(example, encoded, limit)
        elif settings.long_prompt == "truncate_end":
            short = _first_tokens(encoded, limit, tokenizer)
        counts["dropped" if short is None else "truncated"] += 1
        if short is None:
            return None
        encoded = short
    response = encoded.response_ids
    if response is not None and len(encoded.prompt_ids) + len(response) > settings.max_tokens:
        counts["cut"] += 1
        response = response[: settings.max_tokens - len(encoded.prompt_ids)]
    references = example.references or (() if encoded.reply is None else (encoded.reply,))
    return TokenizedExample(
        example.id, encoded.prompt_ids, response, references, encoded.prompt, encoded.targets, example.where
    )


def refused(example: Example, problem: BadRow, skip_bad_rows: bool) -> str:
    """The message about a row that the template cannot hold.

    Raises:
        DataError: It, where bad rows are not to be skipped.
    """
    message = f"{example.where or f'row {example.id}'}: {problem}"
    if not skip_bad_rows:
        raise DataError(message, setting=settings_of(problem.setting, "data.skip_bad_rows")) from None
    return message


def nothing_left(first_skipped: str, num_skipped: int, num_examples: int, settings: PromptSettings) -> DataError:
    """The error where no row is left of ``num_examples``."""
    if num_skipped == num_examples:
        return DataError(f"no usable row: all {num_examples} rows are bad, the first: {first_skipped}")
    return DataError(
        f"all {num_examples - num_skipped} prompts are over the limit of {settings.max_prompt_tokens} tokens: no row "
        "is left",
        setting=_MAX_PROMPT,
    )


def check_settings(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for an unknown policy, or for limits that leave no token for a prompt or a response."""
    num_special = len(leading_special_ids(tokenizer))
    if settings.long_prompt not in LONG_PROMPT_POLICIES:
        raise ConfigError(
            f"unknown policy {settings.long_prompt!r} for long prompts; allowed: {', '.join(LONG_PROMPT_POLICIES)}",
            setting="data.long_prompt",
        )
    check_limits(settings.max_prompt_tokens, settings.max_tokens)
    if num_special >= settings.max_prompt_tokens:
        raise ConfigError(
            f"a limit of {settings.max_prompt_tokens} tokens leaves no token for a prompt after {num_special} special "
            "token(s)",
            setting=_MAX_PROMPT,
        )


def _over_limit(example: Example, num_tokens: int, limit: int) -> DataError:
    where = example.where or f"row {example.id}"
    start = " ".join(example.instruction.split())[:40]
    return DataError(
        f"{where} ({start!r}...): the prompt has {num_tokens} tokens, over the limit of {limit}",
        setting=f"{_MAX_PROMPT}, data.long_prompt",
    )
