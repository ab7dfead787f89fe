"""Prepared rows: tokenized once into files that all processes map (``data/row_file.py``), and found again by key.

The key is a checksum of what the rows depend on: the content of the file, the tokenizer, the template, the limits, and
the names of the columns. A set appears in the cache folder as a whole, under its key, when it is complete; one process
makes it while the others that want it wait, and takes over where that one dies.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.config.data import DataSection
from megadistill.data.dataset import ExampleStream, stream_examples
from megadistill.data.encode import RowTokenizer, check_settings, nothing_left, open_template
from megadistill.data.fingerprint import tokenizer_fingerprint
from megadistill.data.prompts import AUTO, CHAT, PromptSettings, choose_template, read_chat_template
from megadistill.data.readers import rows_file
from megadistill.data.row_file import ENTRY, FORMAT, INDEX, MappedRows, pack, part_name
from megadistill.errors import ConfigError, DataError
from megadistill.files import checksum, content_digest, os_errors_as, write_json
from megadistill.observability.lock import try_lock
from megadistill.observability.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "rows.json"
_BATCH_ROWS, _POLL_S, _SAY_EVERY_S = 4096, 0.2, 10.0


@dataclass(frozen=True)
class PreparedRows:
    """A set of rows, and what happened while it was made.

    Attributes:
        rows: The rows.
        counts: Rows "skipped" and "dropped", prompts "truncated", responses "cut", rows "without_reference".
        description: One line about what was read.
        end_id: The token that ends a reference.
    """

    rows: MappedRows
    counts: dict[str, int]
    description: str
    end_id: int


class _ChatFound(Exception):
    """A row is a chat, and ``auto`` was taken for a template for instructions."""


class RowStore:
    """Sets of prepared rows in a folder.

    Args:
        data: The section ``data``; its ``cache_dir`` is the folder.
        tokenizer: One from ``load_tokenizer``.
        rank: Rank 0 says what is going on.
    """

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase, rank: int = 0) -> None:
        assert data.cache_dir is not None
        self._folder, self._data, self._tokenizer = Path(data.cache_dir), data, tokenizer
        self._log = get_logger(rank, "data")

    def prepared(self, paths: dict[str, str]) -> tuple[str, dict[str, PreparedRows]]:
        """The rows of several files with one template, made where they are missing.

        Args:
            paths: Name -> file; of "prompts", references are not needed.

        Returns:
            The template, and the rows under the same names.

        Raises:
            ConfigError: The template cannot be used.
            DataError: A file cannot be used.
        """
        settings = PromptSettings.of(self._data)
        check_settings(settings, self._tokenizer)
        streams = {name: (lambda n=name, p=path: stream_examples(p, self._data, prompts_only=n == "prompts"))
                   for name, path in paths.items()}  # fmt: skip
        are_chats = settings.template == AUTO and any(stream().starts_with_chat() for stream in streams.values())
        while True:
            chosen = replace(settings, template=choose_template(settings, self._tokenizer, are_chats))
            may_be_chats = settings.template != AUTO or are_chats
            try:
                return chosen.template, {
                    name: self._one(paths[name], stream, chosen, may_be_chats, name == "prompts")
                    for name, stream in streams.items()
                }
            except _ChatFound:
                are_chats = True

    def _one(
        self, path: str, stream: Any, settings: PromptSettings, may_be_chats: bool, prompts_only: bool
    ) -> PreparedRows:
        prefix = rows_file(path, self._data.hub_split)
        if prefix is None:
            raise ConfigError(
                f"{path}: rows are prepared from files alone, or from a folder with a file named after the split; "
                "without a cache folder, any folder and hub data sets are read",
                setting="data.cache_dir",
            )
        with os_errors_as(DataError, prefix, "cannot be read"):
            key = checksum([self._depends_on(prefix, settings, prompts_only)])
        folder = self._folder / key
        if not (folder / MANIFEST).is_file():
            with os_errors_as(DataError, self._folder), self._lock(key, path):
                if not (folder / MANIFEST).is_file():  # nobody has made it meanwhile
                    self._make(folder, path, stream(), settings, may_be_chats, str(prefix))
        return self._opened(folder, path, str(prefix), may_be_chats)

    def _depends_on(self, file: Path, settings: PromptSettings, prompts_only: bool) -> dict[str, Any]:
        data = self._data
        with file.open("rb") as opened:
            content = content_digest(opened)
        template = None
        if settings.template == CHAT:
            template = read_chat_template(settings.chat_template) or self._tokenizer.chat_template
        return {
            "format": FORMAT,
            "content": content,
            "name": "".join(file.suffixes).lower(),
            "columns": [data.instruction_field, data.input_field, data.output_field, prompts_only],
            "settings": asdict(settings),
            "chat_template": template,
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "libraries": [version("tokenizers"), version("transformers")],
        }

    def _opened(self, folder: Path, path: str, prefix: str, may_be_chats: bool) -> PreparedRows:
        with os_errors_as(DataError, folder, "cannot be read"):
            known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in known["sizes"]}
        if sizes != known["sizes"]:
            raise DataError(f"{folder}: the prepared rows are incomplete; remove the folder", setting="data.cache_dir")
        if known["are_chats"] and not may_be_chats:
            raise _ChatFound
        description = f"{path}{known['description']}"
        return PreparedRows(MappedRows(folder, prefix), known["counts"], description, known["end_id"])

    def _make(
        self, folder: Path, path: str, stream: ExampleStream, settings: PromptSettings, may_be_chats: bool, prefix: str
    ) -> None:
        began, template = time.monotonic(), open_template(settings, self._tokenizer, may_be_chats)
        work = RowTokenizer(self._tokenizer, settings, template)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        index: list[np.ndarray] = []
        offset, said = 0, 0.0
        with ExitStack() as files:
            files.callback(shutil.rmtree, partial, ignore_errors=True)  # what failed leaves nothing behind
            records = files.enter_context((partial / part_name(0)).open("wb"))
            for batch in stream.batches(_BATCH_ROWS):
                if not may_be_chats and stream.are_chats:
                    raise _ChatFound
                entries = []
                for row in work.rows(batch):
                    record, entry = pack(row, 0, offset, prefix)
                    records.write(record)
                    offset += len(record)
                    entries.append(entry)
                index.append(np.array(entries, ENTRY))
                if time.monotonic() - began > said + _SAY_EVERY_S:
                    said = time.monotonic() - began
                    self._log.info(f"{path}: {stream.num_examples} rows prepared in {said:.0f} s")
            table = np.concatenate(index)
            if not len(table):
                first = work.skipped[0] if work.skipped else ""
                raise nothing_left(first, len(work.skipped), stream.num_examples, settings)
            records.close()
            np.save(partial / INDEX, table)
            write_json(partial / MANIFEST, {
                "sizes": {name: (partial / name).stat().st_size for name in (part_name(0), INDEX)},
                "counts": {
                    "skipped": len(stream.skipped) + len(work.skipped), **work.counts,
                    "without_reference": int((table["response"] < 0).sum()),
                },
                "are_chats": stream.are_chats,
                "description": stream.description().removeprefix(path),
                "end_id": template.end_id,
            })  # fmt: skip
            partial.rename(folder)

    @contextmanager
    def _lock(self, key: str, path: str) -> Iterator[None]:
        """Waits while another process makes this set; released when that process ends, however it ends."""
        self._folder.mkdir(parents=True, exist_ok=True)
        began, said = time.monotonic(), 0.0
        with (self._folder / f"{key}.lock").open("a+") as file:
            while not try_lock(file):
                time.sleep(_POLL_S)
                if (waited := time.monotonic() - began) > said + _SAY_EVERY_S:
                    said = waited
                    self._log.info(f"{path}: waiting for the process that prepares its rows, {waited:.0f} s")
            yield
