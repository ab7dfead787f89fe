"""Builds the components of a run from its configuration: tokenizer, rows, models, engines, gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.config.schema import DataSection, LossSection, RunConfig
from megadistill.data.dataset import FieldNames, load_examples
from megadistill.data.sampler import BatchSampler
from megadistill.data.spans import make_span_prior
from megadistill.data.tokenize import (
    TokenizedExample,
    assert_same_vocabulary,
    load_tokenizer,
    tokenize_examples,
    vocabulary_size,
)
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.decoding.plan import kv_bytes_per_token
from megadistill.decoding.rollout import MAX_ROWS
from megadistill.engines.student import trained_model
from megadistill.engines.teacher import frozen_model
from megadistill.errors import ConfigError, DataError
from megadistill.generation.policy import TextPolicy
from megadistill.losses import LossConfig, QuantileGate
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
from megadistill.training.teacher_text import teacher_texts
from megadistill.training.texts import BatchRow

# Random weights of teacher and student differ although both come from run.seed.
_TEACHER_SEED, _STUDENT_SEED = 1, 2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows and what was left out while reading them."""

    train: list[TokenizedExample]
    prompts: list[TokenizedExample]
    valid: list[TokenizedExample]
    report: dict[str, int]

    def batch(self, sampler: BatchSampler, step: int) -> list[BatchRow]:
        """This data-parallel rank's rows of a step; prompts-only rows lose their references."""
        rows = []
        for sequence_id, stream, index in sampler.rows(step):
            example = self.train[index] if stream == "train" else self.prompts[index]
            rows.append(BatchRow(sequence_id, example, example.response_ids if stream == "train" else None))
        return rows


def model_paths(config: RunConfig) -> dict[str, str]:
    """Configuration key -> path of the models that this run uses."""
    paths = {"model.student.path": config.model.student.path}
    if config.needs_teacher and config.model.teacher.path is not None:
        paths = {"model.teacher.path": config.model.teacher.path} | paths
    return paths


def check_models(config: RunConfig, world_size: int) -> int:
    """Checks both models' configurations against the run before anything heavy is loaded; returns the resolved tp_size.

    Raises ConfigError or TopologyError.
    """
    counts: list[int] = []
    for key, path in model_paths(config).items():
        model_config = load_model_config(path, key)
        counts += head_counts(model_config, key)
        check_positions(model_config, config.data.max_tokens, "data.max_tokens", f"{key} ({path})")
    tp_size = resolve_tp_size(config.parallel.tp_size, world_size, counts)
    gradient_accumulation_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size // tp_size)
    return tp_size


def has_tokenizer(path: str) -> bool:
    """Whether a model path may be asked for a tokenizer: hub names are, local configurations alone are not."""
    local = Path(path)
    return not local.exists() or (local.is_dir() and any((local / name).exists() for name in _TOKENIZER_FILES))


def run_tokenizer(config: RunConfig) -> Any:
    """The run's tokenizer, after checking that every model that brings one brings the same.

    Raises ConfigError when there is none or when teacher and student differ.
    """
    sources = {key: path for key, path in reversed(model_paths(config).items()) if has_tokenizer(path)}
    if config.model.tokenizer is not None:
        sources = {"model.tokenizer": config.model.tokenizer} | sources
    if not sources:
        raise ConfigError(
            f"no tokenizer: set model.tokenizer; {', '.join(f'{k} ({p})' for k, p in model_paths(config).items())} "
            "bring none"
        )
    loaded = {key: load_tokenizer(path) for key, path in sources.items()}
    first = next(iter(loaded))
    for key, tokenizer in loaded.items():
        if key != first:
            assert_same_vocabulary(loaded[first], tokenizer, names=(sources[first], sources[key]))
    return loaded[first]


def load_rows(
    path: str, tokenizer: Any, data: DataSection, report: dict[str, int], name: str
) -> list[TokenizedExample]:
    """Reads and tokenises one file as ``data`` says, adding counts to ``report``. Raises DataError."""
    fields = FieldNames(data.instruction_field, data.input_field, data.output_field)
    examples = load_examples(
        path, fields=fields, split=data.hub_split, config_name=data.hub_config, skip_bad_rows=data.skip_bad_rows
    )
    tokenized = tokenize_examples(
        examples.examples,
        tokenizer,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=data.max_tokens,
        long_prompt=data.long_prompt,
    )
    counts = {
        "rows": len(tokenized.rows),
        "skipped": len(examples.skipped),
        "dropped": tokenized.num_dropped,
        "truncated_prompts": tokenized.num_truncated,
        "truncated_responses": tokenized.num_truncated_responses,
        "without_reference": tokenized.num_without_reference,
    }
    report |= {f"{name}/{key}": value for key, value in counts.items() if value}
    return tokenized.rows


