"""A run goes on with the rows, the tokenizer and the teacher that it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.config.load import load_config
from megadistill.data.encode import TokenizedExample
from megadistill.errors import CheckpointError, ConfigError
from megadistill.parallel.context import ParallelContext
from megadistill.training.data import TrainingData, load_training_data
from megadistill.training.hooks.inputs import Inputs
from tests.support.chats import chat_tokenizer

ROWS = [TokenizedExample(0, (1, 2), (3,), ("x",), "p"), TokenizedExample(1, (1,), None, (), "p")]
DATA = TrainingData(ROWS, [], [], {}, "plain", end_id=2)


def hook(folder: Path, data: TrainingData = DATA, *overrides: str, eos: str = "<|im_end|>") -> Inputs:
    teacher = folder / "teacher.json"
    if not teacher.exists():
        teacher.write_text('{"model_type": "llama"}', encoding="utf-8")
    paths = [f"run.dir={folder}", f"model.student.path={teacher}", f"model.teacher.path={teacher}"]
    config = load_config(Path(__file__).parents[2] / "configs" / "base.yaml", [*paths, *overrides])
    context = ParallelContext.single("cpu")
    components: Any = SimpleNamespace(
        config=config,
        context=context,
        tokenizer=chat_tokenizer(folder / "tokenizer", eos=eos),
        model_folders={"model.teacher.path": str(teacher)},
        eos_ids=frozenset({2}),
    )
    return Inputs(components, data)


def other(rows: list[TokenizedExample]) -> TrainingData:
    return replace(DATA, train=rows)


def test_the_same_inputs_pass(tmp_path: Path) -> None:
    state = hook(tmp_path).state_dict()
    hook(tmp_path).load_state_dict(state)
    hook(tmp_path).load_state_dict({})  # a checkpoint of a version that did not record them
    del state["inputs"]["model.teacher.path"]  # a run that branches off SFT
    hook(tmp_path).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "is_other"),
    [
        (ROWS[:1], True),
        (ROWS[::-1], True),
        ([replace(ROWS[0], response_ids=(4,)), ROWS[1]], True),
        ([replace(ROWS[0], targets=((0, 1),)), ROWS[1]], True),
        ([replace(ROWS[0], prompt_ids=(1,), response_ids=(2, 3)), ROWS[1]], True),
        ([ROWS[0], replace(ROWS[1], response_ids=())], True),
        ([replace(ROWS[0], prompt="another text of the same ids"), ROWS[1]], False),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, rows: list[TokenizedExample], is_other: bool) -> None:
    state, now = hook(tmp_path).state_dict(), hook(tmp_path, other(rows))
    if not is_other:
        now.load_state_dict(state)
        return
    with pytest.raises(CheckpointError, match="data.train_path was 2 rows, row checksums .* and is now ") as caught:
        now.load_state_dict(state)
    assert caught.value.setting == "train.resume_on_other_data"


def test_another_tokenizer_or_teacher_is_refused_unless_it_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = hook(tmp_path).state_dict()
    with pytest.raises(CheckpointError, match="the tokenizer was checksum"):
        hook(tmp_path, eos="<|endoftext|>").load_state_dict(state)
    (tmp_path / "teacher.json").write_text('{"model_type": "llama", "vocab_size": 7}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.teacher\.path was teacher\.json \d+ bytes"):
        hook(tmp_path).load_state_dict(state)
    hook(tmp_path, DATA, "train.resume_on_other_data=true").load_state_dict(state)
    assert "WARNING train: the checkpoint was made with other inputs" in capsys.readouterr().out


def test_validating_on_the_split_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    """A folder has several splits, and data.hub_split is one setting for all files."""
    (tmp_path / "train.jsonl").write_text('{"instruction": "x", "output": "y"}\n', encoding="utf-8")
    settings = ["run.dir=x", "model.student.path=s", "model.teacher.path=t", f"data.train_path={tmp_path}"]
    config = load_config(
        Path(__file__).parents[2] / "configs" / "base.yaml", [*settings, f"data.valid_path={tmp_path}/."]
    )
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="the split 'train' is read: the run would validate on its training rows"):
        load_training_data(config, tokenizer, len(tokenizer))
