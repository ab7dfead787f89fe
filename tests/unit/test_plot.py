"""``megadistill plot``: which panels are drawn, of one run and of several, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")

from megadistill.cli.main import main  # noqa: E402

FULL = {"loss": 2.0, "loss/sft": 1.0, "loss/dac_kl": 1.0, "kept_mass": 0.9, "gate/lower": 0.1, "gate/upper": 0.9,
        "scrg/corrected_fraction": 0.5, "lr": 1e-4, "throughput/tokens_per_s": 10.0}  # fmt: skip
SFT = {"loss": 2.0, "loss/sft": 2.0, "loss/dac_kl": 0.0, "loss/span": 0.0, "lr": 1e-4, "throughput/tokens_per_s": 10.0}


def make_run(folder: Path, metrics: dict[str, float], **last: float) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 1, **metrics}, {"step": 2, **metrics, **{key.replace("_", "/", 1): v for key, v in last.items()}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn; they stay open for the test to look at."""
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    return drawn


def panels(figure: Any) -> dict[str, list[str]]:
    """Title of each panel -> labels of its lines."""
    places = [place for place in figure.axes if place.axison]
    return {place.get_title(): [text.get_text() for text in place.get_legend().get_texts()] for place in places}


def test_a_run_without_teacher_and_validation(figures: list[Any], tmp_path: Path) -> None:
    assert main(["plot", str(make_run(tmp_path / "sft", SFT))]) == 0
    assert (tmp_path / "sft" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert panels(figures[0]) == {"training losses": ["total", "SFT"], "learning rate": ["lr"], "speed": ["trained"]}
    assert figures[0].get_suptitle() == "sft"


def test_several_runs_share_their_axes(figures: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("a/mine"), FULL, eval_nll=3.0, eval_rouge_l=20.0)
    make_run(Path("sft"), SFT, eval_nll=4.0)
    assert main(["plot", "a/mine", "sft"]) == 0 and Path("curves.png").is_file()
    found = panels(figures[0])
    assert found["references of the validation rows"] == ["mine", "sft"]
    assert found["greedy answers to the validation rows"] == found["teacher mass that the gate keeps"] == ["mine"]
    assert found["training losses"] == ["mine, total", "mine, SFT", "mine, DAC-KL", "sft, total", "sft, SFT"]
    assert "student text that the teacher corrected" in found and figures[0].get_suptitle() == "mine, sft"
    make_run(Path("b/mine"), FULL)
    assert main(["plot", "a/mine", "b/mine", "--output", "x/two.svg", "--title", "both"]) == 0
    assert Path("x/two.svg").is_file() and figures[1].get_suptitle() == "both"
    assert panels(figures[1])["learning rate"] == ["a/mine", "b/mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/mina"], "no such run: runs/mina; did you mean runs/mine?"),
        (["runs"], "runs is not a run directory: it has no metrics.jsonl"),
        (["runs/mine", "--output", "x.txt"], "must end in .png or .pdf or .svg"),
        (["runs/empty"], "nothing to draw"),
        (["runs/broken"], "runs/broken/metrics.jsonl is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/mine"), SFT)
    for name, content in (("empty", ""), ("broken", '{"step": 1\n')):
        Path("runs", name).mkdir()
        Path("runs", name, "metrics.jsonl").write_text(content, encoding="utf-8")
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
