"""Builds the components of a run from its configuration: tokenizer, models, engines, gate, text source."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megadistill.checkpoint.hub_commits import at_commit, commits_now, moved, recorded_commits
from megadistill.checkpoint.model_folder import model_folder
from megadistill.config.schema import RunConfig
from megadistill.data.pairing import pair_tokenizers
from megadistill.data.row_file import ChainedRows
from megadistill.data.spans import SpanPrior, make_span_prior
from megadistill.data.tokenize import has_tokenizer, load_tokenizer, vocabulary_size
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.decoding.plan import kv_bytes_per_token
from megadistill.decoding.rollout import MAX_EXAMPLES
from megadistill.engines.partitioned import PartitionedModel, frozen_model
from megadistill.engines.student import Student, trained_model
from megadistill.errors import ConfigError
from megadistill.generation.sources import source_class
from megadistill.generation.sources.base import SourceInputs
from megadistill.launch.launchers import rank_of
from megadistill.losses import QuantileGate
from megadistill.losses.backends import check_backend
from megadistill.models.adapter_files import weights_folder
from megadistill.models.end_tokens import describe_end_tokens, end_tokens, named_end_tokens
from megadistill.models.families import head_counts
from megadistill.models.folder_checks import check_weights, has_weights
from megadistill.models.loading import (
    DTYPES,
    LoadedModel,
    load_model_config,
    load_model_on_ranks,
    shared_vocab_size,
)
from megadistill.models.lora import with_adapters
from megadistill.models.positions import check_positions
from megadistill.models.weight_files import check_weight_files
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.node import Node
from megadistill.parallel.topology import check_hpz_size, gradient_accumulation_steps, resolve_tp_size
from megadistill.training.components import Components
from megadistill.training.data import TrainingData
from megadistill.training.focus import TokenFocus
from megadistill.training.gate import GateTrainer
from megadistill.training.interpolation import Interpolation
from megadistill.training.length import RunLength

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Added to a multiple of run.seed, so that random weights of teacher and student differ.
_TEACHER_SEED, _STUDENT_SEED = 1, 2


def model_paths(config: RunConfig) -> dict[str, str]:
    """Configuration key -> folder, configuration file or hub name of the models that this run uses.

    A run directory is the ``hf/`` of its latest checkpoint, which may be another one the next time; a hub name has the
    commit that the run began with, where it has begun.

    Raises:
        CheckpointError: A run has no checkpoint.
    """
    paths = {"model.student.path": config.model.student.path}
    if config.needs_teacher and config.model.teacher.path is not None:
        paths = {"model.teacher.path": config.model.teacher.path} | paths
    commits = recorded_commits(config.run.dir)
    return {key: at_commit(model_folder(path), commits) for key, path in paths.items()}


def _located(config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """``model_paths``, and hub name -> the commit that the run uses: what it began with, else what the name is now.

    Logs what moved since.
    """
    teacher = config.model.teacher.path if config.needs_teacher else None
    recorded = recorded_commits(config.run.dir)
    now = commits_now([teacher, config.model.student.path, config.model.tokenizer])
    for line in moved(recorded, now):
        get_logger(component="train").warning(line)
    commits = now | recorded
    return {key: at_commit(path, commits) for key, path in model_paths(config).items()}, commits


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
        check_weight_files(weights_folder(path, key), key, getattr(model_config, "transformers_weights", None))
        check_positions(model_config, config.data.max_tokens, "data.max_tokens", f"{key} ({path})")
    tp_size = resolve_tp_size(config.parallel.tp_size, world_size, counts)
    rows = config.train.micro_batch_size if config.train.micro_batch_tokens is None else 1
    gradient_accumulation_steps(config.train.global_batch_size, rows, world_size // tp_size)
    check_hpz_size(config.parallel.zero.hpz_partition_size, world_size // tp_size)
    return tp_size


def check_adapters(config: RunConfig) -> None:
    """Checks that adapters of the student have a base from which they can be loaded again.

    Raises:
        ConfigError: Its weights are random, a sharded model, or adapters themselves.
    """
    path = model_paths(config)["model.student.path"]
    if config.model.student.lora.enabled:
        check_weights(path, "model.student.path (with model.student.lora)")


def tokenizer_paths(config: RunConfig, models: dict[str, str]) -> dict[str, str]:
    """Configuration key -> path of all tokenizers of a run, the one that it uses first.

    That is ``model.tokenizer``, else the student's, else the teacher's.

    Args:
        config: The configuration of the run.
        models: From ``model_paths``.

    Raises:
        ConfigError: There is none.
    """
    paths = {key: path for key, path in reversed(models.items()) if has_tokenizer(path)}
    if config.model.tokenizer is not None:
        path = at_commit(model_folder(config.model.tokenizer), recorded_commits(config.run.dir))
        paths = {"model.tokenizer": path} | paths
    if not paths:
        raise ConfigError(
            f"no tokenizer: set model.tokenizer; {', '.join(f'{k} ({p})' for k, p in models.items())} bring none"
        )
    return paths


def run_tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerBase, int]:
    """The run's tokenizer, and V, the number of tokens that both models have.

    Rank 0 logs in what the tokenizers of the models differ from it, where that does no harm.

    Raises:
        ConfigError: There is none, teacher and student cannot be compared token by token, or a model has too few rows.
    """
    models = model_paths(config)
    paths = tokenizer_paths(config, models)
    by_path = {path: load_tokenizer(path) for path in dict.fromkeys(paths.values())}
    first, *others = by_path
    used, log = by_path[first], get_logger(rank_of(os.environ), "train")
    for path in others:
        notes = pair_tokenizers(used, by_path[path], names=(first, path))
        if notes:
            log.info(f"tokenizers differ: {'; '.join(notes)}. The run uses the tokenizer of {first}.")
    rows = {key: int(load_model_config(path, key).vocab_size) for key, path in models.items()}
    sizes = [vocabulary_size(tokenizer) for tokenizer in by_path.values()]
    return used, shared_vocab_size(rows.get("model.teacher.path"), rows["model.student.path"], sizes)


def build_components(
    config: RunConfig,
    context: ParallelContext,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    data: TrainingData,
    length: RunLength,
    adapt: Callable[[SourceInputs], SourceInputs] = lambda inputs: inputs,
) -> Components:
    """Loads and partitions both models, makes the gate and the text source (collective over the world).

    Args:
        config: The configuration of the run.
        context: The grid of processes.
        tokenizer: The tokenizer of both models.
        vocab_size: V, the number of tokens that both models have.
        data: What the run trains on: a source may write its text before the first step.
        length: How many steps the run has.
        adapt: Changes what the text source is made of: a dry run (``planning``) has no text to look at.
    """
    check_backend(config.loss.backend, context.device)
    say_what_exceeds_the_budget(config, context)
    paths, commits = context.run_on_rank0(lambda: _located(config))  # once: checkpoints are saved, branches move
    decode_plan = _plan_decode_batches(config, paths, context)
    ends = context.run_on_rank0(lambda: _end_tokens(config, paths, tokenizer, vocab_size, data.end_id))
    student_ends, teacher_ends = ends["model.student.path"], ends.get("model.teacher.path", frozenset())
    student, teacher = _engines(config, context, paths, vocab_size)
    inputs = SourceInputs(
        config=config,
        context=context,
        student=student,
        teacher=teacher,
        eos_ids=student_ends,
        teacher_eos_ids=teacher_ends,
        decode_plan=decode_plan,
        examples=ChainedRows([data.train, data.prompts]),
        teacher_folder=paths.get("model.teacher.path"),
        max_steps=length.max_steps,
    )
    return Components(
        config=config,
        context=context,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id < vocab_size else 0,  # masked, but it needs a row
        eos_ids=student_ends,
        teacher_eos_ids=teacher_ends,
        span_prior=span_prior_of(config),
        loss=config.loss,
        student=student,
        teacher=teacher,
        gate=None if teacher is None else _gate(config, context),
        source=source_class(config).build(adapt(inputs)),
        decode_plan=decode_plan,
        model_folders=paths,
        hub_commits=commits,
        length=length,
        interpolation=Interpolation.of(config.loss.taid, length.max_steps),
        focus=TokenFocus.of(config.loss.adakd, length.max_steps),
    )


def span_prior_of(config: RunConfig) -> SpanPrior:
    """Of ``data.span_prior``; none, and no parser is needed, without a span loss."""
    name = config.data.span_prior if config.loss.span > 0 else "none"
    return make_span_prior(name, config.data.span_window, config.data.span_verb_objects)


def _gate(config: RunConfig, context: ParallelContext) -> GateTrainer | None:
    if not config.loss.uses_gate:
        return None
    gate = QuantileGate.from_config(config.loss, seed=config.run.seed)
    return GateTrainer(gate, lr=config.optim.gate_lr, context=context)


def say_what_exceeds_the_budget(config: RunConfig, context: ParallelContext) -> None:
    """One line where ``train.micro_batch_tokens`` may be less than a single example."""
    budget, longest = config.train.micro_batch_tokens, 2 * config.data.max_tokens
    if budget is not None and budget < longest:
        get_logger(context.rank, "train").warning(
            f"train.micro_batch_tokens={budget}: an example of up to {longest} tokens (reference and response, "
            f"data.max_tokens={config.data.max_tokens} each) that is larger gets a pass of its own"
        )


def _end_tokens(
    config: RunConfig, paths: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_id: int
) -> dict[str, frozenset[int]]:
    """Key of each model -> what ends its text, by one process: hub names and files are looked up once.

    Logs what is not simply the tokenizer's EOS.
    """
    log, ends = get_logger(component="train"), {}
    for key, path in paths.items():
        ends[key] = end_tokens(path, tokenizer, vocab_size=vocab_size, asked=config.model.eos_tokens, more={end_id})
        if ends[key] != {tokenizer.eos_token_id}:
            log.info(f"{path} stops after {describe_end_tokens(ends[key], tokenizer)}")
        ignored = set(named_end_tokens(path)) - ends[key]
        if ignored:
            log.info(
                f"{path} also names the end tokens {describe_end_tokens(ignored, tokenizer)}, which are not used"
                + ("" if config.model.eos_tokens is None else f" (model.eos_tokens={config.model.eos_tokens})")
            )
    if config.model.eos_tokens is not None and all(end_id not in ids for ids in ends.values()):
        log.warning(
            f"references end with {describe_end_tokens({end_id}, tokenizer)}, which is not among "
            f"model.eos_tokens={config.model.eos_tokens}: what learns from them writes on after it"
        )
    return ends


def _engines(
    config: RunConfig, context: ParallelContext, paths: Mapping[str, str], vocab_size: int
) -> tuple[Student, PartitionedModel | None]:
    """Both models loaded and partitioned, the teacher first (collective over the world).

    The student's files are opened and checked before the teacher's are read. Random weights, which exist at once, are
    not made before the teacher's are partitioned.
    """
    offload = config.parallel.offload
    if offload != "none" and context.device.type == "cpu":
        get_logger(context.rank, "train").warning(f"parallel.offload={offload} saves nothing here: there is no GPU")
    node = Node.build(context, has_group=config.model.read == "copy")

    def load(model: str) -> LoadedModel:
        key, is_teacher = f"model.{model}.path", model == "teacher"
        loaded = load_model_on_ranks(
            paths[key],
            node,
            dtype=config.model.teacher.dtype if is_teacher else config.model.student.dtype,
            vocab_size=vocab_size,
            seed=config.run.seed * 1_000 + (_TEACHER_SEED if is_teacher else _STUDENT_SEED),
            attention=config.model.attention,
            where=key,
            read=config.model.read,
        )
        lora = config.model.student.lora
        if is_teacher or not lora.enabled:
            return loaded
        return with_adapters(loaded, lora, seed=config.run.seed, where="model.student.lora", base=paths[key])

    opened = load("student") if has_weights(paths["model.student.path"]) else None
    common: dict[str, Any] = {
        "zero_stage": config.parallel.zero_stage,
        "zero": config.parallel.zero,
        "deepspeed_settings": config.deepspeed,
        "cpu_products": config.generation.cpu_products,
        "cuda_graphs": config.generation.cuda_graphs,
    }
    teacher = None
    if "model.teacher.path" in paths:
        teacher = frozen_model(
            load("teacher"),
            context,
            dtype=config.model.teacher.dtype,
            offload=config.parallel.offloads_teacher,
            **common,
        )
    student = trained_model(
        load("student") if opened is None else opened,
        context,
        dtype=config.model.student.dtype,
        optim=config.optim,
        train=config.train,
        gradient_checkpointing=config.model.gradient_checkpointing,
        offload=config.parallel.offloads_optimizer,
        **common,
    )
    return student, teacher


def _plan_decode_batches(config: RunConfig, paths: Mapping[str, str], context: ParallelContext) -> DecodeBatchPlan:
    """How many examples this run writes at a time (the same on every rank)."""

    def token_bytes(model: str | None) -> int:
        """Bytes of one token in the cache of "teacher" or "student"; 0 for None."""
        key = f"model.{model}.path"
        path = paths.get(key)
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
        decoder_bytes=token_bytes(needs.decoder) + token_bytes("teacher" if needs.is_written_by_both else None),
        prefiller_bytes=token_bytes("teacher" if needs.is_scored else None),
        max_cache_bytes=config.generation.max_cache_bytes,
    )
