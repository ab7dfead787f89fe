"""Rows of any kind and format as examples: an instruction or a chat, and its references.

Every error about a row names its file and line. What was read is said in one line (``LoadedExamples.description``):
the kind of rows, the columns that are used, those that are not, and those that are absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from megadistill.config.data import DataSection
from megadistill.data.chats import Chat, text_of, type_name
from megadistill.data.columns import (
    FieldNames,
    RowKind,
    expected_columns,
    name_list,
    nearest_column,
    recognize,
)
from megadistill.data.readers import BadRow, read_rows
from megadistill.errors import DataError, settings_of
from megadistill.files import did_you_mean


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        id: Number of the row, from 0.
        instruction: The instruction; of a chat, its last user turn.
        input: Its input; empty for none.
        references: The reference answers; empty for a row with a prompt only.
        where: FILE:LINE, for messages.
        chat: The chat, where the row is one.
        row: The row as it was read; empty unless that was asked for.
    """

    id: int
    instruction: str
    input: str
    references: tuple[str, ...]
    where: str = field(default="", compare=False)
    chat: Chat | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class LoadedExamples:
    """Usable rows in file order, and one message per skipped row.

    ``Example.id`` counts bad rows, too: a row has the same id whether or not others are skipped.

    Attributes:
        examples: The usable rows.
        skipped: What is wrong with each of the others.
        description: One line: what kind of rows they are, and which columns are used, not used, and absent.
    """

    examples: list[Example]
    skipped: list[str]
    description: str = ""

    @property
    def are_chats(self) -> bool:
        """Whether one of the rows is a chat."""
        return any(example.chat is not None for example in self.examples)


def load_examples(
    path: str | Path,
    *,
    fields: FieldNames | None = None,
    split: str = "train",
    config_name: str | None = None,
    skip_bad_rows: bool = False,
    prompts_only: bool = False,
    keep_rows: bool = False,
) -> LoadedExamples:
    """Reads every row of a local file (by suffix), a local ``datasets`` folder, or a hub data set.

    Args:
        path: A file, a folder or a hub name.
        fields: Names of the columns; by default rows of several kinds are recognized (``data/columns.py``).
        split: Split of a folder or a hub data set.
        config_name: Configuration (subset) of a hub data set.
        skip_bad_rows: Count malformed rows instead of stopping at the first.
        prompts_only: References are not needed: a column that seems to hold them may have any name.
        keep_rows: Keep the rows as they were read, in ``Example.row``.

    Raises:
        DataError: The file is missing, unreadable or has no usable row; a row is malformed, empty or of wrong types
            and ``skip_bad_rows`` is false; or a column seems to have another name than the one that is read.
    """
    return ExampleStream(
        str(path),
        fields=fields,
        split=split,
        config_name=config_name,
        skip_bad_rows=skip_bad_rows,
        prompts_only=prompts_only,
        keep_rows=keep_rows,
    ).load()


def read_examples(path: str | Path, data: DataSection, *, prompts_only: bool = False) -> LoadedExamples:
    """``load_examples`` as the section ``data`` of a configuration says.

    Args:
        path: A file, a folder or a hub name.
        data: How it is read.
        prompts_only: Its references are not used.

    Raises:
        DataError: As ``load_examples``.
    """
    return stream_examples(path, data, prompts_only=prompts_only).load()


def stream_examples(
    path: str | Path, data: DataSection, *, prompts_only: bool = False, kind: RowKind | None = None
) -> ExampleStream:
    """The examples of ``read_examples``, one after the other; ``kind``: what rows before the first are known to be."""
    return ExampleStream(
        str(path),
        fields=FieldNames(data.instruction_field, data.input_field, data.output_field),
        split=data.hub_split,
        config_name=data.hub_config,
        skip_bad_rows=data.skip_bad_rows,
        prompts_only=prompts_only,
        kind=kind,
    )


