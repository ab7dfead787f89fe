"""The stages that the demo and the study share. A stage is skipped where its result exists and is up to date."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.config.shipped import find_config, shipped_root
from megadistill.errors import ConfigError, needs_extra
from megadistill.files import write_json

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig

CONFIG = "configs/demo.yaml"
_SOURCE = "source.json"


def check_packages() -> None:
    """Raises ConfigError for a missing package of a later stage, before minutes are spent on the first ones."""
    from megadistill.evaluation.rouge import load_scorer

    load_scorer()
    with needs_extra("plots", "megadistill demo"):
        import matplotlib  # noqa: F401
    with needs_extra("spans", "megadistill demo"):
        import textblob  # noqa: F401


def launch_training(overrides: Sequence[str], run_dir: Path, max_steps: int | None) -> None:
    """The distillation: ``bash launchers/run.sh`` with two processes, unless the run is finished already.

    Args:
        overrides: ``section.field=value`` settings.
        run_dir: The run directory.
        max_steps: The run's last step; None where its epochs decide: the run finds out itself whether it is finished.

    Raises:
        ConfigError: The run failed.
    """
    from megadistill.checkpoint.manifest import LATEST

    latest = run_dir / "checkpoints" / LATEST
    if (
        latest.is_file()
        and latest.read_text(encoding="utf-8").strip() == f"step_{max_steps}"
        and (run_dir / "summary.json").is_file()
    ):
        return
    command = ["bash", str(shipped_root() / "launchers/run.sh"), "--config", str(find_config(CONFIG)), *overrides]
    environment = {**os.environ, "NPROC": str(_num_processes())}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with exit code {done.returncode}")


def _num_processes() -> int:
    """Two on CPUs; on a machine with GPUs no more than it has."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def evaluate_once(config: RunConfig, models: dict[str, str], output: Path) -> dict[str, Any]:
    """Evaluates ``models`` (name -> path) on ``eval.path`` in this process, on all cores.

    An earlier evaluation of the same weights with the same settings is not repeated.

    Returns:
        The content of ``output``.
    """
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.cli.evaluate import evaluate_models
    from megadistill.config.load import require
    from megadistill.evaluation.record import add_results, deciding_settings, read_record
    from megadistill.files import to_jsonable
    from megadistill.models.fingerprint import model_fingerprint

    path, settings, record = (
        require(config, "eval.path", "the test rows"),
        deciding_settings(config),
        read_record(output),
    )
    known = {name: record["results"].get(name, {}).get("test", {}) for name in models}
    if all(
        entry.get("model", {}).get("files") == model_fingerprint(model_folder(models[name]))
        and entry["settings"] == to_jsonable(settings)
        and entry.get("set", {}).get("path") == path
        for name, entry in known.items()
    ):
        return record
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    evaluation = evaluate_models(config, models, {"test": (path, None)})
    assert evaluation is not None, "this process is rank 0"
    return add_results(output, evaluation["results"])[0]


def scores_of(evaluation: dict[str, Any], name: str, suite: str = "test") -> dict[str, float]:
    """The measures of one model, flat: means over seeds for sampled answers."""
    result = evaluation["results"][name][suite]
    return {
        "rouge_l_greedy": result["greedy"]["rouge_l"],
        "exact_match_greedy": result["greedy"]["exact_match"],
        "rouge_l_sampled": result["sampled"]["rouge_l"]["mean"],
        "exact_match_sampled": result["sampled"]["exact_match"]["mean"],
        "nll": result["nll"],
    }


def export_once(run_dir: Path, folder: Path) -> None:
    """Exports the run's latest checkpoint to ``folder``, and checks the export by loading it with plain transformers.

    ``folder/source.json`` records the checkpoint: its step and the checksum of its manifest. An export of another
    checkpoint, or without a record, is replaced.
    """
    from megadistill.checkpoint.hf_export import check_export, export_checkpoint
    from megadistill.checkpoint.manifest import MANIFEST, digest, find_checkpoint, read_manifest

    checkpoint = find_checkpoint(run_dir)
    source = {"step": read_manifest(checkpoint)["step"], "manifest": digest(checkpoint / MANIFEST)["blake2b"]}
    record = folder / _SOURCE
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != source:
        shutil.rmtree(folder, ignore_errors=True)
        export_checkpoint(checkpoint, folder)
        write_json(record, source)
    check_export(folder)
