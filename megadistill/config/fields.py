"""Every dotted key of a run's configuration, and the one that was meant."""

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from megadistill.config.schema import RunConfig
from megadistill.config.section import Section, section_type
from megadistill.files import nearest


def walk(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, sections before their keys."""
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key, field
        inner = section_type(field)
        if inner is not None:
            yield from walk(inner, key + ".")


def nearest_key(unknown: str) -> str | None:
    """The valid key that ``unknown`` most likely means; None where none is near.

    First a near spelling in the same section, then the same name in another section, then the nearest spelling.
    """
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
