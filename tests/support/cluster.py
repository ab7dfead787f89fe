"""Clusters on one machine: a private SLURM of two nodes, and two hosts made of network namespaces with sshd.

Each is a context manager that takes away all it has set up, and skips the test with the reason where it cannot.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from megadistill.launch.launchers import without_ranks
from tests.support.runs import ROOT, free_port

SLURM_CONF = Path(__file__).parent / "slurm.conf.in"
# Where the ranks of every launcher find this Python first, and daemons are found too.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def need(*programs: str, root: bool = False) -> None:
    """Skips the test where a program is missing or, with ``root``, where the user is another."""
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (tests/support/install_cluster_tools.sh)")
    if root and os.geteuid() != 0:
        pytest.skip("only root can set this up")


def environment(**more: str) -> dict[str, str]:
    """For launched runs: no rank or job of anybody else, one thread each, and Open MPI as root in a container."""
    inherited = {
        name: value
        for name, value in without_ranks(os.environ).items()
        if name not in ("NPROC", "DRY_RUN") and not name.startswith(("SLURM_", "OMPI_"))
    }
    settled = {"PATH": PATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return inherited | settled | as_root | more


def wait_for(is_true: Callable[[], object], what: Callable[[], str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.1)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Everything that runs for the run in ``run_dir``, however it was started: its command line names the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"run.dir={run_dir}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def survivors(run_dir: Path, seconds: float = 60) -> list[psutil.Process]:
    """Processes of a run that are still there after some time; they are ended."""
    deadline = time.monotonic() + seconds
    while (alive := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        process.kill()
    return alive


@contextmanager
def _daemon(command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen([str(word) for word in command], env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Slurm:
    """Client side of a private SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Its two nodes are this host, and their names are no host's.
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"), MASTER_ADDR="127.0.0.1")

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def submit(self, options: Sequence[str], script: str, arguments: Sequence[str], **variables: str) -> str:
        """Queues a script of launchers/ from the clone; returns the job's number."""
        where = ["--parsable", "--time=10", f"--output={self.folder}/%j.out"]
        command = ["sbatch", *where, *options, f"launchers/{script}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.env | variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self, job: str) -> list[str]:
        """STATE EXIT:SIGNAL RESTARTS of a job, or of each of an array."""
        keys = ("JobState", "ExitCode", "Restarts")
        shown = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in self._show(job)]
        return [" ".join(task[key] for key in keys) for task in shown]

    def wait(self, job: str) -> list[str]:
        """States once nothing of the job runs or is to run."""
        busy = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        wait_for(
            lambda: not any(s.startswith(busy) for s in self.states(job)), lambda: f"{job}:\n{self.text(job)}", 300
        )
        return self.states(job)

    def text(self, job: str) -> str:
        """What a job or an array has printed."""
        numbers = [re.findall(r"JobId=(\d+)", line)[0] for line in self._show(job)]
        return "\n".join(
            f.read_text(encoding="utf-8") for f in (self.folder / f"{n}.out" for n in numbers) if f.exists()
        )

    def _show(self, job: str) -> list[str]:
        return self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()


@contextmanager
def slurm() -> Iterator[Slurm]:
    """munged, slurmctld and two slurmd with names and ports of their own."""
    need("slurmctld", "slurmd", "sbatch", "srun", "munged", root=True)
    # A short path: munge's socket may have 107 letters.
    with tempfile.TemporaryDirectory(prefix="slurm") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("munge", "state", "spool.n1", "spool.n2"):
            (folder / part).mkdir()
        munge = folder / "munge"
        munge.chmod(0o711)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        text = (
            SLURM_CONF.read_text(encoding="utf-8")
            .replace("@DIR@", name)
            .replace("@HOST@", socket.gethostname().partition(".")[0])
        )
        for number in range(3):
            text = text.replace(f"@PORT_{number}@", free_port())
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        files = [f"--{kind}={munge / file}" for kind, file in _MUNGE_FILES]
        client = Slurm(folder)
        stack.enter_context(_daemon(["munged", "--foreground", "--force", *files], client.env, folder / "munge.log"))
        wait_for(lambda: (munge / "socket").exists(), lambda: "munge's socket", 20)
        stack.enter_context(_daemon(["slurmctld", "-D"], client.env, folder / "ctld.log"))
        for node in ("n1", "n2"):
            stack.enter_context(_daemon(["slurmd", "-D", "-N", node], client.env, folder / f"{node}.log"))
        try:
            wait_for(lambda: client.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", lambda: "two idle nodes", 60)
        except AssertionError:
            logs = "\n".join(path.read_text(encoding="utf-8")[-1500:] for path in folder.glob("*.log"))
            pytest.skip(f"SLURM does not start on this machine: {logs}")
        yield client
        client.ask("scancel", "--state=PENDING")
        client.ask("scancel", "--signal=KILL", "--full", "--state=RUNNING")
        client.ask("scancel", "--state=RUNNING")


_MUNGE_FILES = [
    ("key-file", "key"),
    ("socket", "socket"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
]

SSHD_CONFIG = """ListenAddress 10.77.0.{number}
HostKey {folder}/hostkey
PidFile {folder}/sshd.{number}.pid
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
MaxStartups 100
"""
SSH_CONFIG = """Host 10.77.0.* h1 h2
  IdentityFile {folder}/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, h1 (10.77.0.1) and h2 (10.77.0.2) to each other, each with an sshd that root enters
    without a password; nothing else can reach them. Gives the namespaces' names."""
    need("ip", "pdsh", "ssh", "sshd", "ssh-keygen", root=True)
    names = [f"h{number}-{os.getpid()}" for number in (1, 2)]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], env=environment(), capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"no network namespaces on this machine: ip {' '.join(words)}: {done.stderr.strip()}")

    with tempfile.TemporaryDirectory(prefix="hosts") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        for key in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{key}"], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for number, name in enumerate(names, start=1):
            etc = Path("/etc/netns") / name  # `ip netns exec` shows it as /etc
            stack.callback(shutil.rmtree, etc, ignore_errors=True)
            (etc / "ssh").mkdir(parents=True)
            (etc / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 h1\n10.77.0.2 h2\n", encoding="utf-8")
            (etc / "ssh" / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder, number=number), encoding="utf-8")
            (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=folder), encoding="utf-8")
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            sshd = ["ip", "netns", "exec", name, shutil.which("sshd", path=PATH) or "sshd", "-D", "-e"]
            stack.enter_context(_daemon(sshd, environment(), Path(folder) / f"sshd.{number}.log"))
        for number in (1, 2):
            wait_for(Path(folder, f"sshd.{number}.pid").exists, lambda: "sshd", 30)
        yield names
