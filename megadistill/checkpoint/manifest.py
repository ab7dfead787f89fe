"""What a whole checkpoint looks like: a list of its files with sizes and checksums, written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadistill.errors import CheckpointError
from megadistill.observability.progress import progress_bar

MANIFEST = "manifest.json"
LATEST = "latest"
HF_FOLDER, STUDENT_FOLDER = "hf", "student"
_STEP = re.compile(r"step_(\d+)")
VERSION = 2


class OtherVersionError(CheckpointError):
    """A checkpoint of a program that writes them otherwise."""


def digest(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size in bytes and BLAKE2b checksum of one file; ``sync``: of one that is on the disk when this returns."""
    checksum = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            checksum.update(block)
    return {"bytes": path.stat().st_size, "blake2b": checksum.hexdigest()}


def files_below(folder: Path) -> list[str]:
    """Relative names of all files of a checkpoint but the manifest, sorted."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, step: int, layout: dict[str, int], files: dict[str, dict[str, Any]]) -> None:
    write_atomically(
        folder / MANIFEST, json.dumps({"version": VERSION, "step": step, "layout": layout, "files": files}, indent=1)
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises CheckpointError when there is none that can be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            raise OtherVersionError(
                f"{path}: version {manifest['version']} is not supported (this program reads {VERSION})"
            )
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["blake2b"])
        for key in ("tp_size", "dp_size", "zero_stage", "model", "gate"):
            manifest["layout"][key]
        named = _STEP.fullmatch(folder.name)
        if named and int(named[1]) != int(manifest["step"]):
            raise CheckpointError(f"{path} is damaged: it is of step {manifest['step']}")
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no whole checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def check_with_progress(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """``check_files`` for a person who waits for it."""
    for name in progress_bar(sorted(names), description="check", unit="file"):
        check_files(folder, manifest, [name])


def check_files(folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """Compares files with the manifest. Raises CheckpointError naming the first that is missing, truncated or
    changed."""
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
    """Checkpoints of a run to go on from, the best first: the one that ``latest`` names, then those of fewer steps.

    Where ``latest`` cannot be read, all of them, the newest first.
    """
    folder = run_dir / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    steps = dict(sorted((item for item in found if (item[1] / MANIFEST).is_file()), reverse=True))
    try:
        named = _STEP.fullmatch((folder / LATEST).read_text(errors="replace").strip())
    except OSError:
        named = None
    if named is None:
        return list(steps.values())
    latest = int(named[1])
    return [steps.get(latest, folder / named[0]), *(path for step, path in steps.items() if step < latest)]


def find_checkpoint(path: Path) -> Path:
    """The folder of one checkpoint: ``path`` itself, or the latest one of a run directory or of its checkpoints
    folder."""
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).is_file():
            return folder
        if (folder / LATEST).is_file():
            name = (folder / LATEST).read_text(errors="replace").strip()
            if not _STEP.fullmatch(name):
                raise CheckpointError(f"{folder / LATEST} is damaged: it names no step_N folder")
            return folder / name
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    raise CheckpointError(f"{path} holds no whole checkpoint (no {MANIFEST}, no {LATEST})")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target``, which takes its place at the end; after an error nothing is left of it.

    Raises CheckpointError where ``target`` is there already and is not an empty folder.
    """
    target = target.resolve()  # the folder that a link or "." means
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder; choose another one")
    beside = target.with_name(f"{target.name}.{os.getpid()}.partial")  # nobody else's, whatever there is already
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


def write_atomically(path: Path, text: str) -> None:
    """Writes beside and renames into place: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that cannot do this for folders
    finally:
        os.close(descriptor)
