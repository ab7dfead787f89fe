"""Pictures of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.errors import needs_extra
from megadistill.files import read_json_lines

_TERMS = (("loss", "total"), ("loss/sft", "SFT"), ("loss/dac_kl", "DAC-KL"), ("loss/span", "span"))


def loss_curves(run_dir: Path, target: Path, *, baseline_nll: float | None = None) -> Path:
    """Draws the losses, the validation likelihood and the kept mass of a run into a PNG.

    Args:
        run_dir: Folder with metrics.jsonl.
        target: The PNG file.
        baseline_nll: Likelihood of another model, in nats per token, drawn as a dashed line.

    Returns:
        ``target``.
    """
    with needs_extra("plots", "loss curves"):
        import matplotlib

        matplotlib.use("Agg")  # clusters have no display
        from matplotlib import pyplot

    records = read_json_lines(run_dir / "metrics.jsonl")
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for key, label in _TERMS:
        steps, values = _series(records, key)
        if steps:
            left.plot(steps, values, label=label, linewidth=1.2)
    left.set(title="training losses", xlabel="step", ylabel="nats per token")
    left.set_yscale("symlog", linthresh=0.1)
    left.legend()
    steps, values = _series(records, "eval/nll")
    middle.plot(steps, values, marker="o", label="student")
    if baseline_nll is not None:
        middle.axhline(baseline_nll, linestyle="--", color="gray", label="SFT student (test rows)")
    middle.set(
        title="references of the validation rows", xlabel="step", ylabel="negative log-likelihood, nats per token"
    )
    middle.set_ylim(bottom=0)
    middle.legend()
    steps, values = _series(records, "kept_mass")
    right.plot(steps, values, color="tab:green")
    right.axhspan(0.9, 0.99, alpha=0.12, color="tab:green")
    right.set(title="teacher mass that the gate keeps", xlabel="step", ylabel="share", ylim=(0.5, 1.02))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
