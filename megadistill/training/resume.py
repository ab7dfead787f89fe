"""Where a run starts: at step 0 or from a checkpoint; and whether its folder may be used at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from megadistill.checkpoint.manifest import checkpoints_of, find_checkpoint
from megadistill.checkpoint.run_settings import RESOLVED, load_resolved
from megadistill.config.load import flatten
from megadistill.config.schema import RunConfig
from megadistill.errors import CheckpointError, ConfigError
from megadistill.generation.sources import source_class

# What may change when a run is continued: nothing here enters the mathematics of a step, except the length of the
# schedule, which a longer run changes knowingly.
_MAY_CHANGE = (
    "run.dir",
    "run.trackers",
    "run.project",
    "parallel",
    "train.max_steps",
    "train.epochs",
    "train.early_stopping",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.padding_free",
    "train.save_every",
    "train.eval_every",
    "train.eval_rows",
    "train.log_every",
    "train.diagnose_every",
    "train.samples_every",
    "train.samples_rows",
    "train.resume",
    "train.resume_on_other_data",
    "train.stop_grace_s",
    "train.on_nonfinite",
    "train.max_nonfinite",
    "train.profile_steps",
    "generation.max_cache_bytes",
    "loss.backend",
    "loss.chunk_tokens",
    "model.gradient_checkpointing",
    "eval",
    "checkpoint",
    "deepspeed",
    "data.valid_path",
    "data.cache_dir",
)

# A key that the record of an earlier release lacks -> what this release computes in another way since.
_NEW_MEANINGS = {
    "data.span_verb_objects": "a prepositional phrase has its noun phrase now, so loss.span has other pairs",
    "loss.coverage": "the quantiles of loss.clip cut the mass that they name now, which they did not",
}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        run_dir: The folder of the run.
        checkpoints: Checkpoints to resume from, the preferred one first; the next is used where that is damaged. Empty
            for a new run.
    """

    run_dir: Path
    checkpoints: tuple[Path, ...] = ()

    def changes(self) -> list[str]:
        """What an earlier release, which made the checkpoints, computed in another way: one line each."""
        if not self.checkpoints or not (self.run_dir / RESOLVED).is_file():
            return []
        keys = flatten(yaml.safe_load((self.run_dir / RESOLVED).read_text(encoding="utf-8")))
        return [
            f"{self.run_dir} was begun by an earlier release: {change}"
            for key, change in _NEW_MEANINGS.items()
            if key not in keys
        ]


def plan_start(config: RunConfig) -> Start:
    """Decides from ``train.resume`` and from what ``run.dir`` holds; reads only.

    Raises:
        ConfigError: The folder holds another run.
        CheckpointError: The checkpoint to resume from is missing.
    """
    run_dir, resume = Path(config.run.dir), config.train.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir} is a file; a folder is needed")
    # A run that ended before its first step has left nothing to protect.
    metrics = run_dir / "metrics.jsonl"
    own = tuple(checkpoints_of(run_dir))
    is_used = bool(own) or (metrics.is_file() and metrics.stat().st_size > 0)
    if resume == "never":
        if is_used:
            raise ConfigError(
                f"run.dir={run_dir} holds another run and train.resume=never; choose another folder or auto"
            )
        return Start(run_dir)
    if is_used:
        _check_same_run(config, run_dir)
    if resume != "auto":
        # A job that is started again with the same settings continues from its own checkpoints; it goes back to the
        # named one only once.
        is_elsewhere = not Path(resume).resolve().is_relative_to(run_dir.resolve())
        if own and (is_elsewhere or _same_resume_as_last_start(resume, run_dir)):
            return Start(run_dir, own)
        return Start(run_dir, (find_checkpoint(Path(resume)),))
    return Start(run_dir, own)


def _same_resume_as_last_start(resume: str, run_dir: Path) -> bool:
    """Whether the run was started with this train.resume the last time."""
    try:
        return load_resolved(run_dir).train.resume == resume
    except ConfigError:
        return False


def _check_same_run(config: RunConfig, run_dir: Path) -> None:
    if not (run_dir / RESOLVED).is_file():
        raise ConfigError(f"run.dir={run_dir} holds another run (it has no {RESOLVED}); choose another folder")
    try:
        before = load_resolved(run_dir)
    except ConfigError as error:
        raise CheckpointError(f"run.dir={run_dir} holds another run, which cannot be read: {error}") from None
    old, new = flatten(before.model_dump()), flatten(config.model_dump())
    kept = source_class(config).validation_settings()
    if new["data.template"] == "auto":
        new["data.template"] = old["data.template"]  # what auto means is known after the rows are read: hooks/inputs.py
    changed = [key for key in new if old.get(key) != new[key] and (key in kept or not key.startswith(_MAY_CHANGE))]
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(
            f"run.dir={run_dir} holds another run: {key}={old.get(key)} there, {new[key]} here{more}; "
            "choose another run.dir, or give the settings of that run to continue it"
        )
