"""Batch inference that is killed, torn, changed or moved: every row is written once, and always the same."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from megadistill.cli.main import main
from tests.support.runs import free_port
from tests.support.spawn import run_ranks

ROOT = Path(__file__).parents[2]
KEYS = ["id", "instruction", "input", "output", "prompt", "response"]


def _arguments(assets: Path, output: Path, *more: str, data: str = "teacher_train") -> list[str]:
    """150 rows (``prompts``: 24) in blocks of 16, unless ``more`` changes that."""
    return [
        "--model", str(assets / "llama" / "student" / "config.json"), "--tokenizer", str(assets / "tokenizer"),
        "--template", "plain",
        "--input", str(assets / "data" / f"{data}.jsonl"), "--output", str(output), "--max-prompt-tokens", "100",
        "--max-new-tokens", "16", "--batch-size", "2", *more,
    ]  # fmt: skip


def _state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    assert main(["generate", *_arguments(assets, output)]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    return output.read_bytes()


@pytest.fixture(scope="module")
def killed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that is killed (-9) after its first block."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "megadistill", "generate", *_arguments(assets, folder / "out.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not _size(folder / "out.jsonl.partial"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert {path.name for path in folder.iterdir()} == {"out.jsonl.partial", "out.jsonl.progress.json"}
    return folder


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(killed, tmp_path / "left"))


def test_rows_of_the_undisturbed_run(assets: Path, undisturbed: bytes) -> None:
    rows = [json.loads(line) for line in undisturbed.decode().splitlines()]
    given = [
        json.loads(line) for line in (assets / "data" / "teacher_train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(list(row) == KEYS for row in rows) and [row["id"] for row in rows] == list(range(150))
    assert all(row["instruction"] == known["instruction"] for row, known in zip(rows, given, strict=True))
    assert len({row["response"] for row in rows}) > 100


@pytest.mark.parametrize(
    "tail", [b"", b'{"id": 16, "instr', b"\0" * 5000 + b'\n{"id": 17}\n'], ids=["", "torn", "lost"]
)
def test_a_killed_run_goes_on(
    assets: Path, undisturbed: bytes, left: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the last line is torn, within a block, or is what a disk that lost power holds."""
    partial = left / "out.jsonl.partial"
    kept = partial.read_bytes()
    assert undisturbed.startswith(kept) and 16 <= kept.count(b"\n") < 150
    if tail:
        kept = b"".join(kept.splitlines(keepends=True)[:-3])
        partial.write_bytes(kept + tail)
    assert main(["generate", *_arguments(assets, left / "out.jsonl")]) == 0
    assert _state(left) == {"out.jsonl": undisturbed}
    printed, count = capsys.readouterr().err, kept.count(b"\n")
    assert f"has {count} of 150 rows; resuming" in printed and "150/150 row (100 %)" in printed


