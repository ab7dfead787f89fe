"""Data preparation: any readable source to checked, length-filtered JSONL files for training and validation.

``convert_share`` does the work of one of several workers, ``write_converted`` joins their shares. The files do not
depend on the number of workers. Nothing here communicates: the command line gathers over MPI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.data.columns import FieldNames
from megadistill.data.dataset import Example, load_examples
from megadistill.data.encode import check_limits, open_template, refused
from megadistill.data.prompts import PromptSettings, Template
from megadistill.data.readers import BadRow
from megadistill.errors import DataError
from megadistill.files import os_errors_as, write_atomically, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 512
REPORT_NAME = "report.json"


@dataclass(frozen=True)
class ConvertOptions:
    """What to read and keep.

    Attributes:
        path: A file, a folder or a hub name.
        fields: Names of the columns.
        split: Split of a folder or a hub data set.
        config_name: Configuration (subset) of a hub data set.
        skip_bad_rows: Count malformed rows instead of stopping at the first.
        prompts: Template and limits, in tokens.
        drop_long_responses: Leave out rows over ``prompts.max_tokens``; else they are kept, and truncated in training.
        min_reference_words: Shortest first reference; above 0, rows without references are left out, too.
        drop_duplicates: Leave out rows whose prompt was read before.
        max_rows: Keep the first rows that pass; None: all.
        num_valid: Number of kept rows that become the validation file.
        seed: Draws the validation rows.
    """

    path: str
    fields: FieldNames = field(default_factory=FieldNames)
    split: str = "train"
    config_name: str | None = None
    skip_bad_rows: bool = False
    prompts: PromptSettings = field(default_factory=PromptSettings)
    drop_long_responses: bool = False
    min_reference_words: int = 0
    drop_duplicates: bool = True
    max_rows: int | None = None
    num_valid: int = 0
    seed: int = 0


@dataclass(frozen=True)
class CheckedRow:
    """One row and its lengths in tokens.

    Attributes:
        example: The row.
        prompt_tokens: Tokens of the prompt, special tokens included.
        response_tokens: Tokens of the first reference, its end token included; 0 without a reference.
        reason: Why the row is left out; None where it is kept.
    """

    example: Example
    prompt_tokens: int
    response_tokens: int
    reason: str | None


@dataclass(frozen=True)
class ConvertedShare:
    """The rows of one worker.

    Attributes:
        rows: The rows.
        skipped: A message for each bad row; share 0 has those of the whole source.
        description: What was read, in one line.
        template: The template that was used.
    """

    rows: list[CheckedRow]
    skipped: list[str]
    description: str = ""
    template: str = ""


def convert_share(
    options: ConvertOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    share: int = 0,
    num_shares: int = 1,
    progress: Callable[..., Any] | None = None,
) -> ConvertedShare:
    """Reads the source and checks the rows share, share + num_shares, ... of it.

    Every worker parses the whole source (cheap) and tokenizes its own rows (expensive), so a bad row raises on all.

    Args:
        options: What to read and keep.
        tokenizer: Limits are in its tokens.
        share: Number of this worker.
        num_shares: Number of workers.
        progress: ``progress(total=N)`` opens a bar over N rows, a context with ``update``.

    Raises:
        ConfigError: Limits that leave no token for a response, or a template that cannot be used.
        DataError: As ``load_examples``, or the template cannot hold a row.
    """
    check_limits(options.prompts.max_prompt_tokens, options.prompts.max_tokens)
    loaded = load_examples(
        options.path,
        fields=options.fields,
        split=options.split,
        config_name=options.config_name,
        skip_bad_rows=options.skip_bad_rows,
    )
    template = open_template(options.prompts, tokenizer, loaded.are_chats)
    mine = loaded.examples[share::num_shares]
    result = ConvertedShare([], loaded.skipped if share == 0 else [], loaded.description, template.name)
    with progress(total=len(mine)) if progress else nullcontext() as bar:
        for start in range(0, len(mine), _BATCH_ROWS):
            batch = mine[start : start + _BATCH_ROWS]
            _check(batch, template, options, result)
            if bar is not None:
                bar.update(len(batch))
    return result


def _check(examples: Sequence[Example], template: Template, options: ConvertOptions, result: ConvertedShare) -> None:
    """Adds the rows, and what is wrong with those that the template cannot hold, to ``result``."""
    limits = options.prompts
    for example, encoded in zip(examples, template.encode(examples), strict=True):
        if isinstance(encoded, BadRow):
            result.skipped.append(refused(example, encoded, options.skip_bad_rows))
            continue
        prompt_tokens, response_tokens = len(encoded.prompt_ids), len(encoded.response_ids or ())
        reference = example.references[0] if example.references else encoded.reply or ""
        words = len(reference.split())
        reason = None
        if prompt_tokens > limits.max_prompt_tokens:
            reason = f"prompt over {limits.max_prompt_tokens} tokens"
        elif words < options.min_reference_words:
            reason = f"reference under {options.min_reference_words} words"
        elif options.drop_long_responses and prompt_tokens + response_tokens > limits.max_tokens:
            reason = f"prompt and response over {limits.max_tokens} tokens"
        result.rows.append(CheckedRow(example, prompt_tokens, response_tokens, reason))


def taken_files(folder: str | Path) -> list[str]:
    """The files in a folder that ``write_converted`` would replace."""
    return [name for name in ("train.jsonl", "valid.jsonl", REPORT_NAME) if (Path(folder) / name).exists()]


def write_converted(
    shares: Iterable[ConvertedShare], options: ConvertOptions, folder: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes train.jsonl, valid.jsonl (where ``options.num_valid`` > 0) and report.json.

    Returns:
        The report.

    Raises:
        DataError: The folder has them already and ``overwrite`` is false, too few rows are left, or a file cannot be
            written.
    """
    target = Path(folder)
    taken = taken_files(target)
    if taken and not overwrite:
        raise DataError(f"{target} already has {', '.join(taken)}; choose another folder, or overwrite them")
    known = list(shares)
    skipped = [message for share in known for message in share.skipped]
    checked = sorted((row for share in known for row in share.rows), key=lambda row: row.example.id)
    kept, left_out = _select(checked, options)
    if len(kept) <= options.num_valid:
        raise DataError(
            f"{options.path}: {len(kept)} of {len(checked) + len(skipped)} rows are left, too few for "
            f"{options.num_valid} validation rows and a training row (left out: {left_out or 'none'})"
        )
    order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(kept))
    valid_rows = set(order[: options.num_valid].tolist())
    splits = {"train": [row for at, row in enumerate(kept) if at not in valid_rows]}
    if options.num_valid:
        splits["valid"] = [kept[at] for at in sorted(valid_rows)]
    report = {
        "source": options.path,
        "rows": known[0].description if known else "",
        "template": known[0].template if known else options.prompts.template,
        "options": asdict(options),
        "num_rows": len(checked) + len(skipped),
        "num_bad_rows": len(skipped),
        "first_bad_rows": skipped[:10],
        "left_out": left_out,
        "splits": {name: _statistics(rows, options) for name, rows in splits.items()},
    }
    with os_errors_as(DataError, target):
        target.mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            write_atomically(target / f"{name}.jsonl", "".join(_to_line(row.example) for row in rows))
        write_json(target / REPORT_NAME, report)
    return report


