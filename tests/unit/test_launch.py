"""Which launcher started this process, and where its ranks meet."""

import errno
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from megadistill.errors import ExitCode, TopologyError
from megadistill.launch import launchers, rendezvous
from megadistill.launch.ancestors import ancestors, is_alive
from megadistill.launch.launchers import (
    LAUNCHERS,
    Launcher,
    is_launcher,
    is_mpi_rank,
    local_size_of,
    rank_of,
    without_ranks,
)
from megadistill.launch.ranks import hostfile_of, launcher_variables
from megadistill.launch.world import name_accelerator

ROOT = Path(__file__).resolve().parents[2]
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def never_asked(_: str) -> str:
    raise AssertionError


def test_ranks_that_srun_started_know_their_place() -> None:
    found = launcher_variables(SRUN, first_host={"n[1-2]": "n1"}.__getitem__)
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "20017", "MASTER_ADDR": "n1"}
    found = launcher_variables(SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}, first_host=never_asked)
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    found = launcher_variables(SRUN | {"SLURM_STEP_NUM_NODES": "1"}, first_host=never_asked)
    assert found["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"},  # a batch script
        SRUN | {"RANK": "0"},  # a launcher that srun started
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "0"},  # a launcher that mpirun started
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "7"},
        {"WORLD_SIZE": "2"},  # half a set-up, which is refused elsewhere
    ],
)
def test_others_are_left_alone(environment: dict[str, str]) -> None:
    before = "mpi4py.MPI" in sys.modules
    assert launcher_variables(environment, first_host=never_asked) == {}
    assert ("mpi4py.MPI" in sys.modules) is before


