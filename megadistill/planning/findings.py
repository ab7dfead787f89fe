"""What a preflight makes of what all ranks have reported. Pure functions of plain values."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megadistill.launch.machine import counted, differing_versions, listed, slow_ranks, summary
from megadistill.planning.disk_check import Disk
from megadistill.planning.needs import Needs

OK, WARNING, FAILED = "ok", "warning", "FAILED"
_SKEW_S, _SLOW_DISK, _OPEN_FILES = 1.0, 50e6, 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: What was examined.
        state: ``OK``, ``WARNING`` or ``FAILED``.
        found: What was found.
        advice: What to do next; empty: nothing.
    """

    check: str
    state: str
    found: str
    advice: str


@dataclass
class Seen:
    """All that is known.

    Attributes:
        facts: Of each rank that came, ``machine.facts_of``.
        world_size: Number of ranks that should have come.
        speeds: FLOPs a second of each rank that answered.
        results: Of each rank that answered to the end: skew, is_shared, speed, groups.
        places: Of those that did not: the last stage that they came to.
        disk: The disk of run.dir.
        needs: What the run needs at least.
        checkpoints: Number of checkpoints that lie on the disk at a time.
    """

    facts: Mapping[int, Mapping[str, Any]]
    world_size: int
    speeds: Mapping[int, float] = field(default_factory=dict)
    results: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    places: Mapping[int, str] = field(default_factory=dict)
    disk: Disk | None = None
    needs: Needs | None = None
    checkpoints: int = 0


def judge(seen: Seen) -> list[Finding]:
    """The findings, in the order of the report."""
    findings = [_ranks(seen), _versions(seen), _open_files(seen), *_memory(seen), *_disk(seen)]
    if seen.world_size > 1:
        findings += [*_clocks(seen), *_groups(seen)]
    return [*findings, *_speeds(seen)]


def table(findings: list[Finding]) -> str:
    """The report: one line a finding, then what to do, then the verdict."""
    width = max(len(finding.check) for finding in findings)
    lines = [f"{finding.check:<{width}}  {finding.state:<7}  {finding.found}" for finding in findings]
    advice = [f"{finding.check}: {finding.advice}" for finding in findings if finding.advice and finding.state != OK]
    if advice:
        lines += ["", "next:", *(f"  {line}" for line in advice)]
    failed, warnings = (sum(finding.state == state for finding in findings) for state in (FAILED, WARNING))
    parts = [f"{failed} failed"] if failed else []
    parts += [counted(warnings, "warning")] if warnings else []
    return "\n".join([*lines, "", f"doctor: {', '.join(parts) or 'all is right'}"])


def _ranks(seen: Seen) -> Finding:
    absent = [rank for rank in range(seen.world_size) if rank not in seen.facts]
    if absent:
        found = f"{listed(absent)} of {seen.world_size} did not come; {summary(seen.facts)}"
        return Finding("ranks", FAILED, found, "look for their processes and logs; is MASTER_ADDR reachable there?")
    if seen.world_size > 1:
        silent = [rank for rank in seen.facts if rank not in seen.results]
        if silent:
            rank = silent[0]
            place = seen.places.get(rank, "the start")
            host = seen.facts[rank]["host"]
            return Finding(
                "ranks",
                FAILED,
                f"no answer from {listed(silent)}: rank {rank} (process {seen.facts[rank]['pid']} on {host}) did not "
                f"get beyond: {place}",
                "the process is hung or dead: look at it there",
            )
    return Finding("ranks", OK, summary(seen.facts), "")


def _versions(seen: Seen) -> Finding:
    lines = differing_versions({rank: facts["versions"] for rank, facts in seen.facts.items()})
    if lines:
        return Finding("versions", FAILED, "; ".join(lines), "install the same environment on all machines")
    return Finding("versions", OK, f"the same on {counted(len(seen.facts), 'rank')}", "")


def _open_files(seen: Seen) -> Finding:
    needed = max(_OPEN_FILES, 2 * seen.world_size + 256)
    limits = {rank: facts["open_files"] for rank, facts in seen.facts.items()}
    low = [rank for rank, limit in limits.items() if 0 <= limit < needed]  # -1: no limit
    if low:
        return Finding("open files", WARNING, f"{min(limits.values())} on {listed(low)}", f"ulimit -n {4 * needed}")
    least = min(limits.values(), key=lambda limit: float("inf") if limit < 0 else limit)
    return Finding("open files", OK, "no limit" if least < 0 else f"at least {least}", "")


def _memory(seen: Seen) -> Iterator[Finding]:
    device_need, host_need = (seen.needs.device_bytes, seen.needs.host_bytes) if seen.needs else (0, 0)
    has_gpus = all("device_free" in facts for facts in seen.facts.values())
    if has_gpus:
        free = {rank: facts["device_free"] for rank, facts in seen.facts.items()}
        yield _enough("device memory", free, device_need, "docs/memory.md has the knobs; is another process on it?")
    else:
        host_need += device_need
    hosts: dict[str, list[int]] = {}
    for rank, facts in seen.facts.items():
        hosts.setdefault(facts["host"], []).append(rank)
    free = {ranks[0]: min(seen.facts[r]["host_free"] for r in ranks) / len(ranks) for ranks in hosts.values()}
    yield _enough("host memory", free, host_need, "docs/memory.md has the knobs")


