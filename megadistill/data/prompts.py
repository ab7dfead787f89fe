"""From an example to token ids: the templates. One way for training, generation, evaluation and teacher text.

``alpaca`` is MiniLLM's template, word for word; ``plain`` is the text alone; ``chat`` is the tokenizer's own
(``data/chat_template.py``). ``auto`` is chat where a row is a chat, else alpaca.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megadistill.config.data import DataSection
from megadistill.data.dataset import Example
from megadistill.data.readers import BadRow
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# name -> (template of a row without input, template of a row with input)
TEXT_TEMPLATES: dict[str, tuple[str, str]] = {
    "alpaca": (_ALPACA, _ALPACA_WITH_INPUT),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}
AUTO, CHAT = "auto", "chat"
TEMPLATES = (AUTO, *TEXT_TEMPLATES, CHAT)
LONG_PROMPT_POLICIES = ("drop", "truncate", "truncate_end", "error")


@dataclass(frozen=True)
class PromptSettings:
    """How rows become token ids.

    Attributes:
        template: One of ``TEMPLATES``.
        chat_template: File of a chat template to use in place of the tokenizer's own.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``.
        train_on: "last": the reference is the last turn of the assistant; "all": the earlier ones are, too.
        max_prompt_tokens: Longest prompt, special tokens included.
        max_tokens: Longest prompt and response together.
        long_prompt: What happens to longer prompts: "drop", "error", "truncate", which removes the beginning of a text
            and the oldest turns of a chat, or "truncate_end", which keeps the first tokens.
        skip_bad_rows: Count rows that the template cannot hold instead of stopping at the first.
    """

    template: str = AUTO
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_on: str = "last"
    max_prompt_tokens: int = 256
    max_tokens: int = 512
    long_prompt: str = "drop"
    skip_bad_rows: bool = False

    @classmethod
    def of(cls, data: DataSection) -> PromptSettings:
        """Those of a run."""
        return cls(**{name: getattr(data, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class EncodedRow:
    """An example as token ids, before any limit.

    Attributes:
        prompt: Text of the prompt.
        prompt_ids: Its ids, special tokens included.
        response_ids: Ids of the reference with the token that ends it; None for a row without a reference.
        targets: Spans [start, end) of ``prompt_ids`` that are earlier turns of the assistant to train on.
        reply: Text of the reference, where the row has one that is not in ``Example.references`` (a call of a tool).
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    targets: tuple[tuple[int, int], ...] = ()
    reply: str | None = None


class Template(Protocol):
    """Turns examples into token ids.

    Attributes:
        name: "alpaca", "plain" or "chat".
        end_id: The token that ends a reference.
    """

    name: str
    end_id: int

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow | BadRow]:
        """The ids of each example, or what is wrong with it."""
        ...

    def shortened(self, example: Example, encoded: EncodedRow, limit: int) -> EncodedRow | None:
        """The example with a prompt of at most ``limit`` tokens, without its beginning; None where that cannot be."""
        ...


def choose_template(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, are_chats: bool) -> str:
    """The template that ``settings.template`` means for these rows: "alpaca", "plain" or "chat".

    Raises:
        ConfigError: Unknown template; or chats, and no template that can hold them.
    """
    name = settings.template
    if name not in TEMPLATES:
        raise ConfigError(
            f"unknown template {name!r}; allowed: {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}",
            setting="data.template",
        )
    if name == AUTO:
        name = CHAT if are_chats else "alpaca"
    if name == CHAT and settings.chat_template is None and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer ({tokenizer.name_or_path}) has no chat template"
            + (", and the rows are chats" if are_chats else "")
            + "; name a file with one, or a tokenizer that has one",
            setting="data.chat_template, model.tokenizer",
        )
    if name != CHAT and settings.chat_template is not None:
        raise ConfigError(
            f"a chat template is given, but the template is {name}: it would not be used", setting="data.template"
        )
    return name


def read_chat_template(path: str | None) -> str | None:
    """The text of a file with a chat template; None for the tokenizer's own.

    Raises:
        ConfigError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"the chat template {path} cannot be read: {reason}", setting="data.chat_template") from None


def render_prompt(example: Example, template: str = "alpaca") -> str:
    """The text that the model reads before its response, for the text templates. It ends in a line break.

    Raises:
        ConfigError: Not a text template.
        BadRow: A chat that a template for one instruction cannot hold.
    """
    if template not in TEXT_TEMPLATES:
        raise ConfigError(
            f"unknown template {template!r}; allowed: {', '.join(TEXT_TEMPLATES)}"
            f"{did_you_mean(template, TEXT_TEMPLATES)}",
            setting="data.template",
        )
    if example.chat is not None and not example.chat.is_plain:
        kinds = ", ".join(message["role"] for message in example.chat.messages)
        tools = " with tools" if example.chat.tools is not None else ""
        raise BadRow(
            f"a chat ({kinds}{tools}) does not fit the template {template}, which holds one instruction; "
            "use the template chat",
            setting="data.template",
        )
    without_input, with_input = TEXT_TEMPLATES[template]
    chosen = with_input if example.input else without_input
    return chosen.format(instruction=example.instruction, input=example.input)
