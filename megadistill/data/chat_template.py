"""Chats through the tokenizer's own template (``apply_chat_template``).

Prompt ids + response ids are the ids of the whole rendered chat, up to the token that ends its last turn. What a
template writes behind that token (a line break in Qwen's) is left out: no model ever generates it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import count
from typing import TYPE_CHECKING, Any

from megadistill.data.chats import ASSISTANT, Chat, Message, single_turn
from megadistill.data.columns import joined
from megadistill.data.dataset import Example
from megadistill.data.prompts import CHAT, EncodedRow
from megadistill.data.readers import BadRow
from megadistill.data.tokenize import added_ids, decode_text
from megadistill.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Answer 7"
# Takes the place of the function of the same name in a template.
_ON_DAY = "{{%- macro strftime_now(format) -%}}{}{{%- endmacro -%}}"


def chat_of_example(example: Example) -> Chat:
    """The chat of an example; an instruction with its input is one turn of the user."""
    if example.chat is not None:
        return example.chat
    reply = example.references[0] if example.references else None
    return single_turn(joined(example.instruction, example.input), reply)


class ChatTemplate:
    """Implements ``data.prompts.Template`` with a chat template.

    Args:
        tokenizer: One from ``load_tokenizer``.
        text: The chat template; None: the tokenizer's own.
        variables: Variables for the template, such as ``enable_thinking``.
        train_on: "last" or "all".

    Attributes:
        end_id: The token that ends a turn of the assistant: the template's, else the tokenizer's EOS.

    Raises:
        ConfigError: The template cannot render a chat, or writes today's date.
    """

    name = CHAT

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None, variables: Mapping[str, Any], train_on: str
    ) -> None:
        self._tokenizer, self._text, self._variables = tokenizer, text, dict(variables)
        self._refuse_todays_date()
        self._trains_all = train_on == "all"
        if self._trains_all and not tokenizer.is_fast:
            raise ConfigError("training on all turns needs a fast tokenizer", setting="data.train_on")
        self._added_ids = added_ids(tokenizer)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control = _any_of(special | set(tokenizer.all_special_tokens))
        ending = self._ending()
        self._writes_end = ending is not None
        self.end_id = int(tokenizer.eos_token_id) if ending is None else ending
        if self._trains_all and not self._writes_end:
            raise ConfigError("the chat template does not mark the ends of turns", setting="data.train_on")

    def _refuse_todays_date(self) -> None:
        """Llama 3.2's template writes the day into the system prompt: tomorrow the same run would have other rows."""
        try:
            text = self._tokenizer.get_chat_template(self._text)
        except ValueError:  # several templates by name, none of which is the default
            names = ", ".join(self._tokenizer.chat_template)
            raise ConfigError(
                f"the tokenizer has several chat templates ({names}) and no default one; write one to a file",
                setting="data.chat_template",
            ) from None
        if "strftime_now" not in text or not self._writes_the_day(text):
            return
        problem = "the chat template writes today's date into every prompt, so that results would depend on the day; "
        if "date_string" not in text or "date_string" in self._variables:
            raise ConfigError(f"{problem}give a copy of it without strftime_now", setting="data.chat_template")
        raise ConfigError(
            f'{problem}name one: {{"date_string": "{date.today():%d %b %Y}"}}', setting="data.chat_template_kwargs"
        )

    def _writes_the_day(self, text: str) -> bool:
        """Whether two days give two prompts."""
        chat = single_turn("Question 5", None)
        try:
            texts = {
                self._render(chat.messages, chat, is_prompt=True, template=_ON_DAY.format(day) + text) for day in (1, 2)
            }
        except BadRow:  # reported where the template is tried
            return False
        return len(texts) > 1

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | BadRow]:
        """The ids of each example, or what is wrong with it."""
        chats = [chat_of_example(example) for example in examples]
        texts = [self._texts(chat) for chat in chats]
        fine = [text for text in texts if not isinstance(text, BadRow)]
        prompts = iter(self._ids([prompt for prompt, _ in fine]))
        wholes = iter(self._ids([whole for _, whole in fine if whole is not None]))
        rows: list[EncodedRow | BadRow] = []
        for chat, text in zip(chats, texts, strict=True):
            if isinstance(text, BadRow):
                rows.append(text)
                continue
            _, whole = text
            rows.append(self._row(chat, text, next(prompts), None if whole is None else next(wholes)))
        return rows

    def shortened(self, example: Example, encoded: EncodedRow, limit: int) -> EncodedRow | None:
        """The chat without its oldest turns; the system prompt stays."""
        chat = chat_of_example(example)
        messages = list(chat.messages)
        first = 1 if messages[0]["role"] in ("system", "developer") else 0
        starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
        for start in starts:
            kept = replace(chat, messages=(*messages[:first], *messages[start:]))
            row = self.encode([replace(example, chat=kept)])[0]
            if isinstance(row, EncodedRow) and len(row.prompt_ids) <= limit:
                return row
        return None

    def _row(
        self, chat: Chat, text: tuple[str, str | None], prompt_ids: list[int], whole_ids: list[int] | None
    ) -> EncodedRow | BadRow:
        prompt, whole = text
        targets: tuple[tuple[int, int], ...] = ()
        if self._trains_all:
            try:
                targets = self._targets(chat, prompt)
            except BadRow as error:
                return error
        if whole is None or whole_ids is None:
            return EncodedRow(prompt, tuple(prompt_ids), None, targets)
        # Where the answer would merge with the prompt's last characters it is encoded alone: the prompt stays the one
        # that the student reads when it writes.
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            ids = self._until_end(whole_ids[len(prompt_ids) :])
        else:
            ids = self._until_end(self._ids([whole[len(prompt) :]])[0])
        content = str((chat.reply or {}).get("content") or "")
        reply = None if content.strip() else decode_text(self._tokenizer, ids[:-1]).strip()
        return EncodedRow(prompt, tuple(prompt_ids), tuple(ids), targets, reply)

    def _until_end(self, ids: list[int]) -> list[int]:
        """A turn up to its end token, which a template without one does not write."""
        if not self._writes_end:
            return [*ids, self.end_id]
        return ids[: ids.index(self.end_id) + 1] if self.end_id in ids else [*ids, self.end_id]

    def _texts(self, chat: Chat) -> tuple[str, str | None] | BadRow:
        """Text of the prompt, and of the whole chat where there is an answer."""
        try:
            self._refuse_control_tokens(chat)
            prompt = self._render(chat.messages, chat, is_prompt=True)
            if chat.reply is None:
                return prompt, None
            whole = self._render([*chat.messages, chat.reply], chat, is_prompt=False)
        except BadRow as error:
            return error
        if not whole.startswith(prompt):
            shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            return BadRow(
                f"the chat template asks for the answer with {prompt[shared:][-60:]!r}, but renders the answer with "
                f"{whole[shared:][:60]!r} in its place: the student would be trained on another prompt than it reads; "
                "give the template other variables, or another template",
                setting="data.chat_template_kwargs, data.chat_template",
            )
        return prompt, whole

    def _render(self, messages: Sequence[Message], chat: Chat, *, is_prompt: bool, template: str | None = None) -> str:
        from jinja2 import TemplateError

        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if chat.tools is None else list(chat.tools),
                    chat_template=template or self._text,
                    add_generation_prompt=is_prompt,
                    tokenize=False,
                    **self._variables,
                )
            )
            text.encode("utf-8")  # thoughts, calls and tools may hold characters that no tokenizer takes
            return text
        # Templates are programs of their own: a wrong order of roles or an unexpected type may raise anything.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRow(f"the chat template cannot render this chat: {first_line(error)}") from None

    def _refuse_control_tokens(self, chat: Chat) -> None:
        """The text of a message must not end its turn."""
        for message in (*chat.messages, *([chat.reply] if chat.reply is not None else [])):
            if found := self._control.search(str(message.get("content") or "")):
                raise BadRow(
                    f"a turn of the {message['role']} holds the control token {found[0]!r} as text, which the model "
                    "would read as the token; take it out"
                )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _ending(self) -> int | None:
        """The token that the template writes behind the assistant's text; None where it writes none."""
        chat = single_turn("Question 5", _PROBE)
        assert chat.reply is not None
        try:
            text = self._render([*chat.messages, chat.reply], chat, is_prompt=False)
        except BadRow as error:
            raise ConfigError(str(error), setting="data.chat_template, data.chat_template_kwargs") from None
        if _PROBE not in text:
            raise ConfigError(
                "the chat template leaves the assistant's text out", setting="data.chat_template, model.tokenizer"
            )
        tail = self._ids([text[text.rindex(_PROBE) + len(_PROBE) :]])[0]
        return next((id_ for id_ in tail if id_ in self._added_ids), None)

    def _targets(self, chat: Chat, prompt: str) -> tuple[tuple[int, int], ...]:
        """Spans of token positions of the assistant's earlier turns, their end tokens included.

        Raises:
            BadRow: The template does not let an earlier turn be found.
        """
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
        if not turns:
            return ()
        encoded = self._tokenizer([prompt], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
        spans = []
        for turn in turns:
            at = self._start_of(chat, turn, prompt)
            first = next((i for i, (start, _) in enumerate(offsets) if start >= at), len(ids))
            last = next((i for i in range(first, len(ids)) if ids[i] == self.end_id), None)
            if last is None:
                raise BadRow("the end of an earlier turn cannot be found", setting="data.train_on")
            spans.append((first, last + 1))
        return tuple(spans)

    def _start_of(self, chat: Chat, turn: int, prompt: str) -> int:
        """Where the text of an earlier turn begins in the text of the prompt."""
        before, message, after = chat.messages[:turn], chat.messages[turn], chat.messages[turn + 1 :]
        try:
            asked = self._render(before, chat, is_prompt=True)
        except BadRow:  # the assistant may begin, and templates may refuse to ask without a question
            asked = None
        if asked is not None and prompt.startswith(asked):
            return len(asked)
        # Some templates leave the thoughts of earlier turns out: the turn begins where another text in its place would.
        # To look for the text itself could find it in the header or in the turn of the user before it.
        content = str(message.get("content") or "")
        other = next(letter for letter in map(chr, count(ord("A"))) if letter not in content)
        changed = self._render([*before, {**message, "content": other}, *after], chat, is_prompt=True)
        start = next((i for i, (a, b) in enumerate(zip(prompt, changed, strict=False)) if a != b), None)
        if start is None:
            raise BadRow(f"the chat template leaves the text of turn {turn} out", setting="data.train_on")
        return start


def _any_of(texts: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
