"""The span term: what its relations see where a phrase is wrong, and that chunks and backends do not matter to them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadistill.errors import DataError
from megadistill.losses import Head, LossConfig, TeacherTopK, distill_loss
from megadistill.losses.span import SpanSums, chunks_of_whole_spans, written_spans
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import TOP_K, assert_same, make_gate, make_problem, run_fused, run_reference, with_top_k

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)
WRITTEN = ["joint", "log"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relation", WRITTEN)
def test_written_spans_equal_the_reference(backend: str, relation: str) -> None:
    problem, gate = make_problem(ignored=0.1), make_gate()
    for temperature, chunk in [(1.0, 5), (2.0, 1), (2.0, "auto")]:
        config = CONFIG.replace(span_relation=relation, temperature=temperature, chunk_tokens=chunk, backend=backend)
        output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)
        assert float(output.span) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairs", ["none", "one", "all", "few"])
def test_any_number_of_pairs(backend: str, pairs: str) -> None:
    """In chunks without a pair, with one, and with pairs alone; across the border of two chunks, too."""
    problem, gate = make_problem(ignored=0.0), make_gate()
    starts = {"none": [], "one": [9], "all": list(range(22)), "few": [0, 3, 4, 5, 13, 18, 19]}[pairs]
    problem.pair_mask[:] = False
    problem.pair_mask[starts] = True
    problem = replace(problem, num_pairs=len(starts))
    for chunk in (2, 5, "auto"):
        for changes in ({}, {"clip": "off", "temperature": 2.0}):
            config = CONFIG.replace(chunk_tokens=chunk, backend=backend, **changes)
            output, gradients, _ = run_fused(problem, config, gate)
            assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)
            assert (float(output.span) > 0) == (pairs != "none")


@pytest.mark.parametrize("relation", WRITTEN)
def test_written_spans_of_a_teacher_of_top_classes(relation: str) -> None:
    """A label that is not listed is one of the rest, on both sides."""
    for num_listed, temperature in itertools.product([1, 20, 53], [1.0, 2.0]):
        problem = with_top_k(make_problem(ignored=0.1), num_listed, temperature)
        for changes in ({}, {"clip": "off", "sft": 0.0}):
            config = CONFIG.replace(span_relation=relation, temperature=temperature, **changes)
            values, expected = run_reference(problem, config, make_gate())
            values["sft"] = values["sft"] * (config.sft > 0)
            output, gradients, _ = run_fused(problem, config, make_gate())
            assert_same(output, gradients, (values, expected), 1e-10)


def test_written_spans_without_any_pair() -> None:
    problem = make_problem()
    problem.pair_mask = torch.zeros_like(problem.pair_mask)
    for num_pairs in (0, 3):
        problem.num_pairs = num_pairs
        config = CONFIG.replace(span_relation="log")
        output, gradients, _ = run_fused(problem, config, make_gate())
        assert_same(output, gradients, run_reference(problem, config, make_gate()), 1e-10)
        assert float(output.span) == 0.0


def test_an_excluded_class_has_no_logarithm() -> None:
    top = TeacherTopK(torch.tensor([[0], [1]]), torch.zeros(2, 1), torch.full((2,), -torch.inf))
    student = Head(torch.randn(2, 3), torch.randn(5, 3))
    arguments = torch.tensor([0, 2]), torch.tensor([True, False]), None
    for relation, is_refused in [("log", True), ("joint", False)]:
        config = LossConfig(clip="off", span_relation=relation)
        call = (student, top, *arguments, config, VocabShard(0, 5, 5))
        if is_refused:
            with pytest.raises(DataError, match="loss.span_relation=log is infinite where the teacher excludes"):
                distill_loss(*call, num_tokens=2, num_pairs=1)
        else:
            assert distill_loss(*call, num_tokens=2, num_pairs=1).loss.isfinite()


def test_spans_are_runs_of_pairs_and_chunks_cut_none() -> None:
    pairs = [False, True, True, False, True, False, False]
    assert written_spans(pairs) == [[1, 2, 3], [4, 5]]
    assert [(c.start, c.stop) for c in chunks_of_whole_spans(pairs, 2)] == [(0, 4), (4, 6), (6, 7)]
    assert list(chunks_of_whole_spans([], 2)) == []
    sums = SpanSums(written_spans(pairs), torch.device("cpu"))
    assert sums.lengths.tolist() == [3, 2]
    assert sums.sum(torch.arange(7.0)).tolist() == [6.0, 9.0]
    assert sums.spread(torch.tensor([5.0, 7.0]), 7).tolist() == [0, 5, 5, 5, 7, 7, 0]


def _gradient_norms(student: Tensor, teacher: Tensor, labels: Tensor, relation: str) -> tuple[float, float]:
    """Norms of the gradients of span term and token loss by the student's logits, at the default weights."""
    norms = []
    for weights in ({"sft": 0.0, "dac_kl": 0.0}, {"sft": 0.0, "span": 0.0}):
        config = LossConfig(clip="off", span_relation=relation, **weights)
        hidden = student.clone().requires_grad_()
        identity, num_tokens = torch.eye(student.shape[1]), len(labels)
        pairs = torch.tensor([True] * (num_tokens - 1) + [False])
        distill_loss(
            Head(hidden, identity), Head(teacher, identity), labels, pairs, None, config,
            VocabShard(0, student.shape[1], student.shape[1]), num_tokens=num_tokens,
            num_pairs=num_tokens - 1 if relation == "hadamard" else 1,
        ).loss.backward()  # fmt: skip
        assert hidden.grad is not None
        norms.append(float(hidden.grad.norm()))
    return norms[0], norms[1]


def _peaked(classes: list[int], height: float, num_classes: int = 50) -> Tensor:
    logits = torch.randn(len(classes), num_classes, generator=torch.Generator().manual_seed(0))
    logits[range(len(classes)), classes] += height
    return logits


@pytest.mark.parametrize(("relation", "counts"), [("hadamard", False), ("joint", True), ("log", True)])
def test_a_wrong_phrase_moves_the_student(relation: str, counts: bool) -> None:
    """The student is fairly sure of the three tokens that it wrote, the teacher of others: Hadamard products see
    next to nothing of that, and the probabilities of the phrase as written do."""
    written, meant = [3, 8, 12], [5, 9, 30]
    span, token = _gradient_norms(_peaked(written, 7.0), _peaked(meant, 7.0), torch.tensor(written), relation)
    assert (span > 0.02 * token) == counts, (span / token, token)


def test_only_written_spans_see_an_exchange() -> None:
    """The student says the words of a phrase in the other order."""
    teacher = _peaked([3, 8], 7.0)
    labels = torch.tensor([8, 3])
    assert _gradient_norms(teacher.flip(0), teacher, labels, "hadamard")[0] < 1e-5
    for relation in WRITTEN:
        span, token = _gradient_norms(teacher.flip(0), teacher, labels, relation)
        assert span > 0.02 * token
