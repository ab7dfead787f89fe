"""SCRG and decoding with models whose next token is a table: every edge that the method names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.config.schema import RunConfig
from megadistill.data.sample import Sample
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.rollout import Correction, RolloutState, rollout
from megadistill.decoding.sampling import NO_TOKEN, Drawer, Sampling
from megadistill.decoding.token_steps import EagerSteps
from megadistill.errors import DivergenceError
from megadistill.generation import find_error_positions, sample_tokens
from megadistill.generation.scoring import score_responses
from megadistill.generation.scrg import find_corrections
from megadistill.generation.sources.base import SourceInputs
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.observability.timers import Timers
from megadistill.parallel import VocabShard
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead

EOS, PAD, V = 1, 0, 11
GREEDY = Sampling(seed=0, temperature=0.0)
SHARD, CPU = VocabShard(0, V, V), torch.device("cpu")
FOLLOWING = [token + 1 if token + 1 < V else EOS for token in range(V)]
# The hidden state of a token is its one-hot vector; the head knows what follows.
HEAD = OutputHead(torch.nn.functional.one_hot(torch.tensor(FOLLOWING), V).T.double() * 50, None, SHARD)


def state_of(tokens: Sequence[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.int64), V).double()


def samples_of(*prompts: tuple[int, ...]) -> list[Sample]:
    return [Sample(i, prompt) for i, prompt in enumerate(prompts)]


class Slots:
    """What the fake model remembers: the token in every column that a slot has read."""

    def __init__(self, offsets: Sequence[int], columns: int) -> None:
        self.offsets, self.columns = list(offsets), columns
        self.read: list[dict[int, int]] = [{} for _ in offsets]

    def swap(self, a: int, b: int) -> None:
        self.sort([{a: b, b: a}.get(slot, slot) for slot in range(len(self.read))])

    def sort(self, order: list[int]) -> None:
        assert sorted(order) == list(range(len(self.read)))
        self.read, self.offsets = [self.read[slot] for slot in order], [self.offsets[slot] for slot in order]


class Counter:
    """Writes last token + 1, then EOS after V - 1; remembers how wide its batches were. It checks that an example has
    read everything left of the column that it is asked for."""

    shard, device, head, interval = SHARD, CPU, HEAD, 1

    def __init__(self) -> None:
        self.widths: list[int] = []

    def new_state(self, offsets: Sequence[int], columns: int) -> Slots:
        return Slots(offsets, columns)

    def prefill(self, state: Slots, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.widths.append(len(prompts))
        ends = {state.offsets[slot] + len(prompt) for slot, prompt in enumerate(prompts)}
        assert len(ends) == 1, "prompts end in one column"
        for slot, prompt in enumerate(prompts):
            state.read[slot] = {state.offsets[slot] + i: token for i, token in enumerate(prompt)}
        return state_of([prompt[-1] for prompt in prompts])

    def decode(self, state: Slots, tokens: torch.Tensor, column: int) -> torch.Tensor:
        self.widths.append(len(tokens))
        assert column < state.columns
        for slot, token in enumerate(tokens.tolist()):
            assert all(earlier in state.read[slot] for earlier in range(state.offsets[slot], column)), "a gap"
            state.read[slot][column] = token
        return state_of(tokens.tolist())

    def steps(self, state: Slots, drawer: Drawer, *, keep_hidden: bool) -> EagerSteps:
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=self.interval)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ HEAD.weight.T


def _state(samples: list[Sample], limits: list[int], model: Counter | None = None) -> RolloutState:
    model = model or Counter()
    return RolloutState(model, samples, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, keep_hidden=True)


def _write(
    samples: list[Sample], limits: list[int], model: Counter | None = None, **more: int
) -> list[tuple[int, ...]]:
    return rollout(model or Counter(), samples, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, **more)


def test_responses_end_at_eos_or_at_their_own_limit() -> None:
    samples = samples_of((8,), (2, 3), (2,))
    model = Counter()
    assert _write(samples, [9, 3, 1], model) == [(9, 10, EOS), (4, 5, 6), (3,)]
    assert model.widths == [3, 2, 2]  # finished examples leave the batch


def test_examples_without_space_write_nothing() -> None:
    samples = samples_of((2,), (2, 3), (4,))
    assert _write(samples, [0, 2, -1]) == [(), (4, 5), ()]
    assert _write(samples, [0, 0, 0]) == [(), (), ()]


def test_corrected_examples_join_when_the_decoding_reaches_them() -> None:
    model = Counter()
    rollout_state = _state(samples_of((2,), (2, 3), (2,), (7,)), [7] * 4, model)
    rollout_state.write(0)
    assert rollout_state.responses() == [
        (3, 4, 5, 6, 7, 8, 9),
        (4, 5, 6, 7, 8, 9, 10),
        (3, 4, 5, 6, 7, 8, 9),
        (8, 9, 10, EOS),
    ]
    model.widths.clear()
    rollout_state.rewrite([Correction(0, 4, 3), Correction(2, 1, 9), Correction(3, 3, 5), Correction(1, 6, 2)], 0)
    assert rollout_state.responses() == [
        (3, 4, 5, 6, 3, 4, 5), (4, 5, 6, 7, 8, 9, 2), (3, 9, 10, EOS), (8, 9, 10, 5, 6, 7, 8)
    ]  # fmt: skip
    # Example 2 from position 1 to its EOS, 3 from 3, 0 from 4; 1 had nothing right of its correction.
    assert model.widths == [1, 1, 1, 2, 2]
    assert rollout_state.hidden(0).argmax(-1).tolist() == [2, 3, 4, 5, 6, 3, 4]
    assert rollout_state.hidden(3, 3).argmax(-1).tolist() == [10, 5, 6, 7]
    rollout_state.rewrite([], 1)
    rollout_state.rewrite([Correction(1, 0, EOS)], 1)
    assert rollout_state.responses()[1] == (EOS,)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_continuing_is_writing_again(data: st.DataObject) -> None:
    """Any corrections in any order of rounds: what a model that remembers nothing would write.

    However many tokens are written between two looks at which responses have ended.
    """
    num_examples = data.draw(st.integers(1, 6))
    prompts = tuple(
        tuple(data.draw(st.lists(st.integers(2, V - 1), min_size=1, max_size=3))) for _ in range(num_examples)
    )
    limits = [data.draw(st.integers(0, 7)) for _ in range(num_examples)]
    model = Counter()
    model.interval = data.draw(st.integers(1, 8))
    rollout_state = _state(samples_of(*prompts), limits, model)
    rollout_state.write(0)
    texts = [_continued(prompt[-1], (), limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert rollout_state.responses() == texts
    for _ in range(data.draw(st.integers(0, 3))):
        corrections = []
        for row, text in enumerate(texts):
            if text and data.draw(st.booleans()):
                position, token = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(1, V - 1))
                corrections.append(Correction(row, position, token))
                texts[row] = _continued(token, (*text[:position], token), limits[row])
        rollout_state.rewrite(corrections, 0)
        assert rollout_state.responses() == texts
        for row, text in enumerate(texts):
            assert rollout_state.hidden(row).argmax(-1).tolist() == [prompts[row][-1], *text][: len(text)]


@pytest.mark.parametrize("interval", [1, 4, 8])
def test_examples_join_at_their_columns(interval: int) -> None:
    """Also between two looks at which responses have ended; and nothing is written behind the last limit."""
    model = Counter()
    model.interval = interval
    rollout_state = _state(samples_of((2,), (2,)), [9, 9], model)
    rollout_state.write(0)
    assert model.widths == [2] * 9  # the prompts, and all tokens but the last
    model.widths.clear()
    rollout_state.rewrite([Correction(0, 1, 2), Correction(1, 3, 2)], 0)
    assert model.widths == [1] * 2 + [2] * 5


def _continued(last: int, text: tuple[int, ...], limit: int) -> tuple[int, ...]:
    while len(text) < limit and (not text or text[-1] != EOS):
        last = last + 1 if last + 1 < V else EOS
        text = (*text, last)
    return text


def test_the_width_of_a_batch_does_not_matter() -> None:
    samples = samples_of(*((2 + i,) for i in range(7)))
    assert _write(samples, [6] * 7) == _write(samples, [6] * 7, max_examples=2)


def test_find_error_positions_takes_the_earliest_of_the_largest() -> None:
    kl = torch.tensor([[1.0, 3.0, 3.0, 9.0], [5.0, 1.0, 2.0, 0.5], [7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    teacher = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 2, 3, 4], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert find_error_positions(kl, student, teacher, mask).tolist() == [1, 2, -1, 2]
    assert find_error_positions(kl[:, :0], student[:, :0], teacher[:, :0], mask[:, :0]).tolist() == [-1] * 4
    assert find_error_positions(kl, student, teacher, torch.zeros_like(mask)).tolist() == [-1] * 4


class Teacher:
    """Agrees with the student but for objections, (round, example) -> {response position: its own token}; the first
    listed is the strongest."""

    shard, keeps_cache = SHARD, False
    strengths = (1.0, 0.1, 0.08)

    def __init__(self, prompts: Sequence[tuple[int, ...]], objections: dict[tuple[int, int], dict[int, int]]) -> None:
        self.prompts, self.objections, self.num_readings = prompts, objections, 0

    def prefiller(self, examples_per_pass: int) -> Teacher:
        return self

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        yield HEAD

    def read(self, chunks: Sequence[PrefillChunk], state: object = None) -> list[torch.Tensor]:
        round_index, self.num_readings = self.num_readings, self.num_readings + 1
        states = []
        for chunk in chunks:
            hidden, first = state_of(chunk.tokens), len(self.prompts[chunk.slot]) - 1
            for rank, (position, token) in enumerate(self.objections.get((round_index, chunk.slot), {}).items()):
                if first + position < len(hidden):
                    before = FOLLOWING.index(token, 2)  # what this token follows
                    hidden[first + position] = state_of([before])[0] * self.strengths[rank]
            states.append(hidden)
        return states


class Student:
    """Gives out one decoder."""

    shard = SHARD

    def __init__(self, decoder: Counter | None = None) -> None:
        self.counter = decoder or Counter()

    @contextmanager
    def decoder(self) -> Iterator[Counter]:
        yield self.counter


def _revise(
    prompts: tuple[tuple[int, ...], ...],
    objections: dict[tuple[int, int], dict[int, int]],
    rounds: int = 1,
    teacher_eos_ids: frozenset[int] = frozenset(),
    decoder: Counter | None = None,
    **more: int,
) -> tuple[list[Sample], Teacher]:
    """A step's samples, six tokens each, from the text source itself."""
    config = RunConfig.model_validate({
        "run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "generation": {"max_new_tokens": 6, "sampling_temperature": 0.0,
                       "scrg": {"enabled": rounds > 0, "rounds": max(rounds, 1), "teacher_token": "greedy"}},
    })  # fmt: skip
    teacher = Teacher(prompts, objections)
    plan = DecodeBatchPlan(more.get("batch_size", len(prompts)), False, 64)
    inputs = SourceInputs(
        config,
        ParallelContext.single(),
        Student(decoder),
        teacher,
        frozenset({EOS}),
        plan,
        teacher_eos_ids=teacher_eos_ids,
        max_steps=2000,
    )
    return OnPolicy.build(inputs).samples(0, samples_of(*prompts), Timers()), teacher


