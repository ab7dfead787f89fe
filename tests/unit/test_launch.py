"""Who started this process, told from the environment."""

import errno
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from megadistill.engines import rendezvous
from megadistill.engines.ancestors import ancestors
from megadistill.engines.launch import hostfile_of, name_accelerator, srun_variables
from megadistill.engines.mpi_launch import mpi_variables
from megadistill.errors import TopologyError

SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_ranks_that_srun_started_know_their_place() -> None:
    found = srun_variables(SRUN, lambda nodes: {"n[1-2]": "n1"}[nodes])
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "20017", "MASTER_ADDR": "n1"}
    found = srun_variables(SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}, lambda _: "never asked")
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    found = srun_variables(SRUN | {"SLURM_STEP_NUM_NODES": "1"}, lambda _: "never asked")
    assert found["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"},  # a batch script
        SRUN | {"RANK": "0"},  # a launcher that srun started
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
    ],
)
def test_others_are_left_alone(environment: dict[str, str]) -> None:
    assert srun_variables(environment, lambda _: "n1") == {}


def test_half_a_step_is_refused() -> None:
    with pytest.raises(TopologyError, match="did not set SLURM_LOCALID"):
        srun_variables({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"}, lambda _: "n1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "0"},  # a launcher that mpirun started
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "1"},
    ],
)
def test_mpi_is_left_alone_where_mpirun_did_not_start_ranks(environment: dict[str, str]) -> None:
    before = "mpi4py.MPI" in sys.modules
    assert mpi_variables(environment, lambda: 7) == {}
    assert ("mpi4py.MPI" in sys.modules) is before


class Mpi:
    """Stands in for mpi4py's MPI on rank 3 of 4, the second one of its host."""

    COMM_TYPE_SHARED = 0

    def __init__(self, size: int, rank: int, host: "Mpi | None" = None) -> None:
        self.size, self.rank, self.host, self.is_open = size, rank, host, True
        self.COMM_WORLD = self

    def Split_type(self, kind: int) -> "Mpi | None":
        return self.host

    def bcast(self, value: object, root: int = 0) -> object:
        return {"MASTER_ADDR": "of rank 0", "MASTER_PORT": "9"} if self.rank != root else value

    def Free(self) -> None:
        self.is_open = False

    Finalize = Free


@pytest.mark.parametrize(
    ("rank", "num_local", "environment", "meeting"),
    [
        (0, 4, {}, ("127.0.0.1", "7")),
        (0, 2, {}, (socket.gethostname(), "7")),
        (0, 2, {"MASTER_ADDR": "n1", "MASTER_PORT": "8"}, ("n1", "8")),
        (3, 2, {}, ("of rank 0", "9")),
    ],
)
def test_ranks_of_mpirun_learn_their_place_from_mpi(
    monkeypatch: pytest.MonkeyPatch, rank: int, num_local: int, environment: dict[str, str], meeting: tuple[str, str]
) -> None:
    import mpi4py

    mpi = Mpi(4, rank, Mpi(num_local, 1))
    monkeypatch.setattr(mpi4py, "MPI", mpi, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    found = mpi_variables({"PMI_SIZE": "4", **environment}, lambda: 7)
    place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": str(num_local)}
    assert found == place | dict(zip(("MASTER_ADDR", "MASTER_PORT"), meeting, strict=True))
    assert not mpi.is_open, "a rank that fails would wait in MPI_Finalize"


def test_an_mpi_of_another_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is then alone in its world, and would train by itself."""
    import mpi4py

    monkeypatch.setattr(mpi4py, "MPI", Mpi(1, 0), raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi4py.MPI)
    with pytest.raises(TopologyError, match="mpirun started 4 processes and mpi4py sees 1"):
        mpi_variables({"OMPI_COMM_WORLD_SIZE": "4"}, lambda: 7)


@pytest.mark.parametrize(
    ("command", "hostfile"),
    [
        ("python /venv/bin/deepspeed --hostfile my/hosts run.sh --config c.yaml", "my/hosts"),
        ("python /venv/bin/deepspeed --num_nodes 2 -H my/hosts run.sh", "my/hosts"),
        ("/venv/bin/deepspeed --hostfile=my/hosts run.sh", "my/hosts"),
        ("python -m deepspeed.launcher.runner --hostf my/hosts run.sh", "my/hosts"),
        ("python /venv/bin/deepspeed --num_gpus 2 run.sh --config c.yaml", None),
        ("mpirun --hostfile my/hosts run.sh", None),
        ("bash run.sh", None),
    ],
)
def test_the_hostfile_of_a_command_line(command: str, hostfile: str | None) -> None:
    assert hostfile_of(command.split()) == hostfile


def test_ancestors_tell_their_name_their_words_and_their_folder(tmp_path: Path) -> None:
    code = "from megadistill.engines.ancestors import ancestors; a = next(ancestors())"
    code += "; print(a.program, a.words[2], a.path('f'), a.is_alive())"
    shell = tmp_path / "my launcher"
    shell.symlink_to("/bin/sh")
    script = f'cd "{tmp_path}"; PYTHONPATH="{Path.cwd()}" "{sys.executable}" -c "{code}"; exit'
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("my launcher cd ") and done.stdout.endswith(f" {tmp_path}/f True\n"), done.stderr


def test_a_process_that_has_ended_is_no_living_ancestor() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "from megadistill.engines.ancestors import *; a = next(ancestors()); import os, time; os.kill(a.pid, 9)"
    inner += "; exec('while a.is_alive(): time.sleep(0.01)'); print('gone')"
    done = subprocess.run([sys.executable, "-c", code, inner], capture_output=True, text=True, timeout=60)
    assert done.stdout == "gone\n", done.stderr
    assert all(above.is_alive() for above in ancestors())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_the_meeting_point_of_one_machine_is_the_loopback_address(host: str) -> None:
    with rendezvous.listen(host, 0) as listener:
        assert rendezvous.is_loopback(listener.getsockname()[0])
    assert rendezvous.interface_towards("127.0.0.1") in psutil.net_if_addrs()


def test_rank_0_listens_on_all_addresses_only_where_the_master_has_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def listen_on(address: tuple[str, int], **_: object) -> socket.socket:
        asked.append(address)
        if address[0] == "192.0.2.1":  # nobody's
            raise OSError(errno.EADDRNOTAVAIL, "not ours")
        return socket.socket()

    names = {
        "outside": ["192.0.2.1"],
        "ours": ["192.0.2.1", "192.0.2.2"],
        "debian": ["127.0.1.1"],
        "localhost": ["192.0.2.1", "127.0.0.1"],  # the first one: IPv6 that is switched off
    }
    monkeypatch.setattr(socket, "create_server", listen_on)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (name, port)) for name in names[host]]
    )
    last = []
    for host in names:
        rendezvous.listen(host, 7).close()
        last.append(asked[-1])
    assert last == [("", 7), ("192.0.2.2", 7), ("", 7), ("127.0.0.1", 7)]


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            TopologyError, match=f"rank 0 cannot listen on 127.0.0.1 port {port}: Address already in use"
        ):
            rendezvous.listen("127.0.0.1", port)


def test_interfaces_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert set(rendezvous.name_interfaces("localhost")) == {"NCCL_SOCKET_IFNAME"}
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    loopback = rendezvous.interface_towards("127.0.0.1")
    assert rendezvous.name_interfaces("127.0.0.1") == {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def test_torchruns_own_store_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.meeting_store(timedelta(seconds=1)) is None


def test_gpus_do_not_use_an_attention_that_plans_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert name_accelerator() and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
