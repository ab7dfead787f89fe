"""Files for other layouts: what the tools write is what a run of that layout would have written, and reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megadistill.checkpoint.hf_export import export_checkpoint
from megadistill.checkpoint.manifest import digest
from megadistill.checkpoint.reshard import family_shards, reshard_checkpoint, shard_model
from megadistill.cli.main import main
from megadistill.errors import CheckpointError, ConfigError, TopologyError
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.shards import MASTER, HFWeights, ShardReader, shard_file, write_shard
from tests.support.runs import FAMILY_CONFIGS, ROOT, join_deepspeed, losses, run_layout, settings, weights
from tests.support.spawn import run_ranks

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name != "__init__.py")


def _settings(assets: Path, family: str, *more: str) -> list[str]:
    return settings(assets, family, "train.max_steps=4", "train.save_every=2", *more)


@pytest.fixture(scope="module")
def runs(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs at tp 2 x dp 2: GPT-2 (fused, transposed) in float32, Qwen2 (tied, biases) in bfloat16."""
    out = tmp_path_factory.mktemp("runs")
    more = {"gpt2": ("parallel.tp_size=2",), "qwen2": ("parallel.tp_size=2", "model.student.dtype=bf16")}
    run_layout(4, [(str(out / family), _settings(assets, family, *more[family])) for family in more])
    return {family: out / family for family in more}


def _engine_specs(rank: int, assets: Path, families: list[str], tp_size: int) -> dict[str, Any]:
    from deepspeed.utils import groups

    from megadistill.engines.partitioned import frozen_model
    from megadistill.models.loading import load_model
    from megadistill.parallel.context import ParallelContext

    join_deepspeed(rank)
    found = {}
    for family in families:
        loaded = load_model(
            str(assets / family / "student" / "config.json"),
            dtype="fp32",
            vocab_size=403,
            seed=0,
            attention="sdpa",
            where="student",
        )
        context = ParallelContext.build(tp_size, 120, torch.device("cpu"))
        expected = family_shards(loaded.shapes, loaded.family, tp_size)
        found[family] = (expected, frozen_model(loaded, context, zero_stage=0, dtype="fp32").shard_specs)
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
            setattr(groups, name, None)
    return found


