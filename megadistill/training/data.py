"""The rows of a run: read, tokenized, and dealt to steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.config.schema import RunConfig
from megadistill.data.dataset import read_examples
from megadistill.data.encode import Tokenized, TokenizedExample, tokenize_examples
from megadistill.data.pairing import check_ids
from megadistill.data.prompts import PromptSettings, choose_template
from megadistill.data.sample import Sample
from megadistill.data.sampler import BatchSampler
from megadistill.errors import ConfigError, DataError
from megadistill.generation.sources import source_class

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

    train: list[TokenizedExample]
    prompts: list[TokenizedExample]
    valid: list[TokenizedExample]
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


def load_training_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TrainingData:
    """All rows of a run, rendered with one template.

    Args:
        config: The configuration of the run.
        tokenizer: The run's tokenizer.
        vocab_size: V, the number of tokens that both models have.

    Raises:
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
    paths = {"train": data.train_path, "prompts": data.prompts_path, "valid": data.valid_path}
    read = {name: read_examples(path, data, prompts_only=name == "prompts") for name, path in paths.items() if path}
    settings = PromptSettings.of(data)
    are_chats = any(source.are_chats for source in read.values())
    settings = replace(settings, template=choose_template(settings, tokenizer, are_chats))
    report: dict[str, int] = {}
    tokenized = {name: tokenize_examples(source.examples, tokenizer, settings) for name, source in read.items()}
    for name, result in tokenized.items():
        report |= _counts(name, result, len(read[name].skipped))
    rows = {name: tokenized[name].rows if name in tokenized else [] for name in paths}
    for name, path in paths.items():
        check_ids(rows[name], vocab_size, tokenizer, str(path))
    source_class(config).check_examples(config, rows["train"], rows["valid"])
    if config.loss.looks_ahead and not any(row.response_ids for row in rows["train"]):
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
        template=settings.template,
        end_id=tokenized["train"].end_id,
        sources=tuple(source.description for source in read.values()),
    )


def _reads_the_same_split(train: str, valid: str) -> bool:
    """Whether two paths are one folder or hub data set, of which only one split is read."""
    local = Path(train)
    if local.is_file() or Path(valid).is_file():  # the same file is meant
        return False
    return train == valid or (local.is_dir() and Path(valid).is_dir() and local.resolve() == Path(valid).resolve())


def _counts(name: str, result: Tokenized, num_skipped: int) -> dict[str, int]:
    """What happened to the rows of one file, as summary.json has it."""
    counts = {
        "rows": len(result.rows),
        "skipped": num_skipped + len(result.skipped),
        "dropped": result.num_dropped,
        "truncated_prompts": result.num_truncated,
        "truncated_responses": result.num_truncated_responses,
        "without_reference": result.num_without_reference,
    }
    return {f"{name}/{key}": value for key, value in counts.items() if value}


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