def _enough(check: str, free: Mapping[int, float], need: int, advice: str) -> Finding:
    rank = min(free, key=lambda other: free[other])
    found = f"{_gb(free[rank])} free for each process" + (f" on the machine of rank {rank}" if len(free) > 1 else "")
    if need:
        found += f"; the run needs at least {_gb(need)}"
    return Finding(check, FAILED if free[rank] < need else OK, found, advice)


def _disk(seen: Seen) -> Iterator[Finding]:
    shared = {rank: result["is_shared"] for rank, result in seen.results.items()}
    blind = [rank for rank, sees in shared.items() if sees is False]
    if seen.disk is not None and len(shared) > 1:
        if blind:
            hosts = sorted({seen.facts[rank]["host"] for rank in blind})
            found = f"{listed(blind)} ({', '.join(hosts)}) do not see what rank 0 writes in run.dir"
            yield Finding("shared files", FAILED, found, "put run.dir on a file system that all machines share")
        else:
            yield Finding("shared files", OK, f"{counted(len(shared), 'rank')} see what rank 0 writes in run.dir", "")
    if seen.disk is None:
        return
    disk, need = seen.disk, seen.needs.checkpoint_bytes * seen.checkpoints if seen.needs else 0
    found = f"write {disk.write / 1e6:.0f} MB/s, read {disk.read / 1e6:.0f} MB/s, {_gb(disk.free)} free"
    if need:
        found += f"; {seen.checkpoints} checkpoints need {_gb(need)}"
    if disk.free < need:
        yield Finding("disk", FAILED, found, "free some space, or lower checkpoint.keep_last")
    elif disk.write < _SLOW_DISK:
        yield Finding("disk", WARNING, found, "checkpoints will take long: raise train.save_every, or use another disk")
    else:
        yield Finding("disk", OK, found, "")


def _clocks(seen: Seen) -> Iterator[Finding]:
    skews = {rank: result["skew"] for rank, result in seen.results.items() if result["skew"] is not None}
    off = [rank for rank, skew in skews.items() if abs(skew) > _SKEW_S]
    if off:
        worst = max(off, key=lambda rank: abs(skews[rank]))
        found = f"{listed(off)}: up to {skews[worst]:+.1f} s from rank 0's"
        yield Finding("clocks", WARNING, found, "set the clocks (chronyd, ntpd): logs of the machines will not line up")
    elif skews:
        yield Finding("clocks", OK, f"within {max(map(abs, skews.values())) * 1e3:.0f} ms of rank 0's", "")


def _groups(seen: Seen) -> Iterator[Finding]:
    by_name: dict[str, dict[tuple[int, ...], list[Mapping[str, Any]]]] = {}
    for result in seen.results.values():
        for group in result["groups"]:
            by_name.setdefault(group["name"], {}).setdefault(tuple(group["ranks"]), []).append(group)
    for name, groups in by_name.items():
        faults = list(dict.fromkeys(one["fault"] for found in groups.values() for one in found if one["fault"]))
        check = f"group {name}"
        if faults:
            advice = "NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME=NAME may show more; try without that machine"
            yield Finding(check, FAILED, faults[0], advice)
            continue
        # A group is as fast as its slowest rank says.
        speeds = {ranks: [min(speed) for speed in zip(*(one["bytes_per_s"] for one in found), strict=True)]
                  for ranks, found in groups.items()}  # fmt: skip
        large = {ranks: speed[-1] for ranks, speed in speeds.items()}
        slow = [ranks for ranks, speed in large.items() if speed < statistics.median(large.values()) / 2]
        slowest = min(speeds, key=lambda ranks: large[ranks])
        size = f"{counted(len(groups), 'group')} of {len(slowest)}"
        found = f"right sums; all-reduce of 64 KB {_rate(speeds[slowest][0])}, large {_rate(large[slowest])} ({size})"
        if slow:
            yield Finding(
                check, WARNING, f"{found}; {listed(slow[0])} less than half of the others", "look at its links"
            )
        else:
            yield Finding(check, OK, found, "")


def _speeds(seen: Seen) -> Iterator[Finding]:
    if len(seen.speeds) < 2:
        return
    slow = slow_ranks(seen.speeds)
    if slow:
        hosts = sorted({seen.facts[rank]["host"] for rank in slow})
        found = f"{listed(slow)} ({', '.join(hosts)}): less than half of the others' speed in small products"
        yield Finding("speed", WARNING, found, "look for other processes, throttling, or another OMP_NUM_THREADS there")
    else:
        yield Finding("speed", OK, "all ranks compute about as fast", "")


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def _rate(number: float) -> str:
    return f"{number / 1e9:.2f} GB/s"
