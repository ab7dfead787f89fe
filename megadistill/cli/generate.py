"""``megadistill generate``: responses of a model to a file of prompts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megadistill.cli.parsing import Parser, refuse_unwritable, value_of
from megadistill.config.sampling import SamplingOptions
from megadistill.config.section import NonEmptyStr, NonNegativeFloat, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadistill.cli.resumable import RowWriter
    from megadistill.data.dataset import Example
    from megadistill.data.tokenize import TokenizedExample
    from megadistill.parallel.context import ParallelContext

# Batches of one data-parallel rank between two writes: few enough to lose little, enough that ranks rarely wait.
_BATCHES_PER_BLOCK = 8


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parsed = _parser().parse(arguments)
    if parsed.output is not None:
        _generate(parsed, None)
        return 0
    rows = sys.stdout
    # Standard output gets rows only: everything else that is printed goes to standard error meanwhile.
    with redirect_stdout(sys.stderr):
        _generate(parsed, rows)
    return 0


def _generate(parsed: Namespace, stream: TextIO | None) -> None:
    """Writes to ``parsed.output``, or to ``stream`` where there is one."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.cli.resumable import ResumableFile, StandardOutput
    from megadistill.config.schema import ParallelSection
    from megadistill.data.dataset import load_examples
    from megadistill.data.tokenize import load_tokenizer, tokenize_examples, vocabulary_size
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings, write_answers
    from megadistill.evaluation.processes import inference_context
    from megadistill.models.end_tokens import end_tokens
    from megadistill.models.loading import check_positions, load_model_config

    if stream is None:
        refuse_unwritable(parsed.output, is_file=True)
    folder = model_folder(parsed.model)
    limit = parsed.max_prompt_tokens + parsed.max_new_tokens
    asked = "--max-prompt-tokens + --max-new-tokens"
    config = load_model_config(folder, "--model")
    check_positions(config, limit, asked, f"--model ({folder})")
    tokenizer = load_tokenizer(parsed.tokenizer or folder)
    examples = load_examples(parsed.input, skip_bad_rows=parsed.skip_bad_rows).examples
    vocab_size = vocabulary_size(tokenizer)
    writer: RowWriter
    if stream is not None:
        writer = StandardOutput(stream)
    else:
        writer = ResumableFile(Path(parsed.output), [row.id for row in examples], overwrite=parsed.overwrite)
    commit = getattr(config, "_commit_hash", None)
    with inference_context(ParallelSection(tp_size=parsed.tp_size or "auto"), {"--model": folder}) as context:
        try:
            ends = context.run_on_rank0(
                lambda: end_tokens(folder, tokenizer, vocab_size=vocab_size, asked=parsed.eos_tokens)
            )
            settings = AnswerSettings(
                tokenizer, ends, parsed.max_new_tokens, limit, parsed.temperature, SamplingOptions.of(parsed),
                parsed.batch_size,
            )  # fmt: skip
            # Before the model is loaded, so that errors come early.
            num_done = context.run_on_rank0(
                lambda: writer.open(_deciding(parsed, folder, commit, tokenizer, ends, examples))
            )
            rows = tokenize_examples(
                examples, tokenizer, template=parsed.template, max_prompt_tokens=parsed.max_prompt_tokens,
                max_tokens=limit, long_prompt=parsed.long_prompt,
            ).rows  # fmt: skip
            if num_done < len(rows):
                with open_model(folder, context, vocab_size=vocab_size, dtype=parsed.dtype, where="--model") as model:
                    answer = partial(write_answers, model, seed=parsed.seed, settings=settings, context=context)
                    _write_blocks(writer, examples, rows, num_done, answer, parsed.batch_size, context)
            context.run_on_rank0(writer.finish)
        finally:
            writer.close()


