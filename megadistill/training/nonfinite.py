"""What becomes of a step whose numbers are not finite: nothing is updated, its batch is kept, and the run stops or goes
on."""

from __future__ import annotations

from pathlib import Path

from megadistill.errors import DivergenceError
from megadistill.observability.log import get_logger
from megadistill.observability.metrics import JsonLines
from megadistill.training.components import Components
from megadistill.training.step import StepResult

FOLDER = "nonfinite"
_TERMS = ("loss", "loss/sft", "loss/dac_kl", "loss/span", "grad_norm")


class NonFinite:
    """Counts such steps; ``seen`` is collective over the data-parallel group, and raises on every rank or none."""

    def __init__(self, run_dir: Path, components: Components) -> None:
        self._run_dir, self._parts, self._in_a_row = run_dir, components, 0

    def seen(self, step: int, result: StepResult) -> None:
        """Looks at what step number ``step`` left behind. Raises DivergenceError where the run is to stop."""
        train, context = self._parts.config.train, self._parts.context
        if result.is_updated:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        file = self._run_dir / FOLDER / f"step_{step}.jsonl"
        rows = [row for part in context.gather_objects_over_dp(self._shown(result)) for row in part]
        context.run_on_rank0(lambda: self._dump(file, step, result, rows), file)
        terms = ", ".join(f"{name} {result.metrics[name]}" for name in _TERMS)
        what = f"step {step} is not finite ({terms}); nothing was updated, its batch is in {file}"
        if train.on_nonfinite == "stop":
            raise DivergenceError(f"{what}; look at its rows, lower optim.lr, or set train.on_nonfinite=skip")
        if self._in_a_row >= train.max_nonfinite:
            raise DivergenceError(f"{what}; so were the {self._in_a_row - 1} before it (train.max_nonfinite)")
        get_logger(context.rank).warning(f"{what}; skipped")

    def _dump(self, file: Path, step: int, result: StepResult, rows: list[dict[str, object]]) -> None:
        dump = JsonLines(file)
        dump.append({"step": step, **{name: str(result.metrics[name]) for name in _TERMS}})
        for row in rows:
            dump.append({"step": step, **row})
        dump.close()

    def _shown(self, result: StepResult) -> list[dict[str, object]]:
        decode = self._parts.tokenizer.decode
        return [
            {
                "is_finite": is_finite,
                "prompt": decode(list(row.prompt)),
                "reference": None if row.reference is None else decode(list(row.reference)),
                "text": None if row.text is None else decode(list(row.text)),
                "prompt_ids": list(row.prompt),
                "reference_ids": None if row.reference is None else list(row.reference),
                "text_ids": None if row.text is None else list(row.text),
            }
            for row, is_finite in zip(result.rows, result.finite, strict=True)
        ]
