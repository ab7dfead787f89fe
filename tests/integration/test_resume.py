"""Checkpoints: a resumed run is the undisturbed one, bit for bit; what is broken or foreign is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megadistill.checkpoint.hf_export import check_export, export_checkpoint
from megadistill.checkpoint.manifest import digest
from megadistill.errors import CheckpointError
from tests.support.runs import LARGE_MODEL, ROOT, run_layout, samples, settings, train_all, weights
from tests.support.spawn import RankError, run_ranks

TIMES = ("time/", "memory/", "throughput/")


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps at tp 2 x dp 2 with a checkpoint in the middle."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_layout(4, [(str(out), _settings(assets))])
    return out


def _settings(assets: Path, *more: str) -> list[str]:
    return settings(
        assets, "llama", "parallel.tp_size=2", "train.max_steps=20", "train.save_every=10", "train.eval_every=5",
        f"data.valid_path={assets / 'data' / 'valid.jsonl'}", "train.eval_rows=6", "generation.mode=mixed",
        "generation.student_ratio=0.7", "generation.scrg.rounds=2", "train.micro_batch_tokens=150", *more,
    )  # fmt: skip


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]


def _state(run_dir: Path, step: int) -> list[torch.Tensor]:
    state = torch.load(run_dir / "checkpoints" / f"step_{step}" / "trainer.pt", weights_only=True)
    return [*state["gate"]["gate"].values()]


def test_resume_is_bitwise_the_undisturbed_run(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Losses, tokens, weights and gate; the run directory is what a job that died after step 13 leaves behind.

    It goes on with optimizer and teacher in host memory, and with prepared rows, which changes no bit.
    """
    died = _died_after_ten(undisturbed, tmp_path / "died")
    cache = f"data.cache_dir={tmp_path / 'rows'}"
    run_layout(4, [(str(died), _settings(assets, "parallel.offload=both", cache))])
    assert len(list((tmp_path / "rows").glob("*/index.npy"))) == 3
    assert _numbers(died) == _numbers(undisturbed)
    assert samples(died) == samples(undisturbed)
    ours, theirs = weights(died, 20), weights(undisturbed, 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(a, b) for a, b in zip(_state(died, 20), _state(undisturbed, 20), strict=True))
    changed = weights(undisturbed, 10)
    assert any(not torch.equal(changed[name], theirs[name]) for name in theirs)