def test_one_round_corrects_and_continues() -> None:
    prompts = ((2,), (2,), (2,), (9,))
    samples, teacher = _revise(prompts, {(0, 0): {1: 8}, (0, 1): {1: EOS}, (0, 2): {5: 4}})
    assert [s.rollout_ids for s in samples] == [(3, 4, 5, 6, 7, 8)] * 3 + [(10, EOS)]
    # Continued from the correction; the teacher's EOS ends a response; the last position has nothing right of it; no
    # error.
    assert [s.response_ids for s in samples] == [(3, 8, 9, 10, EOS), (3, EOS), (3, 4, 5, 6, 7, 4), (10, EOS)]
    assert [s.error_position for s in samples] == [1, 1, 5, -1]
    assert [s.num_corrections for s in samples] == [1, 1, 1, 0]
    # The teacher has read what is trained on.
    for sample in samples:
        assert sample.teacher_hidden is not None and sample.response_ids is not None
        assert sample.teacher_hidden.argmax(-1).tolist() == [*sample.prompt_ids[-1:], *sample.response_ids[:-1]]
    assert teacher.num_readings == 2


def test_a_correction_ends_a_response_where_it_would_end_the_teachers() -> None:
    """The student itself writes on past the teacher's end tokens."""
    objections = {(0, 0): {1: 8}, (0, 1): {1: EOS}, (0, 2): {2: 9}}
    samples, _ = _revise(((2,), (2,), (2,)), objections, teacher_eos_ids=frozenset({8, 6}))
    assert [s.rollout_ids for s in samples] == [(3, 4, 5, 6, 7, 8)] * 3
    assert [s.response_ids for s in samples] == [(3, 8), (3, EOS), (3, 4, 9, 10, EOS)]


