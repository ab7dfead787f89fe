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


def nearest_sibling(unknown: str, cutoff: float) -> str | None:
    """The key of the section of ``unknown`` that is spelled most like it; None where none is ``cutoff`` like it."""
    section, _, name = unknown.rpartition(".")
    by_name = {key.rpartition(".")[2]: key for key, _ in walk() if key.rpartition(".")[0] == section}
    close = nearest(name, by_name, cutoff)
    return by_name[close] if close else None


def nearest_key(unknown: str) -> str | None:
    """The valid key that ``unknown`` most likely means; None where none is near.

    First the same words (``model.student_path``), then a very near spelling in the same section, the same name in
    another section, a near spelling in the same section, and last the nearest spelling.
    """
    keys = [key for key, _ in walk()]
    unknown = unknown.lstrip("-")
    words = f".{unknown}".replace(".", "_")
    if len(same := [key for key in keys if f".{key}".replace(".", "_").endswith(words)]) == 1:
        return same[0]
    if close := nearest_sibling(unknown, 0.85):
        return close
    name = unknown.rpartition(".")[2]
    if same := [key for key in keys if key.rpartition(".")[2] == name]:
        return nearest(unknown, same, cutoff=0.0)
    if close := nearest_sibling(unknown, 0.7):
        return close
    if close := nearest(unknown, keys):
        return close
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = nearest(name, by_name)
    return by_name[close] if close else None
