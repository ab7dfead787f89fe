"""Every way to start a run, with the real launchers: the losses are one process's, and no process is left behind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import (
    Slurm,
    environment,
    need,
    processes_of,
    slurm,
    survivors,
    two_hosts,
    wait_for,
)
from tests.support.runs import ROOT, free_port, losses, run_layout, settings

STEPS = 3
SCRIPT = "launchers/run.sh"


def arguments(assets: Path, run_dir: Path | str, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "base.yaml")
    return ["--config", config, f"run.dir={run_dir}", *settings(assets, "llama", f"train.max_steps={STEPS}", *more)]


@pytest.fixture(scope="module")
def expected(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run in one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    run_layout(1, [(str(run_dir), settings(assets, "llama", f"train.max_steps={STEPS}"))])
    return losses(run_dir)


class Launched:
    """A command of a launcher and what it prints."""

    def __init__(self, command: Sequence[str | Path], log: Path, **variables: str) -> None:
        self.log = log
        with log.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT, env=environment(**variables), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self, seconds: float = 240) -> tuple[int, str]:
        """Exit code and output."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self.process.returncode, self.log.read_text(encoding="utf-8")


def is_in_step(run_dir: Path, step: int) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= step


def is_saved(run_dir: Path) -> bool:
    """Whether there is a checkpoint of the last step; what ranks print is lost with their launcher."""
    return (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip() == f"step_{len(losses(run_dir))}"


def check(run_dir: Path, expected: list[float], outcome: tuple[int, str]) -> None:
    assert outcome[0] == 0, outcome[1]
    assert losses(run_dir) == pytest.approx(expected, abs=1e-4)
    assert survivors(run_dir) == []


# One machine


@pytest.mark.parametrize("launcher", ["deepspeed", "bash"])
def test_a_run_on_one_machine_listens_on_the_loopback_address_only(
    assets: Path, tmp_path: Path, expected: list[float], launcher: str
) -> None:
    run_dir = tmp_path / "run"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()] if launcher == "deepspeed" else ["bash"]
    launched = Launched([*command, SCRIPT, *arguments(assets, run_dir)], tmp_path / "log")
    listening: set[str] = set()
    while launched.process.poll() is None:
        with suppress(psutil.Error):
            listening |= addresses_of(ranks_of(run_dir))
        time.sleep(0.2)
    check(run_dir, expected, launched.wait())
    assert listening == {"127.0.0.1"}


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that train: they alone run Python on launchers/run.sh."""
    return [p for p in processes_of(run_dir) if p.cmdline()[1:2] == ["-u"] and p.cmdline()[2].endswith(SCRIPT)]


def addresses_of(processes: list[psutil.Process]) -> set[str]:
    """Addresses that they listen on."""
    return {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_a_missing_hostfile_is_refused(assets: Path, tmp_path: Path) -> None:
    """DeepSpeed would only warn and train on one machine."""
    command = ["deepspeed", "--hostfile", "no such file", "--master_port", free_port(), SCRIPT]
    code, text = Launched([*command, *arguments(assets, tmp_path / "run")], tmp_path / "log").wait()
    assert code == 2, text
    assert "no such hostfile: no such file" in text
    assert not (tmp_path / "run").exists() and survivors(tmp_path / "run") == []


def test_two_torchrun_agents(assets: Path, tmp_path: Path, expected: list[float]) -> None:
    run_dir, port = tmp_path / "run", free_port()
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    agents = [
        Launched(["torchrun", *nodes, "--node-rank", str(n), SCRIPT, *arguments(assets, run_dir)], tmp_path / f"log{n}")
        for n in range(2)
    ]
    outcomes = [agent.wait() for agent in agents]
    for outcome in outcomes:
        check(run_dir, expected, outcome)


# MPI


def test_two_jobs_of_mpirun_at_once(assets: Path, tmp_path: Path, expected: list[float]) -> None:
    need("mpirun")
    dirs = [tmp_path / "a", tmp_path / "b"]
    jobs = [
        Launched(["bash", "launchers/mpirun.sh", *arguments(assets, d)], d.with_suffix(".log"), NPROC="2") for d in dirs
    ]
    for run_dir, outcome in zip(dirs, [job.wait() for job in jobs], strict=True):
        check(run_dir, expected, outcome)
        assert "x dp " in outcome[1] and "tp 2 " in outcome[1]


def test_deepspeed_over_openmpi(assets: Path, tmp_path: Path, expected: list[float]) -> None:
    need("mpirun", "ompi_info")
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n", encoding="utf-8")
    # One machine is to deepspeed no case for a launcher, unless forced.
    options = ["--hostfile", hostfile, "--launcher", "openmpi", "--force_multi", "--no_ssh_check"]
    command = ["deepspeed", *options, "--master_addr", "127.0.0.1", SCRIPT, *arguments(assets, run_dir)]
    check(run_dir, expected, Launched(command, tmp_path / "log").wait())


def test_ranks_end_when_mpirun_is_killed(assets: Path, tmp_path: Path) -> None:
    need("mpirun")
    run_dir = tmp_path / "run"
    words = arguments(assets, run_dir, "train.max_steps=100000", "train.stop_grace_s=20")
    launched = Launched(["bash", "launchers/mpirun.sh", *words], tmp_path / "log", NPROC="2")
    try:
        wait_for(lambda: is_in_step(run_dir, 2), lambda: f"two steps: {launched.log.read_text(encoding='utf-8')}")
        assert addresses_of(ranks_of(run_dir)) == {"127.0.0.1"}
    finally:
        launched.process.kill()
        launched.wait()
        left = survivors(run_dir)
    assert left == [] and is_saved(run_dir), launched.log.read_text(encoding="utf-8")


# SLURM


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as client:
        yield client


DIRECT, PER_NODE = "srun starts ranks", "deepspeed on each node"


def submit(cluster: Slurm, script: str, mode: str, nodes: int, words: list[str]) -> str:
    """Two ranks per node."""
    if mode == DIRECT:
        return cluster.submit([f"--nodes={nodes}", "--ntasks-per-node=2"], script, words)
    return cluster.submit([f"--nodes={nodes}", "--ntasks-per-node=1"], script, words, NPROC="2")


@pytest.mark.parametrize(("script", "mode"), [("slurm.sbatch", DIRECT), ("run.sh", PER_NODE)])
def test_slurm_on_two_nodes(
    assets: Path, tmp_path: Path, expected: list[float], cluster: Slurm, script: str, mode: str
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, script, mode, 2, arguments(assets, run_dir, "parallel.tp_size=2"))
    assert cluster.wait(job) == ["COMPLETED 0:0 0"], cluster.text(job)
    check(run_dir, expected, (0, cluster.text(job)))
    assert "tp 2 x dp 2" in cluster.text(job)


@pytest.mark.parametrize(("script", "mode"), [("run.sh", DIRECT), ("slurm.sbatch", PER_NODE)])
def test_a_job_that_slurm_warns_saves_and_is_queued_again(
    assets: Path, tmp_path: Path, cluster: Slurm, script: str, mode: str
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, script, mode, 1, arguments(assets, run_dir, "train.max_steps=100000"))
    try:
        wait_for(lambda: is_in_step(run_dir, 2), lambda: f"two steps:\n{cluster.text(job)}")
        cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 does
        wait_for(lambda: cluster.states(job) == ["PENDING 0:0 1"], lambda: f"a queue:\n{cluster.text(job)}")
        assert cluster.ask("squeue", "-h", "-j", job, "-o", "%t") == "PD"
    finally:
        cluster.ask("scancel", job)
    assert survivors(run_dir) == []
    assert f"checkpoint saved at step {len(losses(run_dir))}" in cluster.text(job)
    assert "stopped and saved" in cluster.text(job)


def test_an_array_of_runs(assets: Path, tmp_path: Path, expected: list[float], cluster: Slurm) -> None:
    words = arguments(assets, tmp_path / "run_%a")
    job = cluster.submit(["--nodes=1", "--ntasks-per-node=2", "--array=0-1"], "slurm.sbatch", words)
    assert cluster.wait(job) == ["COMPLETED 0:0 0"] * 2, cluster.text(job)
    for number in range(2):
        check(tmp_path / f"run_{number}", expected, (0, cluster.text(job)))


def test_ranks_end_when_slurmstepd_is_killed(assets: Path, tmp_path: Path, cluster: Slurm) -> None:
    run_dir = tmp_path / "run"
    words = arguments(assets, run_dir, "train.max_steps=100000", "train.stop_grace_s=20")
    job = submit(cluster, "slurm.sbatch", DIRECT, 1, words)
    try:
        wait_for(lambda: is_in_step(run_dir, 2), lambda: f"two steps:\n{cluster.text(job)}")
        ranks = ranks_of(run_dir)
        (above,) = {rank.parent() for rank in ranks}
        assert above.name() == "slurmstepd" and len(ranks) == 2
        above.kill()
        assert psutil.wait_procs(ranks, 60)[1] == []
    finally:
        cluster.ask("scancel", job)
        left = survivors(run_dir)
    assert left == [] and is_saved(run_dir), cluster.text(job)


# Several machines


def test_deepspeed_with_a_hostfile_over_pdsh(assets: Path, tmp_path: Path, expected: list[float]) -> None:
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n", encoding="utf-8")
    # pdsh forwards few variables; these are for both hosts.
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n", encoding="utf-8")
    with two_hosts() as (first, second):
        command = ["ip", "netns", "exec", first, "deepspeed", "--hostfile", hostfile, SCRIPT]
        launched = Launched([*command, *arguments(assets, run_dir)], tmp_path / "log", HOME=str(tmp_path))
        listening: set[str] = set()
        while launched.process.poll() is None:
            for host in (first, second):
                shown = subprocess.run(["ip", "netns", "exec", host, "ss", "-Hltn"], capture_output=True, text=True)
                listening |= {line.split()[3] for line in shown.stdout.splitlines()}
            time.sleep(0.3)
        check(run_dir, expected, launched.wait())
    by_host = {host: {a.rpartition(":")[2] for a in listening if a.startswith(f"{host}:")} for host in HOSTS}
    assert all(len(ports) > 1 for ports in by_host.values()), "sshd and gloo"
    assert all(address.startswith(tuple(f"{host}:" for host in HOSTS)) for address in listening), listening


HOSTS = ("10.77.0.1", "10.77.0.2")


@pytest.mark.parametrize("victim", ["deepspeed", "pdsh"])
def test_ranks_of_both_hosts_end_when_what_started_them_over_ssh_is_killed(
    assets: Path, tmp_path: Path, victim: str
) -> None:
    """Nothing above a rank is a child of the runner: those on its machine look for it, and all stop with them."""
    need("deepspeed", "pdsh")
    run_dir = tmp_path / "run"
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS), encoding="utf-8")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n", encoding="utf-8")
    with two_hosts() as (first, _):
        command = ["ip", "netns", "exec", first, "deepspeed", "--hostfile", hostfile, SCRIPT]
        endless = arguments(assets, run_dir, "train.max_steps=100000", "parallel.tp_size=1")
        launched = Launched([*command, *endless], tmp_path / "log", HOME=str(tmp_path))
        try:
            wait_for(lambda: is_in_step(run_dir, 2), launched.log.read_text)
            runner = psutil.Process(launched.process.pid)
            below = [process for process in runner.children() if process.name().startswith("pdsh")]
            (runner if victim == "deepspeed" else below[0]).kill()
        finally:
            left = survivors(run_dir)
            launched.process.kill()
            launched.wait()
    assert left == [] and is_saved(run_dir), launched.log.read_text(encoding="utf-8")