def load_training_data(config: RunConfig, tokenizer: Any) -> TrainingData:
    """All rows of a run. Raises ConfigError when there are none to train on, DataError for what is wrong with a
    file."""
    data, report = config.data, {}
    if data.train_path is None:
        raise ConfigError("data.train_path is missing: nothing to train on (rows without references are welcome there)")
    paths = {"train": data.train_path, "prompts": data.prompts_path, "valid": data.valid_path}
    rows = {name: load_rows(path, tokenizer, data, report, name) if path else [] for name, path in paths.items()}
    generation = config.generation
    least_phi = {"mixed": generation.student_ratio, "off_policy": generation.off_policy.initial_phi, "dataset": 0.0}
    if least_phi.get(generation.mode, 1.0) < 1 and not any(row.response_ids for row in rows["train"]):
        raise DataError(
            f"{data.train_path}: no row has a reference, and generation.mode={generation.mode} trains on nothing else "
            "wherever it does not use student text"
        )
    if config.train.eval_every and not rows["valid"]:
        raise DataError(
            f"{data.valid_path}: no row is left to validate on (train.eval_every={config.train.eval_every})"
        )
    is_waiting = generation.mode == "off_policy" and generation.off_policy.initial_phi == 0
    if is_waiting and not any(row.response_ids for row in rows["valid"][: config.train.eval_rows]):
        raise DataError(
            f"{data.valid_path}: none of the first train.eval_rows={config.train.eval_rows} rows has a reference, and "
            "generation.mode=off_policy with initial_phi=0 waits for their likelihood"
        )
    return TrainingData(rows["train"], rows["prompts"], rows["valid"], report)


def make_sampler(config: RunConfig, data: TrainingData, dp_rank: int = 0, dp_size: int = 1) -> BatchSampler:
    """The order of the rows. Raises ConfigError for streams that have no rows or no share of a batch."""
    return BatchSampler(
        num_rows=len(data.train),
        num_prompt_rows=len(data.prompts),
        prompts_ratio=config.data.prompts_ratio,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def loss_config(loss: LossSection) -> LossConfig:
    """The loss section as the losses want it."""
    return LossConfig(**loss.model_dump())


def load_models(config: RunConfig, tokenizer: Any) -> tuple[LoadedModel, LoadedModel | None]:
    """Student and teacher on the CPU, cut to the shared vocabulary."""
    paths = model_paths(config)
    rows = {key: int(load_model_config(path, key).vocab_size) for key, path in paths.items()}
    vocab_size = shared_vocab_size(
        rows.get("model.teacher.path"), rows["model.student.path"], vocabulary_size(tokenizer)
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
    config: RunConfig, context: ParallelContext, tokenizer: Any, rows: Sequence[TokenizedExample] = ()
) -> Components:
    """Loads and partitions both models and makes the gate (collective over the world).

    ``rows``: everything that mode ``teacher`` will train on; the teacher writes its text here.
    """
    loss = loss_config(config.loss)
    check_backend(loss.backend, context.device)
    decode_plan = _plan_decode_batches(config, context)
    student_model, teacher_model = load_models(config, tokenizer)
    zero_stage = config.parallel.zero_stage
    teacher = None
    if teacher_model is not None:
        teacher = frozen_model(teacher_model, context, zero_stage=zero_stage, dtype=config.model.teacher.dtype)
    student = trained_model(
        student_model,
        context,
        zero_stage=zero_stage,
        dtype=config.model.student.dtype,
        optim=config.optim,
        train=config.train,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    gate = None
    if teacher is not None and loss.uses_gate:
        gate = GateTrainer(
            QuantileGate.from_config(loss, seed=config.run.seed), lr=config.optim.gate_lr, context=context
        )
    eos_ids = frozenset({tokenizer.eos_token_id})
    texts = None
    if config.generation.mode == "teacher":
        assert teacher is not None
        texts = teacher_texts(config, rows, teacher, context, eos_ids=eos_ids, rows_at_once=decode_plan.num_rows)
    return Components(
        config=config,
        context=context,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id,
        span_prior=make_span_prior(config.data.span_prior, config.data.span_window),
        loss=loss,
        student=student,
        teacher=teacher,
        gate=gate,
        policy=TextPolicy(
            config.generation,
            seed=config.run.seed,
            max_steps=config.train.max_steps,
            global_batch_size=config.train.global_batch_size,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
        ),
        decode_plan=decode_plan,
        teacher_texts=texts,
    )


def _plan_decode_batches(config: RunConfig, context: ParallelContext) -> DecodeBatchPlan:
    """How many rows this run writes at a time (the same on every rank)."""

    def token_bytes(key: str, dtype: str) -> int:
        path = model_paths(config).get(key)
        return kv_bytes_per_token(load_model_config(path, key), context.tp_size, DTYPES[dtype]) if path else 0

    student = token_bytes("model.student.path", config.model.student.dtype)
    teacher = token_bytes("model.teacher.path", config.model.teacher.dtype)
    mode, data = config.generation.mode, config.data
    longest = data.max_prompt_tokens + min(config.generation.max_new_tokens, data.max_tokens - 1)
    writer, reader = {"teacher": (teacher, 0), "dataset": (0, 0)}.get(mode, (student, teacher))
    return plan_decode_batches(
        # The student writes the rows of a step, the teacher those of the whole file.
        rows_per_rank=MAX_ROWS if mode == "teacher" else config.train.global_batch_size // context.dp_size,
        columns=longest,
        one_row=min(longest, config.data.max_tokens),
        writer_bytes=writer,
        reader_bytes=reader,
        max_cache_bytes=config.generation.max_cache_bytes,
    )