def test_without_rounds_the_text_is_the_students() -> None:
    samples, teacher = _revise(((2,), (9,)), {(0, 0): {1: 8}}, rounds=0)
    assert [s.response_ids for s in samples] == [(3, 4, 5, 6, 7, 8), (10, EOS)] == [s.rollout_ids for s in samples]
    assert [s.error_position for s in samples] == [-1, -1] and teacher.num_readings == 1


def test_the_students_eos_can_be_replaced() -> None:
    samples, _ = _revise(((9,),), {(0, 0): {1: 7}})
    assert samples[0].rollout_ids == (10, EOS) and samples[0].response_ids == (10, 7, 8, 9, 10, EOS)


def test_later_rounds_look_only_right_of_the_last_correction() -> None:
    # Round 1 objects left of, at and right of the correction; only the last counts. Example 1 had no error: it is left
    # alone.
    objections = {(0, 0): {1: 6}, (1, 0): {0: 9, 1: 9, 3: 4}, (1, 1): {0: 9}, (2, 0): {2: 9}}
    samples, teacher = _revise(((2,), (9,)), objections, rounds=3)
    assert [s.response_ids for s in samples] == [(3, 6, 7, 4, 5, 6), (10, EOS)]
    assert [s.error_position for s in samples] == [1, -1] and [s.num_corrections for s in samples] == [2, 0]
    assert teacher.num_readings == 4, "every rank scores in every round, whatever it finds"


