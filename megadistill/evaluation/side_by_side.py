"""Answers of several models to the same rows side by side: as text for a terminal, as Markdown, as JSON lines."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadistill.observability.log import printable

# Characters of a column below which models stand one below the other.
_NARROWEST = 24
_BETWEEN = " | "
_LEFT_OUT = "(no answer: the row does not fit this model's limits or template)"
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")


@dataclass(frozen=True)
class Compared:
    """One row and what each model answered.

    Attributes:
        id: What the row has as its id, else its number.
        question: What was asked: the instruction with its input, or the last turn of the user.
        responses: Name of a model -> its answer; None where the row was left out for it.
        references: Answers of the data set.
        row: The columns of the row.
        prompts: Name of a model -> what it read.
    """

    id: Any
    question: str
    responses: Mapping[str, str | None]
    references: Sequence[str] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Whether all models gave the same answer."""
        return len(set(self.responses.values())) == 1 and None not in self.responses.values()

    def cells(self) -> dict[str, str]:
        """Column -> text; the reference is a column of its own where there is one."""
        cells = {name: _LEFT_OUT if text is None else text for name, text in self.responses.items()}
        return {**({"reference": self.references[0]} if self.references else {}), **cells}


def summary(rows: Sequence[Compared]) -> str:
    """How many answers are the same, in one line."""
    return f"{sum(row.is_same for row in rows)} of {len(rows)} answers are the same"


def as_text(rows: Sequence[Compared], width: int) -> str:
    """A block for each row, at most ``width`` columns of a terminal wide.

    Models stand side by side where each gets 24 columns, else one below the other.
    """
    lines: list[str] = []
    for row in rows:
        lines += wrapped(f"[{row.id}] {row.question}", width)
        names, texts = list(row.cells()), list(row.cells().values())
        of_each = (width - len(_BETWEEN) * (len(names) - 1)) // len(names)
        if of_each >= _NARROWEST:
            columns = [[*wrapped(name, of_each), "-" * of_each, *wrapped(text, of_each)]
                       for name, text in zip(names, texts, strict=True)]  # fmt: skip
            height = max(map(len, columns))
            columns = [[*column, *[""] * (height - len(column))] for column in columns]
            lines += [_BETWEEN.join(_padded(cell, of_each) for cell in cells).rstrip() for cells in zip(*columns)]  # noqa: B905
        else:
            for name, text in zip(names, texts, strict=True):
                lines += [*wrapped(f"{name}:", width), *(f"  {line}" for line in wrapped(text, width - 2))]
        lines.append("")
    return "\n".join([*lines, summary(rows)])


def as_markdown(rows: Sequence[Compared]) -> str:
    """One table; the text of models is shown as it is, never as Markdown or HTML."""
    names = list(dict.fromkeys(name for row in rows for name in row.cells()))
    lines = [["", "prompt", *names], ["---"] * (len(names) + 2)]
    lines += [[str(row.id), row.question, *(row.cells().get(name, "") for name in names)] for row in rows]
    table = ["| " + " | ".join(map(_markdown, cells) if i != 1 else cells) + " |" for i, cells in enumerate(lines)]
    return "\n".join([*table, "", summary(rows)])


def as_json_lines(rows: Sequence[Compared]) -> str:
    """The columns of each row, ``prompts`` and ``responses`` by model, and whether the answers are the same."""
    return "\n".join(
        json.dumps(
            {"id": row.id, **row.row, "prompts": row.prompts, "responses": row.responses, "same": row.is_same},
            ensure_ascii=False,
        )
        for row in rows
    )


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns of a terminal, broken at blanks where that is possible; at least one."""
    lines = []
    for paragraph in printable(text.replace("\t", "    ")).split("\n"):
        line = ""
        for word in re.findall(r"\s+|\S+", paragraph):
            if _columns(line + word) <= width:
                line += word
                continue
            if line.strip():
                lines.append(line.rstrip())
            line = "" if word.isspace() else word
            while _columns(line) > width:
                count = next((n for n in range(1, len(line) + 1) if _columns(line[:n]) > width), len(line)) - 1
                count = max(1, count)
                lines.append(line[:count])
                line = line[count:]
        lines.append(line.rstrip())
    return lines


def _columns(text: str) -> int:
    """Columns that a terminal shows a text in: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )  # fmt: skip


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", html.escape(printable(text), quote=False)).replace("\n", "<br>")
