"""Where ``configs/`` and ``launchers/`` are: beside the package in a clone, inside it in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

# setup.py puts the two folders there when it builds a wheel; a clone has no such folder.
_PACKAGED = Path(__file__).resolve().parents[1] / "_shipped"


def clone_root() -> Path | None:
    """The clone that this package runs from; None where it is installed."""
    return None if _PACKAGED.is_dir() else Path(__file__).resolve().parents[2]


def shipped_root() -> Path:
    """The folder that holds ``configs/`` and ``launchers/``."""
    return clone_root() or _PACKAGED


def find_config(name: str | os.PathLike[str]) -> Path:
    """The configuration file that ``name`` means.

    Args:
        name: A path. ``configs/NAME.yaml`` and ``configs/baselines/NAME.yaml`` also mean the shipped files of these
            names, unless the working directory holds such a file itself.
    """
    path = Path(name)
    shipped = shipped_root() / path
    is_shipped = path.parent in (Path("configs"), Path("configs/baselines")) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def find_base(name: str, folder: Path) -> Path:
    """The file that ``base: NAME`` means in a configuration file.

    Args:
        name: A path, relative to ``folder``. ``NAME.yaml`` and ``configs/NAME.yaml`` also mean the shipped file of that
            name, unless the folder holds such a file itself.
        folder: That of the file with the line.
    """
    path = folder / name
    shipped = shipped_root() / "configs" / Path(name).name
    is_shipped = Path(name).parent in (Path(), Path("configs")) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def shipped_names() -> list[str]:
    """The names of the shipped configuration files, for a message about one that does not exist."""
    return sorted(path.name for path in (shipped_root() / "configs").glob("*.yaml"))
