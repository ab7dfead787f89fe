"""The package as setup.py describes it, and a wheel of it."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]


def setup_arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


def requirements() -> dict[str, list[str]]:
    """Requirements by extra; "" are those of every installation."""
    arguments = setup_arguments()
    return {"": arguments["install_requires"], **arguments["extras_require"]}


def install_wheel(folder: Path) -> Path:
    """Builds a wheel of a copy of the tree and unpacks it below ``folder``, without the network. Returns where."""
    tree, wheels, site = folder / "tree", folder / "wheels", folder / "site"
    tree.mkdir(parents=True)
    for name in ("megadistill", "configs", "launchers"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(tree)]
    subprocess.run(build, check=True, timeout=120)
    install = [*pip, "install", *offline, "--target", str(site), *map(str, wheels.glob("*.whl"))]
    subprocess.run(install, check=True, timeout=120)
    return site
