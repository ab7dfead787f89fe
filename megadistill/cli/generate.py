"""``megadistill generate``: responses of a model to a file of prompts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.generate_options import check_standard_input, fill_in, generate_parser
from megadistill.cli.generate_rows import read_prompts
from megadistill.cli.parsing import refuse_unwritable
from megadistill.config.sampling import SamplingOptions
from megadistill.files import checksum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadistill.cli.resumable import RowWriter
    from megadistill.data.dataset import Example, LoadedExamples
    from megadistill.data.encode import Tokenized, TokenizedExample
    from megadistill.data.prompts import PromptSettings
    from megadistill.parallel.context import ParallelContext

# Batches of one data-parallel rank between two writes: few enough to lose little, enough that ranks rarely wait.
_BATCHES_PER_BLOCK = 8


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parsed = generate_parser().parse(arguments)
    if parsed.output is not None:
        refuse_unwritable(parsed.output, is_file=True)
        answer_rows(parsed, _file_writer(parsed))
        return 0
    from megadistill.cli.resumable import StandardOutput

    rows = sys.stdout
    # Standard output gets rows only: everything else that is printed goes to standard error meanwhile.
    with redirect_stdout(sys.stderr):
        answer_rows(parsed, lambda _: StandardOutput(rows))
    return 0


def answer_rows(
    parsed: Namespace,
    writer_of: Callable[[Lines], RowWriter],
    loaded: LoadedExamples | None = None,
    given: ParallelContext | None = None,
) -> None:
    """Answers every row (collective over the ranks of the launcher).

    Args:
        parsed: The options of ``generate_parser``; those that were not given are filled in.
        writer_of: Where the lines are written.
        loaded: The rows; default: those that the options name.
        given: The grid of processes; default: that of the launcher, for as long as this takes.
    """
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.config.parallel import ParallelSection
    from megadistill.data.encode import tokenize_examples
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings, write_answers
    from megadistill.evaluation.processes import inference_context
    from megadistill.models.end_tokens import end_tokens
    from megadistill.models.loading import load_model_config
    from megadistill.models.positions import check_positions

    limit = fill_in(parsed)
    folder = model_folder(parsed.model)
    config = load_model_config(folder, "--model")
    check_positions(config, limit, "--max-prompt-tokens + --max-new-tokens", f"--model ({folder})")
    tokenizer = load_tokenizer(model_folder(parsed.tokenizer or folder))
    loaded = read_prompts(parsed) if loaded is None else loaded
    prompts = _prompt_settings(parsed, limit, loaded, tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    commit = getattr(config, "_commit_hash", None)
    grid = ParallelSection(tp_size=parsed.tp_size or "auto")
    with nullcontext(given) if given is not None else inference_context(grid, {"--model": folder}) as context:
        check_standard_input(parsed, context.world_size)
        done = tokenize_examples(loaded.examples, tokenizer, prompts)
        lines = Lines(loaded.examples, done.rows)
        writer = writer_of(lines)
        asked: dict[str, Any] = {"asked": parsed.eos_tokens, "more": {done.end_id}}
        try:
            ends = context.run_on_rank0(lambda: end_tokens(folder, tokenizer, vocab_size=vocab_size, **asked))
            settings = AnswerSettings(
                tokenizer, ends, parsed.max_new_tokens, limit, parsed.temperature, SamplingOptions.of(parsed),
                parsed.batch_size,
            )  # fmt: skip
            deciding = partial(_deciding, parsed, prompts, folder, commit, tokenizer, ends, loaded.examples)
            # Before the model is loaded, so that errors come early.
            num_done = context.run_on_rank0(lambda: writer.open(deciding()))
            if context.is_rank0:
                _say(loaded, done, parsed, lines)
            if num_done < len(done.rows):
                with open_model(folder, context, vocab_size=vocab_size, dtype=parsed.dtype, where="--model") as model:
                    answer = partial(write_answers, model, seed=parsed.seed, settings=settings, context=context)
                    _write_blocks(writer, lines, num_done, answer, parsed.batch_size, context)
            context.run_on_rank0(writer.finish)
        finally:
            writer.close()


def _file_writer(parsed: Namespace) -> Callable[[Lines], RowWriter]:
    """Makes the writer of the rows, once their ids are known."""
    from megadistill.cli.resumable import ResumableFile
    from megadistill.data.writers import output_format

    output = Path(parsed.output)
    kind = output_format(output, "--output")
    return lambda lines: ResumableFile(output, lines.ids, overwrite=parsed.overwrite, kind=kind)


def _prompt_settings(
    parsed: Namespace, limit: int, loaded: LoadedExamples, tokenizer: PreTrainedTokenizerBase
) -> PromptSettings:
    from megadistill.data.prompts import PromptSettings, choose_template

    settings = PromptSettings(
        template=parsed.template,
        chat_template=parsed.chat_template,
        chat_template_kwargs=parsed.chat_template_kwargs,
        max_prompt_tokens=parsed.max_prompt_tokens,
        max_tokens=limit,
        long_prompt=parsed.long_prompt,
        skip_bad_rows=parsed.skip_bad_rows,
    )
    parsed.template = choose_template(settings, tokenizer, loaded.are_chats)
    return replace(settings, template=parsed.template)


def _say(loaded: LoadedExamples, done: Tokenized, parsed: Namespace, lines: Lines) -> None:
    """What the user should know about the rows, on standard error."""
    if loaded.description:
        print(f"{loaded.description}; template {parsed.template}", file=sys.stderr)
    if skipped := [*loaded.skipped, *done.skipped]:
        print(f"{len(skipped)} bad rows are left out, the first: {skipped[0]}", file=sys.stderr)
    if done.num_dropped:
        print(
            f"{done.num_dropped} chats are left out: even without their earlier turns they are over "
            f"{parsed.max_prompt_tokens} tokens (--max-prompt-tokens)",
            file=sys.stderr,
        )
    if done.num_truncated:
        print(
            f"{done.num_truncated} of {len(done.rows)} prompts were over {parsed.max_prompt_tokens} tokens and were "
            f"truncated; column {lines.prompt_name!r} holds what the model read",
            file=sys.stderr,
        )
    if (lines.prompt_name, lines.response_name) != ("prompt", "response"):
        print(
            f"the rows have columns with the same names: the prompt goes to {lines.prompt_name!r}, the answer to "
            f"{lines.response_name!r}",
            file=sys.stderr,
        )


def _deciding(
    parsed: Namespace,
    prompts: PromptSettings,
    folder: str,
    commit: str | None,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """The settings that determine the rows, by the names that users know; not how they are computed."""
    from megadistill.cli.resumable import describe_model
    from megadistill.data.fingerprint import tokenizer_fingerprint
    from megadistill.data.prompts import read_chat_template
    from megadistill.models.end_tokens import describe_end_tokens

    content = checksum(
        [[example.id, example.instruction, example.input, example.chat, example.row] for example in examples]
    )
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
    text = tokenizer.chat_template if prompts.chat_template is None else read_chat_template(prompts.chat_template)
    chat = {"the chat template": f"checksum {checksum([text, prompts.chat_template_kwargs])}"}
    return {
        **{f"--{name.replace('_', '-')}": getattr(parsed, name) for name in names},
        "the content of --input": f"{len(examples)} rows, checksum {content}",
        "--eos-tokens": describe_end_tokens(eos_ids, tokenizer),
        "the tokenizer": f"{parsed.tokenizer or 'of --model'}, checksum {tokenizer_fingerprint(tokenizer)}",
        **(chat if prompts.template == "chat" else {}),
        **describe_model(folder, commit),
    }


class Lines:
    """The lines that are written: the columns of the input, then prompt and response.

    Attributes:
        rows: The prompts.
        ids: What each line has as its id.
        prompt_name: Column of the prompt.
        response_name: Column of the response.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[TokenizedExample]) -> None:
        known = {example.id: example for example in examples}
        self.rows, self._given = rows, [_jsonable(known[row.id].row) for row in rows]
        columns = {name for given in self._given for name in given}
        self.prompt_name, self.response_name = (_free_name(name, columns) for name in ("prompt", "response"))
        self.ids = [_id(given, row.id) for given, row in zip(self._given, rows, strict=True)]

    def line(self, index: int, response: str) -> str:
        """The line of a row."""
        row = {"id": None, **self._given[index]}  # its place is where the row has it, else first
        row["id"] = self.ids[index]
        row |= {self.prompt_name: self.rows[index].prompt, self.response_name: response}
        return json.dumps(row, ensure_ascii=False)


