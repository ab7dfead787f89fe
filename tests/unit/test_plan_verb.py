"""``megadistill plan`` as a verb: shipped runs, what is printed and written, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megadistill.cli.main import main
from megadistill.planning.known import shipped_shape
from megadistill.planning.shape import ModelOutline

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

# The GPUs that each file is written for.
SHIPPED = {
    "demo.yaml": 2, "demo_sft.yaml": 2, "smoke.yaml": 2, "gpt2-xl_to_gpt2.yaml": 1, "opt-6.7b_to_opt-1.3b.yaml": 4,
    "open_llama_7b_to_3b.yaml": 4, "llama-13b_to_7b.yaml": 8, "llama-13b_to_7b_2nodes.yaml": 8, "llama-13b_sft.yaml": 8,
    "qwen2.5-1.5b_to_0.5b.yaml": 1, "qwen3-8b_to_1.7b.yaml": 4,
}  # fmt: skip


def test_every_shipped_run_is_planned_here() -> None:
    assert set(SHIPPED) == {file.name for file in CONFIGS.glob("*.yaml")} - {"base.yaml", "paper.yaml"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_runs_fit_their_machines(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing has been made here
    machines = ["--gpus-per-node", str(SHIPPED[name]), "--nodes", "2" if "2nodes" in name else "1"]
    assert main(["plan", "--config", str(CONFIGS / name), *machines]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 160
    assert "\nfits: needs " in shown and "[est]" in shown and "optimizer" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama-13b_to_7b.yaml", "llama-13b_to_7b_2nodes.yaml", "llama-13b_sft.yaml"])
def test_headers_predict_what_plan_predicts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = " ".join(line.strip("# \n") for line in (CONFIGS / name).open(encoding="utf-8") if line.startswith("#"))
    command = re.search(rf"megadistill plan --config configs/{name}( --nodes \d)?", header)
    told = re.search(r"needs ([\d.]+) of 80 GB, ([\d.]+) s a step", header)
    assert command and told and "Predicted" in header
    assert main(["plan", "--config", str(CONFIGS / name), *(command[1] or "").split()]) == 0
    found = re.search(r"needs ([\d.]+) of 80 GB .*; ([\d.]+) s a step", capsys.readouterr().out)
    assert found
    assert float(found[1]) == pytest.approx(float(told[1]), rel=0.1)
    assert float(found[2]) == pytest.approx(float(told[2]), rel=0.2)


def test_shipped_shapes_are_those_of_hub_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_shape("meta-llama/Llama-2-7b-hf") == CONFIGS / "models" / "meta-llama--Llama-2-7b-hf.json"
    assert shipped_shape("meta-llama/Llama-2-70b-hf") is None
    (tmp_path / "meta-llama" / "Llama-2-7b-hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shipped_shape("meta-llama/Llama-2-7b-hf") is None
    sizes = {"meta-llama--Llama-2-13b-hf": 13_015_864_320, "Qwen--Qwen3-8B": 8_190_735_360,
             "Qwen--Qwen2.5-0.5B": 494_032_768, "openai-community--gpt2-xl": 1_557_611_200,
             "facebook--opt-1.3b": 1_315_758_080, "openlm-research--open_llama_3b_v2": 3_426_473_600}  # fmt: skip
    from transformers import AutoConfig

    for name, size in sizes.items():
        assert ModelOutline.of(AutoConfig.from_pretrained(CONFIGS / "models" / f"{name}.json"), name).size == size


def run(*words: object) -> int:
    return main(["plan", "--config", str(CONFIGS / "llama-13b_to_7b.yaml"), *map(str, words)])


def test_what_does_not_fit_says_so_and_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.micro_batch_size=8", "model.gradient_checkpointing=false", "parallel.tp_size=1"]
    assert run("--gpu-memory", "60GB", *settings) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    advice = next(line for line in shown.splitlines() if line.startswith("nearest that fits: "))
    words = advice.removeprefix("nearest that fits: ").partition(" (")[0].split()
    kept = [s for s in settings if s.partition("=")[0] not in advice]
    assert run("--gpu-memory", "60GB", *kept, *words) == 0


def test_json_sweep_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("--json", "-", "--plot", tmp_path / "memory.png") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["use"]["source"] == "formulas" and plan["layout"]["tp_size"] >= 1
    assert plan["seconds"] == pytest.approx(sum(time["seconds"] for time in plan["times"].values()))
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert run("--sweep", "--json", tmp_path / "plan.json") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(row for i, row in enumerate(rows) if i and rows[i - 1] and set(rows[i - 1][0]) == {"-"})
    layouts = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["layouts"]
    assert layouts[0]["seconds"] == min(layout["seconds"] for layout in layouts)
    assert first[0] == str(layouts[0]["settings"]["parallel.tp_size"])
    # The file's own layout need not be one on other machines.
    assert run("--sweep", "--gpus-per-node", 2, "--gpu", "B200-180", "train.micro_batch_size=64") == 0
    assert run("--sweep", "--gpu-memory", "2GB") == 1 and "no layout fits" in capsys.readouterr().out


def test_processes_on_cpus_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cpu", "--gpus-per-node", 8, "--gpu-memory", "90GB"]
    assert run(*words, "--json", "-") == 0
    plan = json.loads(capsys.readouterr().out)
    kept = sum(plan["use"]["resident"].values())
    assert plan["process"] > 3e8 and plan["layout"]["gpu"]["name"] == "CPU core"
    assert plan["needed"] > plan["process"] + max(plan["use"]["peak"], kept + plan["host"]["saving"])
    assert all(phase["operations"] == 0 for phase in plan["use"]["phases"])
    assert run(*words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^process +0\.60", shown, re.MULTILINE) and "for Python and its libraries" in shown
    assert "CUDA context" not in shown
    assert run("--cpu", "--gpu-memory", f"{plan['needed'] / 1e9 - 0.1:.2f}GB") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H100"], "invalid choice: 'H100'"),
        (["--cpu", "--gpu", "H100-80"], "leave out --gpu H100-80, or --cpu"),
        (["--gpu-memory", "80 things"], "is not a size"),
        (["--gpu-memory", "80"], "80 has no unit; allowed: such as 80GB"),
        (["--gpu-memory", "79.5"], "79.5 has no unit"),
        (["--nodes", "0"], "0 is not a whole number >= 1"),
        (["--gpus-per-node", "three"], "three is not a whole number"),
        (["--gpus-per-node", "3", "parallel.tp_size=2"], "does not divide the number of processes, 3"),
        (["parallel.tp_size=16", "--nodes", "2"], "does not divide the 40 attention heads"),
        (["parallel.tp_size=1", "train.global_batch_size=20", "train.micro_batch_size=5"], "cannot be shared by 8"),
        (["train.micro_batch_sise=5"], "did you mean train.micro_batch_size?"),
        (["model.student.path=nowhere/at/all"], "no such file or folder: nowhere/at/all"),
        (["data.max_tokens=5000"], "reads at most 4096 positions"),
        (["generation.max_cache_bytes=1000"], "is too small: one example of 512 tokens"),
        (["--rates", "nowhere/metrics.jsonl"], "nowhere/metrics.jsonl is missing"),
        (["--plot", "memory.gif"], "must end in .png or .pdf or .svg"),
        (["--json", "."], "a file is needed"),
        (["--rates", "."], "--rates . is a folder; give the metrics.jsonl in it"),
        (["--prompt-tokens", "300"], "prompts of 300 tokens are more than data.max_prompt_tokens=256"),
        (["--response-tokens", "300"], "responses of 300 tokens are more than generation.max_new_tokens=256"),
        (["--response-tokens", "300", "generation.mode=dataset"], "256 prompt and 300 response tokens are more than"),
        (["parallel.zero.hpz_partition_size=3"], "over 3 ranks does not divide"),
        (["--exact", "--sweep"], "give one of the two"),
        (["loss.dac_kl=0", "loss.span=0"], "no loss would be computed on its text"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_damaged_rates_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "time/train_s": 1.0}\n', encoding="utf-8")
    (tmp_path / "resolved.yaml").write_text("run: {dir: x}\n", encoding="utf-8")
    assert run("--rates", metrics) == 2 and "summary.json is missing" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    assert run("--rates", metrics) == 2 and "is damaged" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"processes": 2}', encoding="utf-8")
    assert run("--rates", metrics) == 2 and "has 1 steps; at least 3 are needed" in capsys.readouterr().err
