"""Which packages a machine lacks, and the command that gathers them where there is an index."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("trl", "liger-kernel")  # measured against where they are there (vLLM: in its own environment)
_TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
_FEATURES = ("rouge-score", "sentencepiece", "textblob", "matplotlib")


def wanted() -> list[Requirement]:
    """What setup.py asks for, and what tests and demo need.

    Read from the file: on a machine that a tree was copied to, the package is not installed.
    """
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    block = re.search(r"install_requires=\[(.*?)\]", text, re.S)
    assert block is not None, "setup.py has no install_requires"
    found = [Requirement(name) for name in re.findall(r'^\s*"([^"]+)",', block[1], re.M)]
    return found + [Requirement(name) for name in (*_FEATURES, *_TESTS)]


def missing(names: Iterable[str]) -> list[str]:
    """The packages, by the names that pip uses, that are not installed here."""
    absent = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def other_versions(requirements: Sequence[Requirement]) -> list[str]:
    """Packages of another version than setup.py asks for: "torch 2.11.0 (wanted >=2.13)"."""
    found = []
    for requirement in requirements:
        try:
            here = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            found.append(f"{requirement.name} {here} (wanted {requirement.specifier})")
    return found


def pinned(names: Iterable[str]) -> list[str]:
    """``name==version`` as launchers/constraints.txt has it; the bare name where it has none."""
    lines = (ROOT / "launchers/constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = {_plain(line.partition("==")[0]): line.strip() for line in lines if "==" in line}
    return [versions.get(_plain(name), name) for name in names]


def command(names: Iterable[str]) -> str:
    """Gathers wheels for this machine in a folder, run where there is a package index; and installs them here."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    glibc = platform.libc_ver()[1].replace(".", "_") or "2_28"
    words = ["pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    for tag in dict.fromkeys((glibc, "2_28", "2_17")):
        words += ["--platform", f"manylinux_{tag}_{platform.machine()}"]
    words += ["-d", "wheels", *pinned(names)]
    return f"{shlex.join(words)}\npip install --no-index --no-deps wheels/*.whl"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
