"""A preflight of a machine or an allocation: every rank looks at itself, and rank 0 judges what all have found.

No rank waits for another one without a deadline (launch/meeting.py), so that an absent or hung one is named.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megadistill.config.schema import RunConfig
from megadistill.data.hub import check_name
from megadistill.errors import DataError, MegadistillError
from megadistill.files import reason_of
from megadistill.launch.group_check import check_groups
from megadistill.launch.machine import facts_of, speed
from megadistill.launch.meeting import ARRIVAL, Meeting
from megadistill.planning.disk_check import existing_folder, mark_file, measure_disk, sees
from megadistill.planning.findings import FAILED, OK, WARNING, Finding, Seen, judge
from megadistill.planning.needs import Needs, needs_of

_MODELS_S = 240.0  # for rank 0 to read configurations and tokenizers, perhaps from the hub


def examine(
    config: RunConfig | None,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
    report: Callable[[list[Finding]], None],
) -> tuple[int, bool]:
    """Examines this rank's machine, and with the other ranks the job.

    Args:
        config: The run's configuration; without one, only what does not depend on it is examined.
        rank: This rank.
        world_size: Number of ranks.
        device: Where this rank computes.
        timeout_s: Seconds that the other ranks have for each stage, and four times as many to come.
        report: Gets the findings on rank 0, before any rank ends: launchers may end all when one has failed.

    Returns:
        On every rank the number of failures that rank 0 found; whether this process must end by ``os._exit``, because a
        collective never ended.

    Raises:
        TopologyError: Rank 0 is not there, or cannot listen.
    """
    if world_size == 1:
        seen = Seen({0: facts_of(device)}, 1, speeds={0: speed(device)})
        findings = [*_of_config(config, 1, seen), *judge(seen)]
        report(findings)
        return _count(findings), False
    meeting = Meeting(rank, world_size, timeout_s)
    meeting.post("facts", facts_of(device))
    return _lead(config, meeting, device, report) if rank == 0 else _follow(meeting, device)


def _lead(
    config: RunConfig | None, meeting: Meeting, device: torch.device, report: Callable[[list[Finding]], None]
) -> tuple[int, bool]:
    """Rank 0's part."""
    world_size = meeting.world_size
    facts = meeting.gather("facts", range(world_size), ARRIVAL * meeting.timeout_s)
    seen = Seen(facts, world_size)
    findings = _of_config(config, world_size, seen)
    mark = secrets.token_hex(4)
    file = None if config is None else mark_file(existing_folder(config.run.dir), mark)
    if file is not None:
        with suppress(OSError):  # is a finding already
            file.write_text(mark, encoding="utf-8")
    try:
        plan = {"present": list(facts), "tp_size": 1 if seen.needs is None else seen.needs.tp_size,
                "file": None if file is None else str(file), "mark": mark}  # fmt: skip
        meeting.post("plan", plan)
        own = _together(meeting, plan, device)
        # Stages that may have waited for the timeout: arriving, making groups, and each of the collectives.
        results = {0: own} | meeting.gather("results", [r for r in facts if r != 0], 6 * meeting.timeout_s)
    finally:
        if file is not None:
            with suppress(OSError):
                file.unlink()
    seen.results = results
    seen.places = meeting.gather("place", [rank for rank in facts if rank not in results], 0.0)
    seen.speeds = {rank: result["speed"] for rank, result in results.items()}
    findings += judge(seen)
    report(findings)
    failures = _count(findings)
    meeting.post("verdict", failures)
    is_stuck = any(group["is_stuck"] for group in own["groups"])
    # Rank 0 keeps the store: the others need it until they have heard.
    meeting.gather("heard", [rank for rank in results if rank != 0], 5.0)
    return failures, is_stuck


def _follow(meeting: Meeting, device: torch.device) -> tuple[int, bool]:
    """The other ranks' part."""
    timeout_s = meeting.timeout_s
    plan = meeting.gather("plan", [0], (1 + ARRIVAL) * timeout_s + _MODELS_S).get(0)
    if plan is None:
        return 1, False
    own = _together(meeting, plan, device)
    meeting.post("results", own)
    failures = int(meeting.gather("verdict", [0], 8 * timeout_s).get(0, 1))
    with suppress(RuntimeError):  # rank 0 may be gone
        meeting.post("heard", True)
    return failures, any(group["is_stuck"] for group in own["groups"])


