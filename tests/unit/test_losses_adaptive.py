"""A teacher between student and teacher (TAID), and tokens with temperatures (AdaKD): losses, rules and settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadistill.config.adaptive import AdakdSection, TaidSection
from megadistill.config.schema import RunConfig
from megadistill.data.sample import Sample
from megadistill.errors import ConfigError
from megadistill.losses import LossConfig
from megadistill.losses.difficulty import token_difficulty
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import OutputHead
from megadistill.planning.counted_step import plannable
from megadistill.training.focus import TokenFocus
from megadistill.training.interpolation import Interpolation
from megadistill.training.micro_batch import GlobalCounts, MicroBatchLoss, build_micro_batch
from tests.support.backends import BACKENDS
from tests.support.objective import (
    MASKS,
    TOP_K,
    assert_same,
    dense_difficulty,
    make_gate,
    make_problem,
    run_fused,
    run_reference,
    with_temperatures,
    with_top_k,
)

ADAKD = {"adakd": {"enabled": True}, "divergence": "reverse_kl"}
CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", [0.0, 0.4, 0.97])
def test_an_interpolated_teacher_equals_the_reference(backend: str, interpolation: float) -> None:
    """All that a loss can be made of: the plain KL, a divergence, a mask with its gate; both relations of spans."""
    problem = replace(make_problem(), interpolation=interpolation)
    for changes in (
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl", "temperature": 2.0, "span_relation": "log"},
        MASKS[5],
    ):
        config, gate = CONFIG.replace(backend=backend, **changes), make_gate(upper=MASKS[5]["upper"])
        output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


def test_no_gradient_goes_through_the_interpolated_teacher() -> None:
    """At t = 0 the teacher is the student: nothing is left to learn, whatever its logits would ask for."""
    config = CONFIG.replace(divergence="forward_kl", sft=0.0, span=0.0)
    output, gradients, teacher = run_fused(replace(make_problem(), interpolation=0.0), config, None)
    assert abs(float(output.loss.detach())) < 1e-12 and teacher.hidden.grad is None
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-12
    half, _, _ = run_fused(replace(make_problem(), interpolation=0.5), config, None)
    whole, _, _ = run_fused(make_problem(), config, None)
    assert 0 < float(half.loss.detach()) < float(whole.loss.detach())


def test_float32_and_large_logits() -> None:
    problem = replace(make_problem(seed=7, length=24, num_classes=300, scale=100.0), interpolation=0.4)
    config = CONFIG.replace(divergence="forward_kl")
    output, gradients, _ = run_fused(problem, config, None, dtype=torch.float32)
    assert_same(output, gradients, run_reference(problem, config, None), 1e-5 * 100**0.75)


def test_what_has_no_meaning_is_refused() -> None:
    problem, config = replace(make_problem(), interpolation=0.4), CONFIG.replace(divergence="forward_kl")
    with pytest.raises(ConfigError, match=r"no logits to interpolate with the student's \(loss.taid\)"):
        run_fused(with_top_k(problem, 20), config, None)
    with pytest.raises(ConfigError, match="loss.policy rewards by the teacher itself"):
        run_fused(problem, config.replace(policy=1.0), None)
    with pytest.raises(ValueError, match="interpolation must be a number from 0 to 1, got 1.5"):
        run_fused(replace(problem, interpolation=1.5), config, None)


def test_t_follows_the_line_and_gains_while_the_loss_falls() -> None:
    section = TaidSection(enabled=True, start=0.4, end=0.9, alpha=0.1, beta=0.5)
    taid = Interpolation.of(section, 1000)
    assert taid is not None and taid.t == 0.4
    taid.updated(1, 2.0)
    assert taid.t == pytest.approx(0.4 + 0.5 / 1000) and taid.momentum == 0  # nothing to compare with
    before = taid.t
    taid.updated(2, 1.0)
    assert taid.momentum == pytest.approx(0.5 * 0.5)
    fast = taid.t - before
    assert fast == pytest.approx(0.1 / (1 + math.exp(-0.25)) * (1 - before))
    before = taid.t
    taid.updated(3, 4.0)  # a loss that rises: less, and never back
    assert taid.momentum == pytest.approx(0.5 * 0.25 + 0.5 * -3.0) and 0 < taid.t - before < 0.5 * fast
    restored = Interpolation.of(section, 1000)
    assert restored is not None
    restored.load_state_dict(taid.state_dict() | {"gate": 1})
    assert restored == taid
    restored.load_state_dict({})  # of a run without: nothing to continue
    for done in range(4, 1001):
        restored.updated(done, 1.0)
    assert restored.t == 0.9
    line = Interpolation.of(section.model_copy(update={"alpha": 0.0}), 1000)
    assert line is not None
    for done in range(1, 501):
        line.updated(done, 1.0 / done)
    assert line.t == pytest.approx(0.65)
    assert Interpolation.of(TaidSection(), 1000) is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"taid": {"start": 0.5}}, "loss.taid.start=0.5 has no effect with loss.taid.enabled=false"),
        ({"taid": {"enabled": True, "start": 0.9, "end": 0.5}}, "loss.taid.start=0.9 must be less than loss.taid.end"),
        ({"taid": {"enabled": True}, "dac_kl": 0.0}, "loss.taid.enabled=true with loss.dac_kl=0"),
        ({"taid": {"enabled": True}, "policy": 1.0}, "loss.taid.enabled=true with loss.policy=1"),
        ({"taid": {"enabled": True, "start": 1.0}}, "loss.taid.start=1.0: must be a number >= 0 and < 1"),
        ({"adakd": {"warmup": 0.5}}, "loss.adakd.warmup=0.5 has no effect with loss.adakd.enabled=false"),
        ({"adakd": {"enabled": True}}, "loss.adakd.enabled=true with a mask (loss.divergence=dac_kl)"),
        (ADAKD, "loss.adakd.enabled=true with loss.span=1: spans need all tokens"),
        (ADAKD | {"span": 0.0, "policy": 1.0}, "loss.adakd.enabled=true with loss.policy=1: it needs all tokens"),
        (ADAKD | {"span": 0.0, "average": "row"}, "loss.adakd.enabled=true with loss.average=row"),
        (ADAKD | {"span": 0.0, "dac_kl": 0.0}, "loss.adakd.enabled=true with loss.dac_kl=0"),
        ({"taid": {"strat": 0.1}}, "loss.taid.strat: unknown key; did you mean loss.taid.start?"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**settings)
    assert str(caught.value).startswith(line)


ALONE = CONFIG.replace(sft=0.0, span=0.0, clip="off", temperature=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures_of_tokens_equal_the_reference(backend: str) -> None:
    problem = with_temperatures(make_problem())
    for config in (ALONE, ALONE.replace(divergence="reverse_kl", temperature=1.0), ALONE.replace(chunk_tokens="auto")):
        config = config.replace(backend=backend)
        output, gradients, _ = run_fused(problem, config, None)
        assert_same(output, gradients, run_reference(problem, config, None), 1e-10)
    both = replace(problem, interpolation=0.3)
    output, gradients, _ = run_fused(both, ALONE.replace(backend=backend), None)
    assert_same(output, gradients, run_reference(both, ALONE, None), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_difficulty_is_the_hellinger_distance(backend: str) -> None:
    for num_classes in (53, 9001):
        problem = make_problem(length=5, num_classes=num_classes)
        shard = VocabShard(0, num_classes, num_classes)
        found = token_difficulty(problem.student, problem.teacher, shard, temperature=1.5, backend=backend)
        torch.testing.assert_close(found, dense_difficulty(problem, 1.5), rtol=1e-10, atol=1e-12)
        same = token_difficulty(problem.student, problem.student, shard, backend=backend)
        assert float(same.abs().max()) < 1e-12
    problem.student.hidden[1] = float("nan")
    assert token_difficulty(problem.student, problem.teacher, shard, backend=backend).isnan().tolist() == [
        False, True, False, False, False,
    ]  # fmt: skip


def test_temperatures_that_have_no_meaning_are_refused() -> None:
    problem = with_temperatures(make_problem())
    with pytest.raises(ConfigError, match="for the token loss without a mask, alone"):
        run_fused(problem, ALONE.replace(sft=1.0), None)
    with pytest.raises(ConfigError, match="for the token loss without a mask, alone"):
        run_fused(problem, ALONE.replace(clip="fixed"), None)
    with pytest.raises(ConfigError, match=r"one temperature, not one for each token \(loss.adakd\)"):
        run_fused(with_top_k(problem, 20, 1.5), ALONE, None)
    with pytest.raises(ValueError, match=r"temperatures must have shape \(23,\)"):
        run_fused(replace(problem, temperatures=torch.ones(3)), ALONE, None)


def test_hard_tokens_are_taken_and_are_cool() -> None:
    """Against the definition, from the distances of all ranks; none of it depends on which rank has which."""
    focus = TokenFocus(AdakdSection(enabled=True, temperature_scale=0.5), 100, share=0.5)
    distances = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.8, 0.0, 0.3, 0.6, 0.05], dtype=torch.float64)
    own = distances[:5]
    found = focus.temperatures(own, distances, 2.0)
    # Of nine tokens four: 0.9 0.8 0.6 0.4, whose (lower) median is 0.6.
    assert focus.difficulty == pytest.approx(0.6)
    expected = [2.0 * math.exp(-0.5 * math.tanh(math.log(s / 0.6))) for s in (0.9, 0.4, 0.8)]
    assert found.tolist() == pytest.approx([0.0, expected[0], expected[1], 0.0, expected[2]])
    assert found[1] < found[4] < 2.0 < found[2]
    others = focus.temperatures(distances[5:], distances.flip(0), 2.0)
    assert others.tolist() == pytest.approx([0.0, 0.0, 2.0, 0.0])
    # As hard as the last one: taken, too. Models that agree, no tokens at all, and what is no number.
    assert focus.temperatures(torch.full((3,), 0.5), torch.full((3,), 0.5), 1.0).tolist() == [1.0, 1.0, 1.0]
    assert focus.temperatures(torch.zeros(3), torch.zeros(3), 1.0).tolist() == [1.0, 1.0, 1.0]
    assert focus.temperatures(torch.zeros(0), torch.zeros(0), 1.0).tolist() == []
    broken = torch.tensor([float("nan"), 0.1])
    assert (focus.temperatures(broken, broken, 1.0) > 0).tolist() == [True, False]


def test_the_share_follows_the_loss() -> None:
    section = AdakdSection(enabled=True, beta=0.0, warmup=0.1, tolerance=0.1, share_step=0.5, min_share=0.3)
    focus = TokenFocus.of(section, 20)
    assert focus is not None
    shares = []
    for done, loss in enumerate([9.0, 5.0, 4.0, 3.9, 3.0, 2.0, 1.0, 1.05, 2.0, 9.0, 9.5], start=1):
        focus.updated(done, loss)
        shares.append(focus.share)
    # The mark is set after the third update; small moves leave it; 0.3 is the least, 1 the most.
    assert shares == pytest.approx([1, 1, 1, 1, 0.5, 0.3, 0.3, 0.3, 0.45, 0.675, 0.675])
    restored = TokenFocus.of(section, 20)
    assert restored is not None
    restored.load_state_dict(focus.state_dict())
    assert restored == focus and restored.mark == 9.0
    slow = TokenFocus(AdakdSection(enabled=True), 20)
    slow.updated(1, 1.0)
    slow.updated(2, 2.0)
    assert slow.average == pytest.approx(1.01) and slow.mark == pytest.approx(1.01)
    assert TokenFocus.of(AdakdSection(), 20) is None


def test_a_micro_batch_trains_on_the_taken_tokens_alone() -> None:
    """However rows are split: the mean over taken tokens of tau^2 times the divergence at their temperatures."""
    generator = torch.Generator().manual_seed(0)
    embedding, student, teacher = (torch.randn(13, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    rows = [
        Sample(0, (5, 6), "", None, (7, 8, 9), None, embedding[:3], (False,) * 3, temperatures=Tensor([0.5, 0, 2])),
        Sample(1, (4,), "", (3, 2), (3, 2), None, embedding[3:5], (False,) * 2, temperatures=Tensor([0, 1.5])),
    ]
    config = LossConfig(**ADAKD | {"span": 0.0, "sft": 0.5})
    assert [row.num_response_tokens for row in rows] == [2, 1]
    counts, shard = GlobalCounts(num_sft=2.0, num_kd=3.0, num_pairs=0.0), VocabShard(0, 13, 13)
    values = []
    for inputs, hidden, taus in (((6, 7, 8), embedding[:3], (0.5, 0, 2)), ((4, 3), embedding[3:5], (0, 1.5))):
        for column, tau in enumerate(taus):
            if tau:
                log_q = (embedding[inputs[column]] @ student.T / tau).log_softmax(-1)
                log_p = (hidden[column] @ teacher.T / tau).log_softmax(-1)
                values.append(tau**2 * (log_q.exp() * (log_q - log_p)).sum())
    for split in ([[0, 1]], [[0], [1]]):
        found = 0.0
        for indices in split:
            micro = build_micro_batch([rows[i] for i in indices], pad_id=0, device=torch.device("cpu"))
            loss = MicroBatchLoss(micro, counts, config, None, OutputHead(teacher, None, shard), is_diagnosed=True)
            loss(embedding[micro.batch.input_ids], OutputHead(student, None, shard))
            found += float(loss.metrics["loss/dac_kl"])
            assert set(loss.gradient_squares) == {"gradient_share/dac_kl", "gradient_share/sft"}
        assert found == pytest.approx(float(torch.stack(values).mean()), rel=1e-6)  # temperatures are float32


def test_gradient_shares_of_settings_that_belong_together() -> None:
    """A term alone, without what it is configured with: MiniLLM's reward, TAID without a token loss."""
    micro = build_micro_batch(
        [Sample(0, (5, 6), "", (7, 8), (7, 8), None, torch.ones(2, 6), (False, False))],
        pad_id=0,
        device=torch.device("cpu"),
    )
    head = OutputHead(torch.ones(13, 6), None, VocabShard(0, 13, 13))
    for config in (
        LossConfig(clip="off", policy=1.0, policy_reward="return"),
        LossConfig(clip="off", taid={"enabled": True}),
    ):
        loss = MicroBatchLoss(micro, GlobalCounts(2.0, 2.0, 0.0), config, None, head, is_diagnosed=True)
        loss(torch.ones(1, 4, 6), head)
        assert "gradient_share/sft" in loss.gradient_squares


def test_a_plan_says_what_it_does_not_count() -> None:
    """The reading that chooses tokens has a phase that only corrections have in a plan."""
    config = RunConfig.model_validate(
        {
            "run": {"dir": "runs/x"},
            "model": {"student": {"path": "s"}, "teacher": {"path": "t"}},
            "loss": ADAKD | {"span": 0.0},
        }
    )
    planned, notes = plannable(config)
    assert not planned.loss.adakd.enabled and config.loss.adakd.enabled
    assert any("(loss.adakd) is not counted" in note for note in notes)
