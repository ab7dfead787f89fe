"""Builds the components of a run from its configuration: tokenizer, models, engines, gate, text source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadistill.config.schema import RunConfig
from megadistill.data.spans import make_span_prior
from megadistill.data.tokenize import (
    TokenizedExample,
    assert_same_vocabulary,
    eos_ids,
    has_tokenizer,
    load_tokenizer,
    vocabulary_size,
)
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.decoding.plan import kv_bytes_per_token
from megadistill.decoding.rollout import MAX_EXAMPLES
from megadistill.engines.partitioned import frozen_model
from megadistill.engines.student import trained_model
from megadistill.errors import ConfigError
from megadistill.generation.sources import source_class
from megadistill.generation.sources.base import SourceInputs
from megadistill.losses import QuantileGate
from megadistill.losses.backends import check_backend
from megadistill.models.families import head_counts
from megadistill.models.loading import (
    DTYPES,
    LoadedModel,
    check_positions,
    load_model,
    load_model_config,
    shared_vocab_size,
)
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.topology import gradient_accumulation_steps, resolve_tp_size
from megadistill.training.components import Components
from megadistill.training.gate import GateTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Added to a multiple of run.seed, so that random weights of teacher and student differ.
_TEACHER_SEED, _STUDENT_SEED = 1, 2


def model_paths(config: RunConfig) -> dict[str, str]:
    """Configuration key -> path of the models that this run uses."""
    paths = {"model.student.path": config.model.student.path}
    if config.needs_teacher and config.model.teacher.path is not None:
        paths = {"model.teacher.path": config.model.teacher.path} | paths
    return paths


def check_models(config: RunConfig, world_size: int) -> int:
    """Checks text source and both models' configurations before anything heavy is loaded.

    Args:
        config: The configuration of the run.
        world_size: Number of processes.

    Returns:
        The tensor-parallel size.

    Raises:
        ConfigError: A model cannot be used, or settings do not fit together.
        TopologyError: The processes cannot be divided like that.
    """
    source_class(config).check(config)
    counts: dict[str, int] = {}
    for key, path in model_paths(config).items():
        model_config = load_model_config(path, key)
        counts |= head_counts(model_config, key)
        check_positions(model_config, config.data.max_tokens, "data.max_tokens", f"{key} ({path})")
    tp_size = resolve_tp_size(config.parallel.tp_size, world_size, counts)
    gradient_accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size // tp_size)
    return tp_size


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer; all models that come with one must have the same vocabulary.

    Raises:
        ConfigError: There is none, or teacher and student differ.
    """
    # The first one is used: model.tokenizer, else the student's, else the teacher's.
    paths = {key: path for key, path in reversed(model_paths(config).items()) if has_tokenizer(path)}
    if config.model.tokenizer is not None:
        paths = {"model.tokenizer": config.model.tokenizer} | paths
    if not paths:
        raise ConfigError(
            f"no tokenizer: set model.tokenizer; {', '.join(f'{k} ({p})' for k, p in model_paths(config).items())} "
            "bring none"
        )
    loaded = {key: load_tokenizer(path) for key, path in paths.items()}
    first = next(iter(loaded))
    for key, tokenizer in loaded.items():
        if key != first:
            assert_same_vocabulary(loaded[first], tokenizer, names=(paths[first], paths[key]))
    return loaded[first]


def load_models(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[LoadedModel, LoadedModel | None]:
    """Student and teacher on the CPU, with the vocabulary that they share."""
    paths = model_paths(config)
    vocab_rows = {key: int(load_model_config(path, key).vocab_size) for key, path in paths.items()}
    vocab_size = shared_vocab_size(
        vocab_rows.get("model.teacher.path"), vocab_rows["model.student.path"], vocabulary_size(tokenizer)
    )

    def load(key: str, dtype: str, seed: int) -> LoadedModel:
        return load_model(
            paths[key],
            dtype=dtype,
            vocab_size=vocab_size,
            seed=config.run.seed * 1_000 + seed,
            attention=config.model.attention,
            where=key,
        )

    student = load("model.student.path", config.model.student.dtype, _STUDENT_SEED)
    if "model.teacher.path" not in paths:
        return student, None
    return student, load("model.teacher.path", config.model.teacher.dtype, _TEACHER_SEED)


def build_components(
    config: RunConfig,
    context: ParallelContext,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample] = (),
) -> Components:
    """Loads and partitions both models, makes the gate and the text source (collective over the world).

    Args:
        config: The configuration of the run.
        context: The grid of processes.
        tokenizer: The tokenizer of both models.
        examples: All that the run trains on: a source may write their text before the first step.
    """
    loss = config.loss
    check_backend(loss.backend, context.device)
    decode_plan = _plan_decode_batches(config, context)
    student_model, teacher_model = load_models(config, tokenizer)
    zero_stage = config.parallel.zero_stage
    teacher = None
    if teacher_model is not None:
        teacher = frozen_model(
            teacher_model,
            context,
            zero_stage=zero_stage,
            dtype=config.model.teacher.dtype,
            deepspeed_settings=config.deepspeed,
        )
    student = trained_model(
        student_model,
        context,
        zero_stage=zero_stage,
        dtype=config.model.student.dtype,
        optim=config.optim,
        train=config.train,
        gradient_checkpointing=config.model.gradient_checkpointing,
        deepspeed_settings=config.deepspeed,
    )
    gate = None
    if teacher is not None and loss.uses_gate:
        gate = GateTrainer(
            QuantileGate.from_config(loss, seed=config.run.seed), lr=config.optim.gate_lr, context=context
        )
    source = source_class(config).build(
        SourceInputs(config, context, student, teacher, eos_ids(tokenizer), decode_plan, examples)
    )
    return Components(
        config=config,
        context=context,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id,
        span_prior=make_span_prior(config.data.span_prior, config.data.span_window),
        loss=loss,
        student=student,
        teacher=teacher,
        gate=gate,
        source=source,
        decode_plan=decode_plan,
    )


def _plan_decode_batches(config: RunConfig, context: ParallelContext) -> DecodeBatchPlan:
    """How many examples this run writes at a time (the same on every rank)."""

    def token_bytes(model: str | None) -> int:
        """Bytes of one token in the cache of "teacher" or "student"; 0 for None."""
        key = f"model.{model}.path"
        path = model_paths(config).get(key)
        if path is None:
            return 0
        dtype = config.model.teacher.dtype if model == "teacher" else config.model.student.dtype
        return kv_bytes_per_token(load_model_config(path, key), context.tp_size, DTYPES[dtype])

    needs, data = source_class(config).cache_needs(), config.data
    longest = data.max_prompt_tokens + min(config.generation.max_new_tokens, data.max_tokens - 1)
    return plan_decode_batches(
        examples_per_rank=MAX_EXAMPLES if needs.is_offline else config.train.global_batch_size // context.dp_size,
        columns=longest,
        example_columns=min(longest, data.max_tokens),
        decoder_bytes=token_bytes(needs.decoder),
        prefiller_bytes=token_bytes("teacher" if needs.is_scored else None),
        max_cache_bytes=config.generation.max_cache_bytes,
    )
