"""A teacher between student and teacher (TAID), against the dense reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megadistill.config.adaptive import TaidSection
from megadistill.errors import ConfigError
from megadistill.losses import LossConfig
from megadistill.training.interpolation import Interpolation
from tests.support.backends import BACKENDS
from tests.support.objective import (
    MASKS,
    TOP_K,
    assert_same,
    make_gate,
    make_problem,
    run_fused,
    run_reference,
    with_top_k,
)

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
        ({"taid": {"strat": 0.1}}, "loss.taid.strat: unknown key; did you mean loss.taid.start?"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**settings)
    assert str(caught.value).startswith(line)
