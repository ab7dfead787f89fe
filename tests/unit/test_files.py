"""Files are written whole or not at all, and what goes wrong with them is one line."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill.errors import DataError
from megadistill.files import (
    did_you_mean,
    did_you_mean_path,
    os_errors_as,
    reason_of,
    to_jsonable,
    write_atomically,
    write_json,
)


@dataclass
class Point:
    x: float
    names: tuple[str, ...]


def test_text_and_bytes_are_written_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "é\n")
    write_atomically(str(tmp_path / "b"), b"\xff\x00")
    assert (tmp_path / "a").read_bytes() == "é\n".encode() and (tmp_path / "b").read_bytes() == b"\xff\x00"
    write_atomically(tmp_path / "a", "short")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "short"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {
        "point": Point(float("nan"), ("a",)),
        3: [float("inf"), 1.5],
        "tensor": torch.tensor(2),
        "numpy": np.float64("-inf"),
        "text": "é",
    }
    plain = {"point": {"x": None, "names": ["a"]}, "3": [None, 1.5], "tensor": 2, "numpy": None, "text": "é"}
    assert to_jsonable(value) == plain
    write_json(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == plain and "é" in text and text.endswith("}\n")


def test_an_os_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, os_errors_as(DataError, tmp_path / "x", "cannot be read"):
        (tmp_path / "x").read_bytes()
    assert str(caught.value) == f"{tmp_path / 'x'} cannot be read: No such file or directory"
    assert reason_of(OSError("no number")) == "no number" and reason_of(OSError()) == "OSError"


def test_hints_are_worded_alike(tmp_path: Path) -> None:
    assert did_you_mean("alpacca", ["plain", "alpaca"]) == "; did you mean alpaca?"
    assert did_you_mean("x", ["plain", "alpaca"]) == ""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher.txt").touch()
    assert did_you_mean_path(tmp_path / "techer", Path.is_dir) == f"; did you mean {tmp_path / 'teacher'}?"
    assert did_you_mean_path(tmp_path / "qqq") == ""
    assert did_you_mean_path(tmp_path / "no" / "x") == f", and no folder {tmp_path / 'no'}"
    assert did_you_mean_path(tmp_path / "teacher.txt" / "x") == ""
