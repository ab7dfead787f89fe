"""One counted step of a run on rows of stated lengths: the same code for a dry run and for a real one.

Nothing of a user's data is read: the rows are synthetic, no token ends a response, and the teacher corrects every
response at places spread evenly, so that all that a step can do is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from megadistill.config.adaptive import AdakdSection
from megadistill.config.schema import RunConfig, ScrgSection
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample, TokenIds
from megadistill.decoding.rollout import Correction
from megadistill.engines.local_state import kept_tensors
from megadistill.errors import MegadistillError
from megadistill.generation.scoring import TeacherScores
from megadistill.generation.scrg import ErrorRule, find_corrections
from megadistill.generation.sources.base import SourceInputs
from megadistill.generation.sources.teacher import TeacherText
from megadistill.models.loading import load_model_config
from megadistill.observability.timers import Timers
from megadistill.parallel.context import ParallelContext
from megadistill.planning.case import changed
from megadistill.planning.counter import Counter, Counting
from megadistill.planning.known import with_model_paths
from megadistill.planning.owners import BUCKET, GRADIENTS, OPTIMIZER, STUDENT, TEACHER
from megadistill.planning.sampled_decoding import CountedWriter
from megadistill.planning.traffic import Groups
from megadistill.planning.use import StepUse
from megadistill.training.components import Components
from megadistill.training.data import TrainingData
from megadistill.training.length import RunLength
from megadistill.training.setup import build_components, model_paths
from megadistill.training.step import StepResult, distillation_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_ID, _REFERENCE_ID, _CORRECTED_ID, _WRITTEN_ID = 0, 1, 2, 3
_WRITTEN = ("on_policy", "teacher_mixed")  # modes of ``plannable`` whose text is written in the step
# Steps before the one that is counted, and their length of prompts, references and responses.
_WARM_UP_STEPS, _WARM_UP = 2, 2


@dataclass(frozen=True)
class Lengths:
    """Tokens of every row.

    Attributes:
        prompt: Of its prompt.
        response: Of its reference, and of what the student writes.
    """

    prompt: int
    response: int


def models_as_files(config: RunConfig, folder: Path) -> RunConfig:
    """The same run with configuration files in place of its models, whose weights are then never looked for.

    Args:
        config: The configuration of the run.
        folder: Where the files are written.

    Raises:
        ConfigError: A model has no readable configuration.
    """
    files = {}
    for key, path in model_paths(config).items():
        files[key] = str(folder / f"{key}.json")
        load_model_config(path, key).to_json_file(files[key], use_diff=False)
    return with_model_paths(config, files)


def plannable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run's costliest kind of step without its tokenizer and data, and what was taken for granted, for people."""
    notes, mode = [], config.generation.mode
    if mode in ("mixed", "off_policy"):
        notes.append(f"a step of generation.mode={mode} that trains on new student text")
        mode = "on_policy"
    scrg = config.generation.scrg
    if mode == "skd":
        notes.append("a step with one round of correction; generation.mode=skd makes as many as there are objections")
        mode, scrg = "on_policy", ScrgSection()
    elif scrg.after != "regenerate":
        notes.append(f"a step whose corrections are continued (generation.scrg.after={scrg.after} writes nothing anew)")
        scrg = scrg.model_copy(update={"after": "regenerate"})
    if mode == "contrast":
        notes.append("a step on the student's text; generation.mode=contrast also trains on the teacher's")
        mode = "on_policy"
    if mode == "teacher":
        notes.append("a step on the teacher's text, which was written before training")
    changes: dict[str, dict[str, Any]] = {
        # auto would measure how fast products are
        "generation": {"mode": mode, "scrg": scrg, "cpu_products": "packed"},
        "data": {"span_prior": "window"},
        "model": {"eos_tokens": (_PROMPT_ID,)},
        "loss": {"backend": "torch", "adakd": AdakdSection()},
    }
    if config.loss.adakd.enabled:
        notes.append("the student's reading of all responses before they are trained on (loss.adakd) is not counted")
    sections = {name: getattr(config, name).model_copy(update=change) for name, change in changes.items()}
    if config.loss.backend != "torch":
        notes.append("the losses' temporaries are those of eager torch; Triton's and compiled kernels have fewer")
    return config.model_copy(update=sections), notes


