"""Section ``data`` of the configuration."""

from typing import Any, Literal

from pydantic import Field

from megadistill.config.section import BelowOne, NonEmptyStr, PositiveInt, Section


class DataSection(Section):
    """Section ``data``."""

    train_path: NonEmptyStr | None = Field(
        None, description="Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder, or a hub data set."
    )
    prompts_path: NonEmptyStr | None = Field(
        None, description="Extra rows of which only the prompts are used: they get the token and span losses, not SFT."
    )
    prompts_ratio: BelowOne = Field(0.0, description="Share of data.prompts_path in each global batch.")
    valid_path: NonEmptyStr | None = Field(None, description="Validation rows, for train.eval_every.")
    cache_dir: NonEmptyStr | None = Field(
        None,
        description="Folder of prepared rows: they are tokenized once into files that all processes map, for data that "
        "does not fit into their memory; null: every process tokenizes and keeps them.",
    )
    max_prompt_tokens: PositiveInt = Field(256, description="Longest prompt, template included, in tokens.")
    max_tokens: PositiveInt = Field(512, description="Longest prompt plus response, in tokens.")
    skip_bad_rows: bool = Field(False, description="Skip and count malformed rows instead of stopping at the first.")
    long_prompt: Literal["drop", "truncate", "truncate_end", "error"] = Field(
        "drop",
        description="What happens to prompts longer than data.max_prompt_tokens; truncate removes their beginning, "
        "truncate_end their end with what asks for the answer (MiniLLM).",
    )
    template: Literal["auto", "alpaca", "plain", "chat"] = Field(
        "auto",
        description="How a row becomes a prompt. chat: the tokenizer's own chat template; auto: chat where rows are "
        "chats, else alpaca.",
    )
    chat_template: NonEmptyStr | None = Field(
        None, description="File of a chat template (Jinja) to use in place of the tokenizer's own."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables for the chat template, such as {enable_thinking: false}."
    )
    train_on: Literal["last", "all"] = Field(
        "last",
        description="Turns of a chat that are references: the assistant's last one, or all of them. The student writes "
        "the last one.",
    )
    span_prior: Literal["phrases", "spacy", "punctuation", "window", "none"] = Field(
        "phrases",
        description="How a response is divided into spans; phrases: English noun, verb and prepositional phrases.",
    )
    span_verb_objects: bool = Field(
        False, description="For data.span_prior phrases and spacy: a verb phrase takes the noun phrase that follows it."
    )
    span_window: PositiveInt = Field(4, description="Words per span, for data.span_prior window.")
    instruction_field: NonEmptyStr = Field("instruction", description="Name of the column with the instruction.")
    input_field: NonEmptyStr = Field("input", description="Name of the column with the optional input.")
    output_field: NonEmptyStr = Field(
        "output", description="Name of the column with the reference or the list of references."
    )
    hub_split: NonEmptyStr = Field("train", description="Split to read of a hub data set.")
    hub_config: NonEmptyStr | None = Field(None, description="Configuration (subset) of a hub data set.")