def _together(meeting: Meeting, plan: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What every rank does once it knows who is there; collectives only where all are."""
    meeting.post("place", "reading its clock")
    skew = meeting.skew([rank for rank in plan["present"] if rank != 0])
    is_shared = None if plan["file"] is None else sees(Path(plan["file"]), plan["mark"])
    own: dict[str, Any] = {"skew": skew, "is_shared": is_shared, "speed": speed(device), "groups": []}
    if len(plan["present"]) == meeting.world_size:
        own["groups"] = check_groups(meeting, plan["tp_size"], device)
    return own


def _of_config(config: RunConfig | None, world_size: int, seen: Seen) -> list[Finding]:
    """Findings of rank 0 about run.dir, rows, models and tokenizers; ``seen`` gets what the run needs."""
    if config is None:
        return [Finding("configuration", OK, "none given: run.dir, models and memory are not examined", "")]
    return [_run_dir(config, seen), *_data(config), *_models(config, world_size, seen)]


def _run_dir(config: RunConfig, seen: Seen) -> Finding:
    folder = existing_folder(config.run.dir)
    advice = "choose another run.dir, or make it writable"
    try:
        if not folder.is_dir():
            return Finding("run.dir", FAILED, f"{folder} is a file; a folder is needed", advice)
        if not os.access(folder, os.W_OK):
            return Finding("run.dir", FAILED, f"{config.run.dir}: no permission to write in {folder}", advice)
        seen.disk = measure_disk(folder, secrets.token_hex(4))
    except OSError as error:
        return Finding("run.dir", FAILED, f"{folder} cannot be used: {reason_of(error)}", advice)
    return Finding("run.dir", OK, f"{folder} can be written", "")


def _data(config: RunConfig) -> list[Finding]:
    """Whether the files of rows are there; what they hold is read at the start of a run.

    A warning alone: machines are examined before data is prepared on them.
    """
    data = config.data
    paths = {
        "data.train_path": data.train_path, "data.prompts_path": data.prompts_path, "data.valid_path": data.valid_path,
        "eval.path": config.eval.path,
    }  # fmt: skip
    findings = []
    for setting, path in paths.items():
        try:
            if path is not None:
                check_name(path, error=DataError, setting=setting)
        except DataError as error:
            findings.append(Finding(setting, WARNING, str(error), "prepare it, or name another one"))
    if findings and config.run.prepare != "none":
        return [Finding("data", OK, f"the first start makes it (run.prepare={config.run.prepare})", "")]
    if data.train_path is None:
        findings.insert(0, Finding("data.train_path", WARNING, "is not set: a run has nothing to train on", ""))
    return findings or [Finding("data", OK, "files and folders are there; names of the hub are not looked up", "")]


def _models(config: RunConfig, world_size: int, seen: Seen) -> list[Finding]:
    from megadistill.data.hub import is_hub_name, offline_if_unreachable

    paths = [config.model.teacher.path, config.model.student.path, config.model.tokenizer]
    absent = [path for path in paths if path is not None and not Path(path).exists()]
    if absent and config.run.prepare != "none":
        return [Finding("models", OK, f"the first start makes them (run.prepare={config.run.prepare})", "")]
    findings = []
    if any(map(is_hub_name, absent)):
        is_offline = offline_if_unreachable()
        state = "cannot be reached: models and tokenizers come from the cache" if is_offline else "can be reached"
        findings.append(Finding("hub", WARNING if is_offline else OK, f"the hub {state}", ""))
    try:
        needs: Needs = needs_of(config, world_size)
    except MegadistillError as error:
        key = "" if error.setting is None else f"see {error.setting}"
        return [*findings, Finding("models", FAILED, str(error), key)]
    seen.needs = needs
    seen.checkpoints = config.checkpoint.keep_last + 1
    layout = f"tp {needs.tp_size} x dp {world_size // needs.tp_size}"
    return [*findings, Finding("models", OK, f"configurations and tokenizers are found and fit; {layout}", "")]


def _count(findings: list[Finding]) -> int:
    return sum(finding.state == FAILED for finding in findings)
