"""What a run says at its start and at its end, in words for people. summary.json has the numbers by their keys."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from megadistill.config.schema import RunConfig
from megadistill.training.hooks.best import BestValidation
from megadistill.training.length import RunLength

# A run of more steps that saves nothing before its end is warned of. How long a step takes is not known at the start;
# 200 are an hour with 18 seconds each, which is a small model on one GPU.
_LONG_RUN = 200
_STREAMS = {"train": "training", "prompts": "extra prompt", "valid": "validation"}


def length_words(length: RunLength, global_batch_size: int) -> str:
    """How many steps a run has, and how many an epoch: "178 steps of 16 examples, an epoch is 59.1 steps"."""
    per_epoch = number(length.steps_per_epoch)
    return (
        f"{length.max_steps} steps of {global_batch_size} examples, "
        f"an epoch is {per_epoch} step{'' if per_epoch == '1' else 's'}"
    )


def number(value: float) -> str:
    """A positive number as a person would write it: "59.1", "60", "1235"."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def data_warnings(config: RunConfig, report: Mapping[str, int]) -> Iterator[str]:
    """What was left out or shortened while rows were read, a sentence for each.

    Args:
        config: The configuration of the run.
        report: Counts as ``load_training_data`` makes them: "train/rows", "train/dropped" ...
    """
    for key, count in report.items():
        stream, _, what = key.partition("/")
        if what == "rows" or stream == "prompts" and what in ("without_reference", "truncated_responses"):
            continue  # of data.prompts_path only the prompts are used
        kind, rows = _STREAMS.get(stream, stream), report.get(f"{stream}/rows", 0)
        yield _data_warning(config, kind, what, count, rows, rows - report.get(f"{stream}/without_reference", 0)) or (
            "" if what == "without_reference" else f"{key}: {count}"
        )


def _data_warning(config: RunConfig, kind: str, what: str, count: int, rows: int, references: int) -> str:
    """One sentence; empty where there is nothing to warn of, or ``what`` is not known here."""
    data = config.data
    if what == "skipped":
        return f"{count} malformed {kind} rows were skipped (data.skip_bad_rows=true)"
    if what == "dropped":
        return (
            f"{_share(count, rows + count)} {kind} rows were dropped: their prompts are over "
            f"data.max_prompt_tokens={data.max_prompt_tokens}"
        )
    if what == "truncated_prompts":
        part = "end, which asks for the answer" if data.long_prompt == "truncate_end" else "beginning"
        return (
            f"{_share(count, rows)} {kind} prompts are over data.max_prompt_tokens={data.max_prompt_tokens} and lost "
            f"their {part} (data.long_prompt={data.long_prompt})"
        )
    if what == "truncated_responses":
        effect = "they teach no end" if kind == _STREAMS["train"] else "their ends are not scored"
        return (
            f"{_share(count, references)} {kind} responses are longer than data.max_tokens={data.max_tokens} and were "
            f"cut: {effect}"
        )
    if what == "without_reference" and kind == _STREAMS["valid"]:
        return f"{_share(count, rows)} {kind} rows have no reference: no score counts them"
    if what == "without_reference" and not config.needs_teacher:
        return f"{_share(count, rows)} {kind} rows have no reference: SFT learns nothing from them"
    if what == "without_reference" and config.loss.looks_ahead:
        return (
            f"{_share(count, rows)} {kind} rows have no reference: the gate learns nothing from them "
            "(loss.gate_objective=student)"
        )
    return ""


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({100 * count / max(1, total):.0f} %)"


def run_warnings(config: RunConfig, length: RunLength, num_left: int, sizes: tuple[int, int]) -> Iterator[str]:
    """What is unusual about a run as a whole, a sentence for each.

    Args:
        config: The configuration of the run.
        length: How many steps the run has.
        num_left: Steps that are still to be made.
        sizes: Parameters of student and teacher; 0 for no teacher.
    """
    student, teacher = sizes
    if 0 < teacher < student:
        yield f"the student ({_millions(student)} parameters) is larger than its teacher ({_millions(teacher)})"
    if config.data.prompts_path is not None and config.generation.mode == "dataset":
        yield (
            "generation.mode=dataset computes no loss on rows of data.prompts_path, "
            f"{100 * config.data.prompts_ratio:.0f} % of every batch (data.prompts_ratio)"
        )
    if length.num_rows < length.rows_per_step:
        times, rest = divmod(length.rows_per_step, length.num_rows)
        yield (
            f"{length.num_rows} row{'s' if length.num_rows > 1 else ''} with a global batch of {length.rows_per_step}: "
            f"every row is used {f'{times} or {times + 1}' if rest else times} times a step"
        )
    if num_left > _LONG_RUN and not config.train.save_every and not config.checkpoint.keep_best:
        yield (
            f"train.save_every=0: nothing is saved before step {length.max_steps}, so a crash loses the whole run (a "
            "signal such as Ctrl-C saves it); set train.save_every to a number of steps"
        )


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def scores_words(scores: Mapping[str, float]) -> str:
    """A validation: "NLL 1.234 nats per token, ROUGE-L 45.6, exact match 3.2 %"."""
    known = {
        "eval/nll": lambda value: f"NLL {value:.4g} nats per token",
        "eval/rouge_l": lambda value: f"ROUGE-L {value:.1f}",
        "eval/exact_match": lambda value: f"exact match {value:.1f} %",
    }
    return ", ".join(known[name](value) if name in known else f"{name} {value:.4g}" for name, value in scores.items())


def early_words(best: BestValidation) -> str:
    """Why a run ended before its last step."""
    return (
        f"{best.num_since} validations in a row were no better than that of step {best.step} "
        f"({best.metric} {best.value:.4g}, train.early_stopping)"
    )


def end_lines(
    config: RunConfig, run_dir: Path, step: int, validation: Mapping[str, float], best: BestValidation
) -> Iterator[str]:
    """What a run says when it is done: how good it got, and the commands for what comes next.

    Args:
        config: The configuration of the run.
        run_dir: Its folder.
        step: Its last step.
        validation: Its last validation; empty for none.
        best: Its best one.
    """
    is_kept = config.checkpoint.keep_best is not None and best.step > 0
    if not validation:
        yield "how good it got was not measured: validations need data.valid_path and train.eval_every"
    else:
        line = f"validation at step {step}: {scores_words(validation)}"
        if best.step:
            is_last = " (this one)" if best.step == step else f" at step {best.step}"
            where = f", {run_dir / 'checkpoints' / 'best'}" if is_kept else ""
            line += f"; the best by {best.metric}: {best.value:.4g}{is_last}{where}"
        yield line
    model = run_dir / "checkpoints" / "best" if is_kept else run_dir
    suite = config.data.valid_path and f"valid={config.data.valid_path}"
    words = ["megadistill", "evaluate", "--config", str(run_dir / "resolved.yaml")]
    words += [] if config.parallel.tp_size == "auto" else ["parallel.tp_size=auto"]
    words += ["--model", str(model)] + ([] if config.eval.path else ["--suite", suite or "FILE"])
    yield f"evaluate it: {shlex.join(words)}"
    yield f"export it:   {shlex.join(['megadistill', 'export', str(model), f'exported/{run_dir.resolve().name}'])}"
