"""Passes without padding: losses and gradients are those of padded ones; budgets are respected."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.config.load import load_config
from megadistill.config.loss import LossConfig
from megadistill.config.train import TrainSection
from megadistill.data.collate import concatenated
from megadistill.data.sample import Sample
from megadistill.models.attention import use_padding_free_attention
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard
from megadistill.training.micro_batch import GlobalCounts, MicroBatchLoss, build_micro_batch
from megadistill.training.passes import passes_of_equal_size, passes_within_budget, plan_passes
from megadistill.training.setup import say_what_exceeds_the_budget
from tests.support.runs import FAMILY_CONFIGS

CPU, V, H = torch.device("cpu"), 101, 32
# Fewer key-value heads than heads; windows that are shorter than some of the sequences.
VARIANTS: dict[str, dict[str, Any]] = {
    **FAMILY_CONFIGS,
    "grouped": {**FAMILY_CONFIGS["llama"], "num_key_value_heads": 2},
    "sliding": {**FAMILY_CONFIGS["qwen3"], "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "upcast": {**FAMILY_CONFIGS["gpt2"], "reorder_and_upcast_attn": True},
}


def make_model(variant: str, attention: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**VARIANTS[variant], "vocab_size": V, "initializer_range": 0.2, "init_std": 0.2}
    settings |= dict.fromkeys(("dropout", "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    family = settings.pop("model_type")
    settings |= {"n_embd": H} if family == "gpt2" else {"hidden_size": H, "word_embed_proj_dim": H}
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else attention  # which it has alone
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).train()


def make_samples(dtype: torch.dtype) -> list[Sample]:
    """Uneven lengths; a response that is the reference, one without, one alone, and an earlier turn."""
    draw = random.Random(1)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(V) for _ in range(number))

    def hidden(number: int) -> torch.Tensor:
        return torch.randn(number, 24, dtype=dtype, generator=torch.Generator().manual_seed(number))

    same = ids(6)
    return [
        Sample(0, ids(9), "", ids(5), ids(12), None, hidden(12), (True,) * 3 + (False,) * 9),
        Sample(1, ids(1), "", same, same, None, hidden(6), (True, False) * 3),
        Sample(2, ids(3), "", ids(2), targets=((0, 2),)),
        Sample(3, ids(20), "", None, ids(3), None, hidden(3), (False,) * 3),
    ]


def losses_and_gradients(model: Any, samples: list[Sample], *, padding_free: bool) -> tuple[list[float], Any]:
    """Of one pass, as the step computes it, but without an engine."""
    micro = build_micro_batch(samples, pad_id=0, device=CPU, padding_free=padding_free)
    batch = micro.batch
    assert (batch.input_ids.numel() > micro.num_tokens) is not padding_free
    reads: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if padding_free:
        reads = {"attention_mask": None, "lengths": batch.lengths, "bounds": batch.bounds}
    shard, dtype = VocabShard(0, V, V, None), next(model.parameters()).dtype
    teacher = OutputHead(torch.randn(V, 24, dtype=dtype, generator=torch.Generator().manual_seed(7)), None, shard)
    model.zero_grad()
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **reads
    ).last_hidden_state
    loss_fn = MicroBatchLoss(micro, GlobalCounts(15.0, 21.0, 6.0), LossConfig(clip="fixed"), None, teacher)
    loss = loss_fn(hidden, OutputHead(model.get_output_embeddings().weight, None, shard))
    loss.backward()
    assert loss_fn.sft is not None and loss_fn.outputs
    values = [float(loss.detach()), float(loss_fn.sft), *(float(x) for x in loss_fn.outputs[0].metrics.values())]
    return values, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_padded_rows(variant: str, attention: str, checkpointed: bool) -> None:
    # Eager attention computes its softmax in float32, whatever the model's type.
    is_wide = attention == "sdpa" and variant != "gemma2"  # which has eager attention alone
    dtype, tolerance = (torch.float64, 1e-10) if is_wide else (torch.float32, 2e-5)
    tolerance = max(tolerance, 1e-7 if variant in ("gemma", "gemma3_text") else 0)  # their norms are in float32
    model, samples = make_model(variant, attention, dtype), make_samples(dtype)
    expected, gradients = losses_and_gradients(model, samples, padding_free=False)
    use_padding_free_attention(model)
    again, same = losses_and_gradients(model, samples, padding_free=False)
    assert again == expected and all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, ours = losses_and_gradients(model, samples, padding_free=True)
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for a, b in zip(ours, gradients, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(scale, 1.0)


def _varlen(q: Any, k: Any, v: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int, **options: Any) -> Any:
    """torch's ``varlen_attn`` as its documentation says, sequence by sequence."""
    assert bounds is bounds_k and bounds.dtype == torch.int32 and longest == longest_k == int(bounds.diff().max())
    assert options.pop("enable_gqa")
    left, right = options.pop("window_size")
    scale = options.pop("scale")
    assert right == 0 and not options
    outputs = []
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        keys, values = (x[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        scores = q[start:end].transpose(0, 1) @ keys.transpose(1, 2) * scale
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("variant", ["llama", "grouped", "sliding", "opt", "gpt2"])
def test_flash_attention_is_asked_for_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = make_model(variant, "sdpa", torch.float64), make_samples(torch.float64)
    use_padding_free_attention(model)
    expected, gradients = losses_and_gradients(model, samples, padding_free=True)
    monkeypatch.setattr("megadistill.models.attention._has_flash", lambda query: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen)
    found, ours = losses_and_gradients(model, samples, padding_free=True)
    assert found == pytest.approx(expected, rel=1e-10)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_whole_row_has_no_mask() -> None:
    """Memory: 40 sequences of 20 tokens are 640,000 pairs of columns, and nothing has as many elements."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    for attention in ("sdpa", "eager"):
        model = make_model("llama", attention, torch.float32)
        use_padding_free_attention(model)
        batch = concatenated([((5,) * 20, None)] * 40)
        with Largest() as largest:
            model.base_model(
                input_ids=batch.input_ids, attention_mask=None, position_ids=batch.position_ids, use_cache=False,
                lengths=batch.lengths, bounds=batch.bounds,
            ).last_hidden_state.sum().backward()  # fmt: skip
        assert 800 * H <= largest.numel < 800 * 800


def some_lengths(number: int) -> list[list[int]]:
    draw = random.Random(number)
    return [[draw.randint(3, 90) for _ in range(draw.choice((0, 1, 2, 2)))] for _ in range(number)]


def columns(lengths: list[list[int]], indices: list[int], padding_free: bool) -> int:
    together = [length for i in indices for length in lengths[i]]
    return sum(together) if padding_free else len(together) * max(together, default=0)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("budget", [1, 100, 250, 10**6])
def test_a_budget_is_kept_unless_one_sample_exceeds_it(budget: int, padding_free: bool) -> None:
    lengths = some_lengths(60)
    passes = passes_within_budget(lengths, budget, padding_free=padding_free)
    assert sorted(i for indices in passes for i in indices) == list(range(60))
    sizes = [columns(lengths, indices, padding_free) for indices in passes]
    for indices, size in zip(passes, sizes, strict=True):
        assert size <= budget or sum(bool(lengths[i]) for i in indices) == 1
    assert len(passes) == {1: sum(map(bool, lengths)), 10**6: 1}.get(budget, len(passes))
    # No pass could take the first sample of the next one.
    for indices, following in zip(passes, passes[1:], strict=False):
        assert columns(lengths, [*indices, following[0]], padding_free) > budget
    assert passes_within_budget(lengths, budget, padding_free=padding_free) == passes


@pytest.mark.parametrize(("budget", "is_said"), [("null", False), ("1023", True), ("1024", False)])
def test_a_budget_below_the_longest_example_is_said(
    budget: str, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {dir: out}\nmodel: {teacher: {path: big}, student: {path: small}}\n", encoding="utf-8")
    # A budget needs no whole number of micro-batches.
    rows = "train.micro_batch_size=5" if budget != "null" else "train.micro_batch_size=4"
    config = load_config(file, [f"train.micro_batch_tokens={budget}", rows, "data.max_tokens=512"])
    say_what_exceeds_the_budget(config, ParallelContext.single())
    assert ("train.micro_batch_tokens=1023: an example of up to 1024 tokens" in capsys.readouterr().out) is is_said


def test_passes_of_equal_size() -> None:
    lengths = some_lengths(24)
    padded = passes_of_equal_size(lengths, 4, padding_free=False)
    free = passes_of_equal_size(lengths, 4, padding_free=True)
    for passes in (padded, free):
        assert [len(indices) for indices in passes] == [4] * 6
        assert sorted(i for indices in passes for i in indices) == list(range(24))
    unsorted = sum(columns(lengths, list(range(i, i + 4)), False) for i in range(0, 24, 4))
    assert sum(columns(lengths, indices, False) for indices in padded) < 0.9 * unsorted
    # Without padding, what a pass holds differs by less than the largest sample.
    sizes = [columns(lengths, indices, True) for indices in free]
    assert max(sizes) - min(sizes) <= max(map(sum, lengths))


def test_samples_without_a_loss_take_no_pass_of_their_own() -> None:
    samples = [Sample(i, (5,) * 9, "", (6,) * 3 if i < 2 else None) for i in range(4)]
    passes = plan_passes(samples, TrainSection(micro_batch_tokens=12), ParallelContext.single())
    assert [sorted(set(indices) & {0, 1}) for indices in passes] == [[0], [1]]
    nothing = build_micro_batch([], pad_id=3, device=CPU, padding_free=True)
    assert nothing.batch.input_ids.tolist() == [[3]] and nothing.num_tokens == 0 and nothing.is_shared