class ExampleStream:
    """Reads the rows of a source one after the other; the arguments and the errors are those of ``load_examples``.

    Attributes:
        skipped: What is wrong with each row that was left out so far.
        num_examples: Usable rows so far.
        are_chats: Whether one of them is a chat.
    """

    def __init__(
        self,
        path: str,
        *,
        fields: FieldNames | None = None,
        split: str = "train",
        config_name: str | None = None,
        skip_bad_rows: bool = False,
        prompts_only: bool = False,
        keep_rows: bool = False,
        kind: RowKind | None = None,
    ) -> None:
        self.skipped: list[str] = []
        self.num_examples, self.are_chats = 0, False
        self._path, self._split, self._config_name, self._skips = path, split, config_name, skip_bad_rows
        self._reader = _Reader(path, fields or FieldNames(), prompts_only, keep_rows, kind)

    def __iter__(self) -> Iterator[Example]:
        yield from self.examples(read_rows(self._path, self._split, self._config_name))
        self.check()

    def examples(self, rows: Iterable[tuple[str, Any]], first_id: int = 0) -> Iterator[Example]:
        """The examples of some rows of the source, as ``read_rows`` yields them; ``first_id``: number of the first."""
        reader = self._reader
        for row_id, (where, row) in enumerate(rows, start=first_id):
            try:
                example = reader.example(row, row_id, where)
            except BadRow as error:
                message = f"{where}: {error}"
                if not self._skips:
                    # Where no row fits, skipping bad ones would leave nothing.
                    advice = "data.skip_bad_rows" if reader.kind is not None else None
                    raise DataError(message, setting=settings_of(error.setting, advice)) from None
                self.skipped.append(message)
                continue
            self.num_examples += 1
            self.are_chats |= example.chat is not None
            yield example

    def load(self) -> LoadedExamples:
        """All examples at once."""
        examples = list(self)
        return LoadedExamples(examples, self.skipped, self.description())

    def starts_with_chat(self) -> bool:
        """Whether the first usable row is a chat; reads it."""
        return next(iter(self)).chat is not None

    @property
    def kind(self) -> RowKind | None:
        """The kind of the rows that were read."""
        return self._reader.kind

    def seen(self) -> dict[str, Any]:
        """What the rows so far had, as JSON: what ``add`` takes."""
        return {
            "examples": self.num_examples, "are_chats": self.are_chats, "skipped": len(self.skipped),
            "first_skipped": self.skipped[:1], **self._reader.seen(),
        }  # fmt: skip

    def add(self, seen: Mapping[str, Any]) -> None:
        """Takes what another stream has seen of the same source, in later rows; the first bad one stands for all."""
        self.num_examples += seen["examples"]
        self.are_chats |= seen["are_chats"]
        self.skipped += seen["first_skipped"] * seen["skipped"]
        self._reader.add(seen)

    def description(self) -> str:
        """What was read, in one line; after the last row."""
        return self._reader.description(self.num_examples)

    def check(self) -> None:
        """Refuses a source that has no usable row, or columns that seem to have other names; after the last row.

        Raises:
            DataError: It is so.
        """
        path, skipped = self._path, self.skipped
        if not self.num_examples:
            if skipped and self._reader.kind is None and self._reader.has_objects:
                raise DataError(skipped[0], setting="data.instruction_field")
            reason = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "it has no rows"
            raise DataError(f"{path}: no usable row: {reason}")
        self._reader.check_columns()


