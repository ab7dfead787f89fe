import io
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from megadistill.observability import (
    JsonLines,
    MetricsWriter,
    Timers,
    get_logger,
    peak_bytes,
    progress_bar,
    reset_peak,
)
from megadistill.observability import progress as progress_module


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_json_lines_are_readable_at_once_and_strict(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "x.jsonl")
    lines.append({"step": 1, "loss": math.nan, "phi": None, "n": torch.tensor(3), "deep": {"a": [math.inf, 1.5]}})
    lines.append({"step": 2, "text": "a\u2028b\x85c é"})
    assert read(tmp_path / "new" / "x.jsonl") == [
        {"step": 1, "loss": None, "phi": None, "n": 3, "deep": {"a": [None, 1.5]}},
        {"step": 2, "text": "a\u2028b\x85c é"},
    ]
    assert "NaN" not in (tmp_path / "new" / "x.jsonl").read_text(encoding="utf-8")
    lines.close()


def test_resuming_drops_later_steps_and_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = [{"step": step, "text": "a\u2028b"} for step in (0, 1, 2, 2, 3)]
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in whole) + '{"step": 2, "te', encoding="utf-8"
    )
    lines = JsonLines(path, last_step=2)
    lines.append({"step": 3})
    lines.close()
    assert read(path) == [*whole[:4], {"step": 3}]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n', encoding="utf-8")
    JsonLines(path).close()
    assert path.read_text(encoding="utf-8") == ""


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": torch.tensor(0.5 * step), "num_tokens": step, "phi": None})
    with MetricsWriter(tmp_path, last_step=2) as metrics:
        metrics.write(3, {"loss": 9.0})
    assert [(record["step"], record["loss"]) for record in read(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert "phi" not in events.Tags()["scalars"]


def scalars_of(file: Path) -> list[int]:
    """Steps of the losses in one event file, without regard to any other."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]


def test_the_events_of_steps_that_are_repeated_are_gone(tmp_path: Path) -> None:
    """Each file by itself: not every reader knows which events a later file replaces."""

    def attempt(steps: range, last_step: int) -> None:
        before = set(tmp_path.glob("events.*"))
        with MetricsWriter(tmp_path, last_step=last_step) as metrics:
            for step in steps:
                metrics.write(step, {"loss": float(step)})
        (new,) = set(tmp_path.glob("events.*")) - before
        new.rename(new.with_name(f"events.out.tfevents.{steps.stop}.attempt"))  # the clock's second is in the name

    attempt(range(1, 6), 0)
    attempt(range(1, 5), 0)  # nothing had been saved
    assert [scalars_of(file) for file in tmp_path.glob("events.*")] == [[1, 2, 3, 4]]
    (file,) = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-3])  # killed while it wrote
    attempt(range(3, 7), 2)
    assert sorted(scalars_of(file) for file in tmp_path.glob("events.*")) == [[1, 2], [3, 4, 5, 6]]


def test_only_rank_zero_logs(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger(0).info("seen")
    get_logger(0, "train").warning("seen too")
    get_logger(1, "train").error("unseen")
    out, err = capsys.readouterr()
    assert [line.split(" ", 1)[1] for line in out.splitlines()] == ["INFO megadistill: seen", "WARNING train: seen too"]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", line.split(" ", 1)[0]) for line in out.splitlines())
    assert err == ""


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_INTERVAL_S", 3600.0)
    stream = io.StringIO()
    assert list(progress_bar(range(500), description="Rows", unit="rows", stream=stream)) == list(range(500))
    first, last = stream.getvalue().splitlines()
    assert first.startswith("Rows: 0/500 rows (0 %)") and last.startswith("Rows: 500/500 rows (100 %)")
    assert "\r" not in stream.getvalue()


def test_a_bar_by_hand_without_a_total() -> None:
    stream = io.StringIO()
    with progress_bar(description="Steps", stream=stream) as bar:
        bar.set_postfix(loss=0.5, refresh=False)
        bar.update(7)
    assert stream.getvalue().splitlines()[-1].startswith("Steps: 7 it,")
    assert "loss=0.5" in stream.getvalue()


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    list(progress_bar(range(3), description="Rows", stream=stream))
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()


def test_no_bar_on_other_ranks() -> None:
    stream = io.StringIO()
    assert sum(progress_bar(range(4), description="Rows", rank=1, stream=stream)) == 6
    assert stream.getvalue() == ""


def test_timers_add_up_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 3.5, 4.0, 4.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    timers = Timers(synchronize=lambda: calls.append(1))
    with timers("rollout"):
        pass
    with timers("rollout"):
        pass
    with pytest.raises(RuntimeError), timers("train"):
        raise RuntimeError
    assert timers.seconds() == {"time/rollout_s": 3.5, "time/train_s": 0.25}
    assert timers.seconds() == {} and len(calls) == 6


def test_peak_memory_counts_bytes_and_does_not_fall() -> None:
    before = peak_bytes()
    assert before > 20_000_000  # an interpreter with torch, in bytes
    block = torch.ones(before // 4 + 25_000_000)  # more than everything so far, in float32
    assert peak_bytes() > before + 50_000_000
    del block
    reset_peak("cpu")
    assert peak_bytes(torch.device("cpu")) > before + 50_000_000


def test_a_terminal_without_a_size_gets_lines() -> None:
    """A pseudo-terminal of a script: a bar of its width would be invisible."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as stream, progress_bar(description="work", total=2, stream=stream) as bar:
        bar.update(2)
    told = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "work: 2/2" in told
