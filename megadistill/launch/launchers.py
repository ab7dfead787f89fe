"""What is known about each launcher, in one table. It is used before torch is imported, so it imports nothing heavy.

To add a launcher, add a row to ``LAUNCHERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launcher:
    """How a launcher tells a process its rank, and how it looks among the processes above a rank.

    Attributes:
        name: What error messages call it.
        rank: The variable of the rank in the whole job.
        world_size: The variable of the number of processes of the whole job.
        local_rank: The variable of the rank among the processes of this machine.
        local_size: The variable of the number of processes on this machine; None where it sets none.
        meeting_point: Where MASTER_ADDR and MASTER_PORT come from: the environment, SLURM's node list and job number,
            or MPI (which then gives the ranks too).
        private: Further variables that a child process which is not a rank must not see.
        programs: Names of its processes, as the kernel knows them.
        commands: Words at the beginning of a command line that run it, where Python is the program.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str | None
    meeting_point: Literal["environment", "slurm", "mpi"] = "environment"
    private: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables that make a process one of its ranks."""
        local_size = () if self.local_size is None else (self.local_size,)
        return (self.rank, self.world_size, self.local_rank, *local_size, *self.private)


# First those that set RANK and WORLD_SIZE themselves, because they may run below the others.
DEEPSPEED = Launcher(
    name="deepspeed",
    rank="RANK",
    world_size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_SIZE",
    private=("CROSS_RANK", "CROSS_SIZE"),
    programs=("pdsh", "pdsh.bin"),  # pdsh is a script on Debian
    commands=("deepspeed",),
)
LAUNCHERS = (
    DEEPSPEED,
    Launcher(
        name="torchrun",
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_size="LOCAL_WORLD_SIZE",
        private=(
            *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
            *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
            *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
        ),
        commands=("torchrun", "torch.distributed.run", "torch/distributed/run"),
    ),
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        # srun alone sets it: a batch script, and what that starts, have none.
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size=None,
        meeting_point="slurm",
        programs=("slurmstepd",),
    ),
    Launcher(
        name="mpirun of Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        meeting_point="mpi",
        private=("PMIX_RANK",),
        programs=("mpirun", "mpiexec", "prterun", "prted", "orted"),
    ),
    Launcher(
        name="mpirun of MPICH or Intel MPI",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        meeting_point="mpi",
        programs=("mpirun", "mpiexec"),
    ),
)


def rank_of(environment: Mapping[str, str]) -> int:
    """This process's rank, also before ``megadistill.launch.world`` has set RANK; 0 without a launcher."""
    return _first_number(environment, lambda launcher: launcher.rank, 0)


def local_size_of(environment: Mapping[str, str]) -> int:
    """Number of processes that the launcher started on this machine; 1 where none is known."""
    return _first_number(environment, lambda launcher: launcher.local_size, 1)


def is_mpi_rank(environment: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process, even as its only rank."""
    mpi_launchers = [launcher for launcher in LAUNCHERS if launcher.meeting_point == "mpi"]
    return any(name in environment for launcher in mpi_launchers for name in launcher.variables)


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process as one of several ranks without setting RANK; None for other processes."""
    if DEEPSPEED.rank in environment:
        return None
    for launcher in LAUNCHERS:
        if launcher.rank != DEEPSPEED.rank and int(environment.get(launcher.world_size, "1")) > 1:
            return launcher
    return None


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that is not a rank of this process's job."""
    hidden = {*MEETING_POINT, *(name for launcher in LAUNCHERS for name in launcher.variables)}
    return {name: value for name, value in environment.items() if name not in hidden}


def is_launcher(program: str, words: Sequence[str]) -> bool:
    """Whether a process is a launcher: by its program, or by the module that Python runs, not by just any argument."""
    return any(
        program in launcher.programs or any(command in word for word in words[:4] for command in launcher.commands)
        for launcher in LAUNCHERS
    )


def _first_number(environment: Mapping[str, str], variable_of: Callable[[Launcher], str | None], default: int) -> int:
    names = (variable_of(launcher) for launcher in LAUNCHERS)
    return int(next((environment[name] for name in names if name is not None and name in environment), default))
