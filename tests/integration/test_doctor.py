"""``megadistill doctor`` on two forked gloo ranks, with something wrong on one of them, and its rules."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from megadistill.cli.main import main
from megadistill.launch import group_check, machine
from tests.support.runs import ROOT, free_port, settings

LIMIT_S = 120.0
Fault = Callable[[], None]


def _nothing() -> None:
    """No fault."""


def doctor(
    folder: Path, arguments: Collection[str] = (), fault: Fault = _nothing, *, ranks: Collection[int] = (0, 1)
) -> tuple[list[int], str]:
    """Exit codes of the ranks that are started, and what rank 0 (else the first) printed; ``fault`` happens in rank 1.

    A rank that does not end in time counts as -9.
    """
    port, pids = free_port(), []
    for rank in ranks:
        pid = os.fork()
        if not pid:
            _rank(rank, port, folder / f"out_{rank}", [*arguments], fault if rank == 1 else _nothing)
        pids.append(pid)
    deadline, codes = time.monotonic() + LIMIT_S, []
    for pid in pids:
        while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        if not done[0]:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    return codes, (folder / f"out_{min(ranks)}").read_text(encoding="utf-8")


def _rank(rank: int, port: str, out: Path, arguments: list[str], fault: Fault) -> None:
    code = 99
    try:
        file = os.open(out, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # pytest has replaced sys.stdout; what it caught before the fork is its own.
        with os.fdopen(1, "w", closefd=False) as plain, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", plain)
            patch.setattr("sys.stderr", plain)
            fault()
            code = main(["doctor", "--timeout-s", "4", *arguments])
            plain.flush()
    except BaseException:
        os.write(1, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _config(assets: Path, run_dir: Path, *more: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / "base.yaml"), f"run.dir={run_dir}", *settings(assets, "llama", *more)]


def test_all_is_right(assets: Path, tmp_path: Path) -> None:
    """Every check is there; nothing is left in run.dir, which is not made."""
    run_dir = tmp_path / "new" / "run"
    codes, text = doctor(tmp_path, _config(assets, run_dir, "parallel.tp_size=1"))
    assert codes == [0, 0], text
    for check in (
        "run.dir",
        "models",
        "ranks",
        "versions",
        "open files",
        "host memory",
        "shared files",
        "disk",
        "clocks",
    ):
        assert f"\n{check} " in f"\n{text}", text
    assert "tp 1 x dp 2" in text and "2 ranks see what rank 0 writes" in text
    assert "right sums" in text and "group world" in text
    assert not list(tmp_path.rglob(".doctor*")) and not run_dir.parent.exists()


def test_without_a_configuration(tmp_path: Path) -> None:
    codes, text = doctor(tmp_path)
    assert codes == [0, 0] and "none given" in text and "run.dir " not in text.replace("run.dir, models", "")


def test_an_absent_rank_is_named(tmp_path: Path) -> None:
    codes, text = doctor(tmp_path, ranks=[0])
    assert codes == [1] and "rank 1 of 2 did not come" in text, text


def test_an_absent_rank_0_is_missed(tmp_path: Path) -> None:
    codes, text = doctor(tmp_path, ranks=[1])
    assert codes == [2] and "finds no rank 0" in text, text


def _hang_between_collectives() -> None:
    group_check._speed = lambda *_: time.sleep(600)  # type: ignore[assignment]


def _stop() -> None:
    group_check.check_groups = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    import megadistill.planning.doctor as module

    module.check_groups = group_check.check_groups


def _send_garbage() -> None:
    right = group_check.contribution
    group_check.contribution = lambda rank, numel, device: right(rank, numel, device) + (rank == 1)


def _other_torch() -> None:
    right = machine.versions
    machine.versions = lambda device: right(device) | {"torch": "1.0"}


def _be_slow() -> None:
    import megadistill.planning.doctor as module

    right = machine.speed
    module.speed = lambda device: right(device) / 100


def _be_late() -> None:
    now = time.time
    time.time = lambda: now() + 30


@pytest.mark.parametrize(
    ("fault", "line", "code"),
    [
        (_hang_between_collectives, "a collective of ranks 0, 1 did not end within 4 s", 1),
        (_stop, "no answer from rank 1", 1),
        (_send_garbage, "what rank 1 sent is not what arrived", 1),
        (_other_torch, "torch is 1.0 on rank 1", 1),
        (_be_slow, "rank 1 (", 0),
        (_be_late, "rank 1: up to +30", 0),
    ],
)
def test_a_fault_of_one_rank_is_named(tmp_path: Path, fault: Fault, line: str, code: int) -> None:
    """Rank 0 ends in time, whatever the other one does, and says who it is."""
    codes, text = doctor(tmp_path, fault=fault)
    assert codes[0] == code, text
    assert line in text, text
    assert ("failed" if code else "1 warning") in text.splitlines()[-1] and "next:" in text


def _alone(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_what_one_process_finds(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _alone(_config(assets, tmp_path / "run"), capsys)
    assert code == 0 and "run.dir" in text and "group" not in text, text
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    code, text = _alone(_config(assets, file), capsys)
    assert code == 1 and f"{file} is a file; a folder is needed" in text
    code, text = _alone(_config(assets, tmp_path / "run", f"model.tokenizer={tmp_path / 'none'}"), capsys)
    assert code == 1 and str(tmp_path / "none") in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("models ")] == [["models", "FAILED"]]
    assert not any(line.startswith("hub ") for line in text.splitlines())  # a path is not looked up there
    code, text = _alone(_config(assets, tmp_path / "run", "model.tokenizer=none", "run.prepare=smoke"), capsys)
    assert code == 0 and "the first start makes them (run.prepare=smoke)" in text


def test_rows_that_are_not_there(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("", encoding="utf-8")
    config = _config(assets, tmp_path / "run", "data.train_path=row.jsonl", "data.prompts_path=owner/name")
    code, text = _alone(config, capsys)
    lines = [line for line in text.splitlines() if line.startswith("data")]
    assert code == 0 and len(lines) == 1 and "1 warning" in text.splitlines()[-1], text
    assert lines[0].split()[:2] == ["data.train_path", "warning"] and "did you mean rows.jsonl?" in lines[0]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert _alone(["--config", "configs/none.yaml"], capsys)[0] == 2
    code, text = _alone(["run.dir=x"], capsys)
    assert code == 2 and "needs --config FILE" in text
    assert _alone(["--timeout-s", "0"], capsys)[0] == 2


def test_too_little_of_everything() -> None:
    """Rules that no test machine breaks: memory, disk, open files, other file systems."""
    from megadistill.planning.disk_check import Disk
    from megadistill.planning.findings import FAILED, OK, WARNING, Seen, judge
    from megadistill.planning.needs import Needs

    def facts(host: str) -> dict[str, object]:
        return {"host": host, "pid": 1, "versions": {"torch": "2"}, "device": "H100", "host_free": 4e9,
                "device_free": 8e9, "open_files": 256}  # fmt: skip

    def group(ranks: list[int], rate: float) -> dict[str, object]:
        return {"name": "tp", "ranks": ranks, "bytes_per_s": [rate, rate], "fault": None, "is_stuck": False}

    results = {}
    for rank in range(6):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        results[rank] = {
            "skew": 0.0, "is_shared": rank < 2, "groups": [group(pair, 1e10 if rank < 4 else 1e9)]
        }  # fmt: skip
    seen = Seen({rank: facts("a" if rank < 2 else "b") for rank in range(6)}, 6, results=results)
    seen.disk, seen.needs, seen.checkpoints = Disk(10**9, 4e7, 1e8), Needs(2, 9 * 10**9, 2 * 10**9, 4 * 10**8), 3
    states = {finding.check: finding.state for finding in judge(seen)}
    assert states == {
        "ranks": OK, "versions": OK, "open files": WARNING, "device memory": FAILED, "host memory": FAILED,
        "shared files": FAILED, "disk": FAILED, "clocks": OK, "group tp": WARNING,
    }  # fmt: skip
    seen.needs = Needs(2, 10**9, 0, 0)
    states = {finding.check: finding.state for finding in judge(seen)}
    assert (states["device memory"], states["host memory"], states["disk"]) == (OK, OK, WARNING)
