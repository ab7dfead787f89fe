"""``megadistill generate``: responses to a file of prompts, from any model folder or checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from megadistill.cli.parsing import Parser, natural, positive, refuse_unwritable


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Writes one JSON line (instruction, input, prompt, response) per row of a file of instructions.",
        "example:\n"
        "  megadistill generate --model runs/demo --template plain --max-prompt-tokens 64 --max-new-tokens 32 \\\n"
        "      --input prompts.jsonl --output out.jsonl --temperature 0\n\n"
        "It reads no run configuration: template, limits and type are those of the command line.",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="model folder, hub name, checkpoint or run directory"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="rows with an instruction and perhaps an input")
    parser.add_argument("--output", metavar="FILE", help="where to write; default: standard output")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's own")
    parser.add_argument("--template", choices=("alpaca", "plain"), default="alpaca")
    parser.add_argument("--max-prompt-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: greedy")
    parser.add_argument("--top-k", type=natural, default=0, metavar="K", help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tp-size", type=positive, default=None, metavar="N", help="default: the largest that fits")
    parser.add_argument("--skip-bad-rows", action="store_true")
    parser.add_argument("--local_rank", type=int, default=-1, help="added by the deepspeed launcher")
    parsed = parser.parse(arguments)

    from megadistill.cli.inference import inference_context, model_folder
    from megadistill.config.schema import ParallelSection
    from megadistill.data.dataset import load_examples
    from megadistill.data.tokenize import load_tokenizer, tokenize_examples, vocabulary_size
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings, write_answers
    from megadistill.models.loading import check_positions, load_model_config
    from megadistill.observability.progress import progress_bar

    if parsed.output is not None:
        refuse_unwritable(parsed.output, is_file=True)
    folder = model_folder(parsed.model)
    limit = parsed.max_prompt_tokens + parsed.max_new_tokens
    asked = "--max-prompt-tokens + --max-new-tokens"
    check_positions(load_model_config(folder, "--model"), limit, asked, f"--model ({folder})")
    tokenizer = load_tokenizer(parsed.tokenizer or folder)
    examples = load_examples(parsed.input, skip_bad_rows=parsed.skip_bad_rows)
    rows = tokenize_examples(
        examples.examples, tokenizer, template=parsed.template, max_prompt_tokens=parsed.max_prompt_tokens,
        max_tokens=limit, long_prompt="error",
    ).rows  # fmt: skip
    settings = AnswerSettings(
        tokenizer, parsed.max_new_tokens, limit, parsed.temperature, parsed.top_p, parsed.top_k, parsed.batch_size
    )
    parallel = ParallelSection(tp_size=parsed.tp_size or "auto")
    with (
        inference_context(parallel, {"--model": folder}) as context,
        open_model(
            folder, context, vocab_size=vocabulary_size(tokenizer), dtype=parsed.dtype, where="--model"
        ) as model,
    ):
        mine = len(range(context.dp_rank, len(rows), context.dp_size))
        with progress_bar(description="generate", total=mine, unit="row", rank=context.rank) as bar:
            answers = write_answers(model, rows, parsed.seed, settings, context, bar.update)
        if context.is_main:
            by_id = {example.id: example for example in examples.examples}
            lines = [
                json.dumps(
                    {
                        "instruction": by_id[row.id].instruction,
                        "input": by_id[row.id].input,
                        "prompt": row.prompt,
                        "response": answer,
                    },
                    ensure_ascii=False,
                )
                for row, answer in zip(rows, answers, strict=True)
            ]
            _write(lines, parsed.output)
    return 0


def _write(lines: Sequence[str], output: str | None) -> None:
    if output is None:
        sys.stdout.write("\n".join(lines) + "\n")
        return
    from pathlib import Path

    from megadistill.checkpoint.manifest import write_atomically

    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), "\n".join(lines) + "\n")
    print(f"{len(lines)} responses written to {output}", file=sys.stderr)
