"""Manifests of checkpoints (files with sizes and checksums, written last), and where checkpoints are."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadistill.errors import CheckpointError
from megadistill.files import content_digest, write_atomically
from megadistill.observability.progress import progress_bar

MANIFEST = "manifest.json"
LATEST, BEST = "latest", "best"
HF_FOLDER, STUDENT_FOLDER = "hf", "student"
_STEP = re.compile(r"step_(\d+)")
VERSION = 2


class OtherVersionError(CheckpointError):
    """A checkpoint of another version of the program."""


def digest(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size in bytes and BLAKE2b checksum of one file. ``sync``: also wait until the file is on the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        checksum = content_digest(file)
    return {"bytes": path.stat().st_size, "blake2b": checksum}


def files_below(folder: Path) -> list[str]:
    """Relative names of all files of a checkpoint except the manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def write_manifest(folder: Path, step: int, layout: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest: from now on the folder is a checkpoint.

    Args:
        folder: The checkpoint.
        step: Number of optimizer updates.
        layout: Process grid, model and gate, as ``read_manifest`` expects them.
        files: Name of each file -> its ``digest``.
    """
    write_atomically(
        folder / MANIFEST, json.dumps({"version": VERSION, "step": step, "layout": layout, "files": files}, indent=1)
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        OtherVersionError: It is of another version of the program.
        CheckpointError: It is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise OtherVersionError(f"{path} has version {manifest['version']}; this program reads version {VERSION}")
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["blake2b"])
        for key in ("tp_size", "dp_size", "zero_stage", "model", "gate"):
            manifest["layout"][key]
        named = _STEP.fullmatch(folder.name)
        if named and int(named[1]) != int(manifest["step"]):
            raise CheckpointError(f"{path} is damaged: it is the manifest of step {manifest['step']}")
        return dict(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def check_with_progress(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """``check_files`` with a progress bar."""
    for name in progress_bar(sorted(names), description="check", unit="file"):
        check_files(folder, manifest, [name])


def check_files(folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """Compares files with the manifest.

    Raises:
        CheckpointError: Names the first file that is missing, truncated or changed.
    """
    for name in names:
        expected, path = manifest["files"][name], folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: file {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{folder}: file {name} has {size} bytes, expected {expected['bytes']}")
        if digest(path)["blake2b"] != expected["blake2b"]:
            raise CheckpointError(f"{folder}: file {name} does not match its checksum")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Checkpoints of a run to resume from, the best first: the one that ``latest`` names, then those of fewer steps.

    Where ``latest`` cannot be read: all of them, the newest first.
    """
    folder = run_dir / "checkpoints"
    named_steps = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    steps = dict(sorted((item for item in named_steps if (item[1] / MANIFEST).is_file()), reverse=True))
    try:
        named = _STEP.fullmatch((folder / LATEST).read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        named = None
    if named is None:
        return list(steps.values())
    latest = int(named[1])
    return [steps.get(latest, folder / named[0]), *(path for step, path in steps.items() if step < latest)]


def is_pointer(path: Path) -> bool:
    """Whether a path is one of the files that name a checkpoint: RUN/checkpoints/latest, RUN/checkpoints/best."""
    return path.name in (LATEST, BEST) and path.is_file()


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's folder.

    Args:
        path: That folder, a file that names one (``is_pointer``), or a run directory or its folder of checkpoints,
            whose latest one is meant.

    Raises:
        CheckpointError: There is none.
    """
    if is_pointer(path):
        return _named_by(path)
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).is_file():
            return folder
        if is_pointer(folder / LATEST):
            return _named_by(folder / LATEST)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    raise CheckpointError(f"{path} has no complete checkpoint (no {MANIFEST}, no {LATEST})")


def _named_by(pointer: Path) -> Path:
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} is damaged: it does not name a step_N folder")
    return pointer.parent / name


def point_to_latest(checkpoint: Path) -> None:
    """Makes ``latest`` beside a checkpoint name it."""
    write_atomically(checkpoint.parent / LATEST, checkpoint.name + "\n")


def point_to_best(folder: Path, step: int | None) -> None:
    """Makes ``best`` in a run's folder of checkpoints name the checkpoint of ``step``; None: removes it."""
    if step is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_atomically(folder / BEST, f"step_{step}\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``target`` at the end. After an error nothing of it is left.

    Raises:
        CheckpointError: ``target`` exists and is not an empty folder.
    """
    target = target.resolve()  # the folder that a link or "." stands for
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder; choose another one")
    beside = target.with_name(f"{target.name}.{os.getpid()}.partial")  # a name that no other process uses
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.exists():
            for item in beside.iterdir():
                item.replace(target / item.name)
            beside.rmdir()
        else:
            beside.replace(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
