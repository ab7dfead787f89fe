"""The options of ``megadistill generate``, and what they are where the user gives none: those of the model's run."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.cli.parsing import Parser, value_of
from megadistill.config.sampling import SamplingOptions
from megadistill.config.schema import RunConfig
from megadistill.config.section import NonEmptyStr, NonNegativeFloat, NonNegativeInt, PositiveInt
from megadistill.errors import ConfigError

# What a model that belongs to no run gets.
_DEFAULTS: Mapping[str, Any] = {
    "template": "auto",
    "chat_template": None,
    "chat_template_kwargs": {},
    "max_prompt_tokens": 256,
    "max_new_tokens": 256,
}


def generate_parser() -> Parser:
    """All arguments of the verb."""
    parser = Parser(
        "generate",
        "Writes one row (the columns of the input, prompt, response) per row of a file of instructions or chats, in\n"
        "the order of the file. Rows without an id get the number of the row, from 0.",
        "examples:\n"
        "  megadistill generate --model runs/demo --input prompts.jsonl --output out.jsonl --temperature 0\n"
        "  megadistill generate --model Qwen/Qwen2.5-0.5B-Instruct --template chat --prompt 'Name a river.'\n\n"
        "Template and limits are those of --run, else of the run that --model belongs to, unless options say\n"
        "otherwise. The suffix of FILE is its format: .jsonl, .json, .csv, .tsv (text also as .gz) or .parquet.\n\n"
        "Finished rows go to FILE.partial, which becomes FILE after the last one. After an interruption, rerun the\n"
        "same command to resume; the result has the same bytes. Until then FILE.progress.json records the settings:\n"
        "other settings are refused. Processes, --tp-size and --batch-size may change; round-off may then choose\n"
        "other tokens: with fp32 in one row of thousands, with bf16 in many rows.\n\n"
        "Under a launcher give --output (launchers print to standard output, too), and --tp-size 1 where it fits.",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="model folder, hub name, checkpoint or run directory"
    )
    add_prompts(parser)
    parser.add_argument(
        "--output", metavar="FILE",
        help="where to write; default: standard output, as JSON lines, which cannot be resumed",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="start over, and replace FILE and the rows of an interrupted run",
    )  # fmt: skip
    add_tokens(parser)
    add_run(parser)
    add_rows(parser)
    add_sampling(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser


def add_tokens(parser: Parser) -> None:
    """Adds the tokenizer, and what ends a response."""
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's own")
    parser.add_argument(
        "--eos-tokens", type=value_of(NonNegativeInt | NonEmptyStr), nargs="+", metavar="TOKEN",
        help="texts or ids of the tokens that end a response; default: those of the tokenizer and of the model's\n"
        "generation_config.json or config.json",
    )  # fmt: skip


def add_prompts(parser: Parser) -> None:
    """Adds where the prompts are."""
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--input", metavar="FILE", help="rows with prompts, as for training; -: JSON on standard input"
    )
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="an instruction; repeatable")
    prompts.add_argument(
        "--messages", metavar="CHATS",
        help="rows that are chats: a file (-: standard input), or JSON: one chat or a list of chats",
    )  # fmt: skip


def add_rows(parser: Parser) -> None:
    """Adds how rows become prompts, and limits."""
    number = value_of(PositiveInt)
    parser.add_fields(("instruction", "input"))
    parser.add_template()
    parser.add_argument("--max-prompt-tokens", type=number, metavar="N", help="default: the run's, else 256")
    parser.add_argument("--max-new-tokens", type=number, metavar="N", help="default: the run's, else 256")
    parser.add_argument(
        "--long-prompt",
        choices=("error", "truncate", "truncate_end"),
        default="error",
        help="prompts over the limit; default: error",
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help="skip malformed rows; others keep their numbers")
    parser.set_defaults(**dict.fromkeys(_DEFAULTS))


def add_run(parser: Parser) -> None:
    """Adds ``--run``."""
    parser.add_argument(
        "--run", metavar="RUN", help="run whose template and limits are taken; default: that of the model, if any"
    )


def add_sampling(parser: Parser, temperature: float = 1.0) -> None:
    """Adds how tokens are drawn, and how many processes and rows draw them."""
    add_drawing(parser, temperature)
    parser.add_argument(
        "--batch-size", type=value_of(PositiveInt), default=16, metavar="N",
        help="rows decoded at a time on a data-parallel rank; default: 16",
    )  # fmt: skip
    parser.add_argument("--tp-size", type=value_of(PositiveInt), metavar="N", help="default: the largest that fits")


def add_drawing(parser: Parser, temperature: float = 1.0) -> None:
    """Adds how tokens are drawn, and the type that they are computed in."""
    parser.add_argument(
        "--temperature", type=value_of(NonNegativeFloat), default=temperature, metavar="T",
        help=f"0: greedy; default: {temperature:g}",
    )  # fmt: skip
    parser.add_section(SamplingOptions)
    parser.add_argument("--seed", type=value_of(NonNegativeInt), default=0, metavar="N", help="default: 0")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")


def fill_in(parsed: Namespace) -> int:
    """Fills in the options that the user did not give, from ``--run``, or from the run of ``--model`` if it has one.

    Returns:
        The most tokens of prompt and response together.

    Raises:
        ConfigError: The settings of the run cannot be read, or ``--run`` is none.
    """
    found = run_settings(parsed)
    run = {} if found is None else _of_run(found[1])
    is_limit_given = parsed.max_prompt_tokens is not None or parsed.max_new_tokens is not None
    missing = [name for name in _DEFAULTS if getattr(parsed, name) is None]
    if parsed.template not in (None, run.get("template")):  # another template does not take the run's variables
        run = {name: value for name, value in run.items() if not name.startswith("chat_template")}
    for name in missing:
        setattr(parsed, name, run.get(name, _DEFAULTS[name]))
    limit = int(parsed.max_prompt_tokens + parsed.max_new_tokens)
    if found is None:
        return limit
    said = [f"--{name.replace('_', '-')} {getattr(parsed, name)}" for name in missing if run.get(name)]
    if said:
        print(f"from {found[0]}: {', '.join(said)}", file=sys.stderr)
    return limit if is_limit_given else min(limit, found[1].data.max_tokens)


def run_settings(parsed: Namespace) -> tuple[Path, RunConfig] | None:
    """resolved.yaml of ``--run``, or of the run that ``--model`` belongs to, and what it says; None where none is.

    Raises:
        ConfigError: It cannot be read, or ``--run`` is no run.
    """
    from megadistill.checkpoint.run_settings import settings_of_run

    found = settings_of_run(parsed.run or parsed.model)
    if found is None and parsed.run is not None:
        raise ConfigError(f"--run {parsed.run} is no run directory: it has no resolved.yaml")
    return found


def _of_run(config: RunConfig) -> dict[str, Any]:
    data = config.data
    return {
        "template": data.template,
        "chat_template": data.chat_template,
        "chat_template_kwargs": data.chat_template_kwargs,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_new_tokens": config.generation.max_new_tokens,
    }


def check_standard_input(parsed: Namespace, num_ranks: int) -> None:
    """Refuses standard input for several ranks, of which only one could read it.

    Raises:
        ConfigError: So it is.
    """
    option = next((name for name in ("input", "messages") if getattr(parsed, name) == "-"), None)
    if option is not None and num_ranks > 1:
        raise ConfigError(f"--{option} -: standard input can be read by one process only; give a file")
