"""``megadistill plot RUN...``: the curves of runs as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megadistill.cli.parsing import Parser, refuse_unwritable
from megadistill.errors import ConfigError, ExitCode
from megadistill.files import did_you_mean_path

_FORMATS = (".png", ".pdf", ".svg")


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "plot",
        "Draws the curves of runs from their metrics.jsonl, several runs into the same axes: losses, validation,\n"
        "gate, corrections, learning rate, speed. What a run does not have is left out. A run may still be running.",
        "examples:\n  megadistill plot runs/mine\n  megadistill plot runs/sft runs/mine --output compared.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"picture ({', '.join(_FORMATS)}); default: RUN/curves.png for one run, curves.png here for several",
    )
    parser.add_argument("--title", help="title; default: the names of the runs")
    parsed = parser.parse(arguments)
    folders = [Path(text) for text in dict.fromkeys(parsed.runs)]
    for folder in folders:
        _check(folder)
    output = Path(parsed.output or (folders[0] / "curves.png" if len(folders) == 1 else "curves.png"))
    if output.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--output {output}: the name must end in {' or '.join(_FORMATS)}")
    refuse_unwritable(output, is_file=True)

    from megadistill.observability.plots import draw_runs

    runs = _named(folders)
    draw_runs(runs, output, title=parsed.title or ", ".join(runs))
    print(f"written to {output}")
    return ExitCode.DONE


def _check(folder: Path) -> None:
    if not folder.exists():
        raise ConfigError(f"no such run: {folder}{did_you_mean_path(folder, Path.is_dir)}")
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} is not a run directory: it has no metrics.jsonl")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder by its name, or by its whole path where several have that name."""
    names = [folder.resolve().name for folder in folders]
    counts = Counter(names)
    return {name if counts[name] == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)}
