"""What the columns of a row mean: the kinds of rows that people have, recognized by their columns.

To add a kind, add an entry to ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megadistill.data.chats import ASSISTANT, Chat, chat_of, single_turn, text_of, type_name
from megadistill.data.readers import BadRow
from megadistill.files import nearest

# What people call the same thing; for hints only.
_SYNONYMS = {
    "instruction": ("question", "query", "prompt", "text", "problem", "task"),
    "input": ("context", "passage", "document"),
    "output": ("answer", "response", "completion", "target", "label", "reference", "summary", "solution", "answers"),
}
_MAX_NAMES = 8


@dataclass(frozen=True)
class FieldNames:
    """Which keys (columns) of a row hold the instruction, its optional input and the reference output(s)."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"

    def setting_of(self, part: str) -> str:
        """The key that names the column of a part, such as "input"."""
        return f"data.{part}_field"


class Content(NamedTuple):
    """What a row says: an instruction with its input, or a chat; and the references."""

    instruction: str
    input: str
    references: tuple[str, ...]
    chat: Chat | None = None


@dataclass(frozen=True)
class RowKind:
    """One kind of rows.

    Attributes:
        name: What messages call it.
        prompt: The column that it is recognized by.
        inputs: Columns that may hold the input of the instruction; the first that a row has is used.
        answer: Columns that may hold the reference; the first that a row has is used.
        optional: Further columns that are used where they are there.
        parse: Makes the content of a row.
    """

    name: str
    prompt: str
    inputs: tuple[str, ...]
    answer: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], RowKind], Content]

    def used(self, seen: Collection[str]) -> list[str]:
        """Which of the columns that rows have are used."""
        first = [next((name for name in names if name in seen), None) for names in (self.inputs, self.answer)]
        wanted = (self.prompt, *first, *self.optional)
        return [name for name in wanted if name is not None and name in seen]


def _first(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any]:
    """The first of some columns that a row has, and its value; ("", None) for none."""
    return next(((name, row[name]) for name in names if row.get(name) is not None), ("", None))


def _references(row: Mapping[str, Any], kind: RowKind) -> tuple[str, ...]:
    """Texts of the answer column that are not blank: one, or a list of them."""
    name, value = _first(row, kind.answer)
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    texts = [text_of(item, name, "a string or a list of strings") for item in values]
    return tuple(text for text in texts if text.strip())


