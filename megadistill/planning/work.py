"""Closed formulas for what one rank computes, launches, reads and sends in each phase of a step.

Lengths are those of the plan: no response ends early, and the places of corrections are spread evenly, so that half of
what was written is written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megadistill.config.loss import LossConfig
from megadistill.decoding.static_step import STEPS_BEFORE_RECORDING
from megadistill.decoding.token_steps import INTERVAL, rounded_rows
from megadistill.losses.quantile import NUM_NODES, num_rounds
from megadistill.losses.tiles import SpanSum, TileSpec
from megadistill.planning.case import Case
from megadistill.planning.chunks import chunk_tokens, uses_triton
from megadistill.planning.memory import DRAWN_ELEMENTS, PIECE_TOKENS, joins
from megadistill.planning.partitions import partition_size, released, trained_persistent
from megadistill.planning.shape import ModelShape
from megadistill.planning.use import Group, Traffic

# Operations that torch dispatches on a GPU, views left out, as differences between dry runs of small models that differ
# by one thing: a layer, a row, a step, a pass, a chunk. Elsewhere norms and losses are made of more of them.
_READ_LAYER, _CACHED_LAYER, _CACHED_EXAMPLE, _UNPACKED_EXAMPLE, _READING = 12, 2, 2, 5, 16
_DECODE_LAYER, _DECODE_TOKEN, _DRAWN_OVER_TP, _TIED_OVER_TP = 13, 27, 26, 10
_BESIDE_TOKEN = 14  # of a teacher that writes beside the student, and of whose token it is
_DECODE_CALL = 8  # around the steps between two looks at which responses have ended
_ROLLOUT, _ROUND, _RMS_NORMS = 290, 237, 2
_HEAD_NORMS_READ, _HEAD_NORMS_DECODED, _HEAD_NORMS_TRAINED = 6, 2, 52
_JOINING, _DRAWN_PIECE, _DRAWN_PIECE_OVER_TP = 6, 21, 17
_SCORE, _SCORE_CHUNK, _SCORE_OVER_TP = 294, 29, 25  # losses in eager torch
_OBJECTIVE_CHUNK, _CLIPPING_CHUNK, _REFERENCE_CHUNK, _TORCH_CHUNK = 155, 405, 55, 205
_VIRTUAL_STEP, _AHEAD_CHUNK = 60, 180
_MERGED, _MERGED_CASTS, _ADAPTED, _ADAPTED_AGAIN = 3, 4, 8, 4.5  # of a layer with adapters
_PASS, _STEP = 185, 60
_OF_COMPARING, _OF_GATE = 95, 36  # of a pass and of an update: left out where no loss compares with the teacher
_TRAIN_LAYER, _TRAIN_RMS, _TRAIN_CASTS, _AGAIN, _RELEASED_LAYER = 80, 47, 12, 0.26, 2
# Of the optimizer: for each parameter and in all, by ZeRO stage; of a bf16 model whose gradients are summed in fp32.
_UPDATE: Mapping[int, tuple[float, int]] = {0: (7, 58), 1: (2, 100), 2: (2, 110), 3: (2, 110)}
_WIDE_UPDATE: Mapping[int, tuple[float, int]] = {0: (25, 54), 1: (2, 74), 2: (7.5, 139), 3: (2, 110)}
_KV_READS = 0.5  # of the columns, on average over a response
_SMALL_BYTES, _TOGETHER = 2**22, 64  # engines/gathered.py
_FP32 = 4


@dataclass
class Work:
    """One phase of one rank.

    Attributes:
        flops: Of products and attention.
        operations: What torch dispatches, without views; a recorded decoding step is one. 0 on CPUs: not known.
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
    if case.teacher is not None and (case.writes or case.compared is not None):
        phases["teacher"] = _teacher(case, case.teacher)
    if case.rounds and case.teacher is not None:
        phases["score"] = _score(case, case.teacher)
        phases["regenerate"] = _regenerate(case)
    phases["train"] = _train(case)
    phases["optimizer"] = _optimizer(case)
    if not case.like_gpu:
        for done in phases.values():
            done.operations = 0
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