def _parser() -> Parser:
    parser = Parser(
        "generate",
        "Writes one JSON line (id, instruction, input, prompt, response) per row of a file of instructions, in the\n"
        "order of the file; id is the number of the row there, from 0.",
        "example:\n"
        "  megadistill generate --model runs/demo --template plain --max-prompt-tokens 64 --max-new-tokens 32 \\\n"
        "      --input prompts.jsonl --output out.jsonl --temperature 0\n\n"
        "It reads no configuration file: template, limits and type are those of the command line.\n\n"
        "Finished rows go to FILE.partial, which becomes FILE after the last one. After an interruption, rerun the\n"
        "same command to resume; the result has the same bytes. Until then FILE.progress.json records the settings:\n"
        "other settings are refused. Processes, --tp-size and --batch-size may change; round-off may then choose\n"
        "other tokens: with fp32 in one row of thousands, with bf16 in many rows.\n\n"
        "Under a launcher give --output (launchers print to standard output, too), and --tp-size 1 where it fits.",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="model folder, hub name, checkpoint or run directory"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="rows with an instruction and perhaps an input")
    parser.add_argument(
        "--output", metavar="FILE",
        help="where to write; default: standard output, row by row, which cannot be resumed",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="start over, and replace FILE and the rows of an interrupted run",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's own")
    parser.add_argument(
        "--eos-tokens", type=value_of(NonNegativeInt | NonEmptyStr), nargs="+", metavar="TOKEN",
        help="texts or ids of the tokens that end a response; default: those of the tokenizer and of the model's\n"
        "generation_config.json or config.json",
    )  # fmt: skip
    parser.add_argument("--template", choices=("alpaca", "plain"), default="alpaca", help="default: alpaca")
    parser.add_argument(
        "--max-prompt-tokens", type=value_of(PositiveInt), default=256, metavar="N", help="default: 256"
    )
    parser.add_argument("--max-new-tokens", type=value_of(PositiveInt), default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--long-prompt", choices=("error", "truncate"), default="error", help="prompts over the limit; default: error"
    )
    parser.add_argument(
        "--temperature", type=value_of(NonNegativeFloat), default=1.0, metavar="T", help="0: greedy; default: 1"
    )
    parser.add_section(SamplingOptions)
    parser.add_argument("--seed", type=value_of(NonNegativeInt), default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--batch-size",
        type=value_of(PositiveInt),
        default=16,
        metavar="N",
        help="rows decoded at a time on a data-parallel rank; default: 16",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--tp-size", type=value_of(PositiveInt), metavar="N", help="default: the largest that fits")
    parser.add_argument("--skip-bad-rows", action="store_true", help="skip malformed rows; others keep their numbers")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser


def _deciding(
    parsed: Namespace,
    folder: str,
    commit: str | None,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """The settings that determine the rows, by the names that users know; not how they are computed."""
    from megadistill.cli.resumable import checksum, describe_model, describe_tokenizer
    from megadistill.models.end_tokens import describe_end_tokens

    content = checksum([[example.id, example.instruction, example.input] for example in examples])
    names = (
        "template",
        "max_prompt_tokens",
        "max_new_tokens",
        "long_prompt",
        "temperature",
        *SamplingOptions.model_fields,
        "seed",
        "dtype",
    )
    return {
        **{f"--{name.replace('_', '-')}": getattr(parsed, name) for name in names},
        "the content of --input": f"{len(examples)} rows, checksum {content}",
        "--eos-tokens": describe_end_tokens(eos_ids, tokenizer),
        "the tokenizer": f"{parsed.tokenizer or 'of --model'}, checksum {describe_tokenizer(tokenizer)}",
        **describe_model(folder, commit),
    }


def _write_blocks(
    writer: RowWriter,
    examples: Sequence[Example],
    rows: Sequence[TokenizedExample],
    num_done: int,
    answer: Callable[..., list[str]],
    batch_size: int,
    context: ParallelContext,
) -> None:
    """Answers rows in blocks, each written before the next one starts (collective: every rank calls it)."""
    from megadistill.observability.progress import progress_bar

    size = batch_size * context.dp_size * _BATCHES_PER_BLOCK
    with progress_bar(description="generate", total=len(rows), initial=num_done, unit="row", rank=context.rank) as bar:

        def write(lines: Sequence[str]) -> None:
            # A terminal that shows both gets the rows above the bar.
            with bar.external_write_mode():
                writer.write(lines)

        # A block that was written in part is computed as a whole: other batches could round to other tokens.
        for start in range(num_done - num_done % size, len(rows), size):
            block = range(start, min(start + size, len(rows)))
            # Within a block, the progress of rank 0 stands for that of all ranks.
            count = _Count(bar, start, block.stop, context.dp_size)
            answers = answer(rows=[rows[i] for i in block], progress=count)
            lines = [_line(examples[i], rows[i], text) for i, text in zip(block, answers, strict=True)]
            context.run_on_rank0(partial(write, lines[max(0, num_done - start) :]))
            bar.update(block.stop - bar.n)


class _Count:
    """Moves a bar by the rows of a block that one of several data-parallel ranks has finished."""

    def __init__(self, bar: Any, start: int, stop: int, dp_size: int) -> None:
        self._bar, self._finished, self._stop, self._dp_size = bar, start, stop, dp_size

    def __call__(self, num_rows: int) -> None:
        self._finished += num_rows * self._dp_size
        self._bar.update(max(0, min(self._finished, self._stop) - self._bar.n))


def _line(example: Example, row: TokenizedExample, response: str) -> str:
    return json.dumps(
        {
            "id": row.id,
            "instruction": example.instruction,
            "input": example.input,
            "prompt": row.prompt,
            "response": response,
        },
        ensure_ascii=False,
    )
