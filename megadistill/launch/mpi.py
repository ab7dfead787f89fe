"""The place of a rank that mpirun started itself, asked of MPI."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from megadistill.errors import TopologyError, needs_extra

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI


def mpi_variables(environment: Mapping[str, str], free_port: Callable[[], int]) -> dict[str, str]:
    """What a launcher would have set, for one of several ranks of mpirun; empty for any other process.

    Collective over MPI's world. Rank 0's MASTER_ADDR and MASTER_PORT hold for all; where it has none, 127.0.0.1 when
    all ranks are on its host, else its host name, and a port that is free there. MPI is initialised for this alone and
    finalised again: a rank that fails must not wait for the others in MPI_Finalize.
    """
    size = next((int(environment[name]) for name in _SIZES if name in environment), 1)
    if "RANK" in environment or size < 2:
        return {}
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
    meeting = world.bcast(
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
    return {name: str(number) for name, number in place.items()} | meeting