@pytest.mark.parametrize("tp_size", [2, 4])
def test_families_know_how_autotp_cuts_them(assets: Path, tp_size: int) -> None:
    import deepspeed  # noqa: F401  once, before the forks

    families = list(FAMILY_CONFIGS)
    for family, (expected, specs) in run_ranks(_engine_specs, tp_size, assets, families, tp_size)[0].items():
        assert expected == specs, family


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_resharded_checkpoint_is_that_layouts_own(
    assets: Path, runs: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Same files as a run of tp 4 x dp 1 writes when it has loaded the same checkpoint; and the run resumes."""
    source = runs[family] / "checkpoints" / "step_2"
    reshard_checkpoint(source, tmp_path / "re", tp_size=4, dp_size=1)
    dtype = f"model.student.dtype={'bf16' if family == 'qwen2' else 'fp32'}"
    more = ("parallel.tp_size=4", dtype)
    run_layout(
        4,
        [
            (str(tmp_path / "a"), _settings(assets, family, *more, f"train.resume={source}")),
            (str(tmp_path / "b"), _settings(assets, family, *more, f"train.resume={tmp_path / 're'}")),
        ],
    )
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    ours = ShardReader(tmp_path / "b" / "checkpoints" / "step_4" / "student")
    reshard_checkpoint(tmp_path / "b", tmp_path / "there", tp_size=2, dp_size=2)
    reshard_checkpoint(tmp_path / "there", tmp_path / "back", tp_size=4, dp_size=1)
    for rank in range(4):
        file = shard_file(rank, 0)
        back = load_file(tmp_path / "back" / "student" / file)
        there = load_file(tmp_path / "b" / "checkpoints" / "step_4" / "student" / file)
        assert back.keys() == there.keys() and all(torch.equal(back[key], there[key]) for key in there)
    assert ShardReader(tmp_path / "back" / "student").shard_specs == ours.shard_specs


def test_exports_come_from_the_masters(runs: dict[str, Path], tmp_path: Path) -> None:
    """A run in bfloat16 has float32 weights: --dtype fp32 keeps them; in files no larger than asked."""
    export_checkpoint(runs["qwen2"], tmp_path / "fp32", dtype="fp32", max_shard_bytes=40_000)
    files = sorted((tmp_path / "fp32").glob("model-*.safetensors"))
    assert len(files) > 1
    exported, shards = HFWeights(tmp_path / "fp32"), ShardReader(runs["qwen2"] / "checkpoints" / "step_4" / "student")
    rounded = weights(runs["qwen2"], 4)
    assert set(exported.names) == set(rounded)
    for name in exported.names:
        whole = exported.read(name)
        assert whole.dtype == torch.float32 and torch.equal(whole.bfloat16(), rounded[name])
        assert torch.equal(whole[: shards.shard_specs[name].shape[0]], shards.whole(MASTER, name))
    assert any(not torch.equal(exported.read(name), rounded[name].float()) for name in exported.names)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_a_sharded_model_trains_like_the_model(assets: Path, tmp_path: Path, family: str) -> None:
    """Teacher and student from files for each rank, at the layout of the files and at others: the same losses to the
    bit, and the same export."""
    run_layout(1, [(str(tmp_path / "made"), _settings(assets, family, "train.max_steps=1", "train.save_every=1"))])
    models = {"student": tmp_path / "made" / "checkpoints" / "step_1" / "hf"}
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    models["teacher"] = tmp_path / "teacher"
    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(assets / family / "teacher" / "config.json")
    ).save_pretrained(models["teacher"])
    for role, path in models.items():
        shard_model(
            str(path),
            tmp_path / f"{role}_sharded",
            tp_size=2,
            dp_size=2,
            dtype="fp32",
            tokenizer=str(assets / "tokenizer"),
        )

    def paths(suffix: str) -> tuple[str, ...]:
        folders = {role: tmp_path / f"{role}_sharded" if suffix else path for role, path in models.items()}
        return tuple(f"model.{role}.path={folder}" for role, folder in folders.items())

    jobs = [("2", ("parallel.tp_size=2",)), ("1", ("parallel.tp_size=1", "parallel.zero_stage=1"))]
    run_layout(
        2,
        [
            (str(tmp_path / f"{name}{suffix}"), _settings(assets, family, *more, *paths(suffix)))
            for name, more in jobs
            for suffix in ("", "sharded")
        ],
    )
    for name, _ in jobs:
        assert losses(tmp_path / name) == losses(tmp_path / f"{name}sharded")
        ours, theirs = weights(tmp_path / f"{name}sharded", 4), weights(tmp_path / name, 4)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_sharded_model_reads_and_writes_in_one_process(assets: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """verify: the same texts and likelihoods, by the plain forward pass and by generate."""
    shard_model(
        str(runs["gpt2"] / "checkpoints" / "step_4" / "hf"), tmp_path / "sharded", tp_size=2, dp_size=1, dtype="fp32"
    )
    assert main(["verify", str(runs["gpt2"]), str(tmp_path / "sharded"), "--rows", "4", "--greedy-tokens", "4"]) == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join((assets / "data" / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]),
        encoding="utf-8",
    )
    for name, model in (("whole", runs["gpt2"]), ("sharded", tmp_path / "sharded")):
        words = ["--model", str(model), "--input", str(prompts), "--output", str(tmp_path / f"{name}.jsonl")]
        words += ["--max-new-tokens", "6", "--max-prompt-tokens", "64", "--template", "plain", "--temperature", "0"]
        assert main(["generate", *words]) == 0
    assert (tmp_path / "whole.jsonl").read_text(encoding="utf-8") == (tmp_path / "sharded.jsonl").read_text(
        encoding="utf-8"
    )
    assert "shards/tp00_dp00.safetensors" in model_fingerprint(str(tmp_path / "sharded"))


def test_converters_touch_nothing_of_the_users(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x", encoding="utf-8")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_checkpoint(runs["gpt2"], tmp_path / "out")
    export_checkpoint(runs["gpt2"], tmp_path / "link")
    assert (tmp_path / "out.partial" / "mine").read_text(encoding="utf-8") == "x"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        export_checkpoint(runs["gpt2"], ".")
        assert Path("config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", "real", "link", "here"}


def test_garbage_is_one_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that somebody wrote, with a manifest to them."""
    good = runs["gpt2"] / "checkpoints" / "step_4"

    def spoil(file: str, change: Callable[[Any], Any]) -> Path:
        folder = tmp_path / f"bad{len(list(tmp_path.iterdir()))}" / "step_4"
        shutil.copytree(good, folder)
        (folder / file).write_text(
            json.dumps(change(json.loads((folder / file).read_text(encoding="utf-8")))), encoding="utf-8"
        )
        if file != "manifest.json":
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest["files"][file] = digest(folder / file)
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    def parameter(**change: Any) -> Callable[[Any], Any]:
        return lambda tree: tree | {"parameters": tree["parameters"] | {"lm_head.weight": {**spec, **change}}}

    spec = json.loads((good / "student" / "layout.json").read_text(encoding="utf-8"))["parameters"][
        "transformer.wte.weight"
    ]
    bad = [
        spoil("manifest.json", lambda tree: tree | {"files": []}),
        spoil("manifest.json", lambda tree: tree | {"layout": {}}),
        spoil("manifest.json", lambda tree: tree | {"step": 5}),
        spoil("manifest.json", lambda tree: [1]),
        spoil("student/layout.json", lambda tree: tree | {"parameters": [1]}),
        spoil("student/layout.json", parameter(dim=7)),
        spoil("student/layout.json", parameter(shape=[-5], dim=None, sizes=[])),
        spoil("hf/config.json", lambda tree: [1]),
    ]
    for folder in bad:
        assert main(["inspect", str(folder)]) == 2
        if folder != bad[-1]:
            assert main(["export", str(folder), str(tmp_path / "out")]) == 2
            assert main(["reshard", str(folder), str(tmp_path / "out"), "--tp-size", "1", "--dp-size", "1"]) == 2
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").write_text("garbage", encoding="utf-8")
    assert main(["inspect", str(tmp_path / "model")]) == 2
    assert not (tmp_path / "out").exists() and "Traceback" not in capsys.readouterr().err


def test_files_that_are_not_of_a_checkpoint_are_not_read(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "step_4"
    shutil.copytree(runs["gpt2"] / "checkpoints" / "step_4", folder)
    write_shard(folder / "student", shard_file(0, 99), {"master/transformer.ln_f.weight": (0, torch.full((4,), 100.0))})
    before = ShardReader(runs["gpt2"] / "checkpoints" / "step_4" / "student").whole(MASTER, "transformer.ln_f.weight")
    assert torch.equal(ShardReader(folder / "student").whole(MASTER, "transformer.ln_f.weight"), before)


def test_what_cannot_be_cut_is_refused(assets: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="3"):
        reshard_checkpoint(runs["gpt2"], tmp_path / "out", tp_size=3, dp_size=1)
    with pytest.raises(ConfigError, match="has no weights"):
        shard_model(
            str(assets / "llama" / "student" / "config.json"), tmp_path / "out", tp_size=2, dp_size=1, dtype="fp32"
        )
    broken = tmp_path / "broken"
    shutil.copytree(runs["gpt2"] / "checkpoints" / "step_4", broken)
    victim = broken / "student" / "tp00_dp01.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    for convert in (
        lambda: reshard_checkpoint(broken, tmp_path / "out", tp_size=1, dp_size=1),
        lambda: export_checkpoint(broken, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="tp00_dp01.safetensors does not match its checksum"):
            convert()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_has_help(tool: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, timeout=120)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and ("usage" in told or "verbs" in told)


def test_inspect_tells_what_is_there(runs: dict[str, Path], tmp_path: Path) -> None:
    def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "tools" / "inspect_checkpoint.py", *arguments]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)

    told = inspect(runs["gpt2"], "--check", "--tensors").stdout
    parts = (
        "step        4",
        "tp 2 x dp 2, ZeRO-3",
        "4 updates",
        "others      step_2",
        "complete  ",
        "dimension 1 sharded",
    )
    for words in parts:
        assert words in told
    assert "types       BF16" in inspect(runs["qwen2"] / "checkpoints" / "step_2" / "hf").stdout
    broken = tmp_path / "broken"
    shutil.copytree(runs["gpt2"] / "checkpoints" / "step_4", broken)
    (broken / "trainer.pt").write_bytes(b"x")
    done = inspect(broken, "--check")
    assert done.returncode == 2 and "file trainer.pt has 1 bytes, expected" in done.stderr
