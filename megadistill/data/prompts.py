"""Prompt templates: ``alpaca`` is MiniLLM's, word for word; ``plain`` is the text alone."""

from __future__ import annotations

from megadistill.data.dataset import Example
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean

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
TEMPLATES: dict[str, tuple[str, str]] = {
    "alpaca": (_ALPACA, _ALPACA_WITH_INPUT),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}


def render_prompt(example: Example, template: str = "alpaca") -> str:
    """The text that the model reads before its response. It ends in a line break in every template.

    Raises:
        ConfigError: Unknown ``template``.
    """
    if template not in TEMPLATES:
        hint = did_you_mean(template, TEMPLATES)
        raise ConfigError(
            f"unknown template {template!r}; allowed: {', '.join(TEMPLATES)}{hint}", setting="data.template"
        )
    without_input, with_input = TEMPLATES[template]
    chosen = with_input if example.input else without_input
    return chosen.format(instruction=example.instruction, input=example.input)
