"""What the checkpoint writer does once per run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.checkpoint.writer import CheckpointWriter


def _writer(folder: Path) -> CheckpointWriter:
    student: Any = SimpleNamespace(loaded=SimpleNamespace(config=SimpleNamespace(model_type="qwen2")))
    nothing: Any = None
    return CheckpointWriter(folder, student, nothing, nothing, keep_last=1)


def test_the_tokenizer_is_loaded_and_warned_of_once_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each load takes seconds, and the tokenizer of a run does not change."""
    looked_at: list[Path] = []
    monkeypatch.setattr("megadistill.checkpoint.writer.auto_tokenizer_differs", lambda path: not looked_at.append(path))
    steps = [tmp_path / "step_1", tmp_path / "step_2", tmp_path / "step_3"]
    writer = _writer(tmp_path)
    for step in steps:
        writer._check_tokenizer(step)
    lines = capsys.readouterr().out.splitlines()
    assert looked_at == steps[:1] and len(lines) == 1
    assert " WARNING checkpoint: " in lines[0] and "qwen2" in lines[0] and "PreTrainedTokenizerFast" in lines[0]
    _writer(tmp_path)._check_tokenizer(steps[1])
    assert looked_at == steps[:2]
