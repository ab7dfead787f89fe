"""A new divergence: one entry, no other file, every backend."""

import pytest
import torch

from megadistill.losses import LossConfig
from megadistill.losses.divergences import DIVERGENCES, Divergence, exp
from tests.support.backends import BACKENDS
from tests.support.objective import assert_same, make_problem, run_fused, run_reference, with_top_k


def squared_hellinger(log_p, log_q, p, q, share):
    gap = exp(0.5 * log_p) - exp(0.5 * log_q)
    return 0.5 * gap * gap, -0.5 * exp(0.5 * (log_p + log_q))


@pytest.fixture
def config(monkeypatch):
    """The settings that ask for it; a real one also has its name in `TokenLoss`."""
    entry = Divergence(lambda log_p, log_q, share: 1.0 - (0.5 * (log_p + log_q)).exp().sum(-1), squared_hellinger)
    monkeypatch.setitem(DIVERGENCES, "squared_hellinger", entry)
    settings = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, chunk_tokens=5)
    return settings.model_copy(update={"divergence": "squared_hellinger"})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_divergence_is_one_entry(config, backend, temperature):
    config = config.model_copy(update={"backend": backend, "temperature": temperature})
    expected = run_reference(make_problem(), config, None)
    assert float(expected[0]["dac_kl"]) > 0.1
    output, gradients, _ = run_fused(make_problem(), config, None)
    assert_same(output, gradients, expected, 1e-10)


def test_a_new_divergence_from_top_classes(config):
    problem = with_top_k(make_problem(), 20)
    output, gradients, _ = run_fused(problem, config, None)
    assert_same(output, gradients, run_reference(problem, config, None), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_formula_is_noticed(config, monkeypatch, backend):
    """The comparison above can fail: with half the slope it does."""

    def wrong(log_p, log_q, p, q, share):
        gap = exp(0.5 * log_p) - exp(0.5 * log_q)
        return 0.5 * gap * gap, -0.25 * exp(0.5 * (log_p + log_q))

    entry = Divergence(DIVERGENCES["squared_hellinger"].reference, wrong)
    monkeypatch.setitem(DIVERGENCES, "squared_hellinger", entry)
    config = config.model_copy(update={"backend": backend})
    output, gradients, _ = run_fused(make_problem(), config, None)
    values, expected = run_reference(make_problem(), config, None)
    torch.testing.assert_close(output.dac_kl, values["dac_kl"])
    with pytest.raises(AssertionError, match="gradient of hidden"):
        assert_same(output, gradients, (values, expected), 1e-3)
