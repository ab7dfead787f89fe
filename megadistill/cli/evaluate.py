"""``megadistill evaluate``: ROUGE-L, exact match and likelihood of one or more models (method.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadistill.cli.parsing import Parser, config_of, refuse_unwritable
from megadistill.errors import ConfigError


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "evaluate",
        "RougeScores models on evaluation sets: sampled with every seed of eval.seeds, greedy, and by the\n"
        "likelihood of the references.",
        "examples:\n"
        "  megadistill evaluate --config configs/demo.yaml --model runs/demo --suite dolly=FILE\n"
        "  deepspeed --num_gpus 2 --no_local_rank --module megadistill evaluate --config F",
    )
    parser.add_config()
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]PATH",
        help="model folder, hub name, checkpoint or run directory; repeatable; default: run.dir",
    )  # fmt: skip
    parser.add_argument(
        "--suite", action="append", default=[], metavar="[SUITE=]PATH",
        help="evaluation set; SUITE dolly, self_inst, vicuna, sni or unni takes that suite's rows; repeatable; "
        "default: eval.path",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="JSON with every number; default: RUN.DIR/evaluation.json")
    parsed = parser.parse(arguments)
    config = config_of(parsed)
    models, suites = _named(parsed.model) or {"student": config.run.dir}, _suites(parsed.suite, config)
    output = Path(parsed.output or Path(config.run.dir) / "evaluation.json")
    refuse_unwritable(output, is_file=True)
    results = evaluate_models(config, models, suites)
    if results is not None:
        from megadistill.evaluation.report import write_json

        write_json(output, results["json"])
        print(results["table"])
        print(f"written to {output}")
    return 0


def _named(values: Sequence[str]) -> dict[str, str]:
    """[NAME=]PATH arguments; without a name, the path's last part is one. Raises ConfigError for a name given twice."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            name, path = Path(value).name, value
        if name in named:
            raise ConfigError(f"two arguments have the name '{name}' ({named[name]}, {path}); write NAME=PATH")
        named[name] = path
    return named


def _suites(values: Sequence[str], config: Any) -> dict[str, tuple[str, str | None]]:
    """Name of the set -> (path, suite or None)."""
    from megadistill.config.load import require
    from megadistill.evaluation.suites import SUITES

    if not values:
        path = require(config, "eval.path", "the evaluation set; or give --suite PATH")
        return {Path(path).stem: (path, None)}
    found: dict[str, tuple[str, str | None]] = {}
    for name, path in _named(values).items():
        found[name] = (path, name if name in SUITES else None)
    return found


def evaluate_models(
    config: Any, models: dict[str, str], suites: dict[str, tuple[str, str | None]]
) -> dict[str, Any] | None:
    """Evaluates every model on every set with the processes at hand; the results on rank 0, None elsewhere."""
    from megadistill.cli.inference import inference_context, model_folder
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings, reference_likelihood, write_answers
    from megadistill.evaluation.report import results_table, to_jsonable
    from megadistill.evaluation.rouge import load_scorer
    from megadistill.evaluation.suites import run_suite
    from megadistill.models.loading import check_positions, load_model_config
    from megadistill.observability.progress import progress_bar

    load_scorer()  # a missing package is reported before anything is generated
    folders = {name: model_folder(path) for name, path in models.items()}
    results: dict[str, dict[str, Any]] = {}
    likelihoods: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        check_positions(
            load_model_config(folder, name), config.data.max_tokens, "data.max_tokens", f"{name} ({folder})"
        )
    with inference_context(config.parallel, folders) as context:
        for name, folder in folders.items():
            tokenizer = load_tokenizer(config.model.tokenizer or folder)
            sets = {suite: _load_set(config, suite, path, kind, tokenizer) for suite, (path, kind) in suites.items()}
            settings = AnswerSettings(
                tokenizer, config.eval.max_new_tokens, config.data.max_tokens, config.eval.temperature,
                config.eval.top_p, batch_size=config.eval.batch_size,
            )  # fmt: skip
            with open_model(
                folder, context, vocab_size=vocabulary_size(tokenizer), dtype=config.model.student.dtype, where=name,
                attention=config.model.attention,
            ) as model:  # fmt: skip
                results[name], likelihoods[name] = {}, {}
                for suite, rows in sets.items():
                    passes = len(config.eval.seeds) + config.eval.greedy
                    total = passes * len(range(context.dp_rank, len(rows.rows), context.dp_size))
                    with progress_bar(
                        description=f"{name} on {suite}", total=total, unit="row", rank=context.rank
                    ) as bar:

                        def generate(
                            examples: Any,
                            seed: int | None,
                            model: Any = model,
                            settings: Any = settings,
                            bar: Any = bar,
                        ) -> list[str]:
                            return write_answers(model, examples, seed, settings, context, bar.update)

                        results[name][suite] = run_suite(
                            rows, generate, seeds=config.eval.seeds, greedy=config.eval.greedy
                        )
                    total_nll = reference_likelihood(model, rows.rows, settings, context)
                    if total_nll.num_tokens:
                        likelihoods[name][suite] = total_nll.nll
        if not context.is_rank0:
            return None
    return {
        "table": results_table(results, likelihoods),
        "json": {
            "models": folders,
            "results": {
                name: {suite: {**to_jsonable(r), "nll": likelihoods[name].get(suite)} for suite, r in found.items()}
                for name, found in results.items()
            },
        },
    }


def _load_set(config: Any, name: str, path: str, suite: str | None, tokenizer: Any) -> Any:
    from megadistill.data.dataset import FieldNames
    from megadistill.evaluation.suites import load_eval_set

    data = config.data
    return load_eval_set(
        path,
        tokenizer,
        name=name,
        suite=suite,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=data.max_tokens,
        long_prompt=data.long_prompt,
        max_rows=config.eval.max_rows,
        fields=FieldNames(data.instruction_field, data.input_field, data.output_field),
        split=data.hub_split,
        config_name=data.hub_config,
        skip_bad_rows=data.skip_bad_rows,
    )