def test_nothing_is_computed_twice(
    assets: Path, undisturbed: bytes, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last block and the end: not even the model is loaded."""
    (left / "out.jsonl.partial").write_bytes(undisturbed)
    monkeypatch.setattr("megadistill.engines.inference.open_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", *_arguments(assets, left / "out.jsonl")]) == 0
    assert _state(left) == {"out.jsonl": undisturbed}


def test_other_settings_are_refused(
    assets: Path, left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _state(left)
    copy = tmp_path / "assets"
    shutil.copytree(assets, copy)
    config = copy / "llama" / "student" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    data = copy / "data" / "teacher_train.jsonl"
    data.write_text(data.read_text(encoding="utf-8") + '{"instruction": "One more."}\n', encoding="utf-8")
    output = str(left / "out.jsonl")
    for more, words in (
        (["--temperature", "0.5"], "--temperature was 1.0 and is now 0.5;"),
        (["--seed", "1", "--top-k", "5"], "--top-k was 0 and is now 5; also changed: --seed;"),
        (["--max-new-tokens", "17"], "--max-new-tokens was 16 and is now 17;"),
        (["--template", "alpaca", "--long-prompt", "truncate"], "--template was plain"),
        (["--dtype", "bf16"], "--dtype was fp32"),
        (["--input", str(data)], "the content of --input was 150 rows"),
        (["--model", str(config)], "also changed: config.json of --model;"),
    ):
        assert main(["generate", *_arguments(assets, left / "out.jsonl", *more)]) == 2
        line = _error(capsys)
        assert f"{output}.partial" in line and words in line
        assert line.endswith("--overwrite starts over")
        assert _state(left) == before
    (left / "out.jsonl.progress.json").write_text("{", encoding="utf-8")
    assert main(["generate", *_arguments(assets, left / "out.jsonl")]) == 2
    assert "does not have their settings; --overwrite starts over" in _error(capsys)
    (left / "foreign.partial").write_text("somebody's own\n", encoding="utf-8")
    assert main(["generate", *_arguments(assets, left / "foreign")]) == 2
    assert "foreign.progress.json does not have" in _error(capsys)
    with (left / "out.jsonl.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["generate", *_arguments(assets, left / "out.jsonl", "--overwrite")]) == 2
        assert "another process is writing" in _error(capsys)
    assert (left / "out.jsonl.partial").read_bytes() == before["out.jsonl.partial"]


def test_overwrite(assets: Path, left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It starts over; existing files stay until the first new row, and without the option for good."""
    other = ["--seed", "1", "--max-new-tokens", "4", "--batch-size", "16"]
    (left / "out.jsonl").write_text("finished before\n", encoding="utf-8")
    before = _state(left)
    assert main(["generate", *_arguments(assets, left / "out.jsonl")]) == 2
    assert "out.jsonl exists already; --overwrite replaces it" in _error(capsys)
    assert main(["generate", *_arguments(assets, left / "out.jsonl", *other, "--overwrite", "--top-p", "2")]) == 2
    assert "--top-p: 2 is not a number > 0 and <= 1" in _error(capsys)
    assert _state(left) == before
    assert main(["generate", *_arguments(assets, left / "out.jsonl", *other, "--overwrite", data="prompts")]) == 0
    assert list(_state(left)) == ["out.jsonl"] and _state(left)["out.jsonl"].count(b"\n") == 24


def test_a_run_that_wrote_nothing_leaves_nothing(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake (here: too long a prompt) is corrected and tried again without further ado."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"instruction": "Yes."}\n{"instruction": ""}\n' + json.dumps({"instruction": "No. " * 60}) + "\n",
        encoding="utf-8",
    )
    rows, output = ["--input", str(data), "--skip-bad-rows"], tmp_path / "new" / "out.jsonl"
    assert main(["generate", *_arguments(assets, output, *rows)]) == 2
    assert "rows.jsonl:3" in _error(capsys) and not output.parent.exists()
    longer = ["--max-prompt-tokens", "124", "--max-new-tokens", "4"]
    data.write_text('{"instruction": "Yes."}\n{"instruction": ""}\n{"instruction": "No."}\n', encoding="utf-8")
    assert main(["generate", *_arguments(assets, output, *rows, *longer)]) == 0
    # Numbers count the row that was skipped.
    assert [json.loads(line)["id"] for line in output.read_text(encoding="utf-8").splitlines()] == [0, 2]
    text = output.read_text(encoding="utf-8")
    capsys.readouterr()
    arguments = _arguments(assets, output, *rows, *longer)
    where = arguments.index("--output")
    assert main(["generate", *arguments[:where], *arguments[where + 2 :]]) == 0
    assert capsys.readouterr().out == text


def test_two_processes_write_the_same_bytes(assets: Path, tmp_path: Path) -> None:
    """On other rows, on other parts of the vocabulary, from the start and after an interruption; and what rank 0 meets
    ends both."""
    import deepspeed  # noqa: F401  imported once, before the forks

    def arguments(folder: str, *more: str) -> list[str]:
        return _arguments(assets, tmp_path / folder / "out.jsonl", *more, data="prompts")

    assert main(["generate", *arguments("one")]) == 0
    lines = (tmp_path / "one" / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 24
    interrupted = _interrupted(lambda: main(["generate", *arguments("interrupted", "--batch-size", "1")]), num_blocks=2)
    assert interrupted == 1
    commands = [
        arguments("rows", "--tp-size", "1", "--batch-size", "1"),
        arguments("vocabulary", "--tp-size", "2"),
        arguments("interrupted", "--tp-size", "1"),
        arguments("one"),
    ]
    assert run_ranks(_generate_all, 2, commands, free_port()) == [[0, 0, 0, 2]] * 2
    for folder in ("rows", "vocabulary", "interrupted", "one"):
        assert _state(tmp_path / folder) == {"out.jsonl": b"".join(lines)}


def _interrupted(run: Callable[[], int], num_blocks: int) -> int:
    """Lets a run write some blocks and then fail; returns 1 if it did."""
    from megadistill.cli.resumable import ResumableFile

    written = 0
    write = ResumableFile.write

    def fail(self: ResumableFile, lines: Sequence[str]) -> None:
        nonlocal written
        if written == num_blocks:
            raise RuntimeError("interrupted")
        written += 1
        write(self, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableFile, "write", fail)
        try:
            return run()
        except RuntimeError:
            return 1


def _generate_all(rank: int, commands: Sequence[Sequence[str]], port: str) -> list[int]:
    """Exit codes of runs, one after the other on the ranks of one job."""
    from deepspeed.utils import groups

    import megadistill.cli.main

    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "LOCAL_SIZE": dist.get_world_size()}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    megadistill.cli.main._OTHER_RANKS_WAIT_S = 0.0
    # The job outlives its runs; its owner takes it down.
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda *_, **__: None
    codes = []
    for command in commands:
        codes.append(main(["generate", *command]))
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
            setattr(groups, name, None)
    dist.destroy_process_group = destroy
    return codes
