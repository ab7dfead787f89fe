"""Closed formulas for what one rank computes, launches, reads and sends in each phase of a step.

Lengths are those of the plan: no response ends early, and the places of corrections are spread evenly, so that half of
what was written is written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megadistill.config.loss import LossConfig
from megadistill.losses.quantile import NUM_NODES, num_rounds
from megadistill.losses.tiles import SpanSum, TileSpec
from megadistill.planning.case import Case
from megadistill.planning.memory import PIECE_TOKENS, chunk_tokens, joins, partition_size, released
from megadistill.planning.shape import ModelShape
from megadistill.planning.use import Group, Traffic

# Operations that torch dispatches, views left out, counted from the code: one layer of decoding/decoder.py with joined
# products and rotary positions; embedding, head and sampling of a token; a layer of transformers' forward pass, and of
# its backward pass with DeepSpeed's hooks; a parameter's update and its copies.
_DECODE_LAYER, _DECODE_TOKEN = 17, 29
_READ_LAYER, _SCORE_CHUNK = 26, 200
_FORWARD_LAYER, _BACKWARD_LAYER = 40, 90
_LOSS_CHUNK, _UPDATE_PARAMETER = 120, 6
_KV_READS = 0.5  # of the columns, on average over a response
_SMALL_BYTES, _TOGETHER = 2**22, 64  # engines/gathered.py
_FP32 = 4


@dataclass
class Work:
    """One phase of one rank.

    Attributes:
        flops: Of products and attention.
        operations: What torch dispatches, without views; a recorded decoding step is one.
        recorded: Kernels of recorded decoding steps.
        memory_bytes: Read from and written to the GPU's memory by products and elementwise passes, about.
        sent: (group, op) -> [calls, bytes].
    """

    flops: float = 0
    operations: float = 0
    recorded: float = 0
    memory_bytes: float = 0
    sent: dict[tuple[Group, str], list[int]] = field(default_factory=dict)

    def send(self, group: Group, op: str, calls: float, num_bytes: float) -> None:
        """Adds collective calls."""
        if calls >= 1:
            entry = self.sent.setdefault((group, op), [0, 0])
            entry[0] += round(calls)
            entry[1] += round(num_bytes)

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """The calls, as a StepUse has them."""
        return tuple(Traffic(group, op, *entry) for (group, op), entry in sorted(self.sent.items()))


def work(case: Case) -> dict[str, Work]:
    """Phase -> what a rank does in it."""
    phases: dict[str, Work] = {}
    if case.writes:
        phases["rollout"] = _rollout(case)
    if case.teacher is not None:
        phases["teacher"] = _teacher(case, case.teacher)
    if case.rounds and case.teacher is not None:
        phases["score"] = _score(case, case.teacher)
        phases["regenerate"] = _regenerate(case)
    phases["train"] = _train(case)
    phases["optimizer"] = _optimizer(case)
    return phases


def _batches(case: Case) -> Iterator[int]:
    """Sizes of the decode batches of a step."""
    size = case.decode_plan.batch_size if case.writes else case.examples
    for start in range(0, case.examples, size):
        yield min(size, case.examples - start)


def decode_steps(case: Case) -> int:
    """Tokens that are decoded one after the other, in all decode batches and rounds."""
    if not case.writes:
        return 0
    num_batches = len(list(_batches(case)))
    return num_batches * (case.response_tokens - 1 + round(case.rounds * _rewritten(case)))


def _rewritten(case: Case) -> float:
    """Steps of a re-generation: from the earliest correction of a batch on."""
    widest = case.decode_plan.batch_size
    return case.response_tokens * (1 - 0.5 / max(1, widest))


def _attention(model: ModelShape, queries: float, keys: float) -> float:
    """FLOPs in all layers: two products of each query with each key."""
    return 4 * queries * keys * model.query * model.num_layers


def _read(done: Work, case: Case, model: ModelShape, examples: int, tokens: float, keys: float, itemsize: int) -> None:
    """Adds the reading of ``tokens`` of each example, which attend to ``keys`` columns, to ``done``."""
    total = examples * tokens
    done.flops += 2 * model.products * total + _attention(model, total, keys)
    done.operations += model.num_layers * _READ_LAYER * max(1, -(-total // PIECE_TOKENS))
    weights = itemsize * model.num_layers * model.layer
    done.memory_bytes += weights + total * model.num_layers * itemsize * 12 * model.hidden
    if case.tp_size > 1:
        pieces = -(-total // PIECE_TOKENS)
        of_layers = 2 * model.num_layers
        done.send("tp", "all_reduce", of_layers * pieces + model.is_tied, (of_layers + model.is_tied) * total
                  * model.hidden * itemsize)  # fmt: skip


def _decode(done: Work, case: Case, examples: int, steps: float, tokens: float) -> None:
    """Adds ``steps`` decoding steps in which ``tokens`` tokens are written to ``done``."""
    model, itemsize = case.student, case.student_bytes
    columns = case.prompt_tokens + _KV_READS * case.response_tokens
    # A recorded step is that of all slots and columns; only logits are those of texts that are still written.
    read, columns = (examples * steps, case.columns) if case.records_steps else (tokens, columns)
    done.flops += 2 * (model.products * read + model.head * tokens) + _attention(model, read, columns)
    unjoined = sum(2 * len(parts) - 2 for parts in (model.qkv, model.up) if not joins(parts, itemsize))
    kernels = steps * model.num_layers * (_DECODE_LAYER + unjoined)
    if case.records_steps:
        done.recorded += kernels
    done.operations += steps * _DECODE_TOKEN + (0 if case.records_steps else kernels)
    weights = itemsize * (model.num_layers * model.layer + model.head)
    done.memory_bytes += steps * weights + read * columns * model.kv_bytes(itemsize)
    if case.tp_size > 1:
        calls = 2 * model.num_layers + model.is_tied
        done.send("tp", "all_reduce", steps * (calls + 1), tokens * (calls * model.hidden * itemsize + 8))
        done.send("tp", "all_gather", steps, tokens * 16 * case.tp_size)


def _rollout(case: Case) -> Work:
    done, model = Work(), case.student
    _gather(done, case, released(case, model), case.student_bytes)
    for examples in _batches(case):
        _read(done, case, model, examples, case.prompt_tokens, case.prompt_tokens, case.student_bytes)
        steps = case.response_tokens - 1
        _decode(done, case, examples, steps, examples * steps)
    return done


def _regenerate(case: Case) -> Work:
    done = Work()
    for examples in _batches(case):
        steps = case.rounds * _rewritten(case)
        _decode(done, case, examples, steps, case.rounds * examples * case.response_tokens / 2)
    return done


def _teacher(case: Case, teacher: ModelShape) -> Work:
    done, itemsize = Work(), case.teacher_bytes
    for examples in _batches(case):
        for reading in range(1 + case.rounds):
            for _ in range(teacher.num_layers):
                _gather(done, case, teacher.layer_sizes, itemsize)
            _gather(done, case, [teacher.embedding], itemsize)
            _gather(done, case, [teacher.hidden] * (1 if teacher.is_rms else 2), itemsize)  # the last norm
            again = case.response_tokens / 2 if reading and case.keeps_teacher_cache else case.columns
            _read(done, case, teacher, examples, again, case.columns, itemsize)
    return done


def _score(case: Case, teacher: ModelShape) -> Work:
    done, student = Work(), case.student
    for examples in _batches(case):
        for number in range(case.rounds):
            tokens = examples * case.response_tokens / 2**number
            chunks = -(-tokens // chunk_tokens(case))
            done.flops += 2 * tokens * student.classes * (student.hidden + teacher.hidden)
            done.operations += _SCORE_CHUNK * chunks
            done.memory_bytes += 10 * _FP32 * tokens * student.classes
            _gather(done, case, [teacher.head], case.teacher_bytes)
            if case.tp_size > 1:
                done.send("tp", "all_gather", 2 * chunks, tokens * (6 * _FP32 + 16) * case.tp_size)
                done.send("tp", "all_reduce", 1 + chunks, tokens * 8 + 8)
    return done


def _train(case: Case) -> Work:
    done, student, itemsize, passes = Work(), case.student, case.student_bytes, case.passes
    tokens = case.sequences * case.columns
    is_checkpointed = case.config.model.gradient_checkpointing
    # Recomputing stops before the last product of a layer, whose result nothing needs.
    again = student.products - student.num_layers * student.down.size if is_checkpointed else 0
    attention = _attention(student, tokens, case.columns)
    done.flops = passes * (2 * tokens * (3 * student.products + again) + attention * (4.5 if is_checkpointed else 3.5))
    layers = _FORWARD_LAYER * (2 if is_checkpointed else 1) + _BACKWARD_LAYER
    done.operations = passes * student.num_layers * layers
    weights = itemsize * student.num_layers * student.layer
    kept = tokens * student.kept_by_layer(itemsize) * student.num_layers
    done.memory_bytes = passes * (weights * (4 if is_checkpointed else 3) + kept * (4 if is_checkpointed else 3))
    if case.tp_size > 1:
        # Forward: after attention and MLP. Backward: before every column-parallel layer. Recomputing stops before the
        # second one.
        calls = 2 + len(student.qkv) + len(student.up) + is_checkpointed
        calls = student.num_layers * calls + (2 if student.is_tied else 0)
        done.send("tp", "all_reduce", passes * calls, passes * calls * tokens * student.hidden * itemsize)
    _losses(done, case)
    _exchange(done, case)
    return done


def _losses(done: Work, case: Case) -> None:
    """The objective of all micro-batches: three products of the student's head and one of the teacher's."""
    student, teacher = case.student, case.teacher
    tokens = case.passes * case.rows * case.response_tokens
    terms = [teacher.hidden if teacher is not None else 0]
    if teacher is not None and case.sequences > case.rows and case.config.loss.sft > 0:
        terms.append(0)
    for teacher_hidden in terms:
        chunks = case.passes * -(-tokens // (case.passes * chunk_tokens(case)))
        done.flops += 2 * tokens * student.classes * (3 * student.hidden + teacher_hidden)
        done.operations += _LOSS_CHUNK * chunks
        done.memory_bytes += 12 * _FP32 * tokens * student.classes
        if case.tp_size > 1:
            columns, gathers = _exchanged(case.config.loss) if teacher_hidden else (3, 1)
            done.send("tp", "all_gather", gathers * chunks, tokens * columns * _FP32 * case.tp_size)
            done.send("tp", "all_reduce", case.passes * 2, tokens * student.hidden * _FP32)
    if teacher is not None:
        _gather(done, case, [teacher.head], case.teacher_bytes)


def _exchanged(loss: LossConfig) -> tuple[int, int]:
    """Floats per token, and gathers per chunk, of the objective across vocabulary shards."""
    spec = TileSpec.of(loss, has_edges=loss.uses_gate)
    rounds = num_rounds(loss.softness) if loss.is_clipped else 0
    nodes = rounds * NUM_NODES * (1 + spec.has_upper)
    return 7 + loss.top_k + nodes + spec.num_sums + len(SpanSum), 2 + rounds


def _exchange(done: Work, case: Case) -> None:
    """What ZeRO sends over the data-parallel group in the passes of a step."""
    student, itemsize, passes = case.student, case.student_bytes, case.passes
    if case.dp_size == 1:
        return
    if case.zero_stage == 3:
        sizes, kept = released(case, student), int(case.zero("stage3_max_reuse_distance")) // 2
        whole = sum(sizes) - student.head  # which is gathered once for all passes
        times = 1 + max(0.0, 1 - kept / max(1, whole))  # what was released is gathered again to go back
        ahead = int(case.zero("stage3_prefetch_bucket_size"))
        calls = min(len(sizes), -(-whole // ahead)) if ahead else len(sizes)
        done.send("dp", "all_gather", passes * calls * times, passes * times * whole * itemsize)
        _gather(done, case, [student.head], itemsize)
        buckets = -(-student.size // int(case.zero("reduce_bucket_size")))
        done.send("dp", "reduce_scatter", passes * buckets, passes * student.size * case.gradient_bytes)
        return
    times = passes if case.zero_stage == 2 else 1
    buckets = -(-student.size // int(case.zero("reduce_bucket_size")))
    done.send("dp", "all_reduce", times * buckets, times * student.size * case.gradient_bytes)


def _optimizer(case: Case) -> Work:
    done, part = Work(), partition_size(case)
    done.operations = _UPDATE_PARAMETER * len(case.student.sizes)
    done.memory_bytes = 36 * part  # master and moments read and written, the gradient copied, weights written
    if case.zero_stage == 3 and case.dp_size > 1:
        small = case.student.size - sum(released(case, case.student))
        done.send("dp", "all_gather", 1, small * case.student_bytes)
    elif case.zero_stage > 0 and case.dp_size > 1:
        buckets = -(-case.student.size // 500_000_000)
        done.send("dp", "all_gather", buckets, case.student.size * case.student_bytes)
    return done


def _gather(done: Work, case: Case, sizes: Sequence[int], itemsize: int) -> None:
    """Adds what ZeRO-3 gathers of parameters of these sizes; small ones go together (engines/gathered.py)."""
    if case.zero_stage < 3 or case.dp_size == 1:
        return
    small = sum(size * itemsize <= _SMALL_BYTES for size in sizes)
    calls = len(sizes) - small + -(-small // _TOGETHER)
    done.send("dp", "all_gather", calls, sum(sizes) * itemsize)
