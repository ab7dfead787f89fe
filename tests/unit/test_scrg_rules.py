"""SCRG's other rules, what follows a correction, modes skd and teacher_mixed: tables for models, a planted error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.schema import RunConfig
from megadistill.data.sample import NO_ERROR, Sample
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.rollout import Correction
from megadistill.decoding.sampling import NO_TOKEN, Drawer, draw_tokens, sample_tokens, sampling_numbers
from megadistill.decoding.token_steps import EagerSteps
from megadistill.generation.scoring import TeacherScores, TextScores
from megadistill.generation.scrg import ErrorRule, error_positions, find_corrections
from megadistill.generation.sources import source_class
from megadistill.generation.sources.base import SourceInputs
from megadistill.losses import label_scores
from megadistill.observability.timers import Timers
from megadistill.parallel import VocabShard
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.rng import Stream
from megadistill.training import setup
from tools import scrg_controls

V, EOS = 12, 1
SHARD = VocabShard(0, V, V)
IDENTITY = OutputHead(torch.eye(V, dtype=torch.float64), None, SHARD)


class Markov:
    """A decoder whose next token depends on the last one: its hidden states are logits, row t those after token t."""

    shard, device, head = SHARD, torch.device("cpu"), IDENTITY

    def __init__(self, logits: Tensor) -> None:
        self.table = logits.double()

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        class State:
            def swap(self, a: int, b: int) -> None: ...

            def sort(self, order: list[int]) -> None: ...

        return State()

    def prefill(self, state: object, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self.table[[prompt[-1] for prompt in prompts]]

    def decode(self, state: object, tokens: Tensor, column: int) -> Tensor:
        return self.table[tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def steps(self, state: Any, drawer: Drawer, *, keep_hidden: bool) -> EagerSteps:
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=1)


class Model:
    """What gives out the decoder and the prefiller."""

    shard = SHARD

    def __init__(self, logits: Tensor) -> None:
        self.markov = Markov(logits)

    @contextmanager
    def decoder(self) -> Iterator[Markov]:
        yield self.markov

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        yield IDENTITY

    def prefiller(self, examples_per_pass: int) -> Model:
        return self

    keeps_cache = False

    def read(self, chunks: Sequence[PrefillChunk], state: object = None) -> list[Tensor]:
        return [self.markov.table[list(chunk.tokens)] for chunk in chunks]


def written(
    student: Tensor, teacher: Tensor, prompts: Sequence[tuple[int, ...]], *, seed: int = 0, limit: int = 6, **more: Any
) -> list[Sample]:
    """A step's samples of a text source; ``more`` are settings of section ``generation``."""
    config = RunConfig.model_validate({
        "run": {"dir": "x", "seed": seed}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "generation": {"max_new_tokens": limit, **more},
    })  # fmt: skip
    models: Any = [Model(student), Model(teacher)]
    inputs = SourceInputs(
        config, ParallelContext.single(), *models, frozenset({EOS}), DecodeBatchPlan(len(prompts), False, 64),
        max_steps=10,
    )  # fmt: skip
    samples = [Sample(i, prompt) for i, prompt in enumerate(prompts)]
    return source_class(config).build(inputs).samples(0, samples, Timers())


def scores_of(kl: list[list[float]], log_p: list[list[float]] | None = None) -> TeacherScores:
    """The teacher would write token 0 everywhere."""
    kl_map = torch.tensor(kl)
    zeros, text = torch.zeros(kl_map.shape, dtype=torch.int64), None
    if log_p is not None:
        values = torch.tensor(log_p)
        text = TextScores(values, -values, torch.tensor([[int(-5 * x) for x in row] for row in log_p]))
    return TeacherScores(kl_map, zeros, torch.ones(kl_map.shape, dtype=torch.bool), text)


def test_the_rules() -> None:
    scores = scores_of([[0.05, 0.3, 2.0, 0.4]] * 2, [[-0.1, -3.0, -1.0, -2.0]] * 2)
    student = torch.tensor([[5, 5, 5, 5], [5, 0, 5, 5]])  # the second agrees with the teacher at 1
    assert error_positions(scores, student, ErrorRule()).tolist() == [2, 2]
    assert error_positions(scores, student, ErrorRule("regret")).tolist() == [1, 3]
    assert error_positions(scores, student, ErrorRule("first", 0.1)).tolist() == [1, 2]
    assert error_positions(scores, student, ErrorRule("first", 0.3)).tolist() == [2, 2], "above, not at"
    assert error_positions(scores, student, ErrorRule("first", 9.0)).tolist() == [NO_ERROR] * 2
    assert error_positions(scores, student, ErrorRule("rank", 5)).tolist() == [1, 2]
    assert error_positions(scores, student, ErrorRule("rank", 11)).tolist() == [1, NO_ERROR]


