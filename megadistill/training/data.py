"""The rows of a run: read, tokenized, and dealt to steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.config.schema import RunConfig
from megadistill.data.dataset import read_examples
from megadistill.data.encode import TokenizedExample, tokenize_examples
from megadistill.data.pairing import check_ids
from megadistill.data.prompts import PromptSettings, choose_template
from megadistill.data.row_file import has_references
from megadistill.data.row_store import RowStore, said
from megadistill.data.sample import Sample
from megadistill.data.sampler import BatchSampler
from megadistill.errors import ConfigError, DataError
from megadistill.generation.sources import source_class
from megadistill.launch.launchers import rank_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Tokenized examples of a run.

    Attributes:
        train: Examples to train on.
        prompts: Further examples, of which only the prompts are used (``data.prompts_path``).
        valid: Examples to validate on.
        report: Counts of what was left out or shortened while they were read.
        template: The template that all of them were rendered with.
        end_id: The token that ends a reference.
        sources: One line for each file about what was read.
    """

    train: Sequence[TokenizedExample]
    prompts: Sequence[TokenizedExample]
    valid: Sequence[TokenizedExample]
    report: dict[str, int]
    template: str
    end_id: int
    sources: tuple[str, ...] = ()

    def batch(self, sampler: BatchSampler, step: int) -> list[Sample]:
        """This data-parallel rank's share of a step; rows of ``data.prompts_path`` lose their references.

        Args:
            sampler: The order of the rows.
            step: The step, 0-based.
        """
        samples = []
        for sequence_id, stream, index in sampler.rows(step):
            if stream == "train":
                row = self.train[index]
                samples.append(Sample(sequence_id, row.prompt_ids, row.prompt, row.response_ids, targets=row.targets))
            else:
                row = self.prompts[index]
                samples.append(Sample(sequence_id, row.prompt_ids, row.prompt))
        return samples


def load_training_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    is_stopping: Callable[[], bool] = lambda: False,
) -> TrainingData:
    """All rows of a run, rendered with one template.

    Args:
        config: The configuration of the run.
        tokenizer: The run's tokenizer.
        vocab_size: V, the number of tokens that both models have.
        is_stopping: Whether this process was asked to stop.

    Raises:
        PreparationStopped: It was, while it prepared rows.
        ConfigError: There are none to train on, the template cannot be used, or they need a token that a model lacks.
        DataError: A file cannot be used.
    """
    data = config.data
    if data.train_path is None:
        raise ConfigError("data.train_path is missing: nothing to train on (its rows need no references)")
    if data.valid_path is not None and _reads_the_same_split(data.train_path, data.valid_path):
        raise ConfigError(
            f"data.valid_path={data.valid_path} is data.train_path, of which the split {data.hub_split!r} is read: the "
            "run would validate on its training rows; name a file of the folder, or a data set of its own"
        )
    given = row_paths(config)
    if data.cache_dir is None:
        sets = _listed(config, tokenizer, given)
    else:
        sets = _prepared(config, tokenizer, given, is_stopping)
    report: dict[str, int] = {}
    rows: dict[str, Sequence[TokenizedExample]] = {"train": [], "prompts": [], "valid": []}
    for name, loaded in sets.items():
        report |= {f"{name}/{key}": value for key, value in loaded.counts.items() if value}
        check_ids(loaded.rows, vocab_size, tokenizer, given[name])
        rows[name] = loaded.rows
    source_class(config).check_examples(config, rows["train"], rows["valid"])
    if config.loss.looks_ahead and not has_references(rows["train"]):
        raise DataError(
            f"{data.train_path}: no row has a reference, and with loss.gate_objective=student the gate learns from "
            "references alone; minimize, maximize and frozen need none",
            setting="loss.gate_objective",
        )
    if config.train.eval_every and not rows["valid"]:
        raise DataError(
            f"{data.valid_path}: no row is left to validate on (train.eval_every={config.train.eval_every})"
        )
    return TrainingData(
        **rows,
        report=report,
        template=sets["train"].template,
        end_id=sets["train"].end_id,
        sources=tuple(loaded.description for loaded in sets.values()),
    )


def row_paths(config: RunConfig) -> dict[str, str]:
    """The sources of a run's rows: "train", "prompts" and "valid", where there are any."""
    data = config.data
    paths = {"train": data.train_path, "prompts": data.prompts_path, "valid": data.valid_path}
    return {name: path for name, path in paths.items() if path}


def _reads_the_same_split(train: str, valid: str) -> bool:
    """Whether two paths are one folder or hub data set, of which only one split is read."""
    local = Path(train)
    if local.is_file() or Path(valid).is_file():  # the same file is meant
        return False
    return train == valid or (local.is_dir() and Path(valid).is_dir() and local.resolve() == Path(valid).resolve())


@dataclass(frozen=True)
class _Loaded:
    """The rows of one file, what happened to them as summary.json has it, and what they have in common."""

    rows: Sequence[TokenizedExample]
    counts: dict[str, int]
    description: str
    template: str
    end_id: int


def _listed(config: RunConfig, tokenizer: PreTrainedTokenizerBase, paths: Mapping[str, str]) -> dict[str, _Loaded]:
    """Rows that this process reads and keeps."""
    read = {name: read_examples(path, config.data, prompts_only=name == "prompts") for name, path in paths.items()}
    settings = PromptSettings.of(config.data)
    are_chats = any(source.are_chats for source in read.values())
    settings = replace(settings, template=choose_template(settings, tokenizer, are_chats))
    loaded = {}
    for name, source in read.items():
        result = tokenize_examples(source.examples, tokenizer, settings)
        counts = _counts(
            len(result.rows),
            skipped=len(source.skipped) + len(result.skipped),
            dropped=result.num_dropped,
            truncated=result.num_truncated,
            cut=result.num_truncated_responses,
            without_reference=result.num_without_reference,
        )
        loaded[name] = _Loaded(result.rows, counts, source.description, settings.template, result.end_id)
    return loaded


def _prepared(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, paths: Mapping[str, str], is_stopping: Callable[[], bool]
) -> dict[str, _Loaded]:
    """Rows in files that the processes share."""
    watch = said(rank_of(os.environ), is_stopping)
    template, sets = RowStore(config.data, tokenizer, watch).prepared(paths)
    return {
        name: _Loaded(made.rows, _counts(len(made.rows), **made.counts), made.description, template, made.end_id)
        for name, made in sets.items()
    }


def _counts(
    num_rows: int, *, skipped: int, dropped: int, truncated: int, cut: int, without_reference: int
) -> dict[str, int]:
    return {
        "rows": num_rows,
        "skipped": skipped,
        "dropped": dropped,
        "truncated_prompts": truncated,
        "truncated_responses": cut,
        "without_reference": without_reference,
    }


def make_sampler(config: RunConfig, data: TrainingData, dp_rank: int = 0, dp_size: int = 1) -> BatchSampler:
    """The order of the rows.

    Args:
        config: The configuration of the run.
        data: The rows.
        dp_rank: The data-parallel rank whose share is dealt.
        dp_size: Number of data-parallel ranks.

    Raises:
        ConfigError: A stream has no rows, or no share of a batch.
    """
    return BatchSampler(
        num_rows=len(data.train),
        num_prompt_rows=len(data.prompts),
        prompts_ratio=config.data.prompts_ratio,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
