"""The teacher's states of student text: against dense float64 distributions, and what it reads again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch

from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.sampling import Sampling, sample_tokens
from megadistill.generation.scoring import score_responses
from megadistill.generation.teacher_states import TeacherStates
from megadistill.losses import Head, token_kl
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.rng import Stream
from tests.unit.test_decoding import PROMPTS, make_model, prepared

V, H = 300, 5


def _heads(bias: bool) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(V, H, generator=generator, dtype=torch.float64) for _ in range(2)]
    biases = [torch.randn(V, generator=generator, dtype=torch.float64) * 3 if bias else None for _ in range(2)]
    return tuple(zip(weights, biases, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("starts", [(0, 0, 0, 0), (2, 0, 4, 1), (3, 1, 4, 2)])
@pytest.mark.parametrize("sample", [True, False])
def test_scores_are_the_dense_ones(bias: bool, starts: tuple[int, ...], sample: bool) -> None:
    sequence_ids, lengths = (7, 3, 11, 5), (3, 1, 4, 2)
    student, teacher = _heads(bias)
    states = [[torch.randn(length, H, dtype=torch.float64) for length in lengths] for _ in range(2)]

    class Teacher:
        @contextmanager
        def head(self):
            yield OutputHead(*teacher, VocabShard(0, V, V))

    scores = score_responses(
        lengths, starts, sequence_ids,
        student_hidden=[s[a:] for s, a in zip(states[0], starts, strict=True)],
        student_head=OutputHead(*student, VocabShard(0, V, V)),
        teacher_hidden=[s[a:] for s, a in zip(states[1], starts, strict=True)], teacher=Teacher(),
        seed=4, stream=Stream.TEACHER_TOKEN + 2, sampling=Sampling() if sample else None,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        logits = [s[i] @ w.T + (0 if b is None else b) for s, (w, b) in zip(states, (student, teacher), strict=True)]
        log_q, log_p = (x.log_softmax(-1) for x in logits)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        tokens = logits[1].argmax(-1)
        if sample:
            ids, at = torch.full((length,), sequence_ids[i]), torch.arange(length)
            tokens = sample_tokens(
                logits[1], VocabShard(0, V, V), seed=4, sequence_ids=ids, positions=at, stream=Stream.TEACHER_TOKEN + 2
            )
        read = slice(starts[i], length)
        assert scores.mask[i].nonzero().flatten().tolist() == list(range(starts[i], length))
        assert torch.allclose(scores.kl_map[i, read], kl[read], atol=1e-10)
        assert torch.equal(scores.teacher_tokens[i, read], tokens[read])


def test_the_visitor_sees_the_teachers_logits_up_to_a_constant() -> None:
    (student, teacher), seen = _heads(True), torch.zeros(70, V, dtype=torch.float64)
    hidden = [torch.randn(70, H, dtype=torch.float64) for _ in range(2)]

    def visit(rows: slice, logits: torch.Tensor) -> None:
        seen[rows] = logits

    heads = Head(hidden[0], *student), Head(hidden[1], *teacher)
    found = token_kl(*heads, VocabShard(0, V, V), chunk_tokens=32, visit=visit)
    expected = hidden[1] @ teacher[0].T + teacher[1]
    assert torch.allclose(seen.log_softmax(-1), expected.log_softmax(-1), atol=1e-12)
    assert torch.equal(found[0], token_kl(*heads, VocabShard(0, V, V), chunk_tokens=32)[0])


class Counting:
    """A prefiller that counts what it reads."""

    def __init__(self, prefiller: object, keeps_cache: bool = True) -> None:
        self._prefiller, self.keeps_cache, self.calls = prefiller, keeps_cache, []

    def new_state(self, offsets: Sequence[int], columns: int) -> object:
        return self._prefiller.new_state(offsets, columns)

    def read(self, chunks: Sequence[PrefillChunk], state: object = None) -> list[torch.Tensor]:
        self.calls.append({chunk.slot: len(chunk.tokens) for chunk in chunks})
        return self._prefiller.read(chunks, state)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("keeps_cache", [True, False])
def test_text_is_read_from_the_correction_on(keep: bool, keeps_cache: bool) -> None:
    prefiller = Counting(prepared(make_model("qwen3"), "qwen3"), keeps_cache)
    text = TeacherStates(prefiller, PROMPTS, 20, keep_cache=keep)
    first = ((5, 6, 7, 8), (9, 10), (11, 12, 13), ())
    text.update(first, [0, 0, 0, 0])
    # Row 0 is corrected at 1 and grows, row 1 ends by its correction at 0, row 2 stays, row 3 is empty.
    second = ((5, 50, 51, 52, 53, 54), (3,), (11, 12, 13), ())
    text.update(second, [2, 1, 3, 0])
    if keep and keeps_cache:
        assert prefiller.calls[1] == {0: 4}
    else:
        assert prefiller.calls[1].keys() == ({0, 1, 2, 3} if not keeps_cache else {0})
    for row, (prompt, response) in enumerate(zip(PROMPTS, second, strict=True)):
        found = text.hidden[row]
        if not response:
            assert found is None or len(found) == 0
            continue
        whole = prefiller._prefiller.read([PrefillChunk(0, 0, (*prompt, *response[:-1]))])[0][len(prompt) - 1 :]
        assert found is not None and torch.allclose(found, whole, atol=1e-5)
