"""tools/gpu_report.py without a GPU: parts do not depend on each other, time has an end, nothing is left out."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from tests.support.launched import alive
from tools import gpu_report
from tools.benchmarks.rollout_vllm import VllmRollout
from tools.gpu import wheels
from tools.gpu.parts import Part, gpu_parts

ROOT = Path(__file__).resolve().parents[2]


def part(name: str, *programs: str, seconds: int = 30, **more: object) -> Part:
    return Part(name, f"shows {name}", tuple((sys.executable, "-c", text) for text in programs), seconds, **more)


def writes(record: Path) -> str:
    table = record.with_suffix(".md")
    return f"open({str(record)!r}, 'w').write('{{\"ms\": 3}}'); open({str(table)!r}, 'w').write('| 3 ms |')"


def test_every_part_runs_and_is_reported_whatever_the_others_do(tmp_path: Path) -> None:
    record = tmp_path / "works.json"
    parts = [
        part("fails", "print('about to'); raise SystemExit('the reason')", "open('never', 'w')"),
        part("lacks", "pass", needs=("no-such-package-here",)),
        part("works", writes(record), record=record, is_timed=True),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 60)
    assert [(one.part.name, one.state) for one in outcomes] == [
        ("fails", "failed"), ("lacks", "not run"), ("works", "passed"),
    ]  # fmt: skip
    assert "exit code 1" in outcomes[0].reason and "the reason" in outcomes[0].reason
    assert not (ROOT / "never").exists()
    assert outcomes[1].reason == "not installed: no-such-package-here"
    about = {"gpu": "A card", "peers missing": ["trl"]}
    text = gpu_report.table(about, outcomes, "python tools/gpu_report.py")
    assert "gpu A card" in text and "Peers missing: trl." in text and "| 3 ms |" in text
    assert text.count("| not run |") == text.count("| failed |") == text.count("| passed |") == 1
    saved = json.loads(json.dumps(gpu_report.as_record(about, outcomes, "x")))
    assert [one["record"] for one in saved["parts"]] == [None, None, {"ms": 3}]
    assert saved["parts"][0]["commands"][0].startswith("python -c")


def test_a_part_ends_at_its_limit_with_all_its_processes(tmp_path: Path) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    child = f"import subprocess, sys, time; print(subprocess.Popen({sleeper}).pid, flush=True); time.sleep(99)"
    begin = time.monotonic()
    (outcome,) = gpu_report.run_parts([part("hangs", child, seconds=4)], tmp_path, 60)
    assert outcome.state == "out of time" and time.monotonic() - begin < 60
    pid = int((tmp_path / "hangs.log").read_text(encoding="utf-8").splitlines()[-1])
    deadline = time.monotonic() + 20  # the signal has been sent; the kernel ends the process when it comes to it
    with suppress(psutil.NoSuchProcess):
        while alive([psutil.Process(pid)]):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_the_whole_time_does_not_suffice_for_is_said(tmp_path: Path) -> None:
    record = tmp_path / "late.json"
    record.write_text("{}", encoding="utf-8")
    outcomes = gpu_report.run_parts([part("late", "pass", record=record, is_timed=True)], tmp_path, 0.5)
    assert [(one.state, one.reason) for one in outcomes] == [("not run", "the report's time was over")]


def test_an_older_record_is_not_taken_for_this_run(tmp_path: Path) -> None:
    record = tmp_path / "fails.json"
    record.write_text('{"old": 1}', encoding="utf-8")
    (outcome,) = gpu_report.run_parts([part("fails", "raise SystemExit(1)", record=record)], tmp_path, 60)
    assert gpu_report.as_record({}, [outcome], "x")["parts"][0]["record"] is None


def test_counts_of_tests_are_read(tmp_path: Path) -> None:
    results = tmp_path / "tests.xml"
    text = '<testsuites><testsuite tests="9" skipped="2" failures="0"/></testsuites>'
    write = f"open({str(results)!r}, 'w').write({text!r})"
    (outcome,) = gpu_report.run_parts([part("tests", write, record=results)], tmp_path, 60)
    assert outcome.reason == "7 passed, 2 skipped"


def test_tests_that_were_all_skipped_prove_nothing(tmp_path: Path) -> None:
    results = tmp_path / "tests.xml"
    write = f"open({str(results)!r}, 'w').write('<testsuite tests=\"9\" skipped=\"9\"/>')"
    (outcome,) = gpu_report.run_parts([part("tests", write, record=results)], tmp_path, 60)
    assert (outcome.state, outcome.reason) == ("failed", "0 passed, 9 skipped")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lost"], 2, "unknown part 'lost'; allowed: tests, "),
        (["loss", "--list"], 0, "python tools/benchmark.py loss"),
        (["--device", "cuda"], 2, "no GPU here"),
    ],
)
def test_the_command_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_report.main(arguments) == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


def test_parts_name_files_and_verbs_that_exist() -> None:
    for device in ("cuda", "cpu"):
        for one in gpu_parts(Path("runs/gpu"), device):
            for words in one.commands:
                files = [word for word in words if word.startswith(("tests/", "tools/", "configs/", "launchers/"))]
                assert all((ROOT / file).exists() for file in files), words
    assert sum(one.seconds for one in gpu_parts(Path("x")) if one.is_timed) < 9 * 60


def test_packages_that_are_missing_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheels.missing(requirement.name for requirement in wheels.wanted()) == []
    assert wheels.missing(["torch", "no-such-package"]) == ["no-such-package"]
    assert {"torch", "deepspeed", "pytest"} <= {requirement.name for requirement in wheels.wanted()}
    assert wheels.pinned(["Rouge.Score", "trl"])[0].startswith("rouge_score==") and wheels.pinned(["trl"]) == ["trl"]
    assert wheels.other_versions([Requirement("pytest<1")])[0].endswith("(wanted <1)")
    assert "rouge_score==" in wheels.command(["rouge-score"]) and "--no-deps" in wheels.command(["trl"])
    monkeypatch.setattr(gpu_report, "missing", lambda names: [name for name in names if name in ("deepspeed", "trl")])
    assert gpu_report.main(["--wheels"]) == 1
    assert gpu_report.main(["loss", "--device", "cpu"]) == 2


def test_vllm_that_does_not_start_gives_its_last_line(tmp_path: Path) -> None:
    import torch

    class Model:
        dtype = torch.float32

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()

    with pytest.raises(RuntimeError, match="vLLM did not start: ModuleNotFoundError: No module named 'vllm'"):
        VllmRollout(Path(sys.executable), tmp_path, Model(), [(1, 2)], 3, "cpu")
