"""What happens around a step: throughput, profiling, and the count of non-finite steps across a resume."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadistill.config.schema import RunConfig
from megadistill.data.sample import Sample
from megadistill.errors import DivergenceError
from megadistill.parallel.context import ParallelContext
from megadistill.training.hooks.base import Hook, HookList, StepEvent
from megadistill.training.hooks.nonfinite import NonFinite
from megadistill.training.hooks.profile import Profile
from megadistill.training.hooks.throughput import Throughput, peak_flops
from megadistill.training.step import StepResult


def components_of(**train: Any) -> Any:
    config = RunConfig.model_validate({
        "run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "train": {"global_batch_size": 4, **train},
    })  # fmt: skip
    student = SimpleNamespace(loaded=SimpleNamespace(shapes={"a": (10, 10), "b": (5,)}, lora=None))
    teacher = SimpleNamespace(loaded=SimpleNamespace(shapes={"a": (100, 10)}, lora=None))
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    context = ParallelContext.single()
    return SimpleNamespace(config=config, context=context, student=student, teacher=teacher, tokenizer=tokenizer)


def event_of(step: int, samples: list[Sample], *, is_updated: bool = True, **metrics: float) -> StepEvent:
    numbers = {"loss": 1.0, "loss/sft": 0.0, "loss/dac_kl": 0.0, "loss/span": 0.0, "grad_norm": 0.0, **metrics}
    return StepEvent(step, StepResult(numbers, is_updated, samples, [] if is_updated else [False] * len(samples)))


@pytest.mark.parametrize(("adapters", "for_training"), [(None, 6 * 105), (["b"], 4 * 105 + 2 * 5)])
def test_throughput_counts_the_tokens_of_each_phase(
    monkeypatch: pytest.MonkeyPatch, adapters: list[str] | None, for_training: int
) -> None:
    reference, response = (7, 8, 9), (4, 5)
    samples = [
        Sample(0, (1, 2), "", reference, response, rollout_ids=(4, 6)),  # two sequences are trained on
        Sample(1, (1, 2), "", reference, reference),  # one
        Sample(2, (1, 2)),  # none
    ]
    components = components_of()
    components.student.loaded.lora = None if adapters is None else SimpleNamespace(names=adapters)
    hook = Throughput(components)
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("megadistill.training.hooks.throughput.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("megadistill.training.hooks.throughput.peak_bytes", lambda device: 123)
    hook.step_started(1)
    event = event_of(1, samples, **{"time/rollout_s": 0.5, "time/teacher_s": 2.0, "time/train_s": 1.0})
    hook._peak = 1000.0
    hook.step_ended(event)
    trained, read, written = (2 + 3) + (2 + 2) + (2 + 3), (2 + 2) + (2 + 3), 2
    flops = for_training * trained + 2 * 105 * written + 2 * 1000 * read
    expected = {
        "time/step_s": 4.0, "memory/peak_bytes": 123.0, "throughput/tokens_per_s": trained / 4,
        "throughput/examples_per_s": 1.0, "throughput/rollout_tokens_per_s": written / 0.5,
        "throughput/teacher_tokens_per_s": read / 2.0, "throughput/train_tokens_per_s": trained / 1.0,
        "throughput/rollout_examples_per_s": 8.0, "throughput/teacher_examples_per_s": 2.0,
        "throughput/mfu": flops / (4.0 * 1000.0),
    }  # fmt: skip
    assert {name: event.metrics[name] for name in expected} == pytest.approx(expected)
    assert hook.summary() == {
        "throughput": {"tokens_per_s": trained / 4, "examples_per_s": 1.0, "mfu": expected["throughput/mfu"]},
        "memory_peak_bytes": 123.0,
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_the_peak_is_known_by_the_devices_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_profile_is_a_trace_of_its_steps(tmp_path: Path) -> None:
    hook = Profile(tmp_path, ParallelContext.single(), 2, 3)
    for step in (1, 2, 3, 4):
        hook.step_started(step)
        torch.ones(3).mul(step)
        hook.step_ended(event_of(step, []))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps_2-3_rank0.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert names.count("aten::mul") == 2


def test_a_profile_ends_with_a_run_that_is_stopped(tmp_path: Path) -> None:
    hook = Profile(tmp_path, ParallelContext.single(), 1, 9)
    hook.step_started(1)
    hook.step_ended(event_of(1, []))
    hook.stopped(1, "SIGTERM")
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps_1-1_rank0.json.gz"]


def test_non_finite_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    """Nine skipped steps, a preemption, nine more: the limit of ten is reached all the same."""
    components = components_of(on_nonfinite="skip", max_nonfinite=10)
    before, after = NonFinite(tmp_path, components), NonFinite(tmp_path, components)
    for step in range(1, 10):
        before.step_ended(event_of(step, [Sample(0, (1,))], is_updated=False, loss=float("nan")))
    after.load_state_dict(before.state_dict() | {"gate": {}})
    with pytest.raises(DivergenceError, match="step 10 is not finite.*9 before it"):
        after.step_ended(event_of(10, [Sample(0, (1,))], is_updated=False, loss=float("nan")))
    after.step_ended(event_of(11, []))
    assert after.state_dict() == {}
    after.load_state_dict({})  # a checkpoint of a run without such steps, or of an older program


def test_hooks_are_called_in_order_and_closed(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    class Named(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def step_ended(self, event: StepEvent) -> None:
            calls.append((self.name, "ended"))

        def close(self) -> None:
            calls.append((self.name, "closed"))

        def state_dict(self) -> dict[str, Any]:
            return {self.name: 1}

    hooks = HookList()
    hooks.add(Named("a"), Named("b"))
    with pytest.raises(RuntimeError), hooks:
        hooks.step_ended(event_of(1, []))
        raise RuntimeError
    assert calls == [("a", "ended"), ("b", "ended"), ("a", "closed"), ("b", "closed")]
    assert hooks.state_dict() == {"a": 1, "b": 1}
