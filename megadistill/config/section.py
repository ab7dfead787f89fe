"""The base class of all sections of the configuration, its types, and the words for what a key may hold."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
OpenUnitInterval = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
DType = Literal["fp32", "bf16"]

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class CombinationError(ValueError):
    """Values that are valid alone but not together.

    Args:
        message: One line with the keys and their values.
        keys: The dotted keys involved.
    """

    def __init__(self, message: str, keys: tuple[str, ...]) -> None:
        super().__init__(message)
        self.keys = keys


def require_combination(is_fine: bool, message: str, keys: tuple[str, ...]) -> None:
    """Raises CombinationError unless ``is_fine``."""
    if not is_fine:
        raise CombinationError(message, keys)


class Section(BaseModel):
    """A frozen section; an unknown key, a number written as text, or a value out of range is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def section_type(field: FieldInfo) -> type[Section] | None:
    """The section class behind a field, None for a leaf."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def allowed(field: FieldInfo) -> str:
    """What a leaf may hold, e.g. "auto, or a whole number >= 1"."""
    if section_type(field) is not None:
        return "a section"
    return describe(field.annotation, field.metadata)


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of a type of the schema, e.g. "a number > 0 and <= 1"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return describe(args[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(arg, metadata if arg is not type(None) else ()) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if annotation is type(None):
        return "null"
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        is_filled = any(isinstance(item, annotated_types.MinLen) for item in metadata)
        length = len(args) if not many else "one or more" if is_filled else "any length"
        return f"a list of {length}, each {describe(args[0])}"
    if origin is dict:
        return "a mapping"
    bounds = [_bound(item) for item in metadata]
    return " ".join([_NAMES[annotation], " and ".join(bound for bound in bounds if bound)]).strip()


def _bound(item: Any) -> str:
    signs = {annotated_types.Ge: "ge", annotated_types.Gt: "gt", annotated_types.Le: "le", annotated_types.Lt: "lt"}
    words = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    if isinstance(item, annotated_types.MinLen):
        return "that is not empty"
    name = signs.get(type(item))
    if not name:
        return ""
    limit = getattr(item, name)
    return f"{words[name]} {limit if isinstance(limit, int) else format(limit, 'g')}"
