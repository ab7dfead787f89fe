"""The place of a rank that mpirun started, as MPI reports it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from megadistill.errors import TopologyError, needs_extra


def mpi_variables(size: int, environment: Mapping[str, str], free_port: Callable[[], int]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT of one of ``size`` > 1 ranks.

    Collective over MPI's world: one split, one broadcast. All ranks take rank 0's MASTER_ADDR and MASTER_PORT. Where it
    has none: 127.0.0.1 when all ranks are on one host, else rank 0's host name; and a port that is free there. MPI is
    initialized for this alone and finalized again: a rank that fails must not wait for the others in MPI_Finalize.

    Args:
        size: Number of processes that mpirun started.
        environment: That of this process.
        free_port: Finds a free port.

    Raises:
        ConfigError: mpi4py is missing.
        TopologyError: It cannot be used, or uses another MPI than this mpirun's.
    """
    try:
        with needs_extra("mpi", "started by mpirun"):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py is there and libmpi is not
        raise TopologyError(f"mpirun started this process, but mpi4py cannot be used: {error}") from None
    world = MPI.COMM_WORLD
    if world.size != size:
        raise TopologyError(
            f"mpirun started {size} processes and mpi4py sees {world.size}: it uses another MPI than this mpirun's"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    own_address = "127.0.0.1" if host.size == size else socket.gethostname()
    meeting_point = world.bcast(
        {
            "MASTER_ADDR": environment.get("MASTER_ADDR", own_address),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(free_port()),
        }
        if world.rank == 0
        else None
    )
    place = {"RANK": world.rank, "WORLD_SIZE": size, "LOCAL_RANK": host.rank, "LOCAL_SIZE": host.size}
    host.Free()
    MPI.Finalize()
    return {name: str(number) for name, number in place.items()} | meeting_point
