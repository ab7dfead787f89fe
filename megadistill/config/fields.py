"""What a key may hold, in words: for error messages, command-line options and docs/configuration.md."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megadistill.config.schema import RunConfig, Section
from megadistill.files import nearest

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def section_type(field: FieldInfo) -> type[Section] | None:
    """The section class behind a field, None for a leaf."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def walk(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, sections before what is in them."""
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key, field
        inner = section_type(field)
        if inner is not None:
            yield from walk(inner, key + ".")


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
        return f"a list of {'any length' if many else len(args)}, each {describe(args[0])}"
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


def nearest_key(unknown: str) -> str | None:
    """The valid key that `unknown` most likely means: the same name in another section, else the closest spelling."""
    keys = [key for key, _ in walk()]
    section, _, name = unknown.lstrip("-").rpartition(".")
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    by_name = {key.rpartition(".")[2]: key for key in reversed(siblings)}
    if close := nearest(name, by_name, cutoff=0.7):
        return by_name[close]
    if same := [key for key in keys if key.rpartition(".")[2] == name]:
        return nearest(unknown, same, cutoff=0.0)
    if close := nearest(unknown, keys):
        return close
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = nearest(name, by_name)
    return by_name[close] if close else None
