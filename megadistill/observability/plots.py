"""Pictures of runs, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import DataError, needs_extra
from megadistill.files import read_json_lines

_STYLES = ("-", "--", ":", "-.")
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """Axes that several series share.

    Attributes:
        title: Stands above them.
        unit: Stands beside them.
        series: Key of metrics.jsonl -> label.
        is_sparse: Few points, which get markers.
    """

    title: str
    unit: str
    series: Mapping[str, str]
    is_sparse: bool = False


_LOSSES = Panel(
    "training losses",
    "nats per token",
    {"loss": "total", "loss/sft": "SFT", "loss/dac_kl": "DAC-KL", "loss/span": "span"},
)
_LIKELIHOOD = Panel(
    "references of the validation rows", "negative log-likelihood, nats per token", {"eval/nll": "student"}, True
)
_KEPT = Panel("teacher mass that the gate keeps", "share", {"kept_mass": "kept mass"})
PANELS = (
    _LOSSES,
    _LIKELIHOOD,
    Panel("greedy answers to the validation rows", "ROUGE-L", {"eval/rouge_l": "student"}, True),
    _KEPT,
    Panel("classes that the mask keeps", "mean number", {"mask/classes": "classes"}),
    Panel("quantiles of the gate", "share", {"gate/lower": "lower", "gate/upper": "upper"}),
    Panel("student text that the teacher corrected", "share", {"scrg/corrected_fraction": "corrected"}),
    Panel("learning rate", "lr", {"lr": "lr"}),
    Panel("speed", "tokens per second", {"throughput/tokens_per_s": "trained"}),
)


def loss_curves(run_dir: Path, target: Path, *, baseline_nll: float | None = None) -> Path:
    """Draws the losses, the validation likelihood and the kept mass of a run.

    Args:
        run_dir: Folder with metrics.jsonl.
        target: The picture; its suffix names the format.
        baseline_nll: Likelihood of another model, in nats per token, drawn as a dashed line.

    Returns:
        ``target``.
    """
    return draw_runs({run_dir.name: run_dir}, target, panels=(_LOSSES, _LIKELIHOOD, _KEPT), baseline_nll=baseline_nll)


def draw_runs(
    runs: Mapping[str, Path],
    target: Path,
    *,
    panels: Sequence[Panel] = PANELS,
    title: str | None = None,
    baseline_nll: float | None = None,
) -> Path:
    """Draws the curves of one or several runs; a panel of which no run has a number is left out.

    Args:
        runs: Name in the legend -> folder with metrics.jsonl.
        target: The picture; its suffix names the format.
        panels: What may be drawn.
        title: Stands above all.
        baseline_nll: Likelihood of another model, in nats per token, drawn as a dashed line.

    Returns:
        ``target``.

    Raises:
        DataError: A file is damaged, or there is nothing to draw.
    """
    with needs_extra("plots", "curves"):
        import matplotlib

        matplotlib.use("Agg")  # clusters have no display
        from matplotlib import pyplot

    records = {name: _records(folder / "metrics.jsonl") for name, folder in runs.items()}
    shown = [
        panel for panel in panels if any(_series(rows, key)[0] for rows in records.values() for key in panel.series)
    ]
    if not shown:
        raise DataError(
            f"{', '.join(map(str, runs.values()))}: metrics.jsonl has no step yet; there is nothing to draw"
        )
    columns = min(_COLUMNS, len(shown))
    num_rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        num_rows, columns, figsize=(4.4 * columns, 3.8 * num_rows), layout="constrained", squeeze=False
    )
    for panel, place in zip(shown, axes.flat, strict=False):
        _draw(place, panel, records, baseline_nll if panel is _LIKELIHOOD else None)
    for place in list(axes.flat)[len(shown) :]:
        place.set_axis_off()
    if title is not None:
        figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]], target: Path, *, limit: float, limit_label: str, unit: str, title: str
) -> Path:
    """Draws bars of parts that lie on one another, and a line that they should not reach.

    Args:
        bars: Name of a bar -> part -> size.
        target: The picture; its suffix names the format.
        limit: Where the line is.
        limit_label: What it is.
        unit: Of the sizes.
        title: Stands above.

    Returns:
        ``target``.
    """
    with needs_extra("plots", "the picture"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    figure, place = pyplot.subplots(figsize=(1.6 * len(bars) + 4, 5), layout="constrained")
    names, below = list(bars), [0.0] * len(bars)
    palette = matplotlib.colormaps["tab20"]
    for number, part in enumerate(dict.fromkeys(part for bar in bars.values() for part in bar)):
        sizes = [bars[name].get(part, 0.0) for name in names]
        place.bar(names, sizes, bottom=below, label=part, color=palette(number % palette.N))
        below = [start + size for start, size in zip(below, sizes, strict=True)]
    place.axhline(limit, linestyle="--", color="black", label=limit_label)
    place.set(title=title, ylabel=unit, ylim=(0, 1.05 * max(limit, *below)))
    place.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _draw(place: Any, panel: Panel, records: Mapping[str, list[dict[str, Any]]], baseline_nll: float | None) -> None:
    """A color for each run, or for each series of a single run; a line style for each series of several."""
    for number, (name, rows) in enumerate(records.items()):
        for style, (key, label) in zip(_STYLES, panel.series.items(), strict=False):
            steps, values = _series(rows, key)
            if not steps or (panel is _LOSSES and not any(values)):  # a term without weight
                continue
            words = [name] * (len(records) > 1) + [label] * (len(records) == 1 or len(panel.series) > 1)
            several = {"color": f"C{number}", "linestyle": style} if len(records) > 1 else {}
            place.plot(
                steps, values, label=", ".join(words), marker="o" if panel.is_sparse else "", linewidth=1.2, **several
            )
    place.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    if baseline_nll is not None:
        place.axhline(baseline_nll, linestyle="--", color="gray", label="SFT student (test rows)")
    if panel is _LOSSES:
        place.set_yscale("symlog", linthresh=0.1)
    if panel is _LIKELIHOOD:
        place.set_ylim(bottom=0)
    if panel is _KEPT:
        place.axhspan(0.9, 0.99, alpha=0.12, color="tab:green")
        place.set_ylim(0.5, 1.02)
    place.legend(fontsize="small")


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json_lines(file))
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from None


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