def _joining_rows(case: Case, examples: int) -> list[int]:
    """Rows of the steps of a re-generation, in which one example after the other joins."""
    return [rounded_rows(active, examples) if case.records_steps else active for active in range(1, examples + 1)]


def _attention(model: ModelShape, queries: float, keys: float) -> float:
    """FLOPs in all layers: two products of each query with each key."""
    return 4 * queries * keys * model.query * model.num_layers


def _read(
    done: Work, case: Case, model: ModelShape, examples: int, tokens: float, keys: float, itemsize: int, launches: float
) -> None:
    """Adds the reading of ``tokens`` of each example, which attend to ``keys`` columns, to ``done``.

    ``launches`` of a layer come on top of those of its products and norms.
    """
    total = examples * tokens
    done.flops += 2 * model.products * total + _attention(model, total, keys)
    pieces = max(1, -(-total // PIECE_TOKENS))
    of_layer = _READ_LAYER + (_RMS_NORMS if model.is_rms else 0) + (2 if case.tp_size > 1 else 0)
    of_layer += _HEAD_NORMS_READ if model.has_head_norms else 0
    of_layer -= 0 if joins(model.qkv, itemsize) else _JOINING
    done.operations += _READING + model.num_layers * (of_layer * pieces + launches)
    weights = itemsize * model.num_layers * model.layer
    done.memory_bytes += weights + total * model.num_layers * itemsize * 12 * model.hidden
    if case.tp_size > 1:
        of_layers = 2 * model.num_layers
        done.send("tp", "all_reduce", of_layers * pieces + model.is_tied, (of_layers + model.is_tied) * total
                  * model.hidden * itemsize)  # fmt: skip


def _decode(
    done: Work, case: Case, rows: Sequence[int], steps: float, num_recorded: int = 0, teacher: ModelShape | None = None
) -> None:
    """Adds ``steps`` decoding steps, as many of each number of rows, to ``done``; some numbers are recorded already.

    Of the student, or of a teacher that writes beside it.
    """
    model, itemsize = (case.student, case.student_bytes) if teacher is None else (teacher, case.teacher_bytes)
    tokens = steps * sum(rows) / len(rows)
    columns = case.prompt_tokens + _KV_READS * case.response_tokens
    unjoined = sum(len(parts) - 1 for parts in (model.qkv, model.up) if not joins(parts, itemsize))
    over_tp = (_DRAWN_OVER_TP if teacher is None else 0) + (_TIED_OVER_TP if model.is_tied else 0)
    over_tp = over_tp if case.tp_size > 1 else 0
    of_layer = _DECODE_LAYER + unjoined + (_HEAD_NORMS_DECODED if model.has_head_norms else 0)
    pieces = _drawn_pieces(model, tokens / max(1, steps))
    of_token = _DECODE_TOKEN + (pieces - 1) * _DRAWN_PIECE if teacher is None else _BESIDE_TOKEN
    kernels = model.num_layers * of_layer + of_token + over_tp
    if case.records_steps:
        columns = case.columns  # a step of fixed shape reads all of them
        eager = min(steps, STEPS_BEFORE_RECORDING * (len(set(rows)) - num_recorded))
        done.recorded += (steps - eager) * kernels
        done.operations += steps * (1 + _DECODE_CALL / INTERVAL) + eager * kernels
    else:
        done.operations += steps * kernels
    done.flops += 2 * (model.products + model.head) * tokens + _attention(model, tokens, columns)
    weights = itemsize * (model.num_layers * model.layer + model.head)
    done.memory_bytes += steps * weights + tokens * columns * model.kv_bytes(itemsize)
    if case.tp_size > 1:
        calls, drawn = 2 * model.num_layers + model.is_tied, int(teacher is None)
        done.send("tp", "all_reduce", steps * (calls + drawn), tokens * (calls * model.hidden * itemsize + 8 * drawn))
        done.send("tp", "all_gather", steps * drawn, tokens * 16 * case.tp_size * drawn)


def _drawn_pieces(model: ModelShape, rows: float) -> float:
    """In how many pieces tokens are drawn for some rows of logits (decoding/sampling.py)."""
    return max(1, -(-rows // max(1, DRAWN_ELEMENTS // model.classes)))


def _rollout(case: Case) -> Work:
    done, model = Work(), case.student
    done.operations = model.num_adapted * (_MERGED + (_MERGED_CASTS if case.student_bytes < _FP32 else 0))
    beside = case.teacher if case.both_write else None
    _gather(done, case, released(case, model), case.student_bytes, "dp")  # for the first time since the update
    if beside is not None:
        _gather(done, case, beside.sizes, case.teacher_bytes)
    for examples in _batches(case):
        kept = _CACHED_LAYER + _CACHED_EXAMPLE * examples
        _read(done, case, model, examples, case.prompt_tokens, case.prompt_tokens, case.student_bytes, kept)
        done.operations += _ROLLOUT
        _decode(done, case, [examples], case.response_tokens - 1)
        if beside is not None:
            _read(done, case, beside, examples, case.prompt_tokens, case.prompt_tokens, case.teacher_bytes, kept)
            _decode(done, case, [examples], case.response_tokens - 1, teacher=beside)
    return done


def _regenerate(case: Case) -> Work:
    done = Work()
    for examples in _batches(case):
        rows = _joining_rows(case, examples)
        _decode(done, case, rows, case.rounds * _rewritten(case), num_recorded=1)  # that of all examples
        done.operations += case.rounds * (_ROUND + examples)
    return done


def _teacher(case: Case, teacher: ModelShape) -> Work:
    done, itemsize = Work(), case.teacher_bytes
    for examples in [case.examples] if case.both_write else _batches(case):
        for reading in range(1 + case.rounds):
            for _ in range(teacher.num_layers):
                _gather(done, case, teacher.layer_sizes, itemsize)
            _gather(done, case, [teacher.embedding], itemsize)
            _gather(done, case, [teacher.hidden] * (1 if teacher.is_rms else 2), itemsize)  # the last norm
            is_short = reading > 0 and case.keeps_teacher_cache
            again = case.response_tokens / 2 if is_short else case.columns
            kept = _CACHED_LAYER + _CACHED_EXAMPLE * examples if case.keeps_teacher_cache else 0
            kept += _UNPACKED_EXAMPLE * examples if is_short and itemsize == _FP32 else 0
            kept += 1 + len(teacher.layer_sizes) if case.zero_stage == 3 and case.dp_size > 1 else 0
            _read(done, case, teacher, examples, again, case.columns, itemsize, kept)
    return done


def _score(case: Case, teacher: ModelShape) -> Work:
    done, student = Work(), case.student
    for examples in _batches(case):
        for number in range(case.rounds):
            tokens = examples * case.response_tokens / 2**number
            chunks = -(-tokens // chunk_tokens(case))
            done.flops += 2 * tokens * student.classes * (student.hidden + teacher.hidden)
            pieces = _drawn_pieces(student, min(chunk_tokens(case), tokens))
            of_chunk = _launches_of_chunk(case, _SCORE_CHUNK) + _DRAWN_PIECE * pieces
            of_chunk += _SCORE_OVER_TP + _DRAWN_PIECE_OVER_TP * pieces if case.tp_size > 1 else 0
            done.operations += _SCORE + of_chunk * chunks
            done.memory_bytes += 10 * _FP32 * tokens * student.classes
            _gather(done, case, [teacher.head], case.teacher_bytes)
            if case.tp_size > 1:
                done.send("tp", "all_gather", 2 * chunks, tokens * (6 * _FP32 + 16) * case.tp_size)
                done.send("tp", "all_reduce", 1 + chunks, tokens * 8 + 8)
    return done


def _train(case: Case) -> Work:
    done, student, itemsize, passes = Work(), case.student, case.student_bytes, case.passes
    tokens = case.columns * case.trained_sequences / passes
    is_checkpointed = case.config.model.gradient_checkpointing
    # Recomputing stops before the last product of a layer, whose result nothing needs but an adapter.
    last = 0 if student.adapters else student.num_layers * student.down.size
    again = student.products - last if is_checkpointed else 0
    attention = _attention(student, tokens, case.columns)
    of_attention = attention * (4.5 if is_checkpointed else 3.5)
    done.flops = passes * (2 * tokens * (student.trained_products + again) + of_attention)
    layer: float = _TRAIN_LAYER + (_TRAIN_RMS + (_TRAIN_CASTS if itemsize < _FP32 else 0) if student.is_rms else 0)
    layer += _HEAD_NORMS_TRAINED * student.has_head_norms
    layer = layer * (1 + _AGAIN if is_checkpointed else 1) + (_RELEASED_LAYER if case.zero_stage == 3 else 0)
    of_pass = _PASS - (_OF_COMPARING if case.compared is None else 0)
    adapted = student.num_adapted * (_ADAPTED + is_checkpointed * _ADAPTED_AGAIN)
    done.operations = _STEP + passes * (of_pass + student.num_layers * layer + adapted)
    weights = itemsize * student.num_layers * student.layer
    kept = tokens * student.kept_by_layer(itemsize) * student.num_layers
    done.memory_bytes = passes * (weights * (4 if is_checkpointed else 3) + kept * (4 if is_checkpointed else 3))
    if case.tp_size > 1:
        # Forward: after attention and MLP. Backward: before every column-parallel layer. Recomputing stops before the
        # second one, where that has no adapter. Below the first layer no adapter is trained.
        calls = 2 + len(student.qkv) + len(student.up) + is_checkpointed * (1 + bool(student.adapters))
        calls = student.num_layers * calls + (2 if student.is_tied and not student.adapters else 0)
        calls -= len(student.qkv) if student.adapters and not is_checkpointed else 0
        done.send("tp", "all_reduce", passes * calls, passes * calls * tokens * student.hidden * itemsize)
        along_outputs, along_inputs = map(len, student.adapted)
        calls = student.num_layers * (along_outputs + along_inputs * (1 + is_checkpointed))
        done.send("tp", "all_reduce", passes * calls, passes * calls * tokens * student.rank * itemsize)
    _losses(done, case)
    if case.looks_ahead:
        _look_ahead(done, case)
    _exchange(done, case)
    return done


def _look_ahead(done: Work, case: Case) -> None:
    """Adds the references' reading, the virtual step of the head, and what the objective does once more with it."""
    student, teacher, itemsize = case.student, case.teacher, case.student_bytes
    assert teacher is not None
    for _ in range(student.num_layers):
        _gather(done, case, student.layer_sizes, itemsize)
    _gather(done, case, [student.embedding, student.head], itemsize)
    _gather(done, case, [student.hidden] * (1 if student.is_rms else 2), itemsize)
    _read(done, case, student, case.examples, case.columns - 1, case.columns - 1, itemsize, 0)
    tokens = case.examples * case.response_tokens
    chunks, again = -(-tokens // chunk_tokens(case)), case.passes * -(-tokens // (case.passes * chunk_tokens(case)))
    done.flops += 2 * tokens * student.classes * (2 * student.hidden + student.hidden + teacher.hidden)
    done.operations += _VIRTUAL_STEP + _launches_of_chunk(case, _REFERENCE_CHUNK) * chunks
    done.operations += _launches_of_chunk(case, _AHEAD_CHUNK) * again
    done.memory_bytes += 8 * _FP32 * tokens * student.classes
    done.send("dp", "all_reduce", 2 * (case.dp_size > 1), _FP32 * student.head + 8)
    if case.tp_size > 1:
        spec = TileSpec.of(case.config.loss, has_edges=True)
        done.send("tp", "all_gather", chunks + 2 * again, tokens * _FP32 * case.tp_size
                  * (3 + 7 + case.config.loss.top_k + spec.num_sums))  # fmt: skip


def _losses(done: Work, case: Case) -> None:
    """The objective of all micro-batches: three products of the student's head and one of the teacher's."""
    student, teacher = case.student, case.compared
    references = case.references * case.response_tokens
    is_apart = case.sequences_of_example == 2 and case.config.loss.sft > 0
    # Cross-entropy on the text has nothing else where no loss compares.
    alone = references if case.teacher is None else case.trained_sequences * case.response_tokens
    terms = [(0, references if is_apart else alone)] if teacher is None or is_apart else []
    if teacher is not None:
        # Where the response is the reference, rows without one have no loss.
        terms.append((teacher.hidden, (case.trained_sequences - is_apart * case.references) * case.response_tokens))
    for teacher_hidden, tokens in terms:
        chunks = case.passes * -(-tokens // (case.passes * chunk_tokens(case)))
        done.flops += 2 * tokens * student.classes * ((2 if student.adapters else 3) * student.hidden + teacher_hidden)
        launches = _OBJECTIVE_CHUNK if teacher_hidden else _REFERENCE_CHUNK
        launches += _CLIPPING_CHUNK if teacher_hidden and case.config.loss.is_clipped else 0
        done.operations += _launches_of_chunk(case, launches) * chunks
        done.memory_bytes += 12 * _FP32 * tokens * student.classes
        if case.tp_size > 1:
            columns, gathers = _exchanged(case.config.loss) if teacher_hidden else (3, 1)
            done.send("tp", "all_gather", gathers * chunks, tokens * columns * _FP32 * case.tp_size)
            done.send("tp", "all_reduce", case.passes * 2, tokens * student.hidden * _FP32)
    if case.teacher is not None:
        _gather(done, case, [case.teacher.head], case.teacher_bytes)


def _launches_of_chunk(case: Case, in_torch: int) -> int:
    """Triton's kernels take the place of most of what eager torch does between the products of a chunk."""
    return max(in_torch // 2, in_torch - _TORCH_CHUNK) if uses_triton(case) else in_torch


def _exchanged(loss: LossConfig) -> tuple[int, int]:
    """Floats per token, and gathers per chunk, of the objective across vocabulary shards."""
    spec = TileSpec.of(loss, has_edges=loss.uses_gate)
    rounds = num_rounds(loss.softness) if loss.is_clipped else 0
    nodes = rounds * NUM_NODES * (1 + spec.has_upper)
    labels = 0 if loss.span_relation == "hadamard" else 1
    return 7 + labels + loss.top_k + nodes + spec.num_sums + len(SpanSum), 2 + rounds


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
        first, group = 0 if case.writes else 1, _among_few(case)  # who writes has gathered everything before
        again = passes * times - first
        done.send("dp", "all_gather", calls * first, whole * itemsize * first)
        done.send(group, "all_gather", calls * again, whole * itemsize * again)
        _gather(done, case, [student.head], itemsize, group if case.writes else "dp")
        done.operations += 2 * len(student.sizes) if case.hpz_size > 1 else 0
        buckets = -(-student.num_trained // int(case.zero("reduce_bucket_size")))
        done.send("dp", "reduce_scatter", passes * buckets, passes * student.num_trained * case.gradient_bytes)
        return
    times = passes if case.zero_stage == 2 else 1
    buckets = -(-student.num_trained // int(case.zero("reduce_bucket_size")))
    done.send("dp", "all_reduce", times * buckets, times * student.num_trained * case.gradient_bytes)


def _optimizer(case: Case) -> Work:
    done, part = Work(), partition_size(case)
    is_wide = case.gradient_bytes > case.student_bytes
    of_parameter, in_all = (_WIDE_UPDATE if is_wide else _UPDATE)[case.zero_stage]
    done.operations = in_all + of_parameter * len(case.student.trained) - (_OF_GATE if case.compared is None else 0)
    done.memory_bytes = 36 * part  # master and moments read and written, the gradient copied, weights written
    if case.zero_stage == 3 and case.dp_size > 1:
        small = trained_persistent(case)
        done.send("dp", "all_gather", 1, small * case.student_bytes)
    elif case.zero_stage > 0 and case.dp_size > 1:
        buckets = -(-case.student.num_trained // 500_000_000)
        done.send("dp", "all_gather", buckets, case.student.num_trained * case.student_bytes)
    return done


def _among_few(case: Case) -> Group:
    """The ranks among whom weights are gathered that few ranks keep once more; "dp" where they are all of these."""
    return "hpz" if 1 < case.hpz_size < case.dp_size else "dp"


def _gather(done: Work, case: Case, sizes: Sequence[int], itemsize: int, group: Group | None = None) -> None:
    """Adds what ZeRO-3 gathers of parameters of these sizes; small ones go together (engines/gathered.py)."""
    if case.zero_stage < 3 or case.dp_size == 1:
        return
    small = sum(size * itemsize <= _SMALL_BYTES for size in sizes)
    calls = len(sizes) - small + -(-small // _TOGETHER)
    done.send(group or _among_few(case), "all_gather", calls, sum(sizes) * itemsize)
