"""Rows for which a model has no distribution: answers and likelihoods stop on every rank, with the row's name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.decoding.nonfinite import row_name
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.token_steps import EagerSteps
from megadistill.errors import DivergenceError
from megadistill.evaluation.answers import AnswerSettings, reference_likelihood, write_answers
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.training.micro_batch import GlobalCounts
from megadistill.training.step import loss_metrics
from tests.support.spawn import run_ranks

V, EOS, BAD = 8, 1, 6
NAMES = {2: "two", 3: "three", BAD: "bad"}


class Echo:
    """Always writes token 4; has no distribution after BAD."""

    device, interval = torch.device("cpu"), 1

    def __init__(self, context: ParallelContext) -> None:
        self.shard = context.vocab_shard(V)
        weight = torch.zeros(V, V)
        weight[4] = 9
        self.head = OutputHead(weight[self.shard.start : self.shard.stop], None, self.shard)
        self.num_batches = 0

    def new_state(self, offsets: Any, columns: int) -> Any:
        self.num_batches += 1
        return SimpleNamespace(swap=lambda a, b: None)

    def prefill(self, state: Any, prompts: Any) -> torch.Tensor:
        return self._hidden([prompt[-1] for prompt in prompts])

    def decode(self, state: Any, tokens: torch.Tensor, column: int) -> torch.Tensor:
        return self._hidden(tokens.tolist())

    def read(self, chunks: Any) -> list[torch.Tensor]:
        self.num_batches += 1
        return [self._hidden(list(chunk.tokens)) for chunk in chunks]

    def steps(self, state: Any, drawer: Drawer, *, keep_hidden: bool) -> EagerSteps:
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=self.interval)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head.weight.T

    def _hidden(self, tokens: list[int]) -> torch.Tensor:
        states = torch.eye(V)[tokens]
        states[[token == BAD for token in tokens]] = torch.nan
        return states


def rows_of(*tokens: int) -> list[TokenizedExample]:
    return [TokenizedExample(10 + i, (5, token), (4, EOS), ("x",), NAMES[token]) for i, token in enumerate(tokens)]


@pytest.fixture
def settings() -> AnswerSettings:
    tokenizer = SimpleNamespace(eos_token_id=EOS, decode=lambda ids, **_: " ".join(map(str, ids)))
    return AnswerSettings(tokenizer, frozenset({EOS}), max_new_tokens=3, max_tokens=9, batch_size=1)  # type: ignore[arg-type]


def test_an_answer_and_a_likelihood_stop_at_once_on_one_rank(settings: AnswerSettings) -> None:
    context = ParallelContext.single()
    good, bad = rows_of(2, 3), rows_of(2, BAD, 3)
    assert write_answers(Echo(context), good, None, settings, context) == ["4 4 4"] * 2
    assert reference_likelihood(Echo(context), good, settings, context).num_tokens == 4
    for seed in (None, 7):
        model = Echo(context)
        with pytest.raises(DivergenceError, match=r"^row 11 \('bad'\): the logits for token 1 of the answer are NaN"):
            write_answers(model, bad, seed, settings, context)
        assert model.num_batches == 2, "the third is not written"
    for width in (1, 3):  # also where one batch holds good rows beside it
        wide = AnswerSettings(settings.tokenizer, settings.eos_ids, 3, 9, batch_size=width)
        with pytest.raises(DivergenceError, match=r"^row 11 \('bad'\): the logits for a token of the answer"):
            reference_likelihood(Echo(context), bad, wide, context)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_all_ranks_stop_together(settings: AnswerSettings, tp_size: int) -> None:
    """The rank of the row finishes its share first: the others would wait for it for ever."""
    rows = rows_of(2, BAD, 2, 3)

    def body(rank: int) -> list[str]:
        context = ParallelContext.build(tp_size, 60, torch.device("cpu"))
        errors = []
        for action in (write_answers, reference_likelihood):
            arguments = (rows, None) if action is write_answers else (rows,)
            try:
                action(Echo(context), *arguments, settings, context)  # type: ignore[operator]
            except DivergenceError as error:
                errors.append(str(error))
        dist.barrier()
        return errors

    for errors in run_ranks(body, 2, timeout_s=60):
        assert [error[:18] for error in errors] == ["row 11 ('bad'): th"] * 2


def test_a_step_with_such_student_text_is_not_finite() -> None:
    """Whatever its losses are: they may not see what the decoding saw."""
    config = SimpleNamespace(sft=1.0, dac_kl=1.0, span=0.0, policy=0.0)
    components = SimpleNamespace(context=ParallelContext.single(), loss=config, teacher=None)
    for is_finite in (True, False):
        samples = [Sample(0, (2,), response_ids=(4,), rollout_ids=(4,), is_finite=is_finite), Sample(1, (2,))]
        loss = loss_metrics([], samples, GlobalCounts(1.0, 1.0, 0.0), components)["loss"]  # type: ignore[arg-type]
        assert math.isfinite(loss) is is_finite


def test_a_row_is_named_by_its_number_and_the_end_of_its_prompt() -> None:
    row = TokenizedExample(3, (5,), None, (), "Below is an instruction.\n" * 9 + "Name a river.\n\n### Response:\n")
    assert row_name(row).startswith("row 3 ('...") and row_name(row).endswith("Name a river. ### Response:')")
