"""Steps whose numbers are not finite: a student with one broken embedding meets its token now and then."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.cli.main import main
from megadistill.data.tokenize import load_tokenizer
from tests.support.runs import ROOT, run_layout, settings
from tests.support.spawn import RankError

STEPS = 8


@pytest.fixture(scope="module")
def broken(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A student whose embedding of one token is not a number, and the token: it is in few rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(str(assets / "tokenizer"))
    rows = [json.loads(line) for line in (assets / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    in_rows = Counter(token for row in rows for token in set(tokenizer.encode(f"{row['instruction']} {row['input']}")))
    token = next(token for token, count in sorted(in_rows.items()) if count == 2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets / "llama" / "student" / "config.json"))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    folder = tmp_path_factory.mktemp("broken") / "student"
    model.save_pretrained(folder)
    return folder, token


def _settings(assets: Path, student: Path, *more: str) -> list[str]:
    fixed = settings(
        assets,
        "llama",
        f"train.max_steps={STEPS}",
        "data.prompts_ratio=0",
        "data.prompts_path=null",
        "train.save_every=1",
    )
    return [*fixed, f"model.student.path={student}", "train.on_nonfinite=skip", "train.max_nonfinite=3", *more]


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _dumped(run_dir: Path, step: int) -> list[dict[str, Any]]:
    lines = (run_dir / "nonfinite" / f"step_{step}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("mode", ["dataset", "on_policy"])
def test_such_a_step_changes_nothing_and_the_run_goes_on(
    assets: Path, broken: tuple[Path, int], tmp_path: Path, mode: str
) -> None:
    """Every ZeRO stage and type skips the same steps and continues alike; the file names the rows of the batch."""
    student, token = broken
    runs = {
        "z0": ("parallel.zero_stage=0", "parallel.tp_size=1"),
        "z1": ("parallel.zero_stage=1", "parallel.tp_size=1"),
        "z2": ("parallel.zero_stage=2", "parallel.tp_size=2"),
        "z3": ("parallel.zero_stage=3", "parallel.tp_size=1"),
        "z3tp": ("parallel.zero_stage=3", "parallel.tp_size=2"),
    }
    common = (f"generation.mode={mode}", "loss.dac_kl=1" if mode == "on_policy" else "loss.dac_kl=0.5")
    run_layout(2, [(str(tmp_path / n), _settings(assets, student, *common, *more)) for n, more in runs.items()])
    expected = _metrics(tmp_path / "z0")
    skipped = [line["step"] for line in expected if line["loss"] is None]
    assert 1 <= len(skipped) < STEPS - 2
    for name in runs:
        found = _metrics(tmp_path / name)
        assert [line["step"] for line in found] == list(range(1, STEPS + 1))
        assert [line["step"] for line in found if line["loss"] is None] == skipped
        finite = [(a["loss"], b["loss"]) for a, b in zip(found, expected, strict=True) if a["loss"] is not None]
        assert [a for a, _ in finite] == pytest.approx([b for _, b in finite], abs=1e-4)
        assert sorted(int(f.stem.removeprefix("step_")) for f in (tmp_path / name / "nonfinite").iterdir()) == skipped
        for step in skipped:
            head, *rows = _dumped(tmp_path / name, step)
            assert head["loss"] == "nan" and len(rows) == 4
            for row in rows:
                tokens = [*row["prompt_ids"], *(row["reference_ids"] or []), *(row["text_ids"] or [])]
                assert row["is_finite"] is (token not in tokens)
    last = torch.load(tmp_path / "z3tp" / "checkpoints" / f"step_{STEPS}" / "trainer.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in last["gate"]["gate"].values())


def test_a_run_stops_where_it_is_told_to(assets: Path, broken: tuple[Path, int], tmp_path: Path) -> None:
    """The checkpoint before it is whole, although it was being written; nothing of the bad step is in it."""
    student, _ = broken
    with pytest.raises(RankError, match=r"is not finite .*nonfinite/step_\d+\.jsonl"):
        run_layout(2, [(str(tmp_path / "run"), _settings(assets, student, "train.on_nonfinite=stop"))])
    bad = _metrics(tmp_path / "run")[-1]
    assert bad["loss"] is None and _dumped(tmp_path / "run", bad["step"])
    if bad["step"] > 1:
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text(encoding="utf-8") == f"step_{bad['step'] - 1}\n"


def test_weights_that_are_lost_do_not_skip_for_ever(assets: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets / "llama" / "student" / "config.json"))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "lost")
    with pytest.raises(RankError, match="step 3 is not finite .* so were the 2 before it"):
        run_layout(1, [(str(tmp_path / "run"), _settings(assets, tmp_path / "lost"))])


def test_generate_and_evaluate_stop_with_the_row(
    assets: Path, broken: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, token = broken
    data, output = assets / "data" / "train.jsonl", tmp_path / "out.jsonl"
    tokenizer = load_tokenizer(str(assets / "tokenizer"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    named = [i for i, row in enumerate(rows) if token in tokenizer.encode(f"{row['instruction']} {row['input']}")]
    generate = ["--model", str(student), "--tokenizer", str(assets / "tokenizer"), "--input", str(data)]
    generate += ["--output", str(output), "--template", "plain", "--max-prompt-tokens", "64", "--max-new-tokens", "2"]
    config = ["--config", str(ROOT / "configs" / "base.yaml"), *settings(assets, "llama", f"run.dir={tmp_path}")]
    config += [f"eval.path={data}", "eval.max_new_tokens=2", "eval.seeds=[1]", "eval.greedy=false"]
    for verb, arguments, where in (
        ("generate", generate, ""),
        ("generate", [*generate, "--temperature", "0"], ""),
        ("evaluate", [*config, "--model", f"mine={student}"], "mine on train: "),
    ):
        assert main([verb, *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert any(line.startswith(f"megadistill: {where}row {i} (") for i in named) and "NaN or infinite" in line
    assert not output.exists() and not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("part", "more", "message"),
    [
        ("student", ("generation.mode=dataset", "train.eval_every=1"), r"validation after step \d+: row \d+ \("),
        ("teacher", ("generation.mode=teacher",), r"teacher: row \d+ \('.*the logits for token"),
    ],
)
def test_validation_and_teacher_text_stop_all_ranks(
    assets: Path, broken: tuple[Path, int], tmp_path: Path, part: str, more: tuple[str, ...], message: str, tp_size: int
) -> None:
    """Also where steps are skipped; what the teacher wrote before stays, and nothing of the block."""
    path, token = broken
    student = path if part == "student" else assets / "llama" / "student" / "config.json"
    common = _settings(assets, student, f"parallel.tp_size={tp_size}", f"model.{part}.path={path}", *more)
    common += [f"data.valid_path={assets / 'data' / 'train.jsonl'}"]
    with pytest.raises(RankError, match=message):
        run_layout(2, [(str(tmp_path / "run"), common)], timeout_s=120)
    if part == "teacher":
        lines = (tmp_path / "run" / "teacher_text.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        assert all(token not in json.loads(line)["response"] for line in lines)
