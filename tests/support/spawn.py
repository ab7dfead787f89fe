"""Small gloo jobs for tests: forked from a parent that has torch loaded, so a case costs a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm


class RankError(AssertionError):
    """A rank failed; the message has its number and its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Runs ``fn(rank, *args)`` on the ranks of a gloo group (dist.group.WORLD), one thread each.

    Args:
        fn: Any function, a closure too: only results are pickled.
        world_size: Number of ranks.
        args: Passed to ``fn``.
        timeout_s: Seconds after which the ranks are killed, by their process ids.

    Returns:
        The results in rank order; they are pickled, so return tensors of modest size or numbers.

    Raises:
        RankError: A rank raised, died or was not done in time.
    """
    torch.set_num_threads(1)  # a thread pool of the parent does not survive the fork
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        ranks = [_start(fn, rank, world_size, store, args, timeout_s) for rank in range(world_size)]
        try:
            return _collect(ranks, timeout_s)
        finally:
            for pid, connection in ranks:
                connection.close()
                _end(pid)


def run_fresh(fn: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> Any:
    """Runs ``fn(*args)`` in a new interpreter, for what must not depend on the heap that a fork inherits.

    Args:
        fn: A function of a module.
        args: Passed to ``fn``; pickled, as its result is.
        timeout_s: Seconds after which it counts as failed.

    Returns:
        The result.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # ended when the block is left, whatever it does
        return pool.apply_async(fn, args).get(timeout_s)


def _start(
    fn: Callable[..., Any], rank: int, world_size: int, store: Path, args: tuple[Any, ...], timeout_s: float
) -> tuple[int, Connection]:
    receiver, sender = Pipe(duplex=False)
    pid = os.fork()
    if pid:
        sender.close()
        return pid, receiver
    code = 1
    try:
        receiver.close()
        sender.send_bytes(pickle.dumps(_run(fn, rank, world_size, store, args, timeout_s)))
        code = 0
    finally:
        os._exit(code)  # no exit handlers of the test runner


def _run(
    fn: Callable[..., Any], rank: int, world_size: int, store: Path, args: tuple[Any, ...], timeout_s: float
) -> tuple[bool, Any]:
    try:
        torch.set_num_threads(1)
        # The parent's is shared by all forks: a rank that is killed with it would stop every bar of later ones.
        tqdm.set_lock(threading.RLock())
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(rank, *args)
        dist.barrier()  # a rank that leaves early would break the last collective of a slower one
        dist.destroy_process_group()
        return True, result
    except BaseException:
        return False, traceback.format_exc()


def _collect(ranks: list[tuple[int, Connection]], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    results: dict[int, Any] = {}
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pending.values())} of {len(ranks)} were not done after {timeout_s} s")
        for connection in ready:
            rank = pending.pop(connection)  # type: ignore[arg-type]
            try:
                is_good, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} of {len(ranks)} died without a result") from None
            if not is_good:
                raise RankError(f"rank {rank} of {len(ranks)} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(ranks))]


def _end(pid: int) -> None:
    """Kills one rank if it still runs, and takes its status, so that none is left behind."""
    if os.waitpid(pid, os.WNOHANG)[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
