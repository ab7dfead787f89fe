"""Section ``model``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megadistill.config.lora import LoraSection
from megadistill.config.section import DType, NonEmptyStr, NonNegativeInt, Section, require_combination

REVISION_SIGN = "@"  # NAME@REVISION: a branch, tag or commit of a hub name


def _with_revision(section: str, tree: Any) -> Any:
    """Moves ``revision`` into ``path``, as NAME@REVISION: the one form that everything after this knows."""
    if not isinstance(tree, dict) or not isinstance(tree.get("revision"), str) or not tree["revision"]:
        return tree
    path, setting = tree.get("path"), f"{section}.revision={tree['revision']}"
    keys = (f"{section}.revision", f"{section}.path")
    require_combination(path is not None or section == "model.student", f"{setting} needs {section}.path", keys)
    if not isinstance(path, str) or not path:
        return tree
    require_combination(
        not Path(path).exists(), f"{setting}: {path} is local, and only names of the hub have revisions", keys
    )
    require_combination(REVISION_SIGN not in path, f"{setting}: {section}.path={path} has a revision already", keys)
    return tree | {"path": f"{path}{REVISION_SIGN}{tree['revision']}", "revision": None}


class TeacherSection(Section):
    """Section ``model.teacher``."""

    _joined = model_validator(mode="before")(partial(_with_revision, "model.teacher"))

    path: NonEmptyStr | None = Field(
        None,
        description="Model folder, hub name, checkpoint or run directory, or a configuration file (random weights); "
        "null only for plain SFT.",
    )
    revision: NonEmptyStr | None = Field(
        None, description="Branch, tag or commit of a hub name; path: NAME@REVISION says the same."
    )
    dtype: DType = Field("fp32", description="Type of the weights and of the forward pass.")


class StudentSection(Section):
    """Section ``model.student``."""

    _joined = model_validator(mode="before")(partial(_with_revision, "model.student"))

    path: NonEmptyStr = Field(
        description="Model folder, hub name, checkpoint or run directory, or a configuration file (random weights)."
    )
    revision: NonEmptyStr | None = Field(
        None, description="Branch, tag or commit of a hub name; path: NAME@REVISION says the same."
    )
    dtype: DType = Field(
        "fp32", description="Type of weights and activations; with bf16, the optimizer keeps float32 master weights."
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="Train low-rank adapters in place of weights.")


class ModelSection(Section):
    """Section ``model``."""

    teacher: TeacherSection = Field(default_factory=TeacherSection, description="The model to learn from; frozen.")
    student: StudentSection = Field(description="The model that is trained.")
    tokenizer: NonEmptyStr | None = Field(
        None, description="Tokenizer folder or hub name, maybe NAME@REVISION; null: the student's, else the teacher's."
    )
    eos_tokens: Annotated[tuple[NonEmptyStr | NonNegativeInt, ...], Field(min_length=1)] | None = Field(
        None,
        strict=False,
        description="Tokens that end a response, as texts or ids; null: the tokenizer's EOS and those that "
        "generation_config.json (else config.json) of the model that writes names.",
    )
    read: Literal["map", "copy"] = Field(
        "map",
        description="How a model's files are read. map: mapped into memory, which a node's processes share; copy: "
        "front to back by one process of a node, which sends them to the others, for slow file systems. "
        "Random weights and folders of megadistill shard do not use it.",
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute the student's activations in the backward pass: less memory, more time."
    )