def test_competence_looks_where_the_teacher_still_follows() -> None:
    """Means of log p before each position: -, -0.1, -1.55, -1.37, -1.52; log 0.3 = -1.20, log 0.22 = -1.51."""
    scores = scores_of([[0.05, 0.3, 2.0, 3.0, 5.0]], [[-0.1, -3.0, -1.0, -2.0, -1.0]])
    student = torch.full((1, 5), 5)
    for competence, position in [(0.0, 4), (0.3, 1), (0.22, 3), (0.95, 0)]:
        assert error_positions(scores, student, ErrorRule(competence=competence)).tolist() == [position]
    # What an earlier round has looked at does not count.
    masked = scores._replace(mask=torch.tensor([[False, False, True, True, True]]))
    assert error_positions(masked, student, ErrorRule(competence=0.3)).tolist() == [3]


@pytest.mark.parametrize("rule", [ErrorRule("regret"), ErrorRule("first", 0.1), ErrorRule("rank", 1)])
def test_a_teacher_without_a_distribution_finds_no_error(rule: ErrorRule) -> None:
    nan = torch.full((1, 2), torch.nan)
    scores = TeacherScores(
        nan, torch.full((1, 2), NO_TOKEN), torch.ones(1, 2, dtype=torch.bool), TextScores(nan, nan, torch.zeros(1, 2))
    )
    assert find_corrections([(4, 5)], scores, rule) == []
    empty = TeacherScores(nan[:, :0], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool))
    assert error_positions(empty, torch.zeros(1, 0, dtype=torch.int64), ErrorRule("first")).tolist() == [NO_ERROR]


