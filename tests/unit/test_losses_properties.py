"""Mathematical properties of the terms, over drawn problems."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.losses import Head, LossConfig, distill_loss
from megadistill.parallel import VocabShard
from tests.support.objective import TOP_K, make_gate, make_problem, run_fused

ONLY_DAC = LossConfig(sft=0.0, span=0.0, clip="fixed", top_k=TOP_K)
problems = st.builds(
    make_problem,
    seed=st.integers(0, 10**6),
    length=st.integers(1, 8),
    num_classes=st.integers(1, 60),
    scale=st.sampled_from([0.001, 0.5, 2.0, 8.0, 40.0]),
    ignored=st.just(0.0),
)
quantiles = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-6)


def token_values(problem, config, gate=None):
    """The loss of each token, one call a token."""
    shard = VocabShard(0, problem.num_classes, problem.num_classes)
    losses, kls = [], []
    for position in range(len(problem.labels)):
        positions = slice(position, position + 1)
        output = distill_loss(
            Head(problem.student.hidden[positions], problem.student.weight, problem.student.bias),
            Head(problem.teacher.hidden[positions], problem.teacher.weight, problem.teacher.bias),
            problem.labels[positions], problem.pair_mask[positions], gate, config, shard, num_tokens=1, num_pairs=0,
        )  # fmt: skip
        losses.append(output.dac_kl)
        kls.append(output.kl_map[0])
    return torch.stack(losses), torch.stack(kls)


@settings(deadline=None, max_examples=60)
@given(
    problem=problems,
    bounds=quantiles,
    softness=st.sampled_from([0.05, 0.25, 2.0]),
)
def test_a_bucket_loss_lies_between_zero_and_the_kl(problem, bounds, softness):
    config = ONLY_DAC.replace(lower=min(bounds), upper=max(bounds), softness=softness)
    losses, kls = token_values(problem, config)
    slack = 1e-12 + 1e-10 * kls
    assert (losses >= -slack).all() and (losses <= kls + slack).all()


@settings(deadline=None, max_examples=30)
@given(problem=problems, remainder=st.sampled_from(["bucket", "truncate", "renormalize"]))
def test_an_open_mask_gives_the_kl(problem, remainder):
    losses, kls = token_values(problem, ONLY_DAC.replace(lower=0.0, upper=1.0, remainder=remainder))
    torch.testing.assert_close(losses, kls, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(problem=problems, bounds=quantiles)
def test_less_clipping_is_more_loss(problem, bounds):
    """A bucket's loss only falls when classes join the bucket (data processing): so it rises as the mask opens."""
    low, high = sorted(bounds)
    narrow = ONLY_DAC.replace(lower=low, upper=high)
    wide = ONLY_DAC.replace(lower=low / 2, upper=(1 + high) / 2)
    narrow_losses, kls = token_values(problem, narrow)
    wide_losses, _ = token_values(problem, wide)
    assert (wide_losses >= narrow_losses - 1e-10 * (1 + kls)).all()


@settings(deadline=None, max_examples=30)
@given(problem=problems, clip=st.sampled_from(["gate", "fixed", "off"]), seed=st.integers(0, 1000))
def test_the_order_of_classes_and_a_shift_of_logits_do_not_matter(problem, clip, seed):
    config = ONLY_DAC.replace(clip=clip, sft=1.0, span=1.0)
    gate = make_gate()
    order = torch.randperm(problem.num_classes, generator=torch.Generator().manual_seed(seed))
    inverse = torch.argsort(order)
    moved = replace(
        problem,
        student=Head(problem.student.hidden, problem.student.weight[order], problem.student.bias[order] + 7.3),
        teacher=Head(problem.teacher.hidden, problem.teacher.weight[order], problem.teacher.bias[order] - 31.0),
        labels=inverse[problem.labels],
    )
    output, gradients, _ = run_fused(problem, config, gate)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    other, other_gradients, _ = run_fused(moved, config, gate)
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other_gradients["bias"], gradients["bias"][order], rtol=1e-6, atol=1e-8)
    assert torch.equal(order[other.teacher_top1], output.teacher_top1)


@settings(deadline=None, max_examples=30)
@given(
    problem=problems,
    clip=st.sampled_from(["gate", "fixed", "entropy", "off"]),
    remainder=st.sampled_from(["bucket", "truncate", "renormalize", "none"]),
)
def test_logit_gradients_sum_to_zero(problem, clip, remainder):
    """q and g are both distributions (the bias's gradient is the sum of the logits' over the tokens)."""
    _, gradients, _ = run_fused(
        problem, ONLY_DAC.replace(clip=clip, remainder=remainder, sft=1.0, span=1.0), make_gate()
    )
    assert abs(float(gradients["bias"].sum())) < 1e-9


@pytest.mark.parametrize("clip", ["gate", "fixed", "off"])
def test_a_student_equal_to_its_teacher_has_no_distillation_loss(clip):
    problem = make_problem()
    problem = replace(problem, student=problem.teacher)
    config = LossConfig(sft=0.0, clip=clip, top_k=TOP_K, temperature=2.0)
    output, gradients, _ = run_fused(problem, config, make_gate())
    assert abs(float(output.loss.detach())) < 1e-12
    assert max(float(gradients[name].abs().max()) for name in ("hidden", "weight", "bias")) < 1e-12


@settings(deadline=None, max_examples=30)
@given(problem=problems)
def test_the_span_term_is_a_distance_of_at_most_the_square_root_of_two(problem):
    problem.pair_mask[:] = True
    problem.num_pairs = 1
    output, _, _ = run_fused(problem, LossConfig(sft=0.0, dac_kl=0.0), None)
    assert 0 <= float(output.span) <= 2**0.5 * max(0, len(problem.labels) - 1)


def test_temperature_squared_scales_dac_kl_and_not_the_span():
    problem = make_problem()
    tempered = replace(
        problem,
        student=Head(problem.student.hidden / 2, problem.student.weight, problem.student.bias / 2),
        teacher=Head(problem.teacher.hidden / 2, problem.teacher.weight, problem.teacher.bias / 2),
    )
    config = LossConfig(clip="fixed", top_k=TOP_K)
    hot, _, _ = run_fused(problem, config.replace(temperature=2.0), None)
    plain, _, _ = run_fused(tempered, config, None)
    torch.testing.assert_close(hot.dac_kl, 4 * plain.dac_kl)
    torch.testing.assert_close(hot.span, plain.span)
    torch.testing.assert_close(hot.kl_map, plain.kl_map)
    torch.testing.assert_close(hot.sft, run_fused(problem, config, None)[0].sft)