def counted_step(
    config: RunConfig,
    context: ParallelContext,
    counter: Counter,
    lengths: Lengths,
    *,
    source: Literal["dry run", "measured"],
    vocab_size: int,
    skips_decoding: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    inspect: Callable[[Components], None] | None = None,
    repeats: int = 1,
) -> StepUse:
    """Builds a run and counts its third step (collective over the world). Call it where ``counter`` counts.

    The steps before it are short: they make what is made once, such as AdamW's moments and the order in which ZeRO-3
    gathers, which it knows after two micro-batches.

    Args:
        config: From ``plannable``.
        context: The grid of processes.
        counter: What counts.
        lengths: Of the rows.
        source: What the result is to be called.
        vocab_size: V.
        skips_decoding: Count most decoding steps from a few of them.
        progress: Told what begins.
        inspect: Gets the run after the step.
        repeats: Count so many steps from the third on.

    Raises:
        MegadistillError: The rows do not fit the configuration, or a step did not do what was to be counted.
    """
    _check_lengths(config, lengths)
    counter.groups = Groups(context, config.parallel.zero.hpz_partition_size)
    progress("building the engines")
    limit = _Limit(_WARM_UP)
    components, writer = _build(config, context, counter, limit, vocab_size, skips_decoding)
    progress("the first steps, in short")
    for step in range(_WARM_UP_STEPS):
        _step(step, _rows(components, Lengths(_WARM_UP, _WARM_UP)), components, counter)
    _name_owners(components, counter)
    resident = counter.owners()
    limit.tokens, writer.num_steps = lengths.response, 0
    counter.start()
    progress("the step that is counted")
    for step in range(_WARM_UP_STEPS, _WARM_UP_STEPS + repeats):
        _check_step(_step(step, _rows(components, lengths), components, counter), config, lengths)
    if inspect is not None:
        inspect(components)
    return StepUse(
        source=source,
        rank=context.rank,
        world_size=context.world_size,
        tp_size=context.tp_size,
        zero_stage=config.parallel.zero_stage,
        resident=resident,
        phases=tuple(phase for phase in counter.phases() if phase.operations or phase.traffic),
        decode_steps=writer.num_steps,
    )


def _build(
    config: RunConfig,
    context: ParallelContext,
    counter: Counter,
    limit: _Limit,
    vocab_size: int,
    skips_decoding: bool,
) -> tuple[Components, CountedWriter]:
    """The run's components, and the writer that its text source has in place of the student."""
    writers: list[CountedWriter] = []

    def adapt(inputs: SourceInputs) -> SourceInputs:
        writers.append(CountedWriter(inputs.student, counter, skips=skips_decoding))
        given = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
        changed = {"student": writers[0], "eos_ids": frozenset(), "teacher_eos_ids": frozenset()}
        if inputs.teacher is not None:  # where it writes beside the student; its steps are the same ones
            changed["teacher"] = CountedWriter(inputs.teacher, counter, skips=skips_decoding)
        return _CountedInputs(**given | changed | {"find_corrections": _spread_corrections, "limit": limit})

    is_teachers = config.generation.mode == "teacher"
    components = build_components(
        changed(config, {"generation.mode": "on_policy"}) if is_teachers else config,
        context,
        cast("PreTrainedTokenizerBase", _NoTokenizer()),
        vocab_size,
        TrainingData([_example()], [], [], {}, "plain", _PROMPT_ID),
        RunLength(max_steps=1_000, num_rows=1_000, rows_per_step=config.train.global_batch_size),
        adapt,
    )
    if is_teachers:
        reader = components.teacher if config.loss.uses_teacher else None
        source = TeacherText(_TeachersText(limit), reader, config.train.micro_batch_size)
        components = replace(components, source=source)
    return replace(components, eos_ids=frozenset(), teacher_eos_ids=frozenset()), writers[0]


def measured_step(config: RunConfig, context: ParallelContext, lengths: Lengths, *, vocab_size: int) -> StepUse:
    """Counts a step that is really computed (collective over the world): what a dry run is held to.

    Args:
        config: From ``plannable``.
        context: The grid of processes.
        lengths: Of the rows.
        vocab_size: V.

    Raises:
        MegadistillError: As ``counted_step``.
    """
    counter = Counter()
    with Counting(counter):
        return counted_step(config, context, counter, lengths, source="measured", vocab_size=vocab_size)


