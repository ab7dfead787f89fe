"""The commits of hub names that a run began with: it goes on with them, wherever their branches are by then."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from megadistill.data.hub import at_revision, is_hub_name, offline_if_needed
from megadistill.errors import CheckpointError, first_line
from megadistill.files import write_json
from megadistill.models.model_files import commit_of

COMMITS = "hub_commits.json"


def recorded_commits(run_dir: str | Path) -> dict[str, str]:
    """Hub name, as the settings have it -> commit; empty where the run has recorded none.

    Raises:
        CheckpointError: The record cannot be read.
    """
    file = Path(run_dir) / COMMITS
    try:
        commits = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(commits, dict) or not all(isinstance(commit, str) for commit in commits.values()):
            raise ValueError("names and commits are expected")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from None
    return commits


def at_commit(name: str, commits: Mapping[str, str]) -> str:
    """The name at its recorded commit; unchanged where there is none."""
    return at_revision(name, commits[name]) if name in commits and is_hub_name(name) else name


def commits_now(names: Iterable[str | None]) -> dict[str, str]:
    """What the hub, else the cache, says of the hub names among some names; without those that neither knows."""
    hub_names = {name for name in names if name is not None and is_hub_name(name)}
    offline_if_needed(hub_names)
    found = {name: commit_of(name) for name in sorted(hub_names)}
    return {name: commit for name, commit in found.items() if commit is not None}


def moved(commits: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for each name that has another commit now."""
    return [
        f"{name} is commit {now[name]} now; this run goes on with {commit}, which it began with"
        for name, commit in commits.items()
        if now.get(name, commit) != commit
    ]


def record_commits(run_dir: Path, commits: Mapping[str, str]) -> None:
    """Writes the record, where there is something to record."""
    if commits:
        write_json(run_dir / COMMITS, dict(commits))
