"""SCRG and decoding with a model whose next token is a table: every edge that the method names."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.decoding.protocols import Correction, Rows, Sampling, TeacherScores
from megadistill.decoding.rollout import RolloutState, rollout
from megadistill.generation import find_error_positions, sample_tokens
from megadistill.generation.scrg import Revision, revise
from megadistill.parallel import VocabShard

EOS, PAD, V = 1, 0, 11
GREEDY = Sampling(seed=0, temperature=0.0)


class Slots:
    """What the fake model remembers: the token in every column that a slot has read."""

    def __init__(self, offsets: list[int], columns: int) -> None:
        self.offsets, self.columns = list(offsets), columns
        self.read: list[dict[int, int]] = [{} for _ in offsets]

    def swap(self, a: int, b: int) -> None:
        self.sort([{a: b, b: a}.get(slot, slot) for slot in range(len(self.read))])

    def sort(self, order: list[int]) -> None:
        assert sorted(order) == list(range(len(self.read)))
        self.read, self.offsets = [self.read[slot] for slot in order], [self.offsets[slot] for slot in order]


class Counter:
    """Writes last token + 1, then EOS after V - 1; remembers how wide its batches were. Its hidden state is the last
    token, and it checks that a row has read everything left of the column that it is asked for."""

    shard, device = VocabShard(0, V, V), torch.device("cpu")

    def __init__(self) -> None:
        self.widths: list[int] = []

    def new_state(self, offsets: list[int], columns: int) -> Slots:
        return Slots(offsets, columns)

    def prefill(self, state: Slots, prompts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        self.widths.append(len(prompts))
        ends = {state.offsets[slot] + len(prompt) for slot, prompt in enumerate(prompts)}
        assert len(ends) == 1, "prompts end in one column"
        for slot, prompt in enumerate(prompts):
            state.read[slot] = {state.offsets[slot] + i: token for i, token in enumerate(prompt)}
        return torch.tensor([[prompt[-1]] for prompt in prompts])

    def decode(self, state: Slots, tokens: torch.Tensor, column: int) -> torch.Tensor:
        self.widths.append(len(tokens))
        assert column < state.columns
        for slot, token in enumerate(tokens.tolist()):
            assert all(earlier in state.read[slot] for earlier in range(state.offsets[slot], column)), "a gap"
            state.read[slot][column] = token
        return tokens[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        last = hidden[:, 0]
        following = torch.where(last + 1 < V, last + 1, torch.full_like(last, EOS))
        return torch.nn.functional.one_hot(following, V).float() * 50


def _draft(rows: Rows, limits: list[int], model: Counter | None = None) -> RolloutState:
    model = model or Counter()
    return RolloutState(model, rows, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, keep_hidden=True)


def _write(rows: Rows, limits: list[int], model: Counter | None = None, **more: object) -> tuple[tuple[int, ...], ...]:
    found = rollout(model or Counter(), rows, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, **more)
    assert found.prompts == rows.prompts and found.sequence_ids == rows.sequence_ids
    return found.responses


def test_rows_end_at_eos_or_at_their_own_limit() -> None:
    rows = Rows((4, 5, 6), ((8,), (2, 3), (2,)), ((), (), ()))
    model = Counter()
    assert _write(rows, [9, 3, 1], model) == ((9, 10, EOS), (4, 5, 6), (3,))
    assert model.widths == [3, 2, 2]  # finished rows leave the batch


def test_rows_without_room_write_nothing() -> None:
    rows = Rows((0, 1, 2), ((2,), (2, 3), (4,)), ((),) * 3)
    assert _write(rows, [0, 2, -1]) == ((), (4, 5), ())
    assert _write(rows, [0, 0, 0]) == ((), (), ())


def test_corrected_rows_join_when_the_decoding_reaches_them() -> None:
    rows, model = Rows((0, 1, 2, 3), ((2,), (2, 3), (2,), (7,)), ((),) * 4), Counter()
    rollout_state = _draft(rows, [7] * 4, model)
    rollout_state.write(0)
    assert rollout_state.rows.responses == (
        (3, 4, 5, 6, 7, 8, 9),
        (4, 5, 6, 7, 8, 9, 10),
        (3, 4, 5, 6, 7, 8, 9),
        (8, 9, 10, EOS),
    )
    model.widths.clear()
    rollout_state.rewrite([Correction(0, 4, 3), Correction(2, 1, 9), Correction(3, 3, 5), Correction(1, 6, 2)], 0)
    assert rollout_state.rows.responses == (
        (3, 4, 5, 6, 3, 4, 5), (4, 5, 6, 7, 8, 9, 2), (3, 9, 10, EOS), (8, 9, 10, 5, 6, 7, 8)
    )  # fmt: skip
    # Row 2 from column 1 to its EOS, row 3 from 3, row 0 from 4; row 1 had nothing right of its correction.
    assert model.widths == [1, 1, 1, 2, 2]
    assert rollout_state.hidden(0).flatten().tolist() == [2, 3, 4, 5, 6, 3, 4]
    assert rollout_state.hidden(3, 3).flatten().tolist() == [10, 5, 6, 7]
    rollout_state.rewrite([], 1)
    rollout_state.rewrite([Correction(1, 0, EOS)], 1)
    assert rollout_state.rows.responses[1] == (EOS,)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_writing_on_is_writing_anew(data: st.DataObject) -> None:
    """Any corrections in any order of rounds: what a model that remembers nothing would write."""
    num_rows = data.draw(st.integers(1, 6))
    prompts = tuple(tuple(data.draw(st.lists(st.integers(2, V - 1), min_size=1, max_size=3))) for _ in range(num_rows))
    limits = [data.draw(st.integers(0, 7)) for _ in range(num_rows)]
    rollout_state = _draft(Rows(tuple(range(num_rows)), prompts, ((),) * num_rows), limits)
    rollout_state.write(0)
    texts = [_continued(prompt[-1], (), limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert rollout_state.rows.responses == tuple(texts)
    for _ in range(data.draw(st.integers(0, 3))):
        corrections = []
        for row, text in enumerate(texts):
            if text and data.draw(st.booleans()):
                position, token = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(1, V - 1))
                corrections.append(Correction(row, position, token))
                texts[row] = _continued(token, (*text[:position], token), limits[row])
        rollout_state.rewrite(corrections, 0)
        assert rollout_state.rows.responses == tuple(texts)
        for row, text in enumerate(texts):
            assert rollout_state.hidden(row).flatten().tolist() == [prompts[row][-1], *text][: len(text)]


def _continued(last: int, text: tuple[int, ...], limit: int) -> tuple[int, ...]:
    while len(text) < limit and (not text or text[-1] != EOS):
        last = last + 1 if last + 1 < V else EOS
        text = (*text, last)
    return text


def test_the_width_of_a_batch_does_not_matter() -> None:
    rows = Rows(tuple(range(7)), tuple((2 + i,) for i in range(7)), ((),) * 7)
    assert _write(rows, [6] * 7) == _write(rows, [6] * 7, max_rows=2)


def test_find_error_positions_takes_the_earliest_of_the_largest() -> None:
    kl = torch.tensor([[1.0, 3.0, 3.0, 9.0], [5.0, 1.0, 2.0, 0.5], [7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    teacher = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 2, 3, 4], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert find_error_positions(kl, student, teacher, mask).tolist() == [1, 2, -1, 2]
    assert find_error_positions(kl[:, :0], student[:, :0], teacher[:, :0], mask[:, :0]).tolist() == [-1] * 4
    assert find_error_positions(kl, student, teacher, torch.zeros_like(mask)).tolist() == [-1] * 4


class Marker:
    """A teacher that objects to listed (round, row, column) with a token of its own, the first listed most of all."""

    def __init__(self, objections: dict[tuple[int, int], dict[int, int]]) -> None:
        self.objections, self.calls = objections, 0

    def __call__(self, rows: Rows, starts: list[int], round_index: int) -> TeacherScores:
        self.calls += 1
        width = max(len(response) for response in rows.responses)
        tokens = torch.zeros(len(rows.responses), width, dtype=torch.int64)
        kl, mask = torch.full(tokens.shape, 9.0), torch.zeros(tokens.shape, dtype=torch.bool)
        for row, response in enumerate(rows.responses):
            tokens[row, : len(response)] = torch.tensor(response)
            mask[row, starts[row] : len(response)] = True
            for rank, (column, token) in enumerate(self.objections.get((round_index, row), {}).items()):
                tokens[row, column], kl[row, column] = token, 8.0 - rank
        return TeacherScores(kl, tokens, mask)


def _revise(rows: Rows, teacher: Marker, rounds: int = 1, limit: int = 6) -> Revision:
    """What happens to given responses: a rollout_state that wrote them, corrected as the teacher says."""
    texts = list(rows.responses)

    def rewrite(corrections: list[Correction], round_index: int) -> Rows:
        for row, position, token in corrections:
            texts[row] = _continued(token, (*texts[row][:position], token), limit)
        return rows.with_responses(texts)

    return revise(rows, score=teacher, rewrite=rewrite, rounds=rounds)


def test_one_round_corrects_and_writes_on() -> None:
    rows = Rows((0, 1, 2, 3), ((2,),) * 4, ((3, 4, 5), (3, 9, EOS), (3, 4, 5, 6, 7, 8), (3, EOS)))
    teacher = Marker({(0, 0): {1: 8}, (0, 1): {1: EOS}, (0, 2): {5: 4}})
    found = _revise(rows, teacher)
    # Written on from the correction; the teacher's EOS ends its row; the last column has nothing right of it; no error.
    assert found.rows.responses == ((3, 8, 9, 10, EOS), (3, EOS), (3, 4, 5, 6, 7, 4), (3, EOS))
    assert found.error_positions == (1, 1, 5, -1)
    assert found.num_corrections == (1, 1, 1, 0)


def test_the_students_eos_can_be_replaced() -> None:
    found = _revise(Rows((0,), ((2,),), ((3, EOS),)), Marker({(0, 0): {1: 7}}))
    assert found.rows.responses == ((3, 7, 8, 9, 10, EOS),)


def test_later_rounds_look_only_right_of_the_last_correction() -> None:
    rows = Rows((0, 1), ((2,), (2,)), ((3, 4, 5), (3, 4, EOS)))
    # Round 1 objects left of, at and right of the correction; only the last counts. Row 1 had no error: it is left
    # alone.
    teacher = Marker({(0, 0): {1: 6}, (1, 0): {0: 9, 1: 9, 3: 4}, (1, 1): {0: 9}, (2, 0): {2: 9}})
    found = _revise(rows, teacher, rounds=3)
    assert found.rows.responses == ((3, 6, 7, 4, 5, 6), (3, 4, EOS))
    assert found.error_positions == (1, -1) and found.num_corrections == (2, 0)
    assert teacher.calls == 3, "every rank scores in every round, whatever it finds"


def test_streams_give_a_continuation_its_own_random_numbers() -> None:
    logits, ids = torch.zeros(64, 500), torch.arange(64)
    shard, positions = VocabShard(0, 500, 500), torch.zeros(64, dtype=torch.int64)
    drawn = [
        sample_tokens(logits, shard, seed=1, sequence_ids=ids, positions=positions, stream=stream)
        for stream in (0, 0, 7)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert int((drawn[0] == drawn[2]).sum()) < 5
