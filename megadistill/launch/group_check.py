"""Collectives of the process groups: are their results right, how fast are they, and who is to blame where not."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megadistill.launch.machine import listed
from megadistill.launch.meeting import Meeting, MissingRanksError, StuckError, within
from megadistill.parallel.context import ParallelContext

_SMALL, _LARGE_CPU, _LARGE_CUDA = 16 << 10, 4 << 20, 64 << 20  # float32 numbers
_REPEATS = 3


@dataclass
class GroupResult:
    """What one rank found out about one of its groups.

    Attributes:
        name: "world", "tp" or "dp".
        ranks: Its ranks.
        bytes_per_s: Bus bandwidth of an all-reduce at two sizes, 2 (n-1)/n bytes / seconds.
        fault: What is wrong, for people; None: nothing.
        is_stuck: A collective did not end, or may not: this process must end by ``leave``.
    """

    name: str
    ranks: list[int]
    bytes_per_s: list[float]
    fault: str | None = None
    is_stuck: bool = False


def check_groups(meeting: Meeting, tp_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Makes all groups of a run and tries them. Ends at the first fault, because other ranks end there, too.

    Args:
        meeting: Where ranks tell one another that they are there.
        tp_size: Tensor-parallel size of the run.
        device: Where this rank computes.

    Returns:
        ``GroupResult`` of each group as dictionaries.
    """
    rank, world_size = meeting.rank, meeting.world_size
    world = GroupResult("world", list(range(world_size)), [])
    results = [world]
    try:
        meeting.arrive("making groups", world.ranks)
        context = within(2 * meeting.timeout_s, lambda: _context(meeting, tp_size, device))
        tp_start = rank // tp_size * tp_size
        pairs: list[tuple[GroupResult, dist.ProcessGroup | None]] = [(world, None)]
        if tp_size > 1 and tp_size < world_size:
            pairs.append((GroupResult("tp", list(range(tp_start, tp_start + tp_size)), []), context.tp_group))
            pairs.append((GroupResult("dp", list(range(rank % tp_size, world_size, tp_size)), []), context.dp_group))
        for result, group in pairs:
            if result is not world:
                results.append(result)
            world = result
            _check(meeting, result, group, device)
            if result.fault is not None:
                break
        within(meeting.timeout_s, dist.destroy_process_group)
    except MissingRanksError as error:
        results[-1].fault = f"{listed(error.ranks)} did not come to: {error.stage}"
        results[-1].is_stuck = True
    except StuckError:
        results[-1].fault = f"a collective of {listed(results[-1].ranks)} did not end within {meeting.timeout_s:g} s"
        results[-1].is_stuck = True
    except (RuntimeError, dist.DistError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        results[-1].fault = f"a collective of {listed(results[-1].ranks)} failed: {lines[0][:160]}"
        results[-1].is_stuck = True
    return [asdict(result) for result in results]


def _context(meeting: Meeting, tp_size: int, device: torch.device) -> ParallelContext:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("groups", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=meeting.timeout_s),
    )
    return ParallelContext.build(tp_size, meeting.timeout_s, device)


def _check(meeting: Meeting, result: GroupResult, group: dist.ProcessGroup | None, device: torch.device) -> None:
    name = f"the collectives of {result.name} ({listed(result.ranks)})"
    meeting.arrive(name, result.ranks)
    result.fault = within(meeting.timeout_s, lambda: _wrong(result.ranks, meeting.rank, group, device))
    for numel in (_SMALL, _LARGE_CUDA if device.type == "cuda" else _LARGE_CPU):
        if result.fault is None:
            measure = partial(_speed, numel, len(result.ranks), group, device)
            result.bytes_per_s.append(within(meeting.timeout_s, measure))


def contribution(rank: int, numel: int, device: torch.device) -> torch.Tensor:
    """What a rank gives to the test: whole numbers, so that float32 sums of up to 4,096 ranks are exact."""
    return torch.arange(numel, device=device, dtype=torch.float32).remainder_(997).add_(rank)


def _wrong(ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """An all-gather and an all-reduce of small tensors; what is not as it should be."""
    own = contribution(rank, 1024, device)
    rows = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(rows, own, group=group)
    plain = contribution(0, 1024, device)
    wrong = [other for other, row in zip(ranks, rows, strict=True) if not torch.equal(row, plain + other)]
    total = own.clone()
    dist.all_reduce(total, group=group)
    if wrong:
        return f"what {listed(wrong)} sent is not what arrived: memory, link, or driver there is broken"
    if not torch.equal(total, plain * len(ranks) + sum(ranks)):
        return f"the all-reduce of {listed(ranks)} gives wrong sums"
    return None


def _speed(numel: int, size: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Bus bandwidth of an all-reduce, the best of some."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tensor, best = torch.ones(numel, device=device), float("inf")
    for _ in range(_REPEATS):
        tensor.fill_(1.0)
        _wait(device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * (size - 1) / size * tensor.nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave(code: int) -> None:
    """Ends this process at once: destroying process groups would wait for ranks that are gone."""
    os._exit(code)