def test_half_a_step_is_refused() -> None:
    with pytest.raises(TopologyError, match="srun .*did not set SLURM_LOCALID"):
        launcher_variables({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"})


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_every_launcher_tells_a_rank_its_place_and_hides_it_from_other_processes(launcher: Launcher) -> None:
    sizes = {} if launcher.local_size is None else {launcher.local_size: "2"}
    environment = {launcher.rank: "3", launcher.world_size: "4", launcher.local_rank: "1", "HOME": "/", **sizes}
    assert rank_of(environment) == 3
    assert local_size_of(environment) == (1 if launcher.local_size is None else 2)
    assert is_mpi_rank(environment) is (launcher.meeting_point == "mpi")
    private = dict.fromkeys(launcher.private, "x")
    assert without_ranks(environment | private | {"MASTER_ADDR": "n1", "MASTER_PORT": "7"}) == {"HOME": "/"}


def test_a_process_without_a_launcher_is_rank_0_of_1() -> None:
    assert (rank_of({}), local_size_of({}), is_mpi_rank({})) == (0, 1, False)


def test_a_new_launcher_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Launcher(
        name="flux",
        rank="FLUX_RANK",
        world_size="FLUX_SIZE",
        local_rank="FLUX_LOCAL_RANK",
        local_size="FLUX_LOCAL_SIZE",
        private=("FLUX_URI",),
        programs=("flux-broker",),
        commands=("flux_runner",),
    )
    monkeypatch.setattr(launchers, "LAUNCHERS", (*LAUNCHERS, row))
    place = {"FLUX_RANK": "5", "FLUX_SIZE": "8", "FLUX_LOCAL_RANK": "1"}
    environment = {**place, "FLUX_LOCAL_SIZE": "4", "FLUX_URI": "x", "MASTER_ADDR": "n1", "MASTER_PORT": "7", "A": "1"}
    assert launcher_variables(environment) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert (rank_of(environment), local_size_of(environment)) == (5, 4)
    assert without_ranks(environment) == {"A": "1"}
    assert is_launcher("flux-broker", []) and is_launcher("python", ["python", "-m", "flux_runner"])
    assert not is_launcher("python", ["python", "train.py"])
    with pytest.raises(TopologyError, match="flux .*did not set FLUX_LOCAL_RANK"):
        launcher_variables({"FLUX_RANK": "5", "FLUX_SIZE": "8"})


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


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize(
    ("rank", "num_local", "environment", "meeting_point"),
    [
        (0, 4, {}, ("127.0.0.1", "7")),
        (0, 2, {}, (socket.gethostname(), "7")),
        (0, 2, {"MASTER_ADDR": "n1", "MASTER_PORT": "8"}, ("n1", "8")),
        (3, 2, {}, ("of rank 0", "9")),
    ],
)
def test_ranks_of_mpirun_learn_their_place_from_mpi(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    num_local: int,
    environment: dict[str, str],
    meeting_point: tuple[str, str],
    size: str,
) -> None:
    import mpi4py

    mpi = Mpi(4, rank, Mpi(num_local, 1))
    monkeypatch.setattr(mpi4py, "MPI", mpi, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    found = launcher_variables({size: "4", **environment}, free_port=lambda: 7)
    place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": str(num_local)}
    assert found == place | dict(zip(("MASTER_ADDR", "MASTER_PORT"), meeting_point, strict=True))
    assert not mpi.is_open, "a rank that fails would wait in MPI_Finalize"


def test_an_mpi_of_another_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is then alone in its world, and would train by itself."""
    import mpi4py

    monkeypatch.setattr(mpi4py, "MPI", Mpi(1, 0), raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi4py.MPI)
    with pytest.raises(TopologyError, match="mpirun started 4 processes and mpi4py sees 1"):
        launcher_variables({"OMPI_COMM_WORLD_SIZE": "4"})


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
    code = "from megadistill.launch.ancestors import *; a = ancestors()[0]"
    code += "; print(a.name(), command_line(a)[2], path_of(a, 'f'), is_alive(a))"
    shell = tmp_path / "my launcher"
    shell.symlink_to("/bin/sh")
    script = f'cd "{tmp_path}"; PYTHONPATH="{ROOT}" "{sys.executable}" -c "{code}"; exit'
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("my launcher cd ") and done.stdout.endswith(f" {tmp_path}/f True\n"), done.stderr


def test_a_process_that_has_ended_is_not_a_living_ancestor() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "from megadistill.launch.ancestors import *; a = ancestors()[0]; import os, time; os.kill(a.pid, 9)"
    inner += "; exec('while is_alive(a): time.sleep(0.01)'); print('gone', command_line(a), path_of(a, 'f'))"
    done = subprocess.run([sys.executable, "-c", code, inner], capture_output=True, text=True, timeout=60)
    assert done.stdout == "gone [] f\n", done.stderr
    assert ancestors() and all(map(is_alive, ancestors()))


def test_launchers_above_are_found_by_program_by_module_and_through_pdsh(tmp_path: Path) -> None:
    """`deepspeed` and a pdsh that it started stand beside the per-node launcher, which is a child of neither."""
    code = "import sys; from megadistill.launch.ancestors import launchers_above"
    code += "; print(*sorted({(p.name(), p.pid) for p in launchers_above()}), sep='\\n')"
    job = ["--world_info=abc", "--master_port=7"]
    (tmp_path / "sleep.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    (tmp_path / "deepspeed.py").write_text("import subprocess, sys; subprocess.run(sys.argv[1:])", encoding="utf-8")
    pdsh = tmp_path / "pdsh"
    pdsh.symlink_to(sys.executable)
    with subprocess.Popen([pdsh, tmp_path / "sleep.py", " ".join(job)]) as beside:
        try:
            above = [sys.executable, tmp_path / "deepspeed.py", sys.executable, "-c", code, *job]
            done = subprocess.run(above, capture_output=True, text=True, timeout=60)
        finally:
            beside.kill()
    # The launcher's own words are those after deepspeed.py.
    assert f"('pdsh', {beside.pid})" in done.stdout and "('python" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_the_meeting_point_of_one_machine_is_the_loopback_address(host: str) -> None:
    with rendezvous.listen(host, 0) as listener:
        assert rendezvous.is_loopback(listener.getsockname()[0])
    assert rendezvous.interface_towards("127.0.0.1") in psutil.net_if_addrs()


def test_rank_0_listens_on_all_addresses_only_where_the_master_has_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def listen_on(address: tuple[str, int], **_: object) -> socket.socket:
        asked.append(address)
        if address[0] == "192.0.2.1":  # an address of no machine
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
            TopologyError,
            match=f"rank 0 cannot listen on 127.0.0.1 port {port}: Address already in use.*; .* --master_port N",
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


def test_the_documented_exit_codes_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| (\d+) \| (.+?) \|$", text, re.MULTILINE)
    assert documented == [(str(int(code)), code.meaning) for code in ExitCode]


def test_gpus_do_not_use_an_attention_that_plans_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        name_accelerator()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
