"""exp, log1p and sums over classes in the form that compiled CPU code has them, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megadistill.losses import LossConfig
from megadistill.losses.elementary import bounded_exp, floored_exp, log1p_of_share, sum_classes
from tests.support.objective import TOP_K, assert_same, make_gate, make_problem, run_fused, run_reference


def compiled(function):
    return torch.compile(function, dynamic=True, fullgraph=True)


def test_exp_is_within_a_few_roundings_of_its_argument() -> None:
    values = torch.cat([torch.linspace(-86, 87, 300_001), torch.linspace(-1, 1, 100_001), torch.zeros(3)])
    found, expected = compiled(bounded_exp)(values), values.double().exp()
    error = ((found.double() - expected) / expected).abs()
    # One rounding of the exponent in base 2, and those of the polynomial.
    assert float((error / (3e-7 + values.abs() * 8e-8)).max()) < 1
    assert found[-1] == 1.0


def test_exp_hands_on_what_is_no_number_and_has_a_floor() -> None:
    values = torch.tensor([math.nan, -math.inf, -1000.0, -41.0, 0.0])
    found = compiled(floored_exp)(values)
    assert found[0].isnan() and float(found[1]) == float(found[2]) == float(found[3]) > 0
    assert found[1:].double().tolist() == pytest.approx([math.exp(-41)] * 3 + [1.0], rel=3e-6)


def test_exp_of_other_types_is_torchs() -> None:
    values = torch.linspace(-300, 0, 1001, dtype=torch.float64)
    assert torch.allclose(compiled(bounded_exp)(values), values.exp(), rtol=1e-14, atol=0)


def test_log1p_of_a_share() -> None:
    values = torch.cat([torch.linspace(0, 1, 100_001), torch.logspace(-30, 0, 1001)])
    found, expected = compiled(log1p_of_share)(values), values.double().log1p()
    assert float(((found.double() - expected).abs() / expected.clamp_min(1e-37)).max()) < 7e-7
    assert compiled(log1p_of_share)(torch.tensor([math.nan, 0.5, 0.0])).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("num_classes", [1, 512, 4096, 4097, 5120, 5184, 40_000])
def test_sums_of_any_length(num_classes: int) -> None:
    values = torch.rand(3, num_classes, generator=torch.Generator().manual_seed(0))
    found, expected = compiled(sum_classes)(values), values.double().sum(-1)
    assert float(((found.double() - expected) / expected).abs().max()) < 2e-6


@pytest.mark.parametrize("num_classes", [4608, 4672])  # in parts of 512 and 64
@pytest.mark.parametrize(("remainder", "upper"), [("bucket", 0.95), ("truncate", 1.0)])
def test_the_objective_with_many_classes(num_classes: int, remainder: str, upper: float) -> None:
    problem, gate = make_problem(seed=5, length=9, num_classes=num_classes), make_gate(upper=upper)
    config = LossConfig(top_k=TOP_K, remainder=remainder, upper=upper, backend="compile")
    expected = run_reference(problem, config, gate)
    output, gradients, _ = run_fused(problem, config, gate.float(), dtype=torch.float32)
    assert_same(output, gradients, expected, 1e-5)
