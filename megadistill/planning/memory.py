"""Closed formulas for the memory of one rank: what is resident, and what is alive at the fullest moments of a phase.

Each phase has a few moments that can be its fullest one, each a table owner -> bytes; the fullest of them counts. The
formulas follow the code that is named beside them, and are compared with a dry run of that code (``compare.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megadistill.planning.case import Case
from megadistill.planning.chunks import auto_chunk_tokens, chunk_tokens, uses_triton
from megadistill.planning.partitions import partition_size, partitioned, persistent, secondary, weights
from megadistill.planning.shape import Linear, ModelShape

Owners = Mapping[str, int]

TEACHER, STUDENT, OPTIMIZER = "teacher weights", "student weights", "optimizer states"
SECONDARY, GRADIENTS, BUCKET = "secondary weights", "gradients", "reduce bucket"
GATHERED, JOINED, CACHE = "gathered parameters", "joined weights", "kv cache"
HIDDEN, ACTIVATIONS, LOGITS, TEMPORARIES = "hidden states", "activations", "logits", "optimizer temporaries"
OWNERS = (
    TEACHER, STUDENT, SECONDARY, OPTIMIZER, GRADIENTS, BUCKET, GATHERED, JOINED, CACHE, HIDDEN, ACTIVATIONS, LOGITS,
    TEMPORARIES,
)  # fmt: skip

# decoding/decoder.py and decoding/layer.py; a test compares them.
PIECE_TOKENS = 8192
MAX_JOINED_BYTES = 2**24
_FP32 = 4
# Tiles of temporaries between the products of the losses in eager torch, and elements of the float64 copy from
# which tokens are drawn (decoding/sampling.py).
_TILES_OF_KL, _TILES_OF_CLIPPING, _TILES_OF_CLIPPING_ON_CPU = 5, 18, 27
DRAWN_ELEMENTS = 2**22
# DeepSpeed's norm of a gradient.
_FP64 = 8
# Temporaries of torch's AdamW over lists of tensors: two of the size of the float32 weights.
_FOREACH_TEMPORARIES = 2 * _FP32


def resident(case: Case) -> dict[str, int]:
    """Owner -> bytes alive between steps, once AdamW has made its moments."""
    student, itemsize, dp_size, stage = case.student, case.student_bytes, case.dp_size, case.zero_stage
    owners: Counter[str] = Counter()
    if case.teacher is not None and not case.config.parallel.offloads_teacher:
        owners[TEACHER] = weights(case, case.teacher, case.teacher_bytes, keeps_small=False)
    owners[STUDENT] = weights(case, student, itemsize)
    if case.hpz_size > 1 and case.teacher is not None:
        owners[SECONDARY] = secondary(case, case.teacher, case.teacher_bytes)
    owners[OPTIMIZER] = 0 if case.config.parallel.offloads_optimizer else _state(case)
    if stage in (1, 2):  # DeepSpeed keeps them until the next ones are there, summed by stage 1 in bf16 alone
        owners[GRADIENTS] = (case.gradient_bytes if _sums_all(case) else itemsize) * student.num_trained
    if stage == 3:
        owners[GRADIENTS] = case.gradient_bytes * partitioned(student.trained, dp_size)
        owners[BUCKET] = case.gradient_bytes * int(case.zero("reduce_bucket_size"))
    return dict(owners)


def _state(case: Case) -> int:
    """Bytes of a float32 copy of the weights, which only float32 without ZeRO does without, and of two moments."""
    numbers = 2 if case.zero_stage == 0 and case.student_bytes == _FP32 else 3
    return numbers * _FP32 * partition_size(case)


def _brought_in(case: Case, elements: int) -> Owners:
    """The teacher's weights that are brought in from host memory for a use of ``elements`` of them."""
    if not case.config.parallel.offloads_teacher:
        return {}
    shared = case.dp_size if case.zero_stage == 3 else 1
    return {TEACHER: case.teacher_bytes * -(-elements // shared)}


def _sums_all(case: Case) -> bool:
    """Whether float32 gradients of all parameters are there all the time: DeepSpeed's BF16_Optimizer."""
    return case.zero_stage == 1 and case.gradient_bytes > case.student_bytes


def peaks(case: Case) -> dict[str, dict[str, int]]:
    """Phase -> owner -> bytes alive at its fullest moment, what is resident included."""
    phases: dict[str, Sequence[Owners]] = {}
    if case.teacher is not None:
        if case.writes:
            phases["rollout"] = [
                _read(case, model, _batch(case) * case.prompt_tokens, _writing(case), size)
                for model, size in _writers(case)
            ]
        if case.writes or case.compared is not None:
            phases["teacher"] = _teacher(case, case.teacher)
        if case.rounds:
            phases["score"] = [_score(case, case.teacher)]
            phases["regenerate"] = [_regenerate(case)]
    phases["train"] = _train(case)
    phases["optimizer"] = _optimizer(case)
    always = resident(case)
    return {name: max((_sum(always, moment) for moment in moments), key=_total) for name, moments in phases.items()}


def _sum(*tables: Owners) -> dict[str, int]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return {owner: total[owner] for owner in OWNERS if total[owner]}


def _total(owners: Owners) -> int:
    return sum(owners.values())


def _gathered(case: Case, elements: int, itemsize: int) -> int:
    # DeepSpeed copies nothing where one rank has everything.
    return itemsize * elements if case.zero_stage == 3 and case.dp_size > 1 else 0


def _batch(case: Case) -> int:
    """Examples that are written together."""
    return case.decode_plan.batch_size


def _writers(case: Case) -> list[tuple[ModelShape, int]]:
    """The models that write, and the bytes of their numbers."""
    student = (case.student, case.student_bytes)
    return [student, (case.teacher, case.teacher_bytes)] if case.both_write and case.teacher else [student]


def _writing(case: Case) -> Owners:
    """What is alive while student text is written and scored (generation/sources/on_policy.py: ``_write``)."""
    owners, batch, columns = Counter[str](), _batch(case), case.columns
    spare = case.records_steps or case.both_write and case.like_gpu and case.config.generation.cuda_graphs
    if spare:
        columns = -(-columns // 8) * 8 + 1  # the spare column of a recorded step
    for model, itemsize in _writers(case):
        is_kept = model is case.student  # the teacher's small parameters are released too
        owners[GATHERED] += _gathered(case, model.size - (persistent(case, model) if is_kept else 0), itemsize)
        if case.zero_stage < 3 or case.dp_size == 1:  # the base's weights stay beside the merged ones
            owners[GATHERED] += model.merged * itemsize
        owners[JOINED] += model.joined_bytes(itemsize, MAX_JOINED_BYTES)
        owners[CACHE] += batch * columns * model.kv_bytes(itemsize)
    if case.both_write:
        owners += Counter(_brought_in(case, case.teacher.size if case.teacher else 0))
    if case.rounds:
        owners[HIDDEN] = batch * case.response_tokens * case.student.hidden * case.student_bytes
    if case.keeps_teacher_cache and case.teacher is not None:
        owners[CACHE] += batch * case.columns * case.teacher.kv_bytes(case.teacher_bytes)
    return owners


def _read(case: Case, model: ModelShape, total: int, alive: Owners, itemsize: int) -> Owners:
    """Reading ``total`` tokens at once, layer by layer (decoding/decoder.py: ``PlanPrefiller.read``)."""
    piece, pieces = min(total, PIECE_TOKENS), -(-total // PIECE_TOKENS)
    qkv = model.query + 2 * model.key_value
    # On a GPU a norm is one kernel; elsewhere two float32 tensors are made.
    norm = itemsize if case.like_gpu else itemsize + 4 if itemsize == _FP32 else itemsize + 8
    rotated = model.query + model.key_value if model.has_rotary else 0
    # float32 and complex copies of queries and keys, the result, and all three side by side.
    before = piece * (norm * model.hidden + itemsize * 2 * qkv + (12 + itemsize) * rotated)
    width = model.down.inputs * len(model.up)
    mlp = itemsize * (width * (1 if joins(model.up, itemsize) else 2) + model.down.inputs)
    after = piece * max((norm + 2 * itemsize) * model.hidden, mlp + 2 * itemsize * model.hidden)
    whole = itemsize * total
    joined = whole * qkv * (2 if pieces > 1 else 1)
    # The layer's input, queries to values, the attention's output and what is done of the layer's output.
    attention = whole * (model.hidden + qkv + 2 * model.query)
    outputs = whole * (model.hidden + qkv + model.query + model.hidden * (1 if pieces == 1 else 2))
    rope = total * 4 * model.head_dim if model.has_rotary else 0
    activations = rope + max(whole * model.hidden + joined + before, attention, outputs + after)
    return _sum(alive, {ACTIVATIONS: activations})


def _teacher(case: Case, teacher: ModelShape) -> Sequence[Owners]:
    """The teacher's readings (generation/teacher_states.py)."""
    itemsize = case.teacher_bytes
    layer = {
        GATHERED: _gathered(case, teacher.layer, itemsize),
        JOINED: teacher.joined_layer_bytes(itemsize, MAX_JOINED_BYTES),
    }
    layer = _sum(layer, _brought_in(case, teacher.layer))
    alive = _sum(_writing(case), layer) if case.writes and not case.both_write else layer
    earlier = _hidden_of_earlier_batches(case, teacher)
    together = _batch(case) if case.writes and not case.both_write else case.examples
    moments = [_sum(earlier, _read(case, teacher, together * case.columns, alive, itemsize))]
    if case.rounds and not case.keeps_teacher_cache:  # everything once more, beside what was read before
        moments.append(_sum(moments[0], {HIDDEN: _batch(case) * case.columns * teacher.hidden * itemsize}))
    return moments


def _hidden_of_earlier_batches(case: Case, teacher: ModelShape) -> Owners:
    """The teacher's states of what was written before; prompts are kept with them."""
    others = case.examples - _batch(case) if case.writes and not case.both_write else 0
    return {HIDDEN: others * case.columns * teacher.hidden * case.teacher_bytes}


def joins(parts: Sequence[Linear], itemsize: int) -> bool:
    """Whether linear layers of one input are one product when text is written or read."""
    return len(parts) == 1 or sum(part.size for part in parts) * itemsize <= MAX_JOINED_BYTES


def _score(case: Case, teacher: ModelShape) -> Owners:
    """Both models' states side by side and two tiles of logits (generation/scoring.py, losses/token_kl.py)."""
    tokens = _batch(case) * case.response_tokens
    states = tokens * (case.student.hidden * case.student_bytes + teacher.hidden * case.teacher_bytes)
    chunk = min(auto_chunk_tokens(case), tokens)
    read = _batch(case) * case.columns * teacher.hidden * case.teacher_bytes
    drawn = 8 * min(DRAWN_ELEMENTS, chunk * case.student.classes) if case.like_gpu else 0
    temporaries = 0 if uses_triton(case) else _TILES_OF_KL * _FP32 * chunk * case.student.classes
    return _sum(
        _writing(case),
        _brought_in(case, teacher.head),
        _hidden_of_earlier_batches(case, teacher),
        {
            HIDDEN: read + states,
            GATHERED: _gathered(case, teacher.head, case.teacher_bytes),
            LOGITS: 2 * _FP32 * chunk * case.student.classes + max(drawn, temporaries),
        },
    )


def _regenerate(case: Case) -> Owners:
    teacher = case.teacher
    assert teacher is not None
    kept = case.examples * case.columns * teacher.hidden * case.teacher_bytes
    # The cache is sorted layer by layer, into a spare one.
    spare = _batch(case) * case.columns * case.student.kv_bytes(case.student_bytes) // case.student.num_layers
    return _sum(_writing(case), {HIDDEN: kept, CACHE: spare})


def teacher_states(case: Case) -> int:
    """Bytes of the teacher's states of a rank's examples, from the correction to the update."""
    if case.compared is None:
        return 0
    # A reading of everything keeps the prompts' states with the others; a later one of what is new replaces them.
    tokens = case.response_tokens if case.keeps_teacher_cache else case.columns
    return case.examples * tokens * case.compared.hidden * case.teacher_bytes


def trained_parameters(case: Case) -> int:
    """Elements of the student's parameters that ZeRO-3 holds whole at once while it trains.

    It prefetches up to ``stage3_max_live_parameters``; without prefetching it keeps what is used again within
    ``stage3_max_reuse_distance``, which counts forward and backward pass.
    """
    if case.zero_stage < 3:
        return 0
    student = case.student
    whole, kept = student.size, persistent(case, student)
    live, reuse = int(case.zero("stage3_max_live_parameters")), int(case.zero("stage3_max_reuse_distance"))
    ahead = live if int(case.zero("stage3_prefetch_bucket_size")) and reuse else min(live, reuse // 2)
    return min(whole - kept, max(ahead, student.layer) + student.head)


def _train(case: Case) -> Sequence[Owners]:
    """Moments of a micro-batch: the loss, the backward pass of the last layer, a full bucket, the end."""
    student, itemsize, size = case.student, case.student_bytes, case.student.num_trained
    tokens = case.sequences * case.columns
    kept = tokens * student.kept_by_layer(itemsize)
    inputs = tokens * student.hidden * itemsize
    is_checkpointed = case.config.model.gradient_checkpointing
    stored = inputs * (student.num_layers + 1) if is_checkpointed else kept * student.num_layers + inputs
    backward = tokens * student.backward_of_layer(itemsize)
    losses, formed = _losses(case)
    bucket = _bucket(case)
    always = _sum(
        {HIDDEN: teacher_states(case), GATHERED: _gathered(case, trained_parameters(case), itemsize)},
        {GATHERED: _gathered(case, case.teacher.head, case.teacher_bytes) if case.teacher else 0},
        _brought_in(case, case.teacher.head) if case.teacher else {},
        {
            GRADIENTS: _summed(case),
            SECONDARY: secondary(case, student, itemsize),
            LOGITS: _FP32 * student.head if case.looks_ahead else 0,
        },
    )
    final_norm = tokens * student.hidden * ((4 + 2 * itemsize) if student.is_rms else 2 * itemsize)
    at_loss = _sum(always, {ACTIVATIONS: stored + final_norm}, bucket if case.zero_stage == 1 else {})
    recomputed = kept if is_checkpointed else 0
    of_layer = {
        ACTIVATIONS: stored + recomputed + backward,
        LOGITS: formed,
        GRADIENTS: student.trained_layer * itemsize,
    }
    at_last_layer = _sum(always, bucket, of_layer)
    moments = [*(_sum(at_loss, loss) for loss in losses), at_last_layer]
    if case.zero_stage == 3:
        # A full bucket is laid out once more for its ranks (DeepSpeed's reduce_scatter_coalesced).
        elements = min(size, int(case.zero("reduce_bucket_size")))
        left = int(stored * (1 - elements / size))
        full = {ACTIVATIONS: left + recomputed + backward, BUCKET: case.gradient_bytes * elements}
        moments.append(_sum(always, full))
    return [*moments, _sum(always, bucket, _last_reduction(case)), *(_look_ahead(case) if case.looks_ahead else ())]


def _look_ahead(case: Case) -> Sequence[Owners]:
    """The references' reading and the virtual step of the head, before the passes (training/look_ahead.py)."""
    student, itemsize, tokens = case.student, case.student_bytes, case.examples * case.response_tokens
    layer = {
        HIDDEN: teacher_states(case),
        GATHERED: _gathered(case, student.layer, itemsize),
        JOINED: student.joined_layer_bytes(itemsize, MAX_JOINED_BYTES),
    }
    tiles = 2 * _FP32 * min(chunk_tokens(case), tokens) * student.classes
    step = {
        HIDDEN: teacher_states(case) + tokens * student.hidden * (itemsize + _FP32),
        GATHERED: _gathered(case, student.head, itemsize),
        LOGITS: 2 * _FP32 * student.head + tiles,  # the head that moves, and its gradient
    }
    return [_read(case, student, case.examples * (case.columns - 1), layer, itemsize), step]


def _summed(case: Case) -> int:
    """Bytes of gradients, besides resident ones, to which the backward passes add."""
    if case.zero_stage == 2:
        return case.gradient_bytes * partition_size(case) if case.passes > 1 else 0
    return 0 if case.zero_stage == 3 or _sums_all(case) else case.gradient_bytes * case.student.num_trained


def _bucket(case: Case) -> Owners:
    """The buffers through which stages 1 and 2 reduce while a backward pass runs; stage 3 has its own all the time."""
    if case.zero_stage not in (1, 2) or _sums_all(case):
        return {}
    buckets = 2 if case.zero("overlap_comm") else 1
    return {BUCKET: buckets * case.student_bytes * int(case.zero("reduce_bucket_size"))}


def _last_reduction(case: Case) -> Owners:
    """What the reduction of the last gradients takes, when no activations are left."""
    part, wide = case.gradient_bytes * partition_size(case), case.gradient_bytes > case.student_bytes
    if _sums_all(case):  # in one piece
        return {BUCKET: case.gradient_bytes * case.student.num_trained if case.dp_size > 1 else 0}
    if case.zero_stage != 2:
        return {}
    in_fp32 = _FP32 * min(case.student.num_trained, int(case.zero("reduce_bucket_size"))) if wide else part
    return {GRADIENTS: part + in_fp32}


def _losses(case: Case) -> tuple[Sequence[Owners], int]:
    """What the losses hold at their fullest moments, and the gradients that they leave for the backward pass.

    The teacher's losses come first; what they leave for the head's gradient is there when that on references is
    computed.
    """
    student, itemsize = case.student, case.student_bytes
    tokens = case.rows * case.response_tokens
    mixed = case.like_gpu and itemsize == 2  # products read bf16 as it is; elsewhere float32 copies are made
    copied = 0 if mixed or itemsize == _FP32 else _FP32
    per_token = student.hidden * (itemsize + copied + _FP32)  # selected states, their copy, their gradient
    weight = student.head * copied + student.trained_head * _FP32
    terms = 1 if case.compared is None or case.sequences == case.rows else 2
    formed = terms * (_FP32 * student.trained_head + _FP32 * tokens * student.hidden)
    chunk = min(chunk_tokens(case), tokens)
    tiles = chunk * student.classes * (_FP32 + (itemsize if mixed else _FP32))
    last = {HIDDEN: terms * tokens * per_token, LOGITS: terms * weight + tiles}
    if case.compared is None:
        return [last], formed
    wide = case.teacher_bytes + (0 if mixed or case.teacher_bytes == _FP32 else _FP32)
    both = tokens * case.compared.hidden * (case.teacher_bytes + wide)  # collated, and those that count
    tiles += _FP32 * chunk * student.classes
    tiles += 0 if mixed or case.teacher_bytes == _FP32 else _FP32 * case.compared.head
    if case.config.loss.is_clipped and not uses_triton(case):
        tiles_of_clipping = _TILES_OF_CLIPPING if case.like_gpu else _TILES_OF_CLIPPING_ON_CPU
        tiles += tiles_of_clipping * _FP32 * chunk * student.classes
    if case.looks_ahead:  # states in float32, and a tile of logits after the step
        per_token, tiles = per_token + _FP32 * student.hidden, tiles + _FP32 * chunk * student.classes
    first = {HIDDEN: tokens * per_token + both, LOGITS: weight + tiles}
    return [first, _sum(last, {HIDDEN: both})], formed


def _optimizer(case: Case) -> Sequence[Owners]:
    """AdamW on a float32 copy of the gradient; stage 3 goes through it in groups of ``sub_group_size``."""
    part, itemsize = partition_size(case), case.student_bytes
    alive = {HIDDEN: teacher_states(case), SECONDARY: secondary(case, case.student, itemsize)}
    narrow = case.gradient_bytes if case.gradient_bytes < _FP32 else 0
    if case.zero_stage == 3:
        part = min(part, int(case.zero("sub_group_size")))
        temporaries = (_FP32 + narrow) * part
    elif case.zero_stage == 0:
        alive[GRADIENTS] = case.gradient_bytes * part
        # The norm squares one gradient after the other in float64 (engines/student.py).
        temporaries = max(2 * _FP64 * max(case.student.trained), 0 if itemsize == _FP32 else _FP32 * part)
    elif _sums_all(case):
        temporaries = 0
    else:
        alive[GRADIENTS] = case.gradient_bytes * part
        of_norm = _FP64 * min(part, max(case.student.trained))
        temporaries = max(of_norm, (_FP32 + narrow) * part if narrow else 0)
    if not case.like_gpu:  # on a GPU an update is one kernel
        temporaries += _FOREACH_TEMPORARIES * part
    waiting = {OPTIMIZER: _state(case) if case.config.parallel.offloads_optimizer else 0}
    return [_sum(alive, waiting, {TEMPORARIES: temporaries})]
