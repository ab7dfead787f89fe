"""docs/13b.md, line by line, with small models in place of the large ones and two processes on this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megadistill.errors import ExitCode
from tests.support.launched import environment_of
from tests.support.runs import ROOT, free_port, write_assets

PAGE = ROOT / "docs" / "13b.md"
LARGE = {"meta-llama/Llama-2-13b-hf": "teacher", "meta-llama/Llama-2-7b-hf": "student"}
# What is smaller here; everything else is as the files have it: bf16, layout, checkpointing, losses, template.
SMALLER = (
    "data.max_prompt_tokens=120",
    "data.max_tokens=127",
    "data.long_prompt=truncate",
    "generation.max_new_tokens=8",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.eval_every=2",
    "train.eval_rows=4",
    "eval.max_new_tokens=4",
    "eval.seeds=[10]",
)


def commands() -> list[str]:
    """The page's command lines."""
    return [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the two models, in float16 as LLaMA 2's files are, and a corpus with Dolly's columns."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("13b")
    write_assets(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for role in LARGE.values():
        config = AutoConfig.from_pretrained(folder / "llama" / role)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).half()
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    dolly = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in rows]
    (folder / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dolly), encoding="utf-8")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def small(command: str, *more: str) -> list[str]:
    """The command for this machine: small models and data, two processes here whatever nodes it names."""
    for name, role in LARGE.items():
        command = command.replace(name, role)
    command = command.replace("databricks/databricks-dolly-15k", "dolly.jsonl").replace("--valid 1000", "--valid 6")
    command = command.replace("--dp-size 8", "--dp-size 2").replace("--hostfile launchers/hostfile ", "")
    words = shlex.split(command.replace("launchers/run.sh", str(ROOT / "launchers" / "run.sh")))
    if words[0] == "deepspeed":
        words[1:1] = ["--log_level", "warning", "--num_gpus", "2", "--master_port", free_port()]
    if words[0] == "megadistill":
        words[:1] = [sys.executable, "-m", "megadistill"]
    if "--config" not in words or "plan" in words:
        return [*words, *more]
    models = [f"model.{role}.path={role}" for role in ("teacher", "student")]
    if any("sft" in word and word.startswith("configs") for word in words):
        models = ["model.student.path=teacher"]  # the file's model is the large one
    given = [word.partition("=")[0] for word in words]
    models = [word for word in models if word.partition("=")[0] not in given]
    return [*words, *([] if "evaluate" in words else [*models, *SMALLER]), *more]


def run(work: Path, words: list[str], code: int = 0) -> str:
    """Runs a command to its end, which must be ``code``; its output."""
    binaries = str(Path(sys.executable).parent)
    environment = environment_of(PATH=f"{binaries}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), NPROC="2")
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def lose_a_rank(work: Path, words: list[str], run_dir: Path) -> None:
    """Runs a command until its second checkpoint is there, and kills a rank."""
    binaries = str(Path(sys.executable).parent)
    environment = environment_of(PATH=f"{binaries}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    with (work / "lost.log").open("w", encoding="utf-8") as log:
        job = subprocess.Popen(words, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not (run_dir / "checkpoints" / "step_4").exists():
            assert job.poll() is None and time.monotonic() < deadline, (work / "lost.log").read_text(encoding="utf-8")
            time.sleep(0.1)
        below = psutil.Process(job.pid).children(recursive=True)
        rank = next(one for one in below if one.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGKILL)
        assert job.wait(200) == ExitCode.LOST_RANKS or job.returncode != 0
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive


def test_the_page_from_plan_to_export(work: Path) -> None:
    lines = commands()
    kinds = (
        "plan",
        "doctor",
        "prepare",
        "shard",
        "_sft",
        "to_7b.yaml model",
        "2nodes.yaml model",
        "evaluate",
        "export",
    )
    assert all(any(kind in line for line in lines) for kind in kinds)
    for line in lines:
        if line.startswith(("bash launchers/setup.sh", "source")):
            continue  # what every test needs is set up
        if "llama-13b_to_7b.yaml model" in line:
            more = ["train.save_every=2", "train.max_steps=12", "parallel.timeout_s=20"]
            lose_a_rank(work, small(line, *more), work / "runs" / "llama-13b_to_7b")
            assert "step_" in run(work, small(line, *more))
        elif line.startswith("deepspeed") and "doctor" not in line:
            length = ["train.epochs=0.5", "train.max_steps=null"] if "_sft" in line else ["train.max_steps=2"]
            run(work, small(line, *length, "train.save_every=0"))
        else:
            run(work, small(line))
    steps = (work / "runs" / "llama-13b_to_7b" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(step)["step"] for step in steps] == list(range(1, 13))
    _check_export(work)


def _check_export(work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work / "exported" / "llama-7b"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == before.config.vocab_size
    changed = [name for name, x in before.named_parameters() if not torch.equal(x, model.get_parameter(name))]
    assert changed
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(work / "student"))
    evaluation = json.loads((work / "runs" / "llama-13b_to_7b" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["results"]["student"]["dolly"]
