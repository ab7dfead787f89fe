"""What is shipped works as written: every YAML, the README's commands, and the whole way from launch to export."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cli.main import VERBS, main
from megadistill.config.load import load_config
from megadistill.generation.sources import source_class
from tests.support.runs import free_port, losses, run_layout, settings, write_assets

ROOT = Path(__file__).parents[2]
BASELINES = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NOT_RUNS = {"base.yaml", "paper.yaml"}
PAIRS = {
    "gpt2-xl_to_gpt2.yaml": "gpt2",
    "opt-6.7b_to_opt-1.3b.yaml": "opt",
    "open_llama_7b_to_3b.yaml": "llama",
    "llama-13b_to_7b.yaml": "llama",
    "llama-13b_to_7b_2nodes.yaml": "llama",
    "llama-13b_sft.yaml": "llama",  # no pair: the teacher is fine-tuned
    "qwen2.5-1.5b_to_0.5b.yaml": "qwen2",
    "qwen3-8b_to_1.7b.yaml": "qwen3",
}


@pytest.mark.parametrize("file", [*CONFIGS, *BASELINES], ids=lambda file: file.name)
def test_yaml_says_what_it_is_and_loads(file: Path) -> None:
    header = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    if file.name != "base.yaml":
        assert all(f"#   {word}:" in header for word in ("hardware", "launch", "expect")), file
    for launched in re.findall(r"--config (configs/\S+\.yaml)", header):
        assert (ROOT / launched).is_file() or launched == "configs/mine.yaml", launched
    if file.name not in NOT_RUNS:
        assert f"--config {file.relative_to(ROOT)}" in header
        assert load_config(file).run.dir.startswith("runs/")


# File -> what makes it that baseline: mode, corrected by the teacher, divergence, weights of the three terms.
MEANT = {
    "sft": ("dataset", None, None, (1, 0, 0)),
    "kd": ("dataset", None, "forward_kl", (0.5, 0.5, 0)),
    "seqkd": ("teacher", None, None, (1, 0, 0)),
    "imitkd": ("mixed", False, "forward_kl", (0, 1, 0)),
    "distillm": ("off_policy", False, "skewed_forward_kl", (0, 1, 0)),
    "gkd": ("mixed", False, "jensen_shannon", (0, 1, 0)),
    "opd": ("on_policy", False, "reverse_kl", (0, 1, 0)),
    "skd": ("skd", None, "forward_kl", (0, 1, 0)),
    "opd_sampled": ("on_policy", False, None, (0, 0, 0)),
    "distillm2": ("contrast", False, "skewed_reverse_kl", (0, 1, 0)),
    "abkd": ("dataset", None, "alpha_beta", (0, 1, 0)),
    "taid": ("dataset", None, "forward_kl", (0, 1, 0)),
    "adakd": ("dataset", None, "reverse_kl", (0, 1, 0)),
    "minillm": ("teacher_mixed", None, "reverse_kl", (1, 1, 0)),
}


@pytest.mark.parametrize("file", BASELINES, ids=lambda file: file.stem)
def test_baselines_are_what_they_are_called(file: Path) -> None:
    mode, is_corrected, divergence, weights = MEANT[file.stem]
    text = file.read_text(encoding="utf-8")
    assert "#   source:" in text and sum(not line.startswith("#") for line in text.splitlines()) <= 14
    config = load_config(file)
    source_class(config).check(config)
    generation, loss = config.generation, config.loss
    assert config.run.dir == f"runs/baselines/{file.stem}" and generation.mode == mode
    assert is_corrected is None or generation.scrg.enabled == is_corrected
    assert (loss.sft, loss.dac_kl, loss.span) == weights
    assert divergence is None or loss.divergence == divergence
    assert loss.taid.enabled == (file.stem == "taid") and loss.adakd.enabled == (file.stem == "adakd")
    assert loss.policy == (file.stem in ("opd_sampled", "minillm"))
    assert not loss.uses_gate and (loss.sft_text == "text") == (file.stem == "seqkd")
    assert config.needs_teacher == (file.stem != "sft")


def test_every_baseline_is_known() -> None:
    assert {file.stem for file in BASELINES} == set(MEANT)


def test_every_pair_of_the_paper_is_shipped() -> None:
    demos = {"demo.yaml", "demo_sft.yaml", "smoke.yaml"}
    assert {file.name for file in CONFIGS} == set(PAIRS) | NOT_RUNS | demos


@pytest.mark.parametrize(("name", "family"), PAIRS.items())
def test_pairs_train_with_small_models_in_their_place(name: str, family: str, tmp_path: Path) -> None:
    """One step with all the file sets but models, sizes and layout (bf16, checkpointing, Alpaca template stay)."""
    write_assets(tmp_path)
    small = [
        "data.max_prompt_tokens=120",
        "data.max_tokens=127",
        "data.long_prompt=truncate",
        f"data.valid_path={tmp_path / 'data' / 'valid.jsonl'}",
        "data.template=alpaca",
        "parallel.tp_size=1",
    ]
    run = (str(tmp_path / "run"), settings(tmp_path, family, "train.epochs=null", "train.max_steps=1", *small))
    run_layout(1, [run], config=ROOT / "configs" / name)
    assert len(losses(tmp_path / "run")) == 1


def _commands() -> list[str]:
    """The README's command lines (indented blocks), continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.split(" ")[0] in ("megadistill", "deepspeed", "bash", "python", "source")]


