"""``megadistill evaluate``: ROUGE-L, exact match and likelihood of one or more models (docs/method.md, section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser, config_of, named_paths, refuse_unwritable
from megadistill.config.sampling import SamplingOptions
from megadistill.errors import ConfigError

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig
    from megadistill.evaluation.suites import SuiteResult
    from megadistill.parallel.context import ParallelContext


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "evaluate",
        "Scores models on evaluation sets: ROUGE-L and exact match of answers sampled with every seed of eval.seeds\n"
        "and of greedy answers, and the likelihood of the references. Numbers are added to RUN.DIR/evaluation.json;\n"
        "those that were there are kept.",
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
    parser.add_argument(
        "--output", metavar="FILE", help="JSON to add every number to; default: RUN.DIR/evaluation.json"
    )
    parsed = parser.parse(arguments)
    config = config_of(parsed)
    models, suites = named_paths(parsed.model) or {"student": config.run.dir}, _suites(parsed.suite, config)
    config = _as_trained(config, models)
    output = Path(parsed.output or Path(config.run.dir) / "evaluation.json")
    refuse_unwritable(output, is_file=True)
    from megadistill.evaluation.record import add_results, notes_on_rows, read_record

    read_record(output)  # a file that cannot be added to is found before the work
    evaluated = evaluate_models(config, models, suites)
    if evaluated is not None:
        print(evaluated["table"])
        record, num_moved = add_results(output, evaluated["results"])
        for note in notes_on_rows(record, suites):
            print(note)
        kept = f"; {num_moved} earlier result{'s' * (num_moved > 1)} moved to its history" if num_moved else ""
        print(f"added to {output}{kept}")
    return 0


def _as_trained(config: RunConfig, models: Mapping[str, str]) -> RunConfig:
    """The configuration with the prompts that runs among the models were trained with, where it leaves them open.

    Raises:
        ConfigError: Runs with different prompts.
    """
    from megadistill.checkpoint.run_settings import settings_of_run

    if config.data.template != "auto":
        return config
    found = [settings_of_run(path) for path in (config.run.dir, *models.values())]
    runs = [run for run in found if run is not None]
    settings: dict[str, Any] = {"template": "auto"}
    for name in ("template", "chat_template", "chat_template_kwargs"):
        given = getattr(config.data, name)
        values = {str(getattr(run.data, name)): (path, getattr(run.data, name)) for path, run in runs}
        if not values or (name != "template" and given):
            continue
        if len(values) > 1:
            told = ", ".join(f"{value} ({path})" for value, (path, _) in values.items())
            raise ConfigError(f"the models were trained with different prompts: {told}", setting=f"data.{name}")
        settings[name] = next(iter(values.values()))[1]
    return config.with_template(settings.pop("template"), **settings)


def _suites(values: Sequence[str], config: RunConfig) -> dict[str, tuple[str, str | None]]:
    """Name of the set -> (path, suite or None)."""
    from megadistill.config.load import require
    from megadistill.evaluation.suites import SUITES

    if not values:
        path = require(config, "eval.path", "it names the evaluation set; or give --suite PATH")
        return {Path(path).stem: (path, None)}
    return {name: (path, name if name in SUITES else None) for name, path in named_paths(values).items()}


def evaluate_models(
    config: RunConfig, models: Mapping[str, str], suites: Mapping[str, tuple[str, str | None]]
) -> dict[str, Any] | None:
    """Evaluates every model on every set with the processes of the launcher (collective over the world).

    Args:
        config: Evaluation protocol, limits and columns.
        models: Name -> model folder, hub name, checkpoint or run directory.
        suites: Name of the set -> (path, suite or None).

    Returns:
        On rank 0 ``table`` (text) and ``results`` (model -> set -> entry of evaluation.json); None elsewhere.
    """
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.evaluation.processes import inference_context
    from megadistill.evaluation.record import deciding_settings, describe_model, make_entry
    from megadistill.evaluation.report import results_table
    from megadistill.evaluation.rouge import load_scorer
    from megadistill.models.loading import load_model_config
    from megadistill.models.positions import check_positions

    load_scorer()  # a missing package is reported before anything is generated
    folders = {name: model_folder(path) for name, path in models.items()}
    for name, folder in folders.items():
        check_positions(
            load_model_config(folder, name), config.data.max_tokens, "data.max_tokens", f"{name} ({folder})"
        )
    results: dict[str, dict[str, SuiteResult]] = {}
    nll: dict[str, dict[str, float]] = {}
    described: dict[str, dict[str, Any]] = {}
    with inference_context(config.parallel, folders) as context:
        for name, folder in folders.items():
            described[name] = context.run_on_rank0(partial(describe_model, name, folder))
            results[name], nll[name] = _evaluate_model(config, name, folder, suites, context)
        if not context.is_rank0:
            return None
    settings = deciding_settings(config)
    entries = {
        name: {
            suite: make_entry(
                result, nll[name].get(suite), model=described[name], path=suites[suite][0], suite=suites[suite][1],
                settings=settings,
            )
            for suite, result in by_suite.items()
        }
        for name, by_suite in results.items()
    }  # fmt: skip
    return {"table": results_table(results, nll), "results": entries}


def _evaluate_model(
    config: RunConfig,
    name: str,
    folder: str,
    suites: Mapping[str, tuple[str, str | None]],
    context: ParallelContext,
) -> tuple[dict[str, SuiteResult], dict[str, float]]:
    """Scores of one model by set, and nats per reference token of the sets that have references."""
    from megadistill.checkpoint.hub_commits import at_commit, recorded_commits
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size
    from megadistill.decoding.nonfinite import faults_in
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings, reference_likelihood, write_answers
    from megadistill.evaluation.suites import load_eval_set, run_suite
    from megadistill.models.end_tokens import end_tokens
    from megadistill.observability.progress import progress_bar

    named = at_commit(config.model.tokenizer or folder, recorded_commits(config.run.dir))
    tokenizer = load_tokenizer(model_folder(named))
    vocab_size = vocabulary_size(tokenizer)
    sets = {
        name_: load_eval_set(path, tokenizer, config.data, name=name_, suite=suite, max_rows=config.eval.max_rows)
        for name_, (path, suite) in suites.items()
    }
    more = {eval_set.end_id for eval_set in sets.values()}
    eos_ids = context.run_on_rank0(
        lambda: end_tokens(folder, tokenizer, vocab_size=vocab_size, asked=config.model.eos_tokens, more=more)
    )
    settings = AnswerSettings(
        tokenizer, eos_ids, config.eval.max_new_tokens, config.data.max_tokens, config.eval.temperature,
        SamplingOptions.of(config.eval), batch_size=config.eval.batch_size,
    )  # fmt: skip
    results: dict[str, SuiteResult] = {}
    nll: dict[str, float] = {}
    with open_model(
        folder, context, vocab_size=vocab_size, dtype=config.model.student.dtype, where=name,
        attention=config.model.attention, read=config.model.read, cuda_graphs=config.generation.cuda_graphs,
    ) as model:  # fmt: skip
        for suite, eval_set in sets.items():
            passes = len(config.eval.seeds) + config.eval.greedy
            mine = eval_set.rows[context.dp_rank :: context.dp_size]
            total = passes * len(mine) + sum(row.response_ids is not None for row in mine)
            where = f"{name} on {suite}"
            with faults_in(where), progress_bar(description=where, total=total, unit="row", rank=context.rank) as bar:
                answer = partial(write_answers, model, settings=settings, context=context, progress=bar.update)
                results[suite] = run_suite(eval_set, answer, seeds=config.eval.seeds, greedy=config.eval.greedy)
                likelihood = reference_likelihood(model, eval_set.rows, settings, context, bar.update)
            if likelihood.num_tokens:
                nll[suite] = likelihood.nll
    return results, nll
