"""docs/examples as a reader runs them: each as its own process, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megadistill
from megadistill.config.load import load_config
from megadistill.errors import ConfigError, DataError
from megadistill.generation.sources import source_class
from tests.support.chats import chat_tokenizer
from tests.support.model_folders import llama_folder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def _run(folder: Path, *command: str) -> list[str]:
    paths = os.pathsep.join([str(ROOT), str(EXAMPLES)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def _example(name: str) -> str:
    return str(EXAMPLES / f"{name}.py")


def test_a_run_and_a_text_source_of_ones_own(tmp_path: Path) -> None:
    lines = _run(tmp_path, sys.executable, _example("distill"))
    said = next(line for line in lines if line.startswith("4 steps in "))
    summary = json.loads((tmp_path / "runs" / "notebook" / "summary.json").read_text(encoding="utf-8"))
    assert said.endswith(f"loss {summary['last_step']['loss']:.3f}")
    code = "import megadistill; print('again', megadistill.distill('configs/smoke.yaml', {!r}, {!r})['steps'])"
    again = _run(tmp_path, sys.executable, "-c", code.format("run.dir=runs/notebook", "train.max_steps=4"))
    assert "again 4" in again and any("nothing to do" in line for line in again)

    own = ("generation.source=text_source:FirstHalf", "run.dir=runs/half", "train.max_steps=2", "train.samples_every=1")
    _run(tmp_path, sys.executable, "-m", "megadistill", "train", "--config", "configs/smoke.yaml", *own)
    metrics = [
        json.loads(line)
        for line in (tmp_path / "runs" / "half" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["text/first_half"] for line in metrics] == [1.0, 1.0] and metrics[0]["loss/dac_kl"] > 0


def test_the_losses_fall_and_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    lines = _run(tmp_path, sys.executable, _example("losses"))
    first, last = (float(line.rpartition(" ")[2]) for line in lines)
    assert last < first - 1
    lines = _run(tmp_path, *TORCHRUN, _example("losses_tp"))
    assert sorted(line.split(":")[0] for line in lines) == ["rank 0", "rank 1"]


def test_text_is_the_same_on_two_processes(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "model", max_position_embeddings=300)
    one = _run(tmp_path, sys.executable, _example("decode"), str(folder))
    two = _run(tmp_path, *TORCHRUN, _example("decode"), str(folder))
    assert one and "\n".join(two).endswith("\n".join(one))

    chat_tokenizer(folder, "chatml")
    with megadistill.open_model(str(folder)) as model:
        chat = [{"role": "user", "content": "Hi."}]
        first, second = model.answer([chat, "Hi."], template="chat", max_new_tokens=5, temperature=0)
        assert first == second and model.context.world_size == 1
        for prompts, words in (
            ([[{"role": "assistant", "content": "x"}]], r"prompts\[0\]"),
            (["x " * 999], "over the"),
        ):
            with pytest.raises(DataError, match=words):
                model.answer(prompts)


def test_mistakes_are_the_errors_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        ROOT / "configs" / "base.yaml", [f"run.dir={tmp_path}", "model.student.path=x", "model.teacher.path=x"]
    )
    with pytest.raises(ConfigError, match="give them to load_config"):
        megadistill.distill(config, "train.max_steps=1")
    with pytest.raises(ConfigError, match="unknown key"):
        megadistill.distill("configs/smoke.yaml", "train.max_step=1")
    with pytest.raises(AttributeError, match="no attribute 'distill_all'"):
        megadistill.distill_all  # noqa: B018
    assert set(megadistill.__all__) == set(dir(megadistill)) and all(hasattr(megadistill, n) for n in dir(megadistill))
    (tmp_path / "broken_source.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (
        ("text_source", "a text source is MODULE:CLASS"),
        ("no_such_module:X", "is its folder in PYTHONPATH"),
        ("broken_source:X", "division by zero"),
        ("json:loads", "json has no TextSource of that name"),
    ):
        changed = load_config(
            ROOT / "configs" / "base.yaml",
            [f"run.dir={tmp_path}", "model.student.path=x", "model.teacher.path=x", f"generation.source={name}"],
        )
        with pytest.raises(ConfigError, match=words) as error:
            source_class(changed)
        assert error.value.setting == "generation.source"
