"""The rows that ``megadistill generate`` answers: of a file, of standard input, or of the command line."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megadistill.data.dataset import LoadedExamples

STANDARD_INPUT = "standard input"


def read_prompts(parsed: Namespace) -> LoadedExamples:
    """The rows of ``--input``, ``--messages``, or ``--prompt``.

    Raises:
        ConfigError: A text or chat of the command line cannot be used.
        DataError: A file cannot be read, or a row of it cannot be used.
    """
    from megadistill.data.columns import FieldNames
    from megadistill.data.dataset import Example, LoadedExamples, load_examples

    if parsed.prompt is not None:
        _check_prompts(parsed.prompt)
        rows = [{"instruction": text} for text in parsed.prompt]
        return LoadedExamples(
            [Example(i, row["instruction"], "", (), "--prompt", None, row) for i, row in enumerate(rows)], []
        )
    load = partial(
        load_examples, fields=FieldNames(parsed.instruction_field, parsed.input_field),
        skip_bad_rows=parsed.skip_bad_rows, prompts_only=True, keep_rows=True,
    )  # fmt: skip
    if parsed.messages is not None:
        return _only_chats(_read_messages(parsed.messages, load))
    if parsed.input != "-":
        return load(parsed.input)
    return _from_bytes(sys.stdin.buffer.read(), STANDARD_INPUT, load)


def _read_messages(value: str, load: Callable[[str | Path], LoadedExamples]) -> LoadedExamples:
    """The chats of a file, of standard input, or of JSON on the command line: one chat, or a list of them."""
    if value == "-":
        return _from_bytes(sys.stdin.buffer.read(), STANDARD_INPUT, load)
    if not value.lstrip().startswith(("[", "{")):
        return load(value)
    try:
        chats = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"--messages is not valid JSON: {error}") from None
    is_one = isinstance(chats, dict) or any(isinstance(turn, dict) and "messages" not in turn for turn in chats)
    rows = [row if isinstance(row, dict) else {"messages": row} for row in ([chats] if is_one else chats)]
    return _from_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(), "--messages", load)


def _only_chats(loaded: LoadedExamples) -> LoadedExamples:
    for example in loaded.examples:
        if example.chat is None:
            raise ConfigError(f"--messages: {example.where} is no chat; --input takes rows of every kind")
    return loaded


def _from_bytes(content: bytes, name: str, load: Callable[[str | Path], LoadedExamples]) -> LoadedExamples:
    """Reads JSON lines that stand in no file; messages about them have ``name`` in the file's place."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(content)
        try:
            return _named(load(file), str(file), name)
        except DataError as error:
            raise DataError(str(error).replace(str(file), name), setting=error.setting) from None


def _named(loaded: LoadedExamples, file: str, name: str) -> LoadedExamples:
    """Rows by the name of where they came from, which is not that of the file that held them meanwhile."""
    examples = [replace(example, where=example.where.replace(file, name)) for example in loaded.examples]
    skipped = [message.replace(file, name) for message in loaded.skipped]
    return replace(loaded, examples=examples, skipped=skipped, description=loaded.description.replace(file, name))


def _check_prompts(texts: Sequence[str]) -> None:
    """Raises ConfigError for a text that is no prompt."""
    from megadistill.data.chats import text_of
    from megadistill.data.readers import BadRow

    for text in texts:
        if not text.strip():
            raise ConfigError("--prompt: the text is empty")
        try:
            text_of(text, "--prompt")
        except BadRow as error:
            raise ConfigError(str(error)) from None