def test_label_scores_are_the_dense_ones() -> None:
    logits = torch.randn(9, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9)
    logits[3, 3] = logits[3].max()  # a tie at the top
    log_p, regret, rank = label_scores(logits, labels, SHARD)
    dense = logits.log_softmax(-1)
    torch.testing.assert_close(log_p, dense[range(9), labels], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(regret, dense.amax(-1) - log_p, rtol=1e-12, atol=1e-12)
    expected = [int((logits[i] > logits[i, i]).sum()) for i in range(9)]
    assert rank.tolist() == expected and rank[3] == 0


def chain() -> Tensor:
    """Counts 2, 3, ... 11, 2."""
    table = torch.full((V, V), -30.0)
    for token in range(V):
        table[token, 2 + (token - 1) % (V - 2)] = 0.0
    return table


def lost_after_a_slip() -> Tensor:
    """A student that counts from 2 to 6 with a few slips, words from 7 on, and is lost behind one."""
    table = torch.full((V, V), -30.0)
    for token in range(2, 7):
        table[token, 2 + (token - 1) % 5] = 0.0
        table[token, 7:] = -3.3  # a slip: any of the words that are none
    table[7:, 2:] = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    return table


def puzzled_teacher() -> Tensor:
    """It counts, and behind a slip it is ever surer of what the student hardly says."""
    table = torch.full((V, V), -30.0)
    for token in range(2, 7):
        table[token, 2 + (token - 1) % 5] = 0.0
    for token in range(7, V):
        table[token, 2] = 6.0
        table[token, 7:] = -40.0
    return table


def test_first_finds_the_planted_error() -> None:
    """The first word that is none is the error. What follows it disagrees with the teacher even more: the largest KL
    lies there more often than not, and the first disagreement is the error in 90 % of the rows and more."""
    share = {}
    for error in ("kl", "first"):
        samples = written(
            lost_after_a_slip(), puzzled_teacher(), [(2,)] * 200, limit=12,
            scrg={"error": error, "threshold": 0.1},
        )  # fmt: skip
        slips = [next((i for i, token in enumerate(s.rollout_ids or ()) if token >= 7), None) for s in samples]
        planted = [(sample, slip) for sample, slip in zip(samples, slips, strict=True) if slip is not None]
        assert len(planted) > 100
        share[error] = sum(sample.error_position == slip for sample, slip in planted) / len(planted)
        for sample in samples:
            if sample.error_position != NO_ERROR:
                assert sample.rollout_ids is not None and sample.response_ids is not None
                j = sample.error_position
                assert sample.response_ids[:j] == sample.rollout_ids[:j] != sample.rollout_ids[: j + 1]
    assert share["first"] >= 0.9 and share["kl"] < 0.5, share


def test_what_follows_a_correction() -> None:
    """Everything is greedy: the student counts and slips at 5, the teacher does not."""
    student, teacher = chain(), chain()
    student[5] = chain()[6]
    settings: dict[str, Any] = {"sampling_temperature": 0.0, "limit": 6}
    scrg = {"teacher_token": "greedy", "error": "first"}
    (kept,) = written(student, teacher, [(3,)], **settings, scrg={**scrg, "after": "keep"})
    assert kept.rollout_ids == (4, 5, 7, 8, 9, 10) and kept.error_position == 2
    assert kept.response_ids == (4, 5, 6, 8, 9, 10)
    (cut,) = written(student, teacher, [(3,)], **settings, scrg={**scrg, "after": "cut"})
    assert cut.response_ids == (4, 5, 6)
    (again,) = written(student, teacher, [(3,)], **settings, scrg=scrg)
    assert again.response_ids == (4, 5, 6, 7, 8, 9)
    for sample in (kept, cut, again):  # the teacher has read what is trained on
        assert sample.teacher_hidden is not None and sample.response_ids is not None
        assert torch.equal(sample.teacher_hidden, teacher.double()[[3, *sample.response_ids[:-1]]])
    # A kept text ends where the teacher ends it.
    teacher[5] = torch.where(torch.arange(V) == EOS, 0.0, -30.0)
    (ended,) = written(student, teacher, [(3,)], **settings, scrg={**scrg, "after": "keep"})
    assert ended.response_ids == (4, 5, EOS)


def test_the_teachers_token_comes_from_its_nucleus() -> None:
    teacher = torch.full((V, V), -30.0)
    teacher[:, 4], teacher[:, 5] = 0.0, torch.tensor(0.5).log()  # two thirds, one third
    student = torch.full((V, V), -30.0)
    student[:, 9] = 0.0
    for top_p, temperature, share in [(1.0, 1.0, 2 / 3), (0.6, 1.0, 1.0), (1.0, 0.5, 0.8)]:
        samples = written(
            student, teacher, [(2,)] * 400, limit=1,
            scrg={"teacher_top_p": top_p, "teacher_temperature": temperature},
        )  # fmt: skip
        fours = sum(sample.response_ids == (4,) for sample in samples) / 400
        assert fours == pytest.approx(share, abs=0.07 if share < 1 else 0.0)


def random_tables(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(V, V, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2))
    for table in (student, teacher):
        table[:, 0] = -30.0
        table[:, EOS] -= 1.0
    return student, teacher


def token_by_token(
    student: Tensor, teacher: Tensor, prompt: int, row: int, top_k: int, limit: int, seed: int
) -> tuple[int, ...]:
    """Speculative knowledge distillation as its paper writes it: two numbers at each position."""
    text: list[int] = []
    while len(text) < limit and text[-1:] != [EOS]:
        last = text[-1] if text else prompt
        keys = {"seed": seed, "sequence_ids": torch.tensor([row]), "positions": torch.tensor([len(text)])}
        token = int(sample_tokens(student[[last]], SHARD, **keys, stream=Stream.ROLLOUT))
        if token not in teacher[last].topk(top_k).indices.tolist():
            token = int(sample_tokens(teacher[[last]], SHARD, **keys, stream=Stream.TEACHER_TOKEN))
        text.append(token)
    return tuple(text)


@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_skd_is_sampling_token_by_token(top_k: int) -> None:
    student, teacher = random_tables()
    prompts = [(2 + i % 9,) for i in range(60)]
    samples = written(student, teacher, prompts, seed=8, limit=9, mode="skd", skd={"top_k": top_k})
    for i, sample in enumerate(samples):
        expected = token_by_token(student, teacher, prompts[i][0], i, top_k, 9, 8)
        assert sample.response_ids == expected
        assert sample.teacher_hidden is not None
        assert torch.equal(sample.teacher_hidden, teacher[[prompts[i][0], *expected[:-1]]])
    changed = [sample.num_corrections for sample in samples]
    assert (max(changed) == 0) == (top_k == V) and (top_k == V or max(changed) > 2)


def test_skd_draws_from_its_distribution() -> None:
    """Chi-square of the first token: q within the teacher's best, and what q has outside them spread as p."""
    student, teacher = random_tables()
    number, top_k = 4000, 3
    samples = written(student, teacher, [(2,)] * number, limit=2, mode="skd", skd={"top_k": top_k})
    q, p = student[2].softmax(-1), teacher[2].softmax(-1)
    is_accepted = torch.zeros(V, dtype=torch.bool)
    is_accepted[p.topk(top_k).indices] = True
    expected = number * (q * is_accepted + q[~is_accepted].sum() * p)
    firsts = torch.tensor([(sample.response_ids or (0,))[0] for sample in samples])
    counts = torch.bincount(firsts, minlength=V)
    enough = expected > 5
    chi2 = float(((counts - expected)[enough] ** 2 / expected[enough]).sum())
    assert chi2 < 31.3, chi2  # 0.1 % of chi-square with 11 degrees of freedom
    # What accepts everything is q, and would be told apart.
    assert float(((number * q - expected)[enough] ** 2 / expected[enough]).sum()) > 300


def test_a_mixture_is_drawn_token_by_token() -> None:
    """One number at each position says whose token it is, and which one; both models' caches follow the text."""
    (student, teacher), share = random_tables(), 0.3
    prompts = [(2 + i % 9,) for i in range(60)]
    samples = written(student, teacher, prompts, seed=8, limit=9, mode="teacher_mixed", teacher_share=share)
    num_teachers = 0
    for i, sample in enumerate(samples):
        text: list[int] = []
        while len(text) < 9 and text[-1:] != [EOS]:
            number = sampling_numbers(8, torch.tensor([i]), torch.tensor([len(text)]), stream=Stream.ROLLOUT)
            is_teachers = bool(number < share)
            table, inside = (teacher, number / share) if is_teachers else (student, (number - share) / (1 - share))
            text.append(int(draw_tokens(table[[text[-1] if text else prompts[i][0]]], SHARD, inside)))
            num_teachers += is_teachers
        assert sample.response_ids == sample.rollout_ids == tuple(text)
        assert sample.teacher_hidden is not None
        assert torch.equal(sample.teacher_hidden, teacher[[prompts[i][0], *text[:-1]]])
    assert num_teachers > 40


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_mixture_has_its_distribution(share: float) -> None:
    """Chi-square of the first token, and of the second one behind the most frequent first one."""
    student, teacher = random_tables()
    samples = written(student, teacher, [(2,)] * 8000, limit=2, mode="teacher_mixed", teacher_share=share)
    texts = [sample.response_ids or (EOS,) for sample in samples]
    firsts = torch.tensor([text[0] for text in texts])
    common = int(torch.bincount(firsts[firsts != EOS]).argmax())
    seconds = torch.tensor([text[1] for text in texts if text[0] == common])
    for last, drawn in ((2, firsts), (common, seconds)):
        q, p = student[last].softmax(-1), teacher[last].softmax(-1)
        counts, expected = torch.bincount(drawn, minlength=V), len(drawn) * (share * p + (1 - share) * q)
        enough = expected > 5
        chi2 = float(((counts - expected)[enough] ** 2 / expected[enough]).sum())
        assert chi2 < 31.3, chi2  # 0.1 % of chi-square with 11 degrees of freedom
        for other in (p, q):  # either model alone would be told apart
            assert float(((len(drawn) * other - expected)[enough] ** 2 / expected[enough]).sum()) > 100


def test_a_mixture_of_best_tokens() -> None:
    """Sampling options hold for either part."""
    student, teacher = random_tables()
    for sample in written(student, teacher, [(2,)] * 50, limit=1, mode="teacher_mixed", top_k=1):
        assert sample.response_ids and sample.response_ids[0] in (int(student[2].argmax()), int(teacher[2].argmax()))


def test_sampling_without_the_rules_is_the_papers() -> None:
    student, teacher = random_tables()
    default = written(student, teacher, [(2,)] * 8)
    assert [s.response_ids for s in default] == [
        s.response_ids for s in written(student, teacher, [(2,)] * 8, scrg={"error": "kl", "threshold": 5.0})
    ]


@pytest.mark.parametrize(
    ("scrg", "message"),
    [
        ({"after": "keep", "rounds": 2}, "generation.scrg.after=keep with rounds=2"),
        ({"teacher_token": "greedy", "teacher_top_p": 0.5}, "teacher_token=greedy draws nothing: teacher_top_p=0.5"),
    ],
)
def test_settings_without_effect_are_refused(scrg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(chain(), chain(), [(2,)], scrg=scrg)


def test_controls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They stand in the place of the rule, and only there."""
    scores = scores_of([[0.1, 3.0, 0.2, 0.3]] * 300)
    responses = [(5, 0, 6, 2 + i) for i in range(300)]  # agrees with the teacher at position 1
    corrections = scrg_controls.random_disagreement(responses, scores, ErrorRule())
    assert corrections == scrg_controls.random_disagreement(responses, scores, ErrorRule())
    counts = Counter(correction.position for correction in corrections)
    assert counts.keys() == {0, 2, 3} and min(counts.values()) > 70
    assert {correction.token for correction in corrections} == {0}
    first = scores_of([[9.0, 3.0], [0.1, 3.0]])
    assert scrg_controls.resample([(5, 6), (7, 8)], first, ErrorRule()) == [Correction(1, 0, 7)]

    def train(arguments: list[str]) -> int:
        assert arguments == ["train", "--config", "x.yaml"]
        inputs: Any = setup.SourceInputs
        assert inputs.keywords == {"find_corrections": scrg_controls.resample}
        return 7

    monkeypatch.setattr(scrg_controls, "megadistill", train)
    assert scrg_controls.main(["resample", "--config", "x.yaml"]) == 7 and setup.SourceInputs is SourceInputs
    assert scrg_controls.main(["rnd"]) == 2 and "allowed: random, resample" in capsys.readouterr().err