def _select(checked: Sequence[CheckedRow], options: ConvertOptions) -> tuple[list[CheckedRow], dict[str, int]]:
    kept: list[CheckedRow] = []
    left_out: dict[str, int] = {}
    seen: set[str] = set()
    for row in checked:
        prompt = _prompt_of(row.example)
        reason = row.reason
        if reason is None and options.drop_duplicates and prompt in seen:
            reason = "prompt seen before"
        if reason is None and options.max_rows is not None and len(kept) >= options.max_rows:
            reason = f"over {options.max_rows} rows"
        if reason is None:
            seen.add(prompt)
            kept.append(row)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    return kept, left_out


def _statistics(rows: Sequence[CheckedRow], options: ConvertOptions) -> dict[str, Any]:
    """Counts of one split and lengths in tokens."""
    limit = options.prompts.max_tokens
    responses = [row.response_tokens for row in rows if row.response_tokens]
    return {
        "num_rows": len(rows),
        "num_without_references": len(rows) - len(responses),
        "num_over_max_tokens": sum(row.prompt_tokens + row.response_tokens > limit for row in rows),
        "prompt_tokens": _lengths([row.prompt_tokens for row in rows]),
        "response_tokens": _lengths(responses),
    }


def _lengths(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {
        "total": sum(values),
        "mean": float(np.mean(values)),
        "p50": float(p50),
        "p95": float(p95),
        "max": max(values),
    }


def _prompt_of(example: Example) -> str:
    """What tells one prompt from another."""
    if example.chat is None:
        return json.dumps([example.instruction, example.input])
    return json.dumps([example.chat.messages, example.chat.tools], sort_keys=True, default=str)


def _to_line(example: Example) -> str:
    if example.chat is not None:
        chat = example.chat
        messages = [*chat.messages, *([chat.reply] if chat.reply is not None else [])]
        row: dict[str, Any] = {"messages": messages} | ({"tools": chat.tools} if chat.tools is not None else {})
    else:
        references = list(example.references)
        output = references if len(references) > 1 else (references or [""])[0]
        row = {"instruction": example.instruction, "input": example.input, "output": output}
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"  # messages of tables may hold dates


def report_text(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [f"{report['rows']}; template {report['template']}"]
    if report["num_bad_rows"]:
        lines.append(f"  bad rows skipped: {report['num_bad_rows']}, the first: {report['first_bad_rows'][0]}")
    lines += [f"  left out, {reason}: {count}" for reason, count in report["left_out"].items()]
    for name, split in report["splits"].items():
        prompt, response = split["prompt_tokens"], split["response_tokens"]
        lengths = f"prompt {prompt['mean']:.0f} tokens (p95 {prompt['p95']:.0f}, max {prompt['max']})"
        if response:
            lengths += f", response {response['mean']:.0f} (p95 {response['p95']:.0f}, max {response['max']})"
        lines.append(
            f"  {name}: {split['num_rows']} rows, {split['num_without_references']} without references; {lengths}"
        )
    return "\n".join(lines)


def long_response_warnings(report: dict[str, Any]) -> list[str]:
    """A line for each file with answers that training would cut."""
    limit = report["options"]["prompts"]["max_tokens"]
    return [
        f"{split['num_over_max_tokens']} of {split['num_rows']} {name} rows have more than {limit} tokens: training "
        "cuts the ends of their answers"
        for name, split in report["splits"].items()
        if split["num_over_max_tokens"]
    ]