@dataclass
class _Limit:
    tokens: int


class _TeachersText(dict[TokenIds, TokenIds]):
    """What the teacher has written to any prompt."""

    def __init__(self, limit: _Limit) -> None:
        super().__init__()
        self._limit = limit

    def __missing__(self, prompt: TokenIds) -> TokenIds:
        return (_WRITTEN_ID,) * self._limit.tokens


@dataclass(frozen=True)
class _CountedInputs(SourceInputs):
    """Every response has as many tokens as ``limit`` says."""

    limit: _Limit = field(kw_only=True)

    def response_limit(self, prompt_length: int) -> int:
        return self.limit.tokens


class _NoTokenizer:
    """Stands for the run's tokenizer: every token is a word."""

    eos_token_id = pad_token_id = _PROMPT_ID
    eos_token = "w"
    all_special_ids: tuple[int, ...] = ()

    def convert_ids_to_tokens(self, id_: int) -> str:
        return "w"

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "w " * len(ids)


class _CountedTimers(Timers):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self._counter.phase(name), super().__call__(name):
            yield


def _step(step: int, rows: Sequence[Sample], components: Components, counter: Counter) -> StepResult:
    return distillation_step(step, rows, components, _CountedTimers(counter))


def _rows(components: Components, lengths: Lengths) -> list[Sample]:
    """This rank's rows of a step; the share of ``data.prompts_path`` has no references."""
    config = components.config
    number = config.train.global_batch_size // components.context.dp_size
    with_reference = number - int(number * config.data.prompts_ratio)
    prompt, reference = (_PROMPT_ID,) * lengths.prompt, (_REFERENCE_ID,) * lengths.response
    return [Sample(i, prompt, reference_ids=reference if i < with_reference else None) for i in range(number)]


def _example() -> TokenizedExample:
    return TokenizedExample(0, (_PROMPT_ID,), (_REFERENCE_ID,), (), "")


def _spread_corrections(responses: Sequence[TokenIds], scores: TeacherScores, rule: ErrorRule) -> list[Correction]:
    """A correction in every response, at places spread evenly over what was scored: an average step's continuation."""
    find_corrections(responses, scores, rule)  # it is counted; what it finds in untrained models would be chance
    corrections = []
    for i, (response, row) in enumerate(zip(responses, scores.mask.tolist(), strict=True)):
        scored = sum(row)
        if scored:
            start = len(response) - scored
            corrections.append(Correction(i, start + int(scored * (i + 0.5) / len(responses)), _CORRECTED_ID))
    return corrections


def _name_owners(components: Components, counter: Counter) -> None:
    """What stays between steps."""
    student = kept_tensors(components.student.engine)
    owners = {"weights": STUDENT, "optimizer": OPTIMIZER, "gradients": GRADIENTS, "bucket": BUCKET}
    for kind, tensors in student.items():
        counter.own(tensors, owners[kind])
    if components.teacher is not None:
        counter.own(kept_tensors(components.teacher.engine)["weights"], TEACHER)


def _check_lengths(config: RunConfig, lengths: Lengths) -> None:
    if lengths.prompt < 1 or lengths.response < _WARM_UP:
        raise MegadistillError(
            f"rows of {lengths.prompt} prompt and {lengths.response} response tokens; at least 1 and {_WARM_UP} are "
            "needed"
        )
    if lengths.prompt + lengths.response > config.data.max_tokens:
        raise MegadistillError(
            f"{lengths.prompt} prompt and {lengths.response} response tokens are more than "
            f"data.max_tokens={config.data.max_tokens} together",
            setting="data.max_tokens",
        )


def _check_step(result: StepResult, config: RunConfig, lengths: Lengths) -> None:
    """A step that went another way than it was to go would give wrong numbers."""
    written = {len(sample.response_ids or ()) for sample in result.samples} if config.needs_teacher else set()
    if not result.is_updated or (config.generation.mode in _WRITTEN and written != {lengths.response}):
        raise MegadistillError(
            f"the counted step did not run as planned: responses of {sorted(written)} tokens in place of "
            f"{lengths.response}, {'an' if result.is_updated else 'no'} update"
        )


def vocabulary(config: RunConfig) -> int:
    """V without a tokenizer: the rows that both models have."""
    return min(int(load_model_config(path, key).vocab_size) for key, path in model_paths(config).items())
