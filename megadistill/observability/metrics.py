"""Numbers of a run on disk: JSON lines and TensorBoard events."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.errors import ConfigError, needs_extra
from megadistill.files import to_jsonable, write_atomically
from megadistill.observability.log import get_logger


class JsonLines:
    """Appends objects that have a ``step``, one per line; each is in the file when ``append`` returns.

    Args:
        path: The file.
        last_step: Lines up to this step are kept (default: none). Later ones, and a line that a killed process left
            unfinished, are dropped, so that a resumed run writes the same file as an uninterrupted one.
    """

    def __init__(self, path: str | os.PathLike[str], *, last_step: int = -1) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bytes: the text inside may hold characters that str.splitlines takes for line ends.
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        write_atomically(path, b"".join(line + b"\n" for line in lines if 0 <= _step(line) <= last_step))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one object. JSON has no NaN or infinity: they become null."""
        self._file.write(json.dumps(to_jsonable(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricsWriter:
    """``metrics.jsonl`` and TensorBoard events in a run directory, on rank 0 only.

    Args:
        run_dir: The run directory.
        last_step: The step that the run resumes from: whatever was written after it is dropped from both.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, last_step: int = -1) -> None:
        self._lines = JsonLines(Path(run_dir) / "metrics.jsonl", last_step=last_step)
        self._events = _open_events(run_dir, last_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records ``values`` (numbers, 0-dim tensors, None where nothing was measured) under ``step``."""
        self._lines.append({"step": step, **values})
        if self._events is None:
            return
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, float(value), step)
        self._events.flush()

    def close(self) -> None:
        """Closes both."""
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_events(run_dir: str | os.PathLike[str], last_step: int) -> Any:
    """A writer of TensorBoard events; None, with a warning, without its package: metrics.jsonl has all numbers."""
    try:
        with needs_extra("tensorboard", "no TensorBoard events"):
            from torch.utils.tensorboard import SummaryWriter  # a second or more to import

            _drop_later_events(Path(run_dir), last_step)
    except ConfigError as error:
        get_logger().warning(str(error))
        return None
    # For a TensorBoard that has read the files before they were shortened.
    return SummaryWriter(str(run_dir), purge_step=last_step + 1)


def _drop_later_events(run_dir: Path, last_step: int) -> None:
    """Shortens the event files of earlier attempts to ``last_step``, and removes those of which nothing is left.

    TensorBoard's faster reader ignores ``purge_step``, and would draw the steps that are repeated twice.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for file in run_dir.glob("events.out.tfevents.*"):
        events = [(record, Event.FromString(record)) for record in RawEventFileLoader(str(file)).Load()]
        kept = [(record, event) for record, event in events if event.step <= last_step]
        if not any(event.HasField("summary") for _, event in kept):
            file.unlink()
        elif len(kept) < len(events):
            content = io.BytesIO()
            writer = RecordWriter(content)
            for record, _ in kept:
                writer.write(record)
            write_atomically(file, content.getvalue())


def _step(line: bytes) -> int:
    """The step of a line; -1 for a line that is not a whole object with a step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
