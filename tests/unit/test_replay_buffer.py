"""The replay buffer is one FIFO at every layout; the scheduler is DistiLLM's."""

import io
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.sample import Sample
from megadistill.data.sampler import BatchSampler
from megadistill.errors import CheckpointError, ConfigError, DivergenceError, TopologyError
from megadistill.generation.phi_schedule import OffPolicySchedule
from megadistill.generation.replay_buffer import ReplayBuffer, merge, split

STREAM = 77
BATCH = 8
CAPACITY = 3 * BATCH


def entry(sequence_id):
    """Token lists of all lengths; row 3 has no reference, row 5 an empty one."""
    n = sequence_id
    return Sample(
        sequence_id=n,
        prompt_ids=tuple(range(n, n + n % 4)),
        reference_ids=None if n % 3 == 0 else tuple(range(100 + n, 100 + n + n % 5)),
        response_ids=tuple(range(1000 + n, 1000 + n + n % 7)),
        error_position=n % 6 - 1,
        num_corrections=n % 2,
    )


def filled(steps, *, dp_size=1, capacity=CAPACITY, batch=BATCH):
    """The shards of all ranks after the given steps have written text."""
    ranks = [ReplayBuffer(capacity, batch, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in steps:
        for rank, buffer in enumerate(ranks):
            rows = range(step * batch + rank, (step + 1) * batch, dp_size)
            buffer.append([entry(n) for n in rows])
    return ranks


def dealt_back(per_rank):
    """The rows of all ranks in the order of the global batch: place i is with rank i % dp_size."""
    return [row for group in zip(*per_rank, strict=True) for row in group]


def drawn(ranks, *, seed=3, step=50, stream=STREAM):
    return dealt_back([buffer.draw(seed, step, stream=stream) for buffer in ranks])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items())
    assert all(v.dtype == other[k].dtype for k, v in one.items() if isinstance(v, torch.Tensor))
    return True


def restored(state, *, dp_rank=0, dp_size=1):
    buffer = ReplayBuffer(state["capacity"], state["global_batch_size"], dp_rank=dp_rank, dp_size=dp_size)
    buffer.load_state_dict(state)
    return buffer


@pytest.mark.parametrize("num_batches", [1, 2, 3, 7])
@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_what_the_ranks_draw_together_is_the_same_at_every_layout(dp_size, num_batches):
    whole, ranks = filled(range(num_batches)), filled(range(num_batches), dp_size=dp_size)
    for step in range(20):
        assert drawn(ranks, step=step) == drawn(whole, step=step)


def test_a_row_is_drawn_for_its_own_place_so_none_comes_twice():
    ranks = filled(range(3), dp_size=4)
    for step in range(30):
        assert [row.sequence_id % BATCH for row in drawn(ranks, step=step)] == list(range(BATCH))
        assert [row.sequence_id % BATCH for row in ranks[1].draw(0, step, stream=STREAM)] == [1, 5]


def test_draws_are_a_function_of_seed_step_and_stream():
    buffers = filled(range(3))
    first = drawn(buffers)
    assert [drawn(buffers, step=step) for step in (7, 50, 51)][1] == first
    assert drawn(filled(range(3))) == first
    others = (drawn(buffers, seed=4), drawn(buffers, step=51), drawn(buffers, stream=STREAM + 1))
    assert all(other != first for other in others)


def test_draws_are_pinned():
    """A run that an earlier version began replays the same rows forever."""
    rows = drawn(filled(range(3)), seed=0, step=10, stream=3_000)
    assert [row.sequence_id // BATCH for row in rows] == [0, 2, 2, 2, 1, 1, 2, 2]


def test_every_entry_is_equally_likely_and_places_are_drawn_independently():
    buffers, num_steps = filled(range(3)), 3000
    batches = [drawn(buffers, step=step) for step in range(num_steps)]
    counts = Counter(row.sequence_id for batch in batches for row in batch)
    assert set(counts) == set(range(CAPACITY))
    # Binomial(3000, 1/3): a standard deviation of 26.
    assert all(abs(count - num_steps / 3) < 130 for count in counts.values())
    pairs = Counter((batch[0].sequence_id // BATCH, batch[1].sequence_id // BATCH) for batch in batches)
    assert len(pairs) == 9
    assert all(abs(count - num_steps / 9) < 90 for count in pairs.values())


def test_the_largest_draw_stays_inside(monkeypatch):
    largest = 1 - 2.0**-53
    monkeypatch.setattr(
        "megadistill.generation.replay_buffer.uniform",
        lambda seed, ids, positions, *, stream: torch.full(positions.shape, largest, dtype=torch.float64),
    )
    for num_batches in range(1, 40):
        (buffer,) = filled(range(num_batches), capacity=40, batch=1)
        assert buffer.draw(0, 0, stream=STREAM)[0].sequence_id == num_batches - 1
    assert all(int(torch.tensor(largest, dtype=torch.float64) * n) == n - 1 for n in range(1, 3000))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_oldest_batch_leaves_a_full_buffer(dp_size):
    ranks = filled([], dp_size=dp_size)
    assert all(b.is_empty and not b.is_full and len(b) == 0 and b.capacity == CAPACITY for b in ranks)
    with pytest.raises(ValueError, match="empty"):
        drawn(ranks)
    for done in range(1, 8):
        ranks = filled(range(done), dp_size=dp_size)
        held = dealt_back([b.samples() for b in ranks])
        assert held == [entry(n) for n in range(max(0, done - 3) * BATCH, done * BATCH)]
        assert all(len(b) == len(held) and not b.is_empty and b.is_full == (done >= 3) for b in ranks)


def test_steps_without_new_text_leave_gaps_and_nothing_else():
    whole, ranks = filled([2, 3, 9, 40]), filled([2, 3, 9, 40], dp_size=4)
    assert [e.sequence_id for e in whole[0].samples()] == [
        n for s in (3, 9, 40) for n in range(s * BATCH, s * BATCH + 8)
    ]
    assert drawn(ranks) == drawn(whole)


def test_rows_of_the_sampler_fit_and_a_replayed_batch_has_its_shares():
    common = {"num_rows": 10, "num_prompt_rows": 7, "prompts_ratio": 0.25, "global_batch_size": BATCH, "seed": 3}
    ranks = filled([], dp_size=2)
    stream_of = {}
    for step in (0, 1, 4):
        for rank, buffer in enumerate(ranks):
            rows = BatchSampler(**common, dp_rank=rank, dp_size=2).rows(step)
            stream_of |= {row.sequence_id: row.stream for row in rows}
            buffer.append([entry(row.sequence_id) for row in rows])
    for step in range(5, 20):
        assert [stream_of[row.sequence_id] for row in drawn(ranks, step=step)] == ["train"] * 6 + ["prompts"] * 2


@pytest.mark.parametrize(("capacity", "advice"), [(0, "8 or 16"), (-8, "8 or 16"), (3, "8 or 16"), (20, "16 or 24")])
def test_a_capacity_that_is_not_whole_batches_is_refused(capacity, advice):
    with pytest.raises(ConfigError, match=f"{capacity} samples .*=8; for example {advice}$") as error:
        ReplayBuffer(capacity, BATCH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dp_rank", "dp_size"), [(0, 3), (0, 16), (2, 2), (-1, 2)])
def test_a_layout_that_does_not_fit_is_refused(dp_rank, dp_size):
    with pytest.raises(TopologyError, match="train.global_batch_size=8"):
        ReplayBuffer(CAPACITY, BATCH, dp_rank=dp_rank, dp_size=dp_size)
    with pytest.raises(TopologyError, match="batches of 8 samples"):
        split(filled(range(2))[0].state_dict(), dp_rank, dp_size)


@pytest.mark.parametrize(
    "ids",
    [[], [17], [17, 19, 21], [16, 18, 20, 22], [17, 19, 23, 21], [19, 21, 23, 25], [17, 18, 19, 20], [9, 11, 13, 15]],
    ids=str,
)
def test_rows_that_are_not_this_ranks_share_of_a_later_batch_are_refused(ids):
    buffer = filled(range(2), dp_size=2)[1]
    before = list(buffer.samples())
    with pytest.raises(ValueError, match="append"):
        buffer.append([entry(n) for n in ids])
    assert list(buffer.samples()) == before
    buffer.append([entry(n) for n in (17, 19, 21, 23)])


@pytest.mark.parametrize("steps", [[], [0], [0, 5], range(9)], ids=str)
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_state_comes_back_from_a_file_exactly(dp_size, steps):
    for rank, buffer in enumerate(filled(steps, dp_size=dp_size)):
        state = through_a_file(buffer.state_dict())
        again = restored(state, dp_rank=rank, dp_size=dp_size)
        assert list(again.samples()) == list(buffer.samples())
        assert all(type(token) is int for e in again.samples() for token in e.prompt_ids + e.response_ids)
        assert (len(again), again.is_full, again.is_empty) == (len(buffer), buffer.is_full, buffer.is_empty)
        assert same_state(again.state_dict(), buffer.state_dict())


def test_a_state_is_a_snapshot_and_loading_it_replaces_everything():
    (buffer,) = filled(range(2))
    state = buffer.state_dict()
    for step in (2, 3):
        buffer.append([entry(n) for n in range(step * BATCH, (step + 1) * BATCH)])
    buffer.load_state_dict(state)
    assert [e.sequence_id for e in buffer.samples()] == list(range(2 * BATCH))
    buffer.append([entry(n) for n in range(2 * BATCH, 3 * BATCH)])
    assert buffer.is_full and same_state(state, filled(range(2))[0].state_dict())


@pytest.mark.parametrize("steps", [[], [3], range(2), [1, 2, 5, 6]], ids=str)
@pytest.mark.parametrize("saved_at", [1, 2, 4])
@pytest.mark.parametrize("resumed_at", [1, 2, 4, 8])
def test_another_layout_goes_on_from_a_saved_buffer(saved_at, resumed_at, steps):
    merged = merge([buffer.state_dict() for buffer in filled(steps, dp_size=saved_at)])
    assert same_state(merged, filled(steps)[0].state_dict())
    merged = through_a_file(merged)
    expected = filled(steps, dp_size=resumed_at)
    resumed = []
    for rank, buffer in enumerate(expected):
        part = through_a_file(split(merged, rank, resumed_at))
        assert same_state(part, buffer.state_dict())
        resumed.append(restored(part, dp_rank=rank, dp_size=resumed_at))
    for step in (10, 11):
        for rank, buffer in enumerate(resumed):
            buffer.append([entry(n) for n in range(step * BATCH + rank, (step + 1) * BATCH, resumed_at)])
        assert drawn(resumed, step=step) == drawn(filled([*steps, *range(10, step + 1)]), step=step)


def test_a_shard_does_not_drag_the_whole_buffer_into_its_file():
    part = split(filled(range(3))[0].state_dict(), 1, 4)
    for tensor in (part["rows"], part["tokens"]):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_states_that_are_no_whole_buffer_are_refused():
    one, two = (buffer.state_dict() for buffer in filled(range(2), dp_size=2))
    longer = filled(range(3), dp_size=2)[1].state_dict()
    other_batch = filled(range(2), dp_size=2, batch=4)[1].state_dict()
    for states in ([], [one], [two, one], [one, one], [one, longer], [one, other_batch], [one, two, two]):
        with pytest.raises(CheckpointError, match="not the shards of one replay buffer"):
            merge(states)
    with pytest.raises(CheckpointError, match="shard of the replay buffer .rank 1 of 2"):
        split(two, 0, 2)


def test_a_state_of_another_buffer_or_a_damaged_one_is_refused():
    (buffer,) = filled(range(2))
    state, before = filled(range(3))[0].state_dict(), list(buffer.samples())
    rows, tokens = state["rows"], state["tokens"]
    cases = [
        ({"capacity": 4 * BATCH}, "capacity=32, this run 24"),
        ({"global_batch_size": 4}, "global_batch_size=4, this run 8"),
        ({"dp_size": 2}, "dp_size=2, this run 1"),
        ({"tokens": tokens[:-1]}, "damaged.*tokens"),
        ({"rows": rows[:-1], "tokens": tokens[: -int(rows[-1, 4:].clamp(min=0).sum())]}, "damaged"),
        ({"rows": rows.flip(0)}, "damaged"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            buffer.load_state_dict({**state, **change})
        assert list(buffer.samples()) == before
    crowded = {**filled(range(4), capacity=4 * BATCH)[0].state_dict(), "capacity": CAPACITY}
    with pytest.raises(CheckpointError, match="more than 24 entries"):
        buffer.load_state_dict(crowded)


TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    content=st.lists(st.tuples(TOKENS, st.none() | TOKENS, TOKENS), min_size=24, max_size=24),
    num_batches=st.integers(1, 6),
    layouts=st.tuples(*[st.sampled_from([1, 2, 4])] * 2),
    first_step=st.integers(0, 2**40),
    seed=st.integers(0, 2**40),
)
def test_any_content_survives_any_change_of_layout(content, num_batches, layouts, first_step, seed):
    ranks = [ReplayBuffer(16, 4, dp_rank=rank, dp_size=layouts[0]) for rank in range(layouts[0])]
    everything = [
        Sample(
            4 * first_step + n, prompt_ids, reference_ids=reference_ids, response_ids=response_ids,
            error_position=n - 1, num_corrections=n,
        )
        for n, (prompt_ids, reference_ids, response_ids) in enumerate(content[: 4 * num_batches])
    ]  # fmt: skip
    for at in range(0, len(everything), 4):
        for rank, buffer in enumerate(ranks):
            buffer.append(everything[at + rank : at + 4 : layouts[0]])
    merged = merge([through_a_file(buffer.state_dict()) for buffer in ranks])
    after = [restored(split(merged, r, layouts[1]), dp_rank=r, dp_size=layouts[1]) for r in range(layouts[1])]
    assert dealt_back([buffer.samples() for buffer in after]) == everything[-16:]
    assert drawn(after, seed=seed, step=first_step) == drawn(ranks, seed=seed, step=first_step)


# phi 0.4 at a quarter of the run: new text below 0.3, a choice below 0.4.
@pytest.mark.parametrize(
    ("draw", "is_full", "source"),
    [
        (0.0001, False, "generate"),
        (0.0001, True, "generate"),
        (0.29999, True, "generate"),
        (0.3001, True, "replay"),
        (0.3001, False, "generate"),
        (0.39999, True, "replay"),
        (0.39999, False, "generate"),
        (0.4, True, "dataset"),
        (0.4, False, "dataset"),
        (0.9999, True, "dataset"),
    ],
)
def test_the_source_of_a_step(draw, is_full, source):
    assert OffPolicySchedule(phi=0.4).decide(draw, 25, 100, is_full, False) == source


def test_boundaries_of_the_decision():
    # Exact in binary: 0.5 * (1 - 64 / 128) = 0.25. Both comparisons are strict.
    schedule = OffPolicySchedule(phi=0.5)
    below = 0.25 - 2**-40
    assert [schedule.decide(r, 64, 128, True, False) for r in (below, 0.25, 0.5)] == ["generate", "replay", "dataset"]
    # At first nothing is replayed; at the end, everything.
    assert schedule.decide(0.4999, 0, 128, True, False) == "generate"
    assert schedule.decide(1e-12, 128, 128, True, False) == "replay"
    assert OffPolicySchedule().decide(1e-12, 0, 128, False, True) == "dataset"
    for step, source in ((0, "generate"), (64, "replay")):
        assert OffPolicySchedule(phi=1.0).decide(1 - 2**-53, step, 128, True, False) == source
    # An empty buffer is never replayed.
    assert {OffPolicySchedule(phi=0.4).decide(0.35, 25, 100, is_full, True) for is_full in (False, True)} == {
        "generate"
    }


@given(
    phi=st.floats(0, 1),
    draw=st.floats(0, 1, exclude_min=True, exclude_max=True),
    step=st.integers(0, 99),
    is_full=st.booleans(),
)
def test_the_decision_is_the_definition(phi, draw, step, is_full):
    if draw < phi * (1 - step / 100) or (draw < phi and not is_full):
        expected = "generate"
    elif draw < phi:
        expected = "replay"
    else:
        expected = "dataset"
    assert OffPolicySchedule(phi=phi).decide(draw, step, 100, is_full, False) == expected


def test_phi_rises_with_the_validation_loss():
    schedule = OffPolicySchedule(eps=0.25)
    seen = []
    # First: only a mark. Falls and small rises leave the mark; an equality counts.
    for loss in (2.0, 1.0, 2.0, 2.125, 2.25, 2.25, 2.5, 2.0, 2.75):
        schedule.observe(loss)
        seen.append((schedule.phi, schedule.previous_loss))
    assert seen == [(0.0, 2.0)] * 4 + [(0.1, 2.25)] * 2 + [(0.2, 2.5)] * 2 + [(0.3, 2.75)]


def test_phi_is_capped_at_one_after_ten_rises():
    schedule, seen = OffPolicySchedule(eps=0.5), []
    for loss in range(14):
        schedule.observe(float(loss))
        seen.append(schedule.phi)
    assert seen == [n / 10 for n in range(10)] + [1.0] * 4
    nearly = OffPolicySchedule(phi=0.95, previous_loss=0.0)
    nearly.observe(1.0)
    assert nearly.phi == 1.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("previous", [None, 1.0])
def test_a_loss_that_is_not_finite_is_refused(loss, previous):
    schedule = OffPolicySchedule(previous_loss=previous)
    with pytest.raises(DivergenceError, match="validation loss is (nan|inf)"):
        schedule.observe(loss)
    assert schedule == OffPolicySchedule(previous_loss=previous)


@settings(deadline=None)
@given(losses=st.lists(st.floats(0, 20), max_size=30), stop=st.integers(0, 30), eps=st.floats(0, 1))
def test_a_resumed_schedule_continues_as_if_never_stopped(losses, stop, eps):
    straight, before, after = (OffPolicySchedule(eps=eps) for _ in range(3))
    phis = [0.0]
    for loss in losses:
        straight.observe(loss)
        phis.append(straight.phi)
    for loss in losses[:stop]:
        before.observe(loss)
    after.load_state_dict(through_a_file(before.state_dict()))
    for loss in losses[stop:]:
        after.observe(loss)
    assert after == straight
    assert phis == sorted(phis) and phis[-1] <= 1.0
