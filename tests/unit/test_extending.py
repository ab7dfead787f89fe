"""docs/contributing.md keeps its word: a fake of everything that it says how to add. (A divergence is in
test_losses_new_divergence.py, a launcher in test_launch.py.)"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.cli.parsing import Parser
from megadistill.config.sampling import SamplingOptions
from megadistill.config.schema import EvalSection, GenerationSection, RunConfig
from megadistill.data.sample import Sample
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_decoder import make_decoder
from megadistill.decoding.rollout import rollout
from megadistill.decoding.sampling import Sampling
from megadistill.generation.sources import source_class
from megadistill.generation.sources.base import SourceInputs, TextSource
from megadistill.models.families import FAMILIES
from megadistill.observability.timers import Timers
from megadistill.parallel import VocabShard
from megadistill.parallel.context import ParallelContext
from megadistill.training import step as step_module
from megadistill.training.hooks.base import Hook, HookList, StepEvent
from megadistill.training.hooks.record import Record
from megadistill.training.micro_batch import GlobalCounts
from megadistill.training.step import StepResult, loss_metrics, source_metrics

CONFIG = RunConfig.model_validate(
    {"run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}}, "train": {"samples_every": 0}}
)


class Echo(TextSource):
    """The prompt is the response."""

    kind = "echo"
    student_share = 0.25

    @classmethod
    def build(cls, inputs: SourceInputs) -> Echo:
        return cls()

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        return [Sample(s.sequence_id, s.prompt_ids, response_ids=s.prompt_ids) for s in batch]

    def metrics(self) -> dict[str, float]:
        return {"echo/loudness": 3.0}


def test_a_text_source_is_a_module_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("echo")
    module.SOURCE = Echo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megadistill.generation.sources.echo", module)
    # What its value in the schema would allow.
    config = CONFIG.model_copy(update={"generation": CONFIG.generation.model_copy(update={"mode": "echo"})})
    assert source_class(config) is Echo
    model: Any = object()
    inputs = SourceInputs(
        config, ParallelContext.single(), model, model, frozenset(), DecodeBatchPlan(1, True, 1), max_steps=2000
    )
    source = source_class(config).build(inputs)
    samples = source.choose(0).samples(0, [Sample(0, (5, 6))], Timers())
    assert samples[0].response_ids == (5, 6)
    components: Any = SimpleNamespace(source=source)
    metrics = source_metrics(source.choose(0), components)
    assert metrics == {
        "phi": 0.25, "text/generate": 0.0, "text/replay": 0.0, "text/dataset": 0.0, "text/teacher": 0.0,
        "text/echo": 1.0, "echo/loudness": 3.0,
    }  # fmt: skip


def test_a_family_like_llama_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mistral", FAMILIES["llama"])
    config = AutoConfig.for_model(
        "mistral", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=None, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = make_decoder(model, FAMILIES["mistral"].plan(model), VocabShard(0, 97, 97), torch.device("cpu"))
    assert isinstance(decoder, PlanDecoder)
    prompt, greedy = (5, 6, 7), Sampling(0, temperature=0.0)
    written = rollout(decoder, [Sample(0, prompt)], limits=[12], eos_ids=frozenset(), sampling=greedy)
    expected = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert list(written[0]) == expected[0, 3:].tolist()


def test_a_metric_of_the_losses_goes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "METRIC_NAMES", (*step_module.METRIC_NAMES, "loss/fake"))
    losses: Any = [
        SimpleNamespace(
            metrics={"loss/fake": torch.tensor(value)},
            gradient_squares={},
            micro_batch=SimpleNamespace(num_columns=4, num_tokens=3),
        )
        for value in (1.5, 2.0)
    ]
    components: Any = SimpleNamespace(loss=CONFIG.loss, teacher=object(), context=ParallelContext.single())
    metrics = loss_metrics(losses, [], GlobalCounts(1.0, 1.0, 1.0), components)
    assert metrics["loss/fake"] == 3.5 and metrics["loss/sft"] == 0.0


def test_a_metric_of_the_run_is_a_hook(tmp_path: Path) -> None:
    class Doubled(Hook):
        def step_ended(self, event: StepEvent) -> None:
            event.metrics["doubled"] = 2 * event.metrics["loss"]

    components: Any = SimpleNamespace(config=CONFIG, context=ParallelContext.single())
    hooks = HookList()
    hooks.add(Doubled(), Record(tmp_path, components))
    with hooks:
        hooks.run_started(0)
        hooks.step_ended(StepEvent(1, StepResult({"loss": 4.0}, True, [])))
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"step": 1, "loss": 4.0, "doubled": 8.0}


def test_a_sampling_option_is_a_field() -> None:
    class More(SamplingOptions):
        min_p: float = Field(0.0, ge=0, le=1, description="Least share of the largest probability.")

    assert issubclass(GenerationSection, SamplingOptions) and issubclass(EvalSection, SamplingOptions)
    parser = Parser("fake", "")
    parser.add_section(More)
    options = More.of(parser.parse(["--min-p", "0.25", "--top-k", "3"]))
    assert (options.min_p, options.top_k, options.top_p) == (0.25, 3, 1.0)
    assert Sampling(0, 1.0, options).options.top_k == 3
