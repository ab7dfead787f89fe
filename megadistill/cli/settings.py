"""What the user of a verb calls the setting that an error is about.

Errors of lower floors carry dotted configuration keys (``MegadistillError.setting``). Verbs with ``--config`` have
these keys; the others have options, or no such setting at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from megadistill.errors import MegadistillError

_VERBS_WITH_KEYS = frozenset({"train", "evaluate", "demo", "doctor", "plan", "config"})
_GENERATE: Mapping[str, str] = {
    "data.chat_template": "--chat-template",
    "data.chat_template_kwargs": "--chat-template-kwargs",
    "data.input_field": "--input-field",
    "data.instruction_field": "--instruction-field",
    "data.long_prompt": "--long-prompt",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.skip_bad_rows": "--skip-bad-rows",
    "data.template": "--template",
    "generation.max_new_tokens": "--max-new-tokens",
    "model.eos_tokens": "--eos-tokens",
    "model.tokenizer": "--tokenizer",
    "parallel.tp_size": "--tp-size",
}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "prepare": {
        "data.chat_template": "--chat-template",
        "data.chat_template_kwargs": "--chat-template-kwargs",
        "data.hub_config": "--config-name",
        "data.hub_split": "--split",
        "data.input_field": "--input-field",
        "data.instruction_field": "--instruction-field",
        "data.max_prompt_tokens": "--max-prompt-tokens",
        "data.max_tokens": "--max-tokens",
        "data.output_field": "--output-field",
        "data.skip_bad_rows": "--skip-bad-rows",
        "data.template": "--template",
        "model.tokenizer": "--tokenizer",
    },
    "generate": _GENERATE,
    "compare": _GENERATE,
    "chat": {
        "data.chat_template": "--chat-template",
        "data.chat_template_kwargs": "--chat-template-kwargs",
        "data.max_prompt_tokens": "--max-tokens",
        "data.template": "--template",
        "generation.max_new_tokens": "--max-new-tokens",
        "model.tokenizer": "--tokenizer",
    },
    "verify": {"data.instruction_field": "--text-field", "model.tokenizer": "--tokenizer"},
    "shard": {"model.tokenizer": "--tokenizer", "parallel.tp_size": "--tp-size"},
    "reshard": {"parallel.tp_size": "--tp-size"},
}


def names_of(setting: str | None, verb: str) -> list[str]:
    """What the user of ``verb`` calls the settings "a.b, c.d"; those that the verb does not have are left out."""
    keys = setting.split(", ") if setting else []
    if verb in _VERBS_WITH_KEYS:
        return keys
    options = OPTIONS.get(verb, {})
    return [options[key] for key in keys if key in options]


def line_of(error: MegadistillError, verb: str) -> str:
    """The error's message, and the settings of ``verb`` that it is about: "... (see --max-tokens and --template)"."""
    names = names_of(error.setting, verb)
    return f"{error} (see {' and '.join(names)})" if names else str(error)