def test_the_strongest_objection_is_corrected() -> None:
    samples, _ = _revise(((2,), (2,)), {(0, 0): {4: 9, 1: 9}, (0, 1): {1: 9, 4: 9}})
    assert [s.error_position for s in samples] == [4, 1]


class Broken(Counter):
    """Has no distribution after a 9."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(hidden[:, 9:10] > 0, torch.nan, super().logits(hidden))


def test_a_text_without_a_distribution_ends_and_says_so() -> None:
    rollout_state = _state(samples_of((2,), (7,), (9,)), [4] * 3, Broken())
    rollout_state.write(0)
    assert rollout_state.responses() == [(3, 4, 5, 6), (8, 9, 0), (0,)]
    assert rollout_state.nonfinite == {1: 2, 2: 0}
    rollout_state.rewrite([Correction(0, 1, 8)], 1)  # what a correction leads to counts as well
    assert rollout_state.responses()[0] == (3, 8, 9, 0) and rollout_state.nonfinite[0] == 3


def test_rollout_refuses_such_a_text() -> None:
    samples = samples_of((2,), (7,), (9, 9))
    with pytest.raises(DivergenceError, match="sequence 1: the logits for token 3 of the answer are NaN or infinite"):
        _write(samples, [4] * 3, Broken())
    seen: list[tuple[int, int]] = []
    written = rollout(
        Broken(), samples, limits=[4] * 3, eos_ids=frozenset({EOS}), sampling=GREEDY, max_examples=1,
        on_nonfinite=lambda index, position: seen.append((index, position)),
    )  # fmt: skip
    assert written[0] == (3, 4, 5, 6) and seen == [(1, 2), (2, 0)]


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_sample_knows_that_the_student_had_no_distribution(rounds: int) -> None:
    samples, _ = _revise(((2,), (8,), (9,)), {(0, 0): {1: 8}}, rounds, decoder=Broken())
    # The teacher leads example 0 to a 9; a correction that replaces what the others could not write excuses nothing.
    assert [s.is_finite for s in samples] == [rounds == 0, False, False]
    assert [s.rollout_ids for s in samples[1:]] == [(9, 0), (0,)]


def test_a_teacher_without_a_distribution_corrects_nothing() -> None:
    """Its token is none, and its KL is NaN."""
    scores = score_responses(
        [2], [0], [0],
        student_hidden=[state_of([3, 4])], student_head=HEAD, teacher_hidden=[state_of([3, 4]) * torch.nan],
        teacher=Teacher((), {}), sampling=Sampling(),
    )  # fmt: skip
    assert scores.teacher_tokens.tolist() == [[NO_TOKEN] * 2]
    assert find_corrections([(4, 5)], scores) == []


def test_streams_give_a_continuation_its_own_random_numbers() -> None:
    logits, ids = torch.zeros(64, 500), torch.arange(64)
    shard, positions = VocabShard(0, 500, 500), torch.zeros(64, dtype=torch.int64)
    drawn = [
        sample_tokens(logits, shard, seed=1, sequence_ids=ids, positions=positions, stream=stream)
        for stream in (0, 0, 7)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert int((drawn[0] == drawn[2]).sum()) < 5
