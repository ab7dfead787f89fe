"""SCRG and decoding with a model whose next token is a table: every edge that the method names."""

from __future__ import annotations

import torch

from megadistill.generation import find_error_positions, sample_tokens
from megadistill.generation.protocols import Rows, Sampling, Scores
from megadistill.generation.rollout import rollout
from megadistill.generation.scrg import revise
from megadistill.parallel import VocabShard

EOS, PAD, V = 1, 0, 11
GREEDY = Sampling(seed=0, temperature=0.0)


class Counter:
    """Writes last token + 1, then EOS after V - 1; remembers how wide its batches were."""

    shard, device = VocabShard(0, V, V), torch.device("cpu")

    def __init__(self) -> None:
        self.widths: list[int] = []

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        following = torch.where(last + 1 < V, last + 1, torch.full_like(last, EOS))
        return torch.nn.functional.one_hot(following, V).float() * 50

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[dict, torch.Tensor]:
        assert bool((attention_mask[:, -1] == 1).all()), "prompts end at the last column"
        self.widths.append(len(input_ids))
        return {"rows": input_ids[:, -1]}, self._logits(input_ids[:, -1])

    def decode(self, state: dict, tokens: torch.Tensor) -> torch.Tensor:
        assert len(state["rows"]) == len(tokens)
        self.widths.append(len(tokens))
        return self._logits(tokens)

    def select(self, state: dict, rows: torch.Tensor) -> None:
        state["rows"] = state["rows"][rows]


def _write(rows: Rows, limits: list[int], model: Counter | None = None, **more: object) -> tuple[tuple[int, ...], ...]:
    found = rollout(
        model or Counter(), rows, limits=limits, eos_ids=frozenset({EOS}), pad_id=PAD, sampling=GREEDY, **more
    )
    assert found.prompts == rows.prompts and found.sequence_ids == rows.sequence_ids
    return found.responses


def test_rows_end_at_eos_or_at_their_own_limit() -> None:
    rows = Rows((4, 5, 6), ((8,), (2, 3), (2,)), ((), (), ()))
    model = Counter()
    assert _write(rows, [9, 3, 1], model) == ((9, 10, EOS), (4, 5, 6), (3,))
    assert model.widths == [3, 2, 2]  # finished rows leave the batch


def test_prefixes_stay_and_ended_rows_are_left_alone() -> None:
    rows = Rows((0, 1, 2, 3), ((2,), (2,), (2,), (2,)), ((5,), (7, EOS), (3, 4), ()))
    assert _write(rows, [3, 9, 2, 0]) == ((5, 6, 7), (7, EOS), (3, 4), ())
    assert _write(Rows((0,), ((2,),), ((EOS,),)), [5]) == ((EOS,),)


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

    def __call__(self, rows: Rows, round_index: int) -> Scores:
        self.calls += 1
        width = max(len(response) for response in rows.responses)
        tokens = torch.zeros(len(rows.responses), width, dtype=torch.int64)
        kl, mask = torch.full(tokens.shape, 9.0), torch.zeros(tokens.shape, dtype=torch.bool)
        for row, response in enumerate(rows.responses):
            tokens[row, : len(response)] = torch.tensor(response)
            mask[row, : len(response)] = True
            for rank, (column, token) in enumerate(self.objections.get((round_index, row), {}).items()):
                tokens[row, column], kl[row, column] = token, 8.0 - rank
        return Scores(kl, tokens, mask)


def _revise(rows: Rows, teacher: Marker, rounds: int = 1, limit: int = 6):
    def write_on(part: Rows, round_index: int) -> Rows:
        return part.with_responses(_write(part, [limit] * len(part.prompts)))

    return revise(rows, score=teacher, write_on=write_on, rounds=rounds)


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