class _Reader:
    """Makes examples of one source, and knows which columns it has seen.

    Attributes:
        kind: The kind of its rows, that of the first row that has one.
    """

    def __init__(
        self, path: str, fields: FieldNames, prompts_only: bool, keeps_rows: bool, kind: RowKind | None
    ) -> None:
        self.kind = kind
        self._path, self._fields = path, fields
        self._prompts_only, self._keeps_rows = prompts_only, keeps_rows
        self._seen: dict[str, None] = {}  # an ordered set
        self._has_references = False
        self._reads_answers = False

    @property
    def has_objects(self) -> bool:
        """Whether one of the rows was an object with columns."""
        return bool(self._seen)

    def example(self, row: Any, row_id: int, where: str) -> Example:
        """The example of a row. Raises BadRow."""
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
            row = {"messages": row}  # a chat without an object around it
        if not isinstance(row, dict):
            raise BadRow(f"a row must be an object with the field {self._fields.instruction!r}, not {type_name(row)}")
        self._seen |= dict.fromkeys(str(key) for key in row)
        kind = self.kind or recognize(row, self._fields)
        if kind is None:
            raise self._no_prompt(row)
        if kind.prompt not in row:
            raise BadRow(
                f"field {kind.prompt!r} is missing (fields: {name_list(map(str, row)) or 'none'})"
                f"{did_you_mean(kind.prompt, map(str, row))}",
                setting=self._setting("instruction"),
            )
        if self._keeps_rows:
            _check_characters(row)
        # A table of pandas has NaN where a value is absent.
        given = {key: None if isinstance(value, float) and isnan(value) else value for key, value in row.items()}
        self.kind = kind  # before the row is parsed: the next rows have the same columns even where this one is bad
        content = kind.parse(given, kind)
        # A call of a tool is a reference, too.
        is_answered = content.chat is not None and content.chat.reply is not None
        self._has_references |= is_answered or bool(content.references)
        self._reads_answers |= not content.has_own_answer
        kept = row if self._keeps_rows else {}
        return Example(row_id, content.instruction, content.input, content.references, where, content.chat, kept)

    def seen(self) -> dict[str, Any]:
        """What the columns had, as JSON."""
        return {
            "columns": list(self._seen), "has_references": self._has_references, "reads_answers": self._reads_answers,
        }  # fmt: skip

    def add(self, seen: Mapping[str, Any]) -> None:
        """Takes what later rows had."""
        self._seen |= dict.fromkeys(seen["columns"])
        self._has_references |= seen["has_references"]
        self._reads_answers |= seen["reads_answers"]

    def check_columns(self) -> None:
        """Refuses a source where a part is absent and another column seems to hold it.

        Raises:
            DataError: So it is, or no row has a column that the user named.
        """
        assert self.kind is not None
        for part, is_needed in (("input", True), ("output", not self._prompts_only)):
            name = getattr(self._fields, part)
            known = self.kind.answer if part == "output" else self.kind.inputs
            if not self._is_instruction() or self._seen.keys() & set(known):
                continue
            if name != getattr(FieldNames(), part) and is_needed:
                raise DataError(f"{self._path}: no row has a field {name!r}", setting=self._setting(part))
            near = nearest_column(part, self._unused())
            if near is not None and is_needed:
                raise DataError(
                    f"{self._path}: no row has a field {name!r} (fields: {name_list(self._seen)}); "
                    f"did you mean {near}?",
                    setting=self._setting(part),
                )

    def description(self, num_rows: int) -> str:
        """What was read, in one line."""
        assert self.kind is not None
        parts = [f"{self._path}: {num_rows} {self.kind.name} ({', '.join(self._used())})"]
        if unused := self._unused():
            parts.append(f"{'copied' if self._keeps_rows else 'not used'}: {name_list(unused)}")
        if not self._has_references and not self._prompts_only:
            parts.append("no references")
        return "; ".join(parts)

    def _is_instruction(self) -> bool:
        return self.kind is not None and self.kind.prompt == self._fields.instruction

    def _used(self) -> list[str]:
        assert self.kind is not None
        ignored = self.kind.answer if self._prompts_only or not self._reads_answers else ()
        return [name for name in self.kind.used(self._seen) if name not in ignored]

    def _unused(self) -> list[str]:
        used = self._used()
        return [name for name in self._seen if name not in used]

    def _setting(self, part: str) -> str:
        return self._fields.setting_of(part)

    def _no_prompt(self, row: Mapping[Any, Any]) -> BadRow:
        names = [str(key) for key in row]
        wanted = self._fields.instruction
        allowed = "" if self._fields != FieldNames() else f"; rows may have {expected_columns()}"
        near = nearest_column("instruction", names) or ""
        hint = f"; did you mean {near}?" if near else did_you_mean(wanted, names)
        return BadRow(
            f"field {wanted!r} is missing (fields: {name_list(names) or 'none'}){allowed}{hint}",
            setting=self._setting("instruction"),
        )


def _check_characters(row: Mapping[Any, Any]) -> None:
    """Refuses a row that could not be written again: broken bytes of a CSV, halves of characters in JSON."""
    for name, value in row.items():
        text_of(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), str(name))
