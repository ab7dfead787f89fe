"""Prepared rows: tokenized once into files that all processes map (``data/row_file.py``), and found again by key.

The key is a checksum of what the rows depend on: the content of the source, the tokenizer, the template, the limits,
and the names of the columns. A set appears in the cache folder as a whole, under its key, when it is complete; the
processes that want it make it together (``data/row_parts.py``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.config.data import DataSection
from megadistill.data.dataset import ExampleStream, stream_examples
from megadistill.data.encode import check_settings
from megadistill.data.fingerprint import tokenizer_fingerprint
from megadistill.data.prompts import AUTO, CHAT, PromptSettings, choose_template, read_chat_template
from megadistill.data.row_file import FORMAT, MappedRows
from megadistill.data.row_parts import MANIFEST, ChatFound, RowSetMaker, Watch
from megadistill.data.row_sources import PART_ROWS, RECORDS, RowSource
from megadistill.errors import DataError
from megadistill.files import checksum, os_errors_as
from megadistill.observability.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAY_EVERY_S = 10.0


class PreparationStopped(Exception):
    """The process was asked to stop while rows were prepared; finished parts are kept."""


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


class RowStore:
    """Sets of prepared rows in a folder.

    Args:
        data: The section ``data``; its ``cache_dir`` is the folder.
        tokenizer: One from ``load_tokenizer``.
        watch: Is told what is done; what it raises ends the work.
    """

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> None:
        assert data.cache_dir is not None
        self._folder, self._data, self._tokenizer, self._watch = Path(data.cache_dir), data, tokenizer, watch

    def prepared(self, paths: Mapping[str, str]) -> tuple[str, dict[str, PreparedRows]]:
        """The rows of several sources with one template, made where they are missing, together with other processes.

        Args:
            paths: Name -> source; of "prompts", references are not needed.

        Returns:
            The template, and the rows under the same names.

        Raises:
            ConfigError: The template cannot be used.
            DataError: A source cannot be used.
        """
        settings = PromptSettings.of(self._data)
        check_settings(settings, self._tokenizer)
        streams = {
            name: partial(stream_examples, path, self._data, prompts_only=name == "prompts")
            for name, path in paths.items()
        }
        are_chats = settings.template == AUTO and any(stream().starts_with_chat() for stream in streams.values())
        while True:
            chosen = replace(settings, template=choose_template(settings, self._tokenizer, are_chats))
            may_be_chats = settings.template != AUTO or are_chats
            try:
                return chosen.template, {
                    name: self._one(paths[name], stream, chosen, may_be_chats, name == "prompts")
                    for name, stream in streams.items()
                }
            except ChatFound:
                are_chats = True

    def _one(
        self,
        path: str,
        stream: Callable[..., ExampleStream],
        settings: PromptSettings,
        may_be_chats: bool,
        prompts_only: bool,
    ) -> PreparedRows:
        source = RowSource(path, self._data)
        content = source.content(self._folder / RECORDS)
        folder = self._folder / checksum([self._depends_on(content.digest, settings, prompts_only)])
        if not (folder / MANIFEST).is_file():
            maker = RowSetMaker(
                folder, source, content, self._data, stream, self._tokenizer, settings, may_be_chats, self._watch
            )
            with os_errors_as(DataError, self._folder):
                maker.run()
        return self._opened(folder, path, source.prefix, may_be_chats)

    def _depends_on(self, content: str, settings: PromptSettings, prompts_only: bool) -> dict[str, Any]:
        data = self._data
        template = None
        if settings.template == CHAT:
            template = read_chat_template(settings.chat_template) or self._tokenizer.chat_template
        return {
            "format": [FORMAT, PART_ROWS],
            "content": content,
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
            raise ChatFound
        description = f"{path}{known['description']}"
        return PreparedRows(MappedRows(folder, prefix), known["counts"], description, known["end_id"])


def said(rank: int, is_stopping: Callable[[], bool]) -> Watch:
    """A watch of a process of a run: rank 0 logs now and then, every rank stops when it is asked to."""
    log, began = get_logger(rank, "data"), time.monotonic()
    last = began

    def watch(path: str, done: int, total: int | None) -> None:
        nonlocal last
        if is_stopping():
            raise PreparationStopped
        if (now := time.monotonic()) > last + _SAY_EVERY_S:
            last = now
            log.info(f"{path}: {done}{f' of {total}' if total else ''} rows prepared in {now - began:.0f} s")

    return watch