def test_readme_commands_exist() -> None:
    commands = _commands()
    assert any(line.startswith("bash launchers/demo.sh") for line in commands) and len(commands) >= 6
    for line in commands:
        words = shlex.split(line)
        if words[0] == "megadistill":
            assert words[1] in VERBS, line
        if words[0] in ("bash", "deepspeed"):
            script = next(word for word in words[1:] if word.endswith(".sh"))
            assert (ROOT / script).is_file(), line
        if "--config" in words and words[words.index("--config") + 1].startswith("configs/"):
            overrides = [word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=.*", word)]
            load_config(ROOT / words[words.index("--config") + 1], overrides)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run by the launcher, two processes, as a user starts it: from launch to checkpoint."""
    folder = tmp_path_factory.mktemp("smoke")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "launchers" / "run.sh"), "--config", str(ROOT / "configs" / "smoke.yaml")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_a_launched_run_leaves_what_is_promised(smoke: Path) -> None:
    run_dir = smoke / "runs" / "smoke"
    found = {path.name for path in run_dir.iterdir()}
    assert {"resolved.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints"} <= found
    assert any(name.startswith("events.out.tfevents") for name in found)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21))
    promised = "loss loss/sft loss/dac_kl loss/span grad_norm lr num_tokens kept_mass scrg/corrected_fraction \
        scrg/error_position_mean phi time/step_s memory/peak_bytes"
    assert all(set(promised.split()) <= set(record) for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["tp_size"] == 2


def test_generate_evaluate_and_export(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smoke)
    data = "runs/assets/smoke_0/data/test.jsonl"
    common = ["--template", "plain", "--max-prompt-tokens", "64", "--max-new-tokens", "12"]
    for output, width in (("a.jsonl", "3"), ("b.jsonl", "16")):
        arguments = ["--model", "runs/smoke", "--input", data, "--output", output, "--batch-size", width, *common]
        assert main(["generate", *arguments]) == 0
    assert Path("a.jsonl").read_text(encoding="utf-8") == Path("b.jsonl").read_text(encoding="utf-8")
    config = ["--config", str(ROOT / "configs" / "smoke.yaml")]
    assert (
        main(
            ["evaluate", *config, "--model", "runs/smoke", "--model", "teacher=runs/assets/smoke_0/teacher/config.json"]
        )
        == 0
    )
    alone = json.loads(Path("runs/smoke/evaluation.json").read_text(encoding="utf-8"))["results"]
    assert set(alone) == {"smoke", "teacher"}
    two = ["torchrun", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    command = [str(Path(sys.executable).parent / two[0]), *two[1:], "-m", "megadistill", "evaluate", *config]
    for tp_size in (1, 2):
        more = ["--model", "runs/smoke", "--output", f"two_{tp_size}.json", f"parallel.tp_size={tp_size}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *more], env=environment, check=True, timeout=300, capture_output=True)
        found = json.loads(Path(f"two_{tp_size}.json").read_text(encoding="utf-8"))["results"]["smoke"]["test"]
        expected = dict(alone["smoke"]["test"])
        found["time"] = expected["time"]
        assert found.pop("nll") == pytest.approx(expected.pop("nll"), rel=1e-5)
        assert found == expected
    script = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "runs/smoke", "student"]
    subprocess.run(script, check=True, timeout=120)
    assert main(["export", "runs/smoke/checkpoints/step_20", "again"]) == 0
    assert Path("student/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_finished_run_is_not_repeated(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (smoke / "runs" / "smoke" / "metrics.jsonl").read_bytes()
    summary = (smoke / "runs" / "smoke" / "summary.json").read_bytes()
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m"]
    command = [*run, "megadistill", "train", "--config", str(ROOT / "configs" / "smoke.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=smoke, env=environment, check=True, timeout=300, capture_output=True)
    assert (smoke / "runs" / "smoke" / "metrics.jsonl").read_bytes() == before
    assert (smoke / "runs" / "smoke" / "summary.json").read_bytes() == summary
