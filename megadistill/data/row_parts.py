"""Makes a set of prepared rows, part by part, in as many processes as want it.

A part is a range of rows of the source. A process takes the next part that nobody has made or holds, by a lock that
ends with its process, so that processes of one or several machines share the work without talking to one another, and
what a killed process has finished is kept. The files do not depend on who made them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from megadistill.config.data import DataSection
from megadistill.data.dataset import ExampleStream
from megadistill.data.encode import RowTokenizer, nothing_left, open_template
from megadistill.data.prompts import PromptSettings
from megadistill.data.readers import Rows, Start, read_rows
from megadistill.data.row_file import ENTRY, INDEX, pack, part_name
from megadistill.data.row_sources import Content, RowSource, part_rows
from megadistill.errors import DataError, MegadistillError
from megadistill.files import write_atomically, write_json
from megadistill.observability.lock import try_lock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "rows.json"
_CHATS = "chats"
_BATCH_ROWS, _POLL_S = 512, 0.2
# Called often while rows are made, with the source, the rows that are done, and their number where it is known. What it
# raises ends the work; finished parts are kept.
Watch = Callable[[str, int, int | None], None]


class ChatFound(Exception):
    """A row is a chat, and ``auto`` was taken for a template for instructions."""


class RowSetMaker:
    """Makes one set.

    Args:
        folder: Where it appears when it is complete.
        source: What it is made from.
        content: What that held when the folder got its name.
        data: How the source is read.
        stream: ``stream(kind=...)`` makes a stream of the source's examples.
        tokenizer: One from ``load_tokenizer``.
        settings: Template and limits.
        may_be_chats: Whether chats are expected.
        watch: Is told what is done.
    """

    def __init__(
        self,
        folder: Path,
        source: RowSource,
        content: Content,
        data: DataSection,
        stream: Callable[..., ExampleStream],
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptSettings,
        may_be_chats: bool,
        watch: Watch,
    ) -> None:
        self._folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        self._source, self._content, self._data, self._stream = source, content, data, stream
        self._tokenizer, self._settings, self._may_be_chats, self._watch = tokenizer, settings, may_be_chats, watch
        self._signature = source.signature()
        self._template = open_template(settings, tokenizer, may_be_chats)
        first = stream()
        first.starts_with_chat()
        self._kind = first.kind
        self._states: dict[int, dict[str, Any]] = {}
        self._cursor: tuple[Rows, int] | None = None

    def run(self) -> None:
        """Works until the set is complete, whoever completes it.

        Raises:
            DataError: The source cannot be used.
            ChatFound: It has a chat, and none is expected.
            OSError: The folder cannot be written.
        """
        while not (self._folder / MANIFEST).is_file():
            try:
                self._partial.mkdir(parents=True, exist_ok=True)
                if not self._make_parts():
                    self._tell(0)  # others hold the rest
                    time.sleep(_POLL_S)
                elif not self._join():
                    time.sleep(_POLL_S)
            except FileNotFoundError:
                if self._partial.is_dir():
                    raise
                self._states.clear()  # another process has completed or removed it
            except MegadistillError:
                shutil.rmtree(self._partial, ignore_errors=True)  # nothing can come of it
                raise
        total = self._content.num_rows
        self._watch(self._source.path, total or sum(state["read"] for state in self._states.values()), total)

    def _make_parts(self) -> bool:
        """Makes what nobody else holds; whether all parts are there."""
        number, has_all = 0, True
        while not self._is_behind_the_end(number):
            self._find_states()
            if number not in self._states:
                with self._claimed(number) as is_mine:
                    if not is_mine:
                        has_all = False
                    elif not self._file(number, "json").is_file():
                        self._make(number)
            number += 1
        self._find_states()
        return has_all and all(each in self._states for each in range(number))

    def _is_behind_the_end(self, number: int) -> bool:
        if self._content.num_rows is not None:
            return part_rows(number).start >= self._content.num_rows
        return any(each < number and state["read"] < len(part_rows(each)) for each, state in self._states.items())

    def _find_states(self) -> None:
        for file in self._partial.iterdir():
            if file.name == _CHATS and not self._may_be_chats:
                raise ChatFound
            if (
                file.suffix == ".json"
                and file.stem.startswith("part_")
                and (at := int(file.stem[5:])) not in self._states
            ):
                self._states[at] = json.loads(file.read_text(encoding="utf-8"))

    def _file(self, number: int, suffix: str) -> Path:
        return (self._partial / part_name(number)).with_suffix(f".{suffix}")

    @contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        with self._file(number, "lock").open("a") as file:
            yield try_lock(file)

    def _tell(self, here: int) -> None:
        self._watch(
            self._source.path, sum(state["read"] for state in self._states.values()) + here, self._content.num_rows
        )

    def _rows(self, number: int) -> Rows:
        """The source's rows of a part."""
        wanted = part_rows(number)
        where = (self._source.path, self._data.hub_split, self._data.hub_config)
        if self._source.seeks:
            starts = self._content.starts
            start = Start(wanted.start, starts[number] if number < len(starts) else None)
            yield from islice(read_rows(*where, start), len(wanted))
            return
        if self._cursor is None or self._cursor[1] > wanted.start:
            self._cursor = (read_rows(*where), 0)
        rows, at = self._cursor
        for _ in islice(rows, wanted.start - at):
            at += 1
        for row in islice(rows, wanted.stop - at):
            at += 1
            yield row
        self._cursor = (rows, at)

    def _make(self, number: int) -> None:
        stream, work = self._stream(kind=self._kind), RowTokenizer(self._tokenizer, self._settings, self._template)
        read, offset, entries = 0, 0, []
        temporary = [self._file(number, f"{suffix}.{uuid4().hex[:8]}") for suffix in ("bin", "npy")]

        def counted() -> Rows:
            nonlocal read
            for row in self._rows(number):
                read += 1
                yield row

        examples = stream.examples(counted(), part_rows(number).start)
        try:
            with temporary[0].open("wb") as records:
                while batch := list(islice(examples, _BATCH_ROWS)):
                    if stream.are_chats and not self._may_be_chats:
                        self._say_chats()
                    for row in work.rows(batch):
                        record, entry = pack(row, number, offset, self._source.prefix)
                        records.write(record)
                        offset += len(record)
                        entries.append(entry)
                    self._tell(read)
            with temporary[1].open("wb") as table:
                np.save(table, np.array(entries, ENTRY))
            if self._source.signature() != self._signature:
                raise DataError(
                    f"{self._source.prefix} was changed while its rows were prepared; rerun the same command"
                )
            temporary[0].replace(self._file(number, "bin"))
            temporary[1].replace(self._file(number, "npy"))
        finally:
            for each in temporary:
                each.unlink(missing_ok=True)
        unusable = {"unusable": len(work.skipped), "first_unusable": work.skipped[:1]}
        write_json(self._file(number, "json"), {"read": read, **stream.seen(), **unusable, "counts": work.counts})

    def _say_chats(self) -> None:
        """Tells all processes that work on this set that it is none."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(exist_ok=True)
        write_atomically(self._partial / _CHATS, "")
        raise ChatFound

    def _join(self) -> bool:
        """Makes the parts a set, unless another process does so already."""
        with (self._folder.parent / f"{self._folder.name}.lock").open("a") as lock:
            if not try_lock(lock):
                return False
            if (self._folder / MANIFEST).is_file():
                return True
            numbers = [at for at in sorted(self._states) if not self._is_behind_the_end(at)]
            states = [self._states[at] for at in numbers]
            merged = self._stream(kind=self._kind)
            for state in states:
                merged.add(state)
            merged.check()
            table = np.concatenate([np.load(self._file(at, "npy")) for at in numbers])
            unusable = sum(state["unusable"] for state in states)
            if not len(table):
                first = next((message for state in states for message in state["first_unusable"]), "")
                raise nothing_left(first, unusable, merged.num_examples, self._settings)
            index = self._partial / f"{INDEX}.{uuid4().hex[:8]}"
            with index.open("wb") as opened:
                np.save(opened, table)
            index.replace(self._partial / INDEX)
            names = [INDEX, *(part_name(at) for at in numbers)]
            counts = {key: sum(state["counts"][key] for state in states) for key in states[0]["counts"]}
            write_json(self._partial / MANIFEST, {
                "sizes": {name: (self._partial / name).stat().st_size for name in names},
                "counts": {
                    "skipped": len(merged.skipped) + unusable, **counts,
                    "without_reference": int((table["response"] < 0).sum()),
                },
                "are_chats": merged.are_chats,
                "description": merged.description().removeprefix(self._source.path),
                "end_id": self._template.end_id,
            })  # fmt: skip
            self._partial.rename(self._folder)
            for file in self._folder.iterdir():
                if file.name not in (*names, MANIFEST):
                    with suppress(OSError):
                        file.unlink()
        return True