def _id(given: Mapping[str, Any], number: int) -> Any:
    """The id of a row; its number where it has none."""
    found = given.get("id")
    return number if found is None or found != found else found  # NaN: a table of pandas where a value is absent


def _free_name(name: str, columns: Collection[str]) -> str:
    """The name of a new column: none that rows have, so that nothing of theirs is replaced."""
    while name in columns:
        name = f"model_{name}"
    return name


def _jsonable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON holds it: tables have dates and bytes, too."""
    return dict(json.loads(json.dumps(row, default=str)))


def _write_blocks(
    writer: RowWriter,
    lines: Lines,
    num_done: int,
    answer: Callable[..., list[str]],
    batch_size: int,
    context: ParallelContext,
) -> None:
    """Answers rows in blocks, each written before the next one starts (collective: every rank calls it)."""
    from megadistill.observability.progress import progress_bar

    rows = lines.rows
    size = batch_size * context.dp_size * _BATCHES_PER_BLOCK
    with progress_bar(description="generate", total=len(rows), initial=num_done, unit="row", rank=context.rank) as bar:

        def write(block: Sequence[str]) -> None:
            # A terminal that shows both gets the rows above the bar.
            with bar.external_write_mode():
                writer.write(block)

        # A block that was written in part is computed as a whole: other batches could round to other tokens.
        for start in range(num_done - num_done % size, len(rows), size):
            block = range(start, min(start + size, len(rows)))
            # Within a block, the progress of rank 0 stands for that of all ranks.
            count = _Count(bar, start, block.stop, context.dp_size)
            answers = answer(rows=[rows[i] for i in block], progress=count)
            texts = [lines.line(i, text) for i, text in zip(block, answers, strict=True)]
            context.run_on_rank0(partial(write, texts[max(0, num_done - start) :]))
            bar.update(block.stop - bar.n)


class _Count:
    """Moves a bar by the rows of a block that one of several data-parallel ranks has finished."""

    def __init__(self, bar: Any, start: int, stop: int, dp_size: int) -> None:
        self._bar, self._finished, self._stop, self._dp_size = bar, start, stop, dp_size

    def __call__(self, num_rows: int) -> None:
        self._finished += num_rows * self._dp_size
        self._bar.update(max(0, min(self._finished, self._stop) - self._bar.n))
