"""The rows of a run: read, tokenized, and dealt to steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megadistill.config.schema import DataSection, RunConfig
from megadistill.data.dataset import FieldNames, load_examples
from megadistill.data.pairing import check_ids
from megadistill.data.sample import Sample
from megadistill.data.sampler import BatchSampler
from megadistill.data.tokenize import TokenizedExample, tokenize_examples
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
    """

    train: list[TokenizedExample]
    prompts: list[TokenizedExample]
    valid: list[TokenizedExample]
    report: dict[str, int]

    def batch(self, sampler: BatchSampler, step: int) -> list[Sample]:
        """This data-parallel rank's share of a step; rows of ``data.prompts_path`` lose their references.

        Args:
            sampler: The order of the rows.
            step: The step, 0-based.
        """
        samples = []
        for sequence_id, stream, index in sampler.rows(step):
            example = self.train[index] if stream == "train" else self.prompts[index]
            reference_ids = example.response_ids if stream == "train" else None
            samples.append(Sample(sequence_id, example.prompt_ids, example.prompt, reference_ids))
        return samples


def load_rows(
    path: str, tokenizer: PreTrainedTokenizerBase, data: DataSection, report: dict[str, int], name: str
) -> list[TokenizedExample]:
    """Reads and tokenizes one file.

    Args:
        path: The file, or a data set of the hub.
        tokenizer: The tokenizer.
        data: How it is read.
        report: Counts of what was left out or shortened are added here.
        name: Prefix of the counts.

    Raises:
        DataError: The file cannot be used.
    """
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


def load_training_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TrainingData:
    """All rows of a run.

    Args:
        config: The configuration of the run.
        tokenizer: The run's tokenizer.
        vocab_size: V, the number of tokens that both models have.

    Raises:
        ConfigError: There are none to train on, or they need a token that a model does not have.
        DataError: A file cannot be used.
    """
    data = config.data
    report: dict[str, int] = {}
    if data.train_path is None:
        raise ConfigError("data.train_path is missing: nothing to train on (its rows need no references)")
    paths = {"train": data.train_path, "prompts": data.prompts_path, "valid": data.valid_path}
    rows = {name: load_rows(path, tokenizer, data, report, name) if path else [] for name, path in paths.items()}
    for name, path in paths.items():
        check_ids(rows[name], vocab_size, tokenizer, str(path))
    source_class(config).check_examples(config, rows["train"], rows["valid"])
    if config.train.eval_every and not rows["valid"]:
        raise DataError(
            f"{data.valid_path}: no row is left to validate on (train.eval_every={config.train.eval_every})"
        )
    return TrainingData(rows["train"], rows["prompts"], rows["valid"], report)


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