def _prompt_text(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text.strip():
        raise BadRow(f"field {name!r} is empty")
    return text


def _instruction(row: Mapping[str, Any], kind: RowKind) -> Content:
    """Instruction, input and output; with LLaMA-Factory's ``system`` and ``history`` it is a chat."""
    instruction = _prompt_text(row[kind.prompt], kind.prompt)
    system, history = kind.optional
    name, context = _first(row, kind.inputs)
    text = "" if context is None else text_of(context, name)
    references = _references(row, kind)
    turns = _history(row.get(history))
    prompt = text_of(row.get(system) or "", system)
    if not turns and not prompt.strip():
        return Content(instruction, text, references)
    chat = single_turn(joined(instruction, text), references[0] if references else None, system=prompt, history=turns)
    return Content(instruction, text, references, chat)


def joined(instruction: str, text: str) -> str:
    """Instruction and input as one user turn."""
    return f"{instruction}\n\n{text}" if text else instruction


def _history(value: Any) -> list[Mapping[str, Any]]:
    turns: list[Mapping[str, Any]] = []
    for pair in value or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("field 'history' must be a list of [instruction, answer] pairs")
        turns.append({"role": "user", "content": text_of(pair[0], "history")})
        turns.append({"role": ASSISTANT, "content": text_of(pair[1], "history")})
    return turns


def _of_chat(chat: Chat) -> Content:
    reply = chat.reply or {}
    text = str(reply.get("content") or "")
    return Content(chat.last_user_text, "", (text,) if text.strip() else (), chat)


def _messages(row: Mapping[str, Any], kind: RowKind) -> Content:
    return _of_chat(chat_of(row[kind.prompt], kind.prompt, system=row.get("system"), tools=row.get("tools")))


def _prompt_and_answer(row: Mapping[str, Any], kind: RowKind) -> Content:
    """TRL's prompt and completion: two texts, or two lists of messages."""
    value = row[kind.prompt]
    if isinstance(value, list | tuple):
        name, answer = _first(row, kind.answer)
        if isinstance(answer, str):
            answer = [{"role": ASSISTANT, "content": answer}]
        if answer is not None and not isinstance(answer, list | tuple):
            raise BadRow(f"field {name!r} must be a string or a list of messages, not {type_name(answer)}")
        together = [*value, *(answer or ())]
        return _of_chat(chat_of(together, kind.prompt, system=row.get("system"), tools=row.get("tools")))
    instruction, references = _prompt_text(value, kind.prompt), _references(row, kind)
    return Content(instruction, "", references)


def _preference(row: Mapping[str, Any], kind: RowKind) -> Content:
    """The chosen answer: a text beside a prompt, a list of messages after it, or a whole chat."""
    chosen, prompt = row[kind.prompt], row.get("prompt")
    if not isinstance(chosen, list | tuple):
        if prompt is None:
            raise BadRow(f"field {kind.prompt!r} is a text, and there is no field 'prompt' that it answers")
        if isinstance(prompt, list | tuple):
            reply = {"role": ASSISTANT, "content": text_of(chosen, kind.prompt)}
            return _of_chat(chat_of([*prompt, reply], "prompt", system=row.get("system"), tools=row.get("tools")))
        return Content(_prompt_text(prompt, "prompt"), "", (text_of(chosen, kind.prompt),))
    whole = list(chosen)
    if isinstance(prompt, list | tuple) and whole[: len(prompt)] != list(prompt):
        whole = [*prompt, *whole]
    elif isinstance(prompt, str) and len(whole) == 1:
        whole = [{"role": "user", "content": prompt}, *whole]
    return _of_chat(chat_of(whole, kind.prompt, system=row.get("system"), tools=row.get("tools")))


def _instruction_rows(fields: FieldNames) -> RowKind:
    """Rows whose columns have these names; a name that is left as it is also means Dolly's."""
    inputs = ("input", "context") if fields.input == "input" else (fields.input,)
    answer = ("output", "response") if fields.output == "output" else (fields.output,)
    return RowKind("instruction rows", fields.instruction, inputs, answer, ("system", "history"), _instruction)


# In the order of preference, where a row would fit several. The columns of instruction rows can have other names.
KINDS: tuple[RowKind, ...] = (
    RowKind("chats", "messages", (), (), ("system", "tools"), _messages),
    RowKind("ShareGPT chats", "conversations", (), (), ("system", "tools"), _messages),
    _instruction_rows(FieldNames()),
    RowKind("preference rows", "chosen", (), (), ("prompt", "system", "tools"), _preference),
    RowKind("prompts and answers", "prompt", (), ("completion", "response"), ("system", "tools"), _prompt_and_answer),
)


def recognize(row: Mapping[str, Any], fields: FieldNames) -> RowKind | None:
    """The kind of a row; None where no column of it holds a prompt.

    Args:
        row: The row.
        fields: Where a name differs from the default, rows are instruction rows with these columns.
    """
    kinds = KINDS if fields == FieldNames() else (_instruction_rows(fields),)
    return next((kind for kind in kinds if row.get(kind.prompt) is not None), None)


def expected_columns() -> str:
    """The columns that rows may have, for messages."""
    return "; or ".join(" + ".join((kind.prompt, *kind.answer[:1])) for kind in KINDS)


def nearest_column(part: str, names: Iterable[str]) -> str | None:
    """The column that most likely holds a part ("instruction", "input", "output"); None where none is near."""
    by_word = {name.strip().lower(): name for name in names}
    for word in (part, *_SYNONYMS[part]):
        if word in by_word:
            return by_word[word]
    close = nearest(part, by_word, cutoff=0.75)
    return None if close is None else by_word[close]


def name_list(names: Iterable[str]) -> str:
    """Column names for a message; only the first of many."""
    known = list(names)
    more = f" and {len(known) - _MAX_NAMES} more" if len(known) > _MAX_NAMES else ""
    return ", ".join(known[:_MAX_NAMES]) + more
