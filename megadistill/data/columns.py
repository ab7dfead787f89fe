"""What the columns of a row mean: the kinds of rows that people have, recognized by their columns.

To add a kind, add an entry to ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megadistill.data.chats import ASSISTANT, Chat, chat_of, from_json, single_turn, text_of, tools_of, type_name
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
    """What a row says: an instruction with its input, or a chat; and the references.

    ``has_own_answer``: a chat that ends in its answer, so that no other column is asked for one.
    """

    instruction: str
    input: str
    references: tuple[str, ...]
    chat: Chat | None = None
    has_own_answer: bool = False


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
        is_chat: Whether the prompt's column usually holds the answer, too.
    """

    name: str
    prompt: str
    inputs: tuple[str, ...]
    answer: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], RowKind], Content]
    is_chat: bool = False

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
    name, context = _first(row, kind.inputs)
    text = "" if context is None else text_of(context, name)
    return _of_text(row, instruction, _references(row, kind), text=text, history=_history(row.get("history")))


def _of_text(
    row: Mapping[str, Any],
    instruction: str,
    references: tuple[str, ...],
    *,
    text: str = "",
    history: Sequence[Mapping[str, Any]] = (),
    tools: Any = None,
) -> Content:
    """An instruction; with a system prompt, earlier turns or tools it is a chat."""
    system, known = text_of(row.get("system") or "", "system"), tools_of(tools)
    if not history and not system.strip() and known is None:
        return Content(instruction, text, references)
    reply = references[0] if references else None
    chat = single_turn(joined(instruction, text), reply, system=system, history=history, tools=known)
    return Content(instruction, text, references, chat)


def joined(instruction: str, text: str) -> str:
    """Instruction and input as one user turn."""
    return f"{instruction}\n\n{text}" if text else instruction


def _history(value: Any) -> list[Mapping[str, Any]]:
    turns: list[Mapping[str, Any]] = []
    value = from_json(value, "history") or ()
    if not isinstance(value, list | tuple):
        raise BadRow(f"field 'history' must be a list, not {type_name(value)}")
    for pair in value:
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
    """A chat; one that waits for an answer may have it in a column of its own, as the rows that generate writes."""
    chat = chat_of(row[kind.prompt], kind.prompt, system=row.get("system"), tools=row.get("tools"))
    name, answer = _first(row, kind.answer)
    if chat.reply is not None or answer is None:
        return _of_chat(chat)._replace(has_own_answer=chat.reply is not None)
    turns = from_json(row[kind.prompt], kind.prompt)
    return _of_chat(_answered(row, turns, answer, kind.prompt, name))


def _answered(row: Mapping[str, Any], turns: Sequence[Any], answer: Any, prompt: str, name: str) -> Chat:
    """A chat of two columns: turns, and a text, a message, or messages (perhaps of the whole chat) that answer them."""
    if isinstance(answer, Mapping):
        together = [*turns, answer]
    elif isinstance(answer, list | tuple):
        together = list(answer) if list(answer[: len(turns)]) == list(turns) else [*turns, *answer]
    elif answer is None:
        together = list(turns)
    else:
        text = text_of(answer, name, "a string or a list of messages")
        together = [*turns, {"role": ASSISTANT, "content": text}]
    return chat_of(together, prompt, system=row.get("system"), tools=row.get("tools"))


def _prompt_and_answer(row: Mapping[str, Any], kind: RowKind) -> Content:
    """TRL's prompt and completion: two texts, or two lists of messages."""
    value = row[kind.prompt]
    if isinstance(value, list | tuple):
        name, answer = _first(row, kind.answer)
        return _of_chat(_answered(row, value, answer, kind.prompt, name))
    return _of_text(row, _prompt_text(value, kind.prompt), _references(row, kind), tools=row.get("tools"))


def _preference(row: Mapping[str, Any], kind: RowKind) -> Content:
    """The chosen answer: a text beside a prompt, a list of messages after it, or a whole chat."""
    chosen, prompt = row[kind.prompt], row.get("prompt")
    if isinstance(prompt, list | tuple):
        return _of_chat(_answered(row, prompt, chosen, "prompt", kind.prompt))
    if isinstance(chosen, list | tuple | Mapping):
        turns = [chosen] if isinstance(chosen, Mapping) else list(chosen)
        if isinstance(prompt, str) and len(turns) == 1:
            turns = [{"role": "user", "content": prompt}, *turns]
        return _of_chat(chat_of(turns, kind.prompt, system=row.get("system"), tools=row.get("tools")))
    if prompt is None:
        raise BadRow(f"field {kind.prompt!r} is a text, and there is no field 'prompt' that it answers")
    answer = text_of(chosen, kind.prompt)
    references = (answer,) if answer.strip() else ()
    return _of_text(row, _prompt_text(prompt, "prompt"), references, tools=row.get("tools"))


def _instruction_rows(fields: FieldNames) -> RowKind:
    """Rows whose columns have these names; one that is left as it is also means Dolly's, or a preference's answer."""
    inputs = ("input", "context") if fields.input == "input" else (fields.input,)
    answer = ("output", "response", "chosen") if fields.output == "output" else (fields.output,)
    return RowKind("instruction rows", fields.instruction, inputs, answer, ("system", "history"), _instruction)


_CHAT_ANSWERS = ("chosen", "response", "completion")
# In the order of preference, where a row would fit several. The columns of instruction rows can have other names.
KINDS: tuple[RowKind, ...] = (
    RowKind("chats", "messages", (), _CHAT_ANSWERS, ("system", "tools"), _messages, is_chat=True),
    RowKind("ShareGPT chats", "conversations", (), _CHAT_ANSWERS, ("system", "tools"), _messages, is_chat=True),
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
    return "; or ".join(" + ".join((kind.prompt, *(() if kind.is_chat else kind.answer[:1]))) for kind in KINDS)


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
    return ", ".join(name or "(no name)" for name in known[:_MAX_NAMES]) + more
