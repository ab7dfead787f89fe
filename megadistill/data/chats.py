"""Chats as data sets hold them: ``messages`` (role, content), ShareGPT's ``conversations`` (from, value), tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.data.readers import BadRow
from megadistill.files import did_you_mean

# A message as chat templates see it: role, content, and whatever else the data set has (tool_calls, name ...).
Message = Mapping[str, Any]
ASSISTANT = "assistant"
_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# Names that ShareGPT data sets and the libraries around them use for the same roles.
_OTHER_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True)
class Chat:
    """A conversation up to the turn that the student writes.

    Attributes:
        messages: What comes before that turn; the last one is not the assistant's.
        reply: The assistant's turn in the data; None where the row has a prompt only.
        tools: Descriptions of functions, as chat templates take them; None for none.
    """

    messages: tuple[Message, ...]
    reply: Message | None = None
    tools: tuple[Any, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a template for one instruction can hold it: one user turn, and nothing around it."""
        kinds = [message["role"] for message in self.messages]
        return kinds == ["user"] and self.tools is None and not (self.reply or {}).get("tool_calls")

    @property
    def last_user_text(self) -> str:
        """The last user turn, for messages about the row."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def text_of(value: Any, name: str, allowed: str = "a string") -> str:
    """A value of a row as text. Numbers are text where text is meant (labels, GSM8K's answers).

    Raises:
        BadRow: It is neither, or not valid Unicode.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} must be {allowed}, not {type_name(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"field {name!r} has a broken character at position {error.start} (invalid UTF-8)") from None
    return value


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def chat_of(value: Any, name: str, *, system: Any = None, tools: Any = None) -> Chat:
    """The chat in one column of a row.

    Args:
        value: A list of messages, with ``role`` and ``content`` or with ``from`` and ``value``; or it as JSON text.
        name: The column.
        system: A system prompt from another column; None or empty for none.
        tools: Descriptions of functions from another column, as a list or as JSON text.

    Raises:
        BadRow: It is not a chat, or has no turn of the user or of a tool to answer.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, name)
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"field {name!r} must be a list of messages, not {_empty_or_type(value)}")
    messages = [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if system is not None and text_of(system, "system").strip():
        if messages[0]["role"] == "system":
            raise BadRow(f"there are two system prompts: in field 'system' and in {name}[0]")
        messages.insert(0, {"role": "system", "content": text_of(system, "system")})
    reply = messages.pop() if messages[-1]["role"] == ASSISTANT else None
    if reply is not None and not reply["content"].strip() and "tool_calls" not in reply:
        reply = None  # as a blank output: nothing to learn
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        what = f"a turn of the {messages[-1]['role']}" if messages else "no turn"
        raise BadRow(f"field {name!r}: there is {what} where a turn of the user must come before the answer")
    return Chat(tuple(messages), reply, tools_of(tools))


def single_turn(
    text: str,
    reply: str | None,
    *,
    system: str = "",
    history: Sequence[Message] = (),
    tools: tuple[Any, ...] | None = None,
) -> Chat:
    """A chat of one instruction, perhaps after a system prompt and earlier turns."""
    first = [{"role": "system", "content": system}] if system else []
    answer = None if reply is None else {"role": ASSISTANT, "content": reply}
    return Chat((*first, *history, {"role": "user", "content": text}), answer, tools)


def _empty_or_type(value: Any) -> str:
    return "an empty list" if isinstance(value, list | tuple) else type_name(value)


def _message(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRow(f"{name} must be an object with a role and a content, not {type_name(item)}")
    keys = ("role", "content") if "role" in item else ("from", "value")
    if keys[0] not in item:
        raise BadRow(f"{name} has no role (its keys: {', '.join(map(str, item)) or 'none'})")
    role = text_of(item[keys[0]], f"{name}.{keys[0]}").strip().lower()
    role = _OTHER_ROLES.get(role, role)
    if role not in _ROLES:
        known = [*_ROLES, *_OTHER_ROLES]
        hint = did_you_mean(role, known) or f"; allowed: {', '.join(_ROLES)}"
        raise BadRow(f"{name} has the unknown role {role!r}{hint}")
    # Tables give every message the union of all keys, null where a message has none.
    others = {key: value for key, value in item.items() if key not in keys and value is not None}
    if calls := others.pop("tool_calls", None):
        if not isinstance(calls, list | tuple):
            raise BadRow(f"{name}.tool_calls must be a list, not {type_name(calls)}")
        others["tool_calls"] = [_tool_call(call) for call in calls]
    content = _content(item.get(keys[1]), f"{name}.{keys[1]}", may_be_missing="tool_calls" in others)
    return {"role": role, "content": content, **others}


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object, as chat templates expect them; OpenAI's format has them as JSON text."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _tool_call(function)}
    arguments = call.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = arguments
    return {**call, "arguments": parsed} if isinstance(parsed, Mapping) else call


def _content(value: Any, name: str, *, may_be_missing: bool) -> str:
    """The text of a message; a list of text parts is joined."""
    if value is None and may_be_missing:
        return ""
    if not isinstance(value, list | tuple):
        return text_of(value, name)
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
            raise BadRow(f"{name} has a part of type {kind!r}; only text can be read")
        texts.append(text_of(part.get("text"), f"{name}.text"))
    return "".join(texts)


def from_json(value: Any, name: str) -> Any:
    """A value that tables of text (CSV) hold as JSON.

    Raises:
        BadRow: A text that is not JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"field {name!r} is not valid JSON: {error}") from None


def tools_of(value: Any) -> tuple[Any, ...] | None:
    """Descriptions of functions, from a list or JSON text; None for none. Raises BadRow."""
    value = from_json(value, "tools")
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise BadRow(f"field 'tools' must be a list, not {type_name(value)}")
    return tuple(value)
