"""Validation: likelihood of references and greedy answers, every ``train.eval_every`` steps and at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megadistill.data.encode import TokenizedExample
from megadistill.decoding.nonfinite import faults_in
from megadistill.evaluation.answers import AnswerSettings, reference_likelihood, write_answers
from megadistill.evaluation.rouge import score_texts
from megadistill.files import write_atomically
from megadistill.observability.log import get_logger
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent


class Validation(Hook):
    """Adds ``eval/...`` to the metrics of a step and shows them to the text source; keeps the answers.

    Args:
        components: What the run is made of.
        run_dir: The folder of the run: the answers of each validation go to ``evaluations/step_N.jsonl`` in it.
        examples: Examples to validate on; the first ``train.eval_rows`` are used.
        notify: ``notify(step, metrics)`` is called after each validation.

    Attributes:
        last: Metrics of the last validation.
    """

    def __init__(
        self,
        components: Components,
        run_dir: Path,
        examples: Sequence[TokenizedExample],
        notify: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self._components, self._notify = components, notify
        self._folder = run_dir / "evaluations"
        self._examples = examples[: components.config.train.eval_rows]
        self.last: dict[str, float] = {}

    def run_started(self, first_step: int) -> None:
        """Validates a new run where its text source needs that."""
        if first_step == 0 and self._components.source.needs_first_validation:
            self.run(0)

    def step_ended(self, event: StepEvent) -> None:
        """Validates every ``train.eval_every`` steps and after the last one."""
        every, last = self._components.config.train.eval_every, self._components.length.max_steps
        if every and (event.step % every == 0 or event.step == last):
            self.run(event.step)
            event.metrics.update(self.last)

    def summary(self) -> dict[str, Any]:
        """The last validation."""
        return {"validation": self.last}

    def run(self, step: int) -> None:
        """Validates the student as it is after ``step`` steps (collective over the world).

        Raises:
            DivergenceError: On every rank, where the logits of a row are not finite, whatever ``train.on_nonfinite``.
            MegadistillError: On every rank, where the answers cannot be written.
        """
        with faults_in(f"validation after step {step}"):
            self.last, answers = validate(self._components, self._examples)
        file = self._folder / f"step_{step}.jsonl"
        self._components.context.run_on_rank0(lambda: _write(file, self._examples, answers), file)
        self._components.source.observe(self.last)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in self.last.items())
        get_logger(self._components.context.rank, "train").info(f"step {step}: {numbers}")
        self._notify(step, self.last)


def validate(components: Components, examples: Sequence[TokenizedExample]) -> tuple[dict[str, float], list[str]]:
    """Likelihood of the references, and ROUGE-L and exact match of greedy answers (collective over the world).

    Args:
        components: What the run is made of.
        examples: Examples to validate on.

    Returns:
        Name -> value, where what needs references is left out where there are none; and the answers.
    """
    config = components.config
    settings = AnswerSettings(
        components.tokenizer,
        components.eos_ids,
        config.generation.max_new_tokens,
        config.data.max_tokens,
        batch_size=min(config.eval.batch_size, components.decode_plan.max_batch_size),
    )
    with components.student.decoder() as decoder:
        likelihood = reference_likelihood(decoder, examples, settings, components.context)
        answers = write_answers(decoder, examples, None, settings, components.context)
    scores = score_texts(answers, [example.references for example in examples])
    metrics = {
        "eval/nll": likelihood.nll if likelihood.num_tokens else None,
        "eval/rouge_l": scores.rouge_l,
        "eval/exact_match": scores.exact_match,
    }
    return {name: value for name, value in metrics.items() if value is not None}, answers


def _write(file: Path, examples: Sequence[TokenizedExample], answers: Sequence[str]) -> None:
    """One line for each example, in order; a repeated validation takes the place of the one before."""
    file.parent.mkdir(exist_ok=True)
    rows = [
        {"id": example.id, "prompt": example.prompt, "answer": answer, "references": list(example.references)}
        for example, answer in zip(examples, answers, strict=True)
    ]
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
