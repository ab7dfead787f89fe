"""What a GPU is asked, in the order of its worth."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

SMOKE = "configs/smoke.yaml"
_PYTHON = sys.executable
_CUDA_TESTS = (
    "tests/unit/test_losses_cuda.py",
    "tests/unit/test_decoding_cuda.py",
    "tests/unit/test_padding_free_cuda.py",
    "tests/unit/test_losses_backends.py",
    "tests/unit/test_triton_compiles.py",
)


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other, until one fails.

    Attributes:
        name: One word.
        what: What it shows, for the report.
        commands: The commands, run in the repository's root.
        seconds: The most that all of them may take together.
        needs: Packages without which it cannot run, beyond those of setup.py.
        record: A JSON file that it writes, with a table in Markdown beside it; or a file of pytest's results (.xml).
        is_timed: It measures time, so nothing runs beside it.
    """

    name: str
    what: str
    commands: tuple[tuple[str, ...], ...]
    seconds: int
    needs: tuple[str, ...] = ()
    record: Path | None = None
    is_timed: bool = False


def gpu_parts(out: Path, device: str = "cuda", vllm_python: Path | None = None) -> list[Part]:
    """All parts.

    Args:
        out: Folder for runs and records.
        device: "cuda"; "cpu" rehearses, at sizes that show nothing but that the kit works.
        vllm_python: Interpreter of an environment that has vLLM.
    """
    return [*_checks(out), *_measurements(out, device, vllm_python)]


def _checks(out: Path) -> list[Part]:
    """What must pass, side by side: nothing in it is timed."""
    results, smoke = out / "tests.xml", out / "smoke"
    launch = (_PYTHON, "-m", "deepspeed.launcher.runner", "launchers/run.sh", "--config", SMOKE, f"run.dir={smoke}")
    bf16 = ("model.student.dtype=bf16", "model.teacher.dtype=bf16")
    answers = ("--max-prompt-tokens", "64", "--long-prompt", "truncate", "--max-new-tokens", "16")
    return [
        Part(
            "tests",
            "kernels, decoder paths, CUDA graphs, mixed precision, attention with masks, against float64",
            ((_PYTHON, "-m", "pytest", "-q", "-n", "4", f"--junitxml={results}", *_CUDA_TESTS),),
            240,
            ("pytest", "pytest-xdist"),
            results,
        ),
        Part(
            "smoke",
            "`deepspeed launchers/run.sh` in bfloat16 with ZeRO-3: trains, resumes, generates, evaluates",
            (
                (*launch, *bf16),
                (*launch, *bf16, "train.max_steps=26"),
                (_PYTHON, "-m", "megadistill", "generate", "--model", str(smoke), "--output", str(out / "a.jsonl"),
                 "--input", "runs/assets/smoke_0/data/test.jsonl", *answers),
                (_PYTHON, "-m", "megadistill", "evaluate", "--config", f"{smoke}/resolved.yaml", "--model", str(smoke)),
            ),
            240,
        ),
        Part(
            "faults",
            "SIGTERM saves and resumes; kill -9 costs the steps since the last checkpoint",
            ((_PYTHON, "-m", "tools.gpu.faults", "--output", str(out / "faults.json")),),
            200,
            record=out / "faults.json",
        ),
        Part(
            "doctor",
            "all collectives of one rank over NCCL, memory, clocks, disk",
            ((*launch[:4], "doctor", *launch[4:]),),
            60,
        ),
        Part(
            "demo",
            "the demo on one GPU, from corpus to table",
            ((_PYTHON, "-m", "megadistill", "demo", f"run.dir={out}/demo", "train.max_steps=40"),),
            260,
        ),
    ]  # fmt: skip


def _measurements(out: Path, device: str, vllm_python: Path | None) -> list[Part]:
    """What measures, one at a time."""
    is_cpu = device == "cpu"
    bench, on = (_PYTHON, "tools/benchmark.py"), ("--device", device)
    sizes = ("--models", "tiny", "--vocab", "512", "--rounds", "1") if is_cpu else (
        "--models", "medium", "--vocab", "32768", "--rounds", "3", "--prompt-tokens", "128", "--new-tokens", "128",
    )  # fmt: skip
    loss = ("--tokens", "64", "--vocab", "512", "--hidden", "32") if is_cpu else (
        "--tokens", "2048", "--vocab", "32768", "131072", "--hidden", "1536", "--dtype", "bfloat16",
        "--max-tera-flops", "1000", "--no-error",
    )  # fmt: skip

    def part(name: str, what: str, command: tuple[str, ...], seconds: int) -> Part:
        record = out / f"{name}.json"
        return Part(name, what, ((*command, *on, "--output", str(record)),), seconds, record=record, is_timed=True)

    plan = ("--models", "tiny", "--vocab", "512", "--tokens", "16") if is_cpu else ()
    rollout = sizes if is_cpu else (*sizes, "--dtype", "bfloat16")
    if vllm_python is not None:
        rollout += ("--vllm-python", str(vllm_python))
    return [
        part("loss", "the objective against its products, dense compiled code, Liger and TRL",
             (*bench, "loss", "--tp", "1", *loss), 90),
        part("rollout", "decoding against transformers' generate, and vLLM where --vllm-python names one",
             (*bench, "rollout", "--no-parallel", "--rows", "2" if is_cpu else "16", *rollout), 90),
        part("plan", "memory and seconds of a step beside its dry run",
             (_PYTHON, "-m", "tools.gpu.against_plan", *plan), 120),
        part("step", "a step against TRL's trainer",
             (*bench, "step", "--rows", "2" if is_cpu else "16", *sizes), 120),
    ]  # fmt: skip
