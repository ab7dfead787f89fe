"""A run that trains adapters: every layout, resuming, the folder that peft reads, and the verbs that take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import LARGE_MODEL, losses, run_layout, samples, settings

STEPS = 4
FAMILIES = ("llama", "gpt2", "gemma2")  # a plan, fused and transposed layers, and the family's own forward pass
LAYOUTS = [(2, 1, 3, FAMILIES[:1]), (2, 2, 3, FAMILIES), (2, 2, 1, FAMILIES[:1])]
# A large rate: text of later steps is that of adapters that are far from zero.
LORA = ("model.student.lora.r=4", "model.student.lora.alpha=8", "optim.lr=0.02", "run.seed=1", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def bases(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with weights for each family, as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(f"base_{family}")
        torch.manual_seed(3)
        config = AutoConfig.from_pretrained(assets / family / "student")
        AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
    return made


def _settings(assets: Path, bases: dict[str, Path], family: str, *more: str) -> list[str]:
    common = settings(assets, family, *LORA, f"model.student.path={bases[family]}", f"train.max_steps={STEPS}")
    return [*common, "train.save_every=2", *more]


@pytest.fixture(scope="module")
def one_process(assets: Path, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    run_layout(1, [(str(out / family), _settings(assets, bases, family)) for family in FAMILIES])
    return out


def _hf(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step_{step}" / "hf"


def _adapters(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(_hf(run, step) / "adapter_model.safetensors")


def _assert_same_run(found: Path, expected: Path) -> None:
    assert samples(found) == samples(expected)
    for key in ("loss", "loss/dac_kl", "grad_norm"):
        assert losses(found, key) == pytest.approx(losses(expected, key), rel=1e-4), key


@pytest.mark.parametrize(("tp_size", "dp_size", "zero_stage", "families"), LAYOUTS)
def test_every_layout_is_one_process(
    assets: Path, bases: dict[str, Path], one_process: Path, tmp_path: Path,
    tp_size: int, dp_size: int, zero_stage: int, families: tuple[str, ...],
) -> None:  # fmt: skip
    more = [f"parallel.tp_size={tp_size}", f"parallel.zero_stage={zero_stage}"]
    more += LARGE_MODEL if (dp_size, zero_stage) == (2, 3) else []
    run_layout(
        tp_size * dp_size,
        [(str(tmp_path / family), _settings(assets, bases, family, *more)) for family in families],
    )
    for family in families:
        _assert_same_run(tmp_path / family, one_process / family)
        ours, theirs = _adapters(tmp_path / family), _adapters(one_process / family)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


def test_it_learns_and_the_base_stays(bases: dict[str, Path], one_process: Path) -> None:
    for family in FAMILIES:
        first, last = _adapters(one_process / family, 2), _adapters(one_process / family)
        assert all(float((first[name] - last[name]).abs().max()) > 1e-3 for name in last)
        assert all(".lora_" in name for name in last)
        student = one_process / family / "checkpoints" / f"step_{STEPS}" / "student"
        layout = json.loads((student / "layout.json").read_text(encoding="utf-8"))
        assert len(layout["parameters"]) == len(last)


def test_resuming_is_the_undisturbed_run_also_on_another_layout(
    assets: Path, bases: dict[str, Path], one_process: Path, tmp_path: Path
) -> None:
    for name in ("same", "other"):
        shutil.copytree(one_process / "llama", tmp_path / name, symlinks=True)
        shutil.rmtree(tmp_path / name / "checkpoints" / f"step_{STEPS}")
        (tmp_path / name / "checkpoints" / "latest").unlink()
        (tmp_path / name / "checkpoints" / "latest").write_text("step_2\n", encoding="utf-8")
    run_layout(1, [(str(tmp_path / "same"), _settings(assets, bases, "llama"))])
    assert all(
        torch.equal(x, _adapters(one_process / "llama")[name]) for name, x in _adapters(tmp_path / "same").items()
    )
    assert losses(tmp_path / "same") == losses(one_process / "llama")
    run_layout(2, [(str(tmp_path / "other"), _settings(assets, bases, "llama", "parallel.tp_size=2"))])
    _assert_same_run(tmp_path / "other", one_process / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_folder_and_so_do_we(assets: Path, one_process: Path, family: str) -> None:
    from peft import AutoPeftModelForCausalLM

    from megadistill.checkpoint.probe import probe_logits, streamed_logits
    from megadistill.models.loading import load_model

    folder = _hf(one_process / family)
    wrapped: Any = AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
    vocab_size = load_vocabulary(assets)
    expected = probe_logits(wrapped, vocab_size)
    loaded = load_model(str(folder), dtype="fp32", vocab_size=vocab_size, seed=0, attention="eager", where="MODEL")
    assert torch.allclose(streamed_logits(loaded, vocab_size), expected, atol=1e-5)
    with wrapped.disable_adapter():
        assert not torch.allclose(probe_logits(wrapped, vocab_size), expected, atol=1e-2)


def load_vocabulary(assets: Path) -> int:
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size

    return vocabulary_size(load_tokenizer(assets / "tokenizer"))


def test_the_verbs_take_a_run_with_adapters(
    bases: dict[str, Path], one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters and whole models are exported; merging by peft, our export and our reading are the same model."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from megadistill.cli.main import main

    run, base = one_process / "gpt2", bases["gpt2"]
    out = {name: str(tmp_path / name) for name in ("adapters", "bf16", "whole", "peft", "tp2", "again")}
    assert main(["export", str(run), out["adapters"]]) == 0
    assert "AutoPeftModelForCausalLM" in capsys.readouterr().out
    assert main(["export", str(run), out["bf16"], "--dtype", "bf16"]) == 0
    assert main(["export", str(run), out["whole"], "--merged", "--max-shard-size", "20KB"]) == 0
    assert main(["merge", str(base), str(run), out["peft"]]) == 0
    AutoPeftModelForCausalLM.from_pretrained(out["adapters"])
    AutoModelForCausalLM.from_pretrained(out["whole"])
    for other in (out["whole"], out["peft"], out["adapters"]):
        assert main(["verify", str(run), other, "--tolerance", "1e-9", "--rows", "4", "--greedy-tokens", "8"]) == 0
    assert main(["verify", str(run), str(base), "--rows", "4", "--greedy-tokens", "0"]) == 1
    assert main(["reshard", str(run), out["tp2"], "--tp-size", "2", "--dp-size", "2"]) == 0
    assert main(["export", out["tp2"], out["again"]]) == 0
    ours, theirs = (Path(out[name]) / "adapter_model.safetensors" for name in ("again", "adapters"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert main(["inspect", str(run)]) == 0
    assert f"adapters    multiplied by 2, of the base {base}" in capsys.readouterr().out


def test_what_adapters_cannot_do_is_refused_in_one_line(
    assets: Path, bases: dict[str, Path], one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megadistill.cli.main import main

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    def train(*more: str) -> str:
        common = _settings(assets, bases, "llama", *more)
        return refused("train", "--config", "configs/base.yaml", f"run.dir={tmp_path / 'run'}", *common)

    random = f"model.student.path={assets / 'llama' / 'student' / 'config.json'}"
    assert "has no weights" in train(random)
    assert "holds LoRA adapters" in train(f"model.student.path={one_process / 'llama'}")
    assert "no linear layer q_prj; did you mean q_proj?" in train("model.student.lora.targets=[q_prj]")
    assert "alpha has no effect with model.student.lora.r=0" in train("model.student.lora.r=0")
    assert "the step ahead" in train("loss.gate_objective=student")
    assert "megadistill merge" in refused(
        "shard", str(one_process / "llama"), str(tmp_path / "x"), "--tp-size", "2", "--dp-size", "1"
    )
    assert "--merged --push o/n" in refused("export", str(one_process / "llama"), str(tmp_path / "x"), "--push", "o/n")
    moved = tmp_path / "moved"
    shutil.copytree(_hf(one_process / "llama"), moved)
    record = {"path": str(bases["gpt2"]), "files": {"config.json": "1"}, "layers": []}
    (moved / "adapter_base.json").write_text(json.dumps(record), encoding="utf-8")
    assert "is not what it was" in refused("verify", str(moved), str(moved))
    assert main(["inspect", str(moved)]) == 0
    other = f"train.resume={one_process / 'llama'}"
    assert "or to other adapters" in train(other, "model.student.lora.alpha=80", f"train.max_steps={STEPS + 1}")
    assert "--merged" in refused("export", str(one_process / "llama"), str(tmp_path / "y"), "--max-shard-size", "5KB")
    assert "not the model" in refused("merge", str(bases["gpt2"]), str(one_process / "llama"), str(tmp_path / "z"))