def test_a_new_run_starts_from_a_named_checkpoint(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It releases and gathers parameters as for a large model, which changes no bit either."""
    more = f"train.resume={undisturbed / 'checkpoints' / 'step_10'}"
    run_layout(4, [(str(tmp_path / "forked"), _settings(assets, more, *LARGE_MODEL))])
    assert _numbers(tmp_path / "forked") == _numbers(undisturbed)[10:]


@pytest.mark.parametrize(("world_size", "tp_size", "zero_stage"), [(1, 1, 0), (2, 1, 3), (2, 2, 1), (4, 4, 2)])
def test_another_layout_goes_on_with_the_same_losses(
    assets: Path, undisturbed: Path, tmp_path: Path, world_size: int, tp_size: int, zero_stage: int
) -> None:
    """Same run.dir: another tp_size, dp_size and ZeRO stage are still the same run."""
    died = _died_after_ten(undisturbed, tmp_path / "died")
    more = (f"parallel.tp_size={tp_size}", f"parallel.zero_stage={zero_stage}")
    run_layout(world_size, [(str(died), [*_settings(assets), *more])])
    ours, theirs = _numbers(died), _numbers(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for key in ("loss", "loss/sft", "loss/dac_kl", "loss/span", "gate/lower"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], abs=1e-4)
    assert samples(died) == samples(undisturbed)


@pytest.fixture(scope="module")
def small(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process, a checkpoint after two."""
    out = tmp_path_factory.mktemp("small") / "run"
    run_layout(1, [(str(out), _small_settings(assets))])
    return out


def _small_settings(assets: Path) -> list[str]:
    return settings(assets, "llama", "train.max_steps=4", "train.save_every=2")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest", "no latest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    assets: Path, small: Path, tmp_path: Path, damage: str
) -> None:
    """A run whose last checkpoint is damaged resumes from the one before, and ends with the same numbers."""
    run_dir = tmp_path / "run"
    shutil.copytree(small, run_dir)
    last = run_dir / "checkpoints" / "step_4"
    victim = max((last / "student").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncated":
        victim.write_bytes(content[:-100])
    elif damage == "missing":
        victim.unlink()
    elif damage == "no manifest":
        (last / "manifest.json").write_text("{", encoding="utf-8")
    else:
        (run_dir / "checkpoints" / "latest").write_text("step_", encoding="utf-8")
    run_layout(1, [(str(run_dir), _small_settings(assets))])
    assert _numbers(run_dir) == _numbers(small)
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_4\n"
    assert (run_dir / "checkpoints" / "step_4.damaged").exists() is (damage != "no latest")
    if damage in ("flipped", "truncated", "missing"):
        explicit = f"train.resume={run_dir / 'checkpoints' / 'step_4.damaged'}"
        with pytest.raises(RankError, match="checksum|bytes, expected|is missing"):
            run_layout(1, [(str(tmp_path / "b"), [*_small_settings(assets), explicit])])


def _died_after_ten(undisturbed: Path, died: Path) -> Path:
    """The run directory of a job that died in step 14; its last checkpoint is of step 10."""
    shutil.copytree(undisturbed, died)
    shutil.rmtree(died / "checkpoints" / "step_20")
    (died / "checkpoints" / "latest").write_text("step_10\n", encoding="utf-8")
    (died / "summary.json").unlink()
    lines = (died / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (died / "metrics.jsonl").write_text("".join(lines[:13]) + '{"step": 14, "lo', encoding="utf-8")
    return died


def _checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("step_*")}


def test_what_is_no_damage_is_left_alone(assets: Path, small: Path, tmp_path: Path) -> None:
    """A checkpoint of another program is refused and keeps its name; one that is gone gives way to the one before."""
    newer, gone = tmp_path / "newer", tmp_path / "gone"
    for copy in (newer, gone):
        shutil.copytree(small, copy)
    for file in newer.glob("checkpoints/step_*/manifest.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"version": 2', '"version": 9'), encoding="utf-8")
    with pytest.raises(RankError, match="version 9"):
        run_layout(1, [(str(newer), _small_settings(assets))])
    assert _checkpoints(newer) == {"step_2", "step_4"}
    shutil.rmtree(gone / "checkpoints" / "step_4")
    run_layout(1, [(str(gone), _small_settings(assets))])
    assert _numbers(gone) == _numbers(small)


def test_going_back_by_the_same_words_happens_once(assets: Path, small: Path, tmp_path: Path) -> None:
    """A job that is queued again with train.resume=its own step_2 resumes from what it saved since."""
    run_dir = tmp_path / "run"
    shutil.copytree(small, run_dir)
    words = f"train.resume={run_dir / 'checkpoints' / 'step_2'}"
    with pytest.raises(RankError, match="step_2 .* last step 1"):
        run_layout(1, [(str(run_dir), [*_small_settings(assets), words, "train.max_steps=1"])])
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_4\n"
    run_layout(1, [(str(run_dir), [*_small_settings(assets), words, "train.max_steps=3"])])
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_3\n"
    marked = run_dir / "checkpoints" / "step_3" / "manifest.json"
    before = marked.stat().st_mtime_ns
    run_layout(1, [(str(run_dir), [*_small_settings(assets), words])])
    assert marked.stat().st_mtime_ns == before
    assert [line["step"] for line in _numbers(run_dir)] == [1, 2, 3, 4]


def test_a_way_back_that_is_refused_leaves_the_run_where_it_was(
    assets: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(small, run_dir)
    monkeypatch.setattr("megadistill.training.hooks.inputs.describe_inputs", lambda *_: {"the tokenizer": "other"})
    words = f"train.resume={run_dir / 'checkpoints' / 'step_2'}"
    with pytest.raises(RankError, match="the checkpoint was made with other inputs"):
        run_layout(1, [(str(run_dir), [*_small_settings(assets), words])])
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_4\n"
    assert _numbers(run_dir) == _numbers(small)


def test_the_start_is_planned_by_who_holds_the_folder(assets: Path, small: Path, tmp_path: Path) -> None:
    """What another job saved while this one loaded its models is not thrown away."""
    from megadistill.training import loop

    run_dir = tmp_path / "run"
    shutil.copytree(small, run_dir)
    seen = []

    def stale(rank: int) -> None:
        planned = loop.plan_start

        def plan(config: object) -> object:
            seen.append(planned(config))  # type: ignore[arg-type]
            return seen[-1]

        loop.plan_start = plan  # type: ignore[assignment]
        train_all(
            rank, [(str(run_dir), [*_small_settings(assets), "train.max_steps=5"])], ROOT / "configs" / "base.yaml"
        )
        assert [start.checkpoints[0].name for start in seen] == ["step_4"]

    run_ranks(stale, 1)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_the_probe(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may be killed soon; any other first checkpoint is compared with the student."""
    from megadistill.launch.stopping import StopRequest

    def refuse(*_: object) -> None:
        raise CheckpointError("compared")

    monkeypatch.setattr("megadistill.checkpoint.writer.prove_student", refuse)
    with pytest.raises(RankError, match="compared"):
        run_layout(1, [(str(tmp_path / "whole"), [*_small_settings(assets), "train.max_steps=1"])])
    asked = StopRequest()
    asked.ask(15)
    monkeypatch.setattr("megadistill.training.loop.StopRequest", lambda: asked)
    run_layout(1, [(str(tmp_path / "stopped"), _small_settings(assets))])
    assert _checkpoints(tmp_path / "stopped") == {"step_1"}


def test_links_and_what_cannot_be_removed_do_not_fail_a_run(assets: Path, small: Path, tmp_path: Path) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(small, run_dir)
    (run_dir / "checkpoints" / "step_2").rename(elsewhere)
    (run_dir / "checkpoints" / "step_2").symlink_to(elsewhere)
    more = ("train.max_steps=6", "checkpoint.keep_last=1")
    run_layout(1, [(str(run_dir), [*_small_settings(assets), *more])])
    assert (elsewhere / "manifest.json").is_file()
    assert _checkpoints(run_dir) == {"step_2", "step_6"}


class _Program:
    """What a hostile pickle holds: reading it naively makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self._path),)


def test_reading_a_hostile_checkpoint_executes_nothing(assets: Path, small: Path, tmp_path: Path) -> None:
    """Its manifest is in order: it was written with the files."""
    hostile, trace = tmp_path / "step_2", tmp_path / "executed"
    shutil.copytree(small / "checkpoints" / "step_2", hostile)
    torch.save({"gate": _Program(trace)}, hostile / "trainer.pt")
    manifest = json.loads((hostile / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["trainer.pt"] = digest(hostile / "trainer.pt")
    (hostile / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RankError, match="trainer.pt cannot be read"):
        run_layout(1, [(str(tmp_path / "run"), [*_small_settings(assets), f"train.resume={hostile}"])])
    model = tmp_path / "model"
    shutil.copytree(small / "checkpoints" / "step_2" / "hf", model)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Program(trace)}, model / "pytorch_model.bin")
    with pytest.raises(RankError, match="cannot load the weights"):
        run_layout(1, [(str(tmp_path / "run"), [*_small_settings(assets), f"model.student.path={model}"])])
    assert not trace.exists()
    torch.load(hostile / "trainer.pt", weights_only=False)
    assert trace.exists()


def test_going_back_keeps_what_is_written(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Resuming from an earlier checkpoint leaves a branch with later steps; the new ones must not make way for it."""
    run_dir = tmp_path / "back"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "checkpoints" / "step_mine").mkdir()
    more = (f"train.resume={run_dir / 'checkpoints' / 'step_10'}", "checkpoint.keep_last=1", "train.max_steps=11")
    run_layout(4, [(str(run_dir), _settings(assets, *more))])
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_11\n"
    assert {p.name for p in (run_dir / "checkpoints").glob("step_*")} == {"step_11", "step_20", "step_mine"}
    export_checkpoint(run_dir, tmp_path / "student")


def test_export_loads_with_plain_transformers_and_predicts_the_same(undisturbed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "student"
    export_checkpoint(undisturbed, folder)
    check_export(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) + 2  # the padded rows are back
    assert torch.equal(model.lm_head.weight, weights(undisturbed, 20)["lm_head.weight"])
    export_checkpoint(undisturbed / "checkpoints" / "step_10", tmp_path / "half", dtype="bf16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, weights(undisturbed, 10)["lm_head.weight"].bfloat16())


def test_export_refuses_what_it_cannot_trust(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_checkpoint(undisturbed, tmp_path / "full")
    short = tmp_path / "short"
    shutil.copytree(undisturbed / "checkpoints" / "step_20", short)
    weights_file = short / "hf" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors has .* bytes, expected"):
        export_checkpoint(short, tmp_path / "out")
    (short / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_losses_fall(undisturbed: Path) -> None:
    found = [n["eval/nll"] for n in _numbers(undisturbed) if "eval/nll" in n]
    assert len(found) == 4 and found[-1] < found[0]


def test_replayed_text_and_phi_go_on_with_other_processes(assets: Path, tmp_path: Path) -> None:
    """Mode off_policy: the buffer is distributed over another number of data-parallel ranks."""
    more = ["train.max_steps=8", "train.save_every=4", "generation.mode=off_policy", "train.eval_every=2"]
    more += ["generation.off_policy.initial_phi=0.5", "generation.off_policy.replay_batches=3", "train.eval_rows=4"]
    words = settings(assets, "llama", *more, f"data.valid_path={assets / 'data' / 'valid.jsonl'}")
    run_layout(1, [(str(tmp_path / "one"), words)])
    start = f"train.resume={tmp_path / 'one' / 'checkpoints' / 'step_4'}"
    run_layout(2, [(str(tmp_path / "two"), [*words, "parallel.tp_size=1", start])])
    expected, found = _numbers(tmp_path / "one")[4:], _numbers(tmp_path / "two")
    assert any(line["text/replay"] for line in expected) and any(line["text/generate"] for line in expected)
    for key in ("phi", "text/replay", "text/generate", "replay/rows"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
