"""Writes docs/configuration.md's tables and configs/base.yaml from the schema, docs/coming_from.md's from aliases.py.

    python -m megadistill.config.reference    # from the repository root, after a change in schema.py or aliases.py

A test fails while they differ.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from megadistill.config.aliases import TABLES
from megadistill.config.fields import walk
from megadistill.config.section import allowed, section_type

MARK = "<!-- From here on: written by python -m megadistill.config.reference -->"
BASE_HEADER = """\
# Every key with its default and what it means: a reference, and the `base:` of the other files here.
# Written by python -m megadistill.config.reference; docs/configuration.md has the allowed values.
# Hardware: any. It is a base, not a run: a run adds at least run.dir and model.student.path:
#   base: base.yaml
#   run: {dir: runs/mine}
#   model: {student: {path: FOLDER}, teacher: {path: FOLDER}}
#   data: {train_path: FILE}
# and starts with: deepspeed launchers/run.sh --config configs/mine.yaml [section.field=value ...]
"""


def reference_markdown() -> str:
    """One table for each section, in the order of the schema."""
    lines: list[str] = []
    for key, field in walk():
        if section_type(field) is not None:
            keys = [(name, leaf) for name, leaf in walk() if _is_leaf_of(name, leaf, key)]
            lines += [f"\n## {key}\n", f"{field.description}\n"]
            if keys:
                lines += ["| key | default | allowed | meaning |", "|---|---|---|---|"]
                lines += [_row(name, leaf) for name, leaf in keys]
    return "\n".join(lines) + "\n"


def coming_from_markdown() -> str:
    """One table for each other trainer: its settings, ours, and what differs."""
    lines: list[str] = []
    for title, rows in TABLES.items():
        lines += [f"\n## {title}\n", "| there | here | |", "|---|---|---|"]
        for row in rows:
            keys = ", ".join(f"`{key}`" for key in row.keys)
            lines.append(f"| `{row.name}` | {keys} | {row.word.replace('|', 'or')} |")
    return "\n".join(lines) + "\n"


def base_yaml() -> str:
    """The whole tree with its defaults; keys without one are comments."""
    return BASE_HEADER + "".join(_yaml_lines())


def _yaml_lines() -> Iterator[str]:
    for key, field in walk():
        name, depth = key.rpartition(".")[2], key.count(".")
        indent = "  " * depth
        if section_type(field) is not None:
            yield f"{'' if depth else chr(10)}{indent}{name}:  # {field.description}\n"
            continue
        setting = f"# {name}: REQUIRED" if field.is_required() else f"{name}: {_yaml(field.default)}"
        yield f"{indent}{setting}  # {field.description}\n"


def _is_leaf_of(name: str, field: FieldInfo, section: str) -> bool:
    return section_type(field) is None and name.rpartition(".")[0] == section


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return f"| `{name}` | {default} | {allowed(field).replace('|', 'or')} | {field.description} |"


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(plain, float):
        return repr(plain) if "e" not in repr(plain) else f"{plain:.1e}"
    return yaml.safe_dump(plain, default_flow_style=True).strip().removesuffix("...").strip()


def main(root: Path = Path()) -> None:
    """Rewrites the three files below the repository root ``root``."""
    for name, tables in (("configuration.md", reference_markdown()), ("coming_from.md", coming_from_markdown())):
        page = root / "docs" / name
        head = page.read_text(encoding="utf-8").partition(MARK)[0]
        page.write_text(head + MARK + "\n" + tables, encoding="utf-8")
    (root / "configs/base.yaml").write_text(base_yaml(), encoding="utf-8")


if __name__ == "__main__":
    main()
