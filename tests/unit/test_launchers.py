"""The scripts in launchers/, in copies of the tree whose path has a space, with stand-ins for deepspeed and pip."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.package import requirements

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launchers/*.s*h"), *ROOT.glob("tests/**/*.sh"), ROOT / "launchers/slurm.sbatch", ROOT / ".ci/run"]
)
TOOLS = ["bash", "sh", "env", "dirname", "cat", "cksum", "id", "rm", "mkdir", "printf", "flock"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "launchers", clone / "launchers")
    shutil.copy(ROOT / "setup.py", clone)
    return clone


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with a shell and little else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def run(*command: str | Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "HOME": str(path.parent), **variables}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_and_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    # launchers/run.sh continues in Python where its docstring ends.
    shell_part = script.read_text(encoding="utf-8").partition('\n"""\n')[0]
    subprocess.run(["bash", "-n"], input=shell_part, text=True, check=True)


def test_ci_calls_the_test_script() -> None:
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[1:] == [
        'exec bash "$(dirname "$0")/../tests/run.sh"'
    ]


# Stands in for a Python with deepspeed: it prints the words that it is started with, and chooses a port.
FAKE_LAUNCHER = """#!/bin/sh
case "$2" in
    *find_spec*) exit {is_missing} ;;
    *socket*) echo 23456 ;;
    *) echo "[PYTHONPATH=$PYTHONPATH]"; for word in "$@"; do echo "[$word]"; done ;;
esac
"""


def use_fake_launcher(python: Path, *, is_missing: int = 0) -> None:
    python.unlink(missing_ok=True)
    write_script(python, FAKE_LAUNCHER.format(is_missing=is_missing))


def test_run_from_the_shell_starts_deepspeed_on_itself(clone: Path, tools: Path) -> None:
    use_fake_launcher(tools / "python3")
    done = run("bash", clone / "launchers/run.sh", "--config", "a b.yaml", "eval.seeds=[1, 2]", path=tools)
    words = re.findall(r"\[(.*)\]", done.stdout)
    assert done.returncode == 0, done.stderr
    assert words == [
        *[f"PYTHONPATH={clone}", "-u", "-m", "megadistill.launch.quiet_deepspeed", "2", "23456"],
        *[f"{clone}/launchers/run.sh", "--config", "a b.yaml", "eval.seeds=[1, 2]"],
    ]


def test_run_takes_all_gpus_or_what_nproc_says(clone: Path, tools: Path) -> None:
    use_fake_launcher(tools / "python3")
    write_script(tools / "nvidia-smi", "#!/bin/sh\n")
    assert "[gpus]\n[23456]" in run("bash", clone / "launchers/run.sh", path=tools).stdout
    chosen = run("bash", clone / "launchers/run.sh", path=tools, NPROC="3", MASTER_PORT="12345").stdout
    assert "[3]\n[12345]" in chosen


def test_run_prefers_the_environment_of_the_clone(clone: Path, tools: Path) -> None:
    use_fake_launcher(tools / "python3", is_missing=1)
    use_fake_launcher(clone / ".venv/bin/python3")
    assert "quiet_deepspeed" in run("bash", clone / "launchers/run.sh", path=tools).stdout


def test_run_without_deepspeed(clone: Path, tools: Path) -> None:
    use_fake_launcher(tools / "python3", is_missing=1)
    done = run("bash", clone / "launchers/run.sh", path=tools)
    assert done.returncode == 2 and "bash launchers/setup.sh" in done.stderr


def test_run_from_python_is_the_train_verb(clone: Path) -> None:
    command = clone / "megadistill/cli/main.py"
    command.parent.mkdir(parents=True)
    (clone / "megadistill/__init__.py").touch()
    shutil.copytree(ROOT / "megadistill/launch", clone / "megadistill/launch")
    command.write_text(
        "import os\n\n\ndef main(words):\n    print(words, os.environ['OMP_NUM_THREADS'])\n    return len(words)\n",
        encoding="utf-8",
    )
    words = [sys.executable, "-S", clone / "launchers/run.sh", "--local_rank=1", "--config", "a b", "x.y=--z"]
    alone = run(*words, path=clone, LOCAL_SIZE="100000")
    assert alone.stdout == "['train', '--local_rank=1', '--config', 'a b', 'x.y=--z'] 1\n" and alone.returncode == 5
    assert run(*words, path=clone, OMP_NUM_THREADS="7").stdout.endswith(" 7\n")
    doctor = run(*words[:4], "doctor", *words[4:], path=clone)  # as deepspeed starts it
    assert doctor.stdout.startswith("['doctor', '--local_rank=1', '--config', 'a b', 'x.y=--z']")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run(*words, path=clone).stdout.endswith(f" {cores}\n")


# Makes an environment whose python writes down how pip is called, as `-m venv` does.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) exit {is_too_old} ;;
    "--version") echo "Python 3.99.0" ;;
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"pip --version"*) exit 0 ;;
    *"pip install"*) echo "$*" >>"{log}"; exit {pip_status} ;;
esac
"""


@pytest.fixture
def pip_log(tools: Path, tmp_path: Path) -> Path:
    (tools / "cp").symlink_to(shutil.which("cp") or "/bin/cp")
    use_fake_python(tools, tmp_path / "pip.log")
    return tmp_path / "pip.log"


def use_fake_python(tools: Path, log: Path, *, is_too_old: int = 0, pip_status: int = 0) -> None:
    (tools / "python3").unlink(missing_ok=True)
    write_script(tools / "python3", FAKE_PYTHON.format(log=log, is_too_old=is_too_old, pip_status=pip_status))


def test_setup_installs_once(clone: Path, tools: Path, pip_log: Path) -> None:
    first = run("bash", clone / "launchers/setup.sh", path=tools)
    assert first.returncode == 0, first.stderr
    calls = pip_log.read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2 and all(f"-c {clone}/launchers/constraints.txt" in call for call in calls)
    assert calls[0].endswith(" torch setuptools") and calls[1].endswith(" -e .[all]")
    again = run("bash", clone / "launchers/setup.sh", path=tools)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    run("bash", clone / "launchers/setup.sh", "test", path=tools)
    assert pip_log.read_text(encoding="utf-8").splitlines()[-1].endswith(" -e .[all,test]")
    assert len(pip_log.read_text(encoding="utf-8").splitlines()) == 4


def test_setup_installs_again_after_a_change(clone: Path, tools: Path, pip_log: Path) -> None:
    run("bash", clone / "launchers/setup.sh", "test", path=tools)
    assert run("bash", clone / "launchers/setup.sh", path=tools).stdout == "", "test has all that base has"
    with (clone / "launchers/constraints.txt").open("a", encoding="utf-8") as constraints:
        constraints.write("another==1\n")
    run("bash", clone / "launchers/setup.sh", path=tools)
    assert len(pip_log.read_text(encoding="utf-8").splitlines()) == 4


def test_a_failed_setup_is_not_taken_for_done(clone: Path, tools: Path, pip_log: Path) -> None:
    use_fake_python(tools, pip_log, pip_status=1)
    assert run("bash", clone / "launchers/setup.sh", path=tools).returncode != 0
    shutil.rmtree(clone / ".venv")
    use_fake_python(tools, pip_log)
    assert "done" in run("bash", clone / "launchers/setup.sh", path=tools).stdout


def test_setup_with_an_old_python(clone: Path, tools: Path, pip_log: Path) -> None:
    use_fake_python(tools, pip_log, is_too_old=1)
    done = run("bash", clone / "launchers/setup.sh", path=tools)
    assert done.returncode == 2 and "Python 3.11 or newer" in done.stderr and "3.99.0" in done.stderr


def test_setup_with_an_unknown_argument(clone: Path, tools: Path) -> None:
    done = run("bash", clone / "launchers/setup.sh", "tset", path=tools)
    assert done.returncode == 2 and "'tset'; allowed: test" in done.stderr


def pins() -> dict[str, str]:
    lines = (ROOT / "launchers/constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def test_every_package_is_pinned_exactly() -> None:
    assert pins()["torch"] == "2.13.0"
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_pins_satisfy_setup_and_reach_every_dependency() -> None:
    todo = [requirement for group in requirements().values() for requirement in group]
    seen: set[str] = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        assert name in pins(), f"{name} is not pinned in launchers/constraints.txt"
        assert requirement.specifier.contains(pins()[name], prereleases=True), f"{requirement} against {pins()[name]}"
        if name not in seen:
            seen.add(name)
            todo += _requirements(name)


def _requirements(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def dry_run(script: Path, tools: Path, **variables: str) -> list[str]:
    """The words of the command that a launcher prints for `--config "a b.yaml"`, as a shell reads them."""
    done = run("bash", script, "--config", "a b.yaml", path=tools, DRY_RUN="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout.replace("$'", "'"))


def test_every_launcher_prints_what_it_would_run(clone: Path, tools: Path) -> None:
    folder = clone / "launchers"
    write_script(tools / "mpirun", "#!/bin/sh\necho started; exit 1\n")
    use_fake_launcher(tools / "python3")
    train = [f"{folder}/run.sh", "--config", "a b.yaml"]
    assert dry_run(folder / "run.sh", tools, MASTER_PORT="7", NPROC="3") == [
        *["python3", "-u", "-m", "megadistill.launch.quiet_deepspeed", "3", "7"],
        *train,
    ]
    assert dry_run(folder / "mpirun.sh", tools) == ["mpirun", "-n", "2", "--bind-to", "none", "python", "-u", *train]
    several = dry_run(folder / "mpirun.sh", tools, HOSTFILE="my hosts", MPIRUN_ARGS="-x A")
    assert several[:-5] == ["mpirun", "--hostfile", "my hosts", "--bind-to", "none", "-x", "A"]
    in_a_job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "n1"}
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=300"]
    words = dry_run(folder / "slurm.sbatch", tools, SLURM_SUBMIT_DIR=str(clone), SLURM_NTASKS="4", **in_a_job)
    assert words == [*srun, "bash", "-c", 'trap "" USR1; exec python -u "$0" "$@"', *train]


@pytest.mark.parametrize(("gpus", "nproc"), [("4", None), ("1", "2")])
def test_slurm_starts_one_deepspeed_a_node_where_a_task_has_several_devices(
    clone: Path, tools: Path, gpus: str, nproc: str | None
) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "n1", "SLURM_GPUS_ON_NODE": gpus}
    variables |= {"NPROC": nproc} if nproc else {}
    words = dry_run(clone / "launchers" / "slurm.sbatch", tools, MEGADISTILL_ROOT=str(clone), **variables)
    assert words[:6] == ["srun", "--kill-on-bad-exit=0", "--wait=300", "--ntasks-per-node=1", "bash", "-c"]
    assert "--no_ssh --node_rank" in words[6] and words[7:] == [f"{clone}/launchers/run.sh", "--config", "a b.yaml"]


def test_run_in_a_batch_job_goes_on_in_the_script_for_slurm(clone: Path, tools: Path, tmp_path: Path) -> None:
    """From the folder of the job, as slurmd starts a copy of it."""
    copy = tmp_path / "spool" / "job7" / "slurm_script"
    write_script(copy, (clone / "launchers" / "run.sh").read_text(encoding="utf-8"))
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "5"}
    for where in ("SLURM_SUBMIT_DIR", "MEGADISTILL_ROOT"):
        assert dry_run(copy, tools, **job, **{where: str(clone)})[-3] == f"{clone}/launchers/run.sh"
    lost = run("bash", copy, path=tools, SLURM_SUBMIT_DIR=str(tmp_path), **job)
    assert lost.returncode == 2 and "submit it from the clone" in lost.stderr
    use_fake_launcher(tools / "python3")
    assert dry_run(clone / "launchers" / "run.sh", tools, **job, SLURM_STEP_ID="0")[0] == "python3"


def test_jobs_of_an_array_read_their_number(clone: Path, tools: Path) -> None:
    script = clone / "launchers" / "slurm.sbatch"
    words = ["run.dir=runs/%a", "run.seed=%a"]
    variables = {"SLURM_SUBMIT_DIR": str(clone), "DRY_RUN": "1"}
    assert run("bash", script, *words, path=tools, **variables).stdout.endswith("run.dir=runs/%a run.seed=%a \n")
    job = run("bash", script, *words, path=tools, **variables, SLURM_ARRAY_TASK_ID="12")
    assert job.stdout.endswith("run.dir=runs/12 run.seed=12 \n")


def test_both_scripts_ask_slurm_for_the_same() -> None:
    asked = [
        [
            line
            for line in (ROOT / "launchers" / name).read_text(encoding="utf-8").splitlines()
            if line.startswith("#SBATCH")
        ]
        for name in ("run.sh", "slurm.sbatch")
    ]
    assert asked[0] == asked[1] and "#SBATCH --signal=B:USR1@300" in asked[0]


def test_mpirun_is_missing(clone: Path, tools: Path) -> None:
    done = run("bash", clone / "launchers" / "mpirun.sh", path=tools)
    assert done.returncode == 2 and "mpirun is not installed" in done.stderr
    assert dry_run(clone / "launchers" / "mpirun.sh", tools)[0] == "mpirun"


def test_cluster_tools_that_cannot_be_installed_are_named(tools: Path) -> None:
    write_script(tools / "ssh", "#!/bin/sh\n")
    (tools / "id").unlink()
    write_script(tools / "id", "#!/bin/sh\necho 1000\n")
    # A separate PATH: the script looks into /usr/sbin as well.
    text = (
        (ROOT / "tests" / "support" / "install_cluster_tools.sh")
        .read_text(encoding="utf-8")
        .replace(":/usr/sbin:/sbin", "")
    )
    write_script(tools.parent / "install.sh", text)
    done = run("bash", tools.parent / "install.sh", path=tools)
    assert done.returncode == 0
    assert done.stdout == (
        "tests: not installed: slurm-wlm munge pdsh openssh-server iproute2 (not root); what needs them is skipped\n"
    )


def test_slurm_queues_a_stopped_run_again_and_no_other(clone: Path, tools: Path) -> None:
    """With stand-ins for srun and scontrol; tests/integration/test_clusters.py has the real ones."""
    write_script(tools / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    write_script(tools / "date", "#!/bin/sh\necho now\n")
    for code, is_queued in ((85, True), (0, False), (1, False)):
        write_script(tools / "srun", f"#!/bin/sh\nexit {code}\n")
        script = clone / "launchers" / "slurm.sbatch"
        done = run("bash", script, path=tools, SLURM_SUBMIT_DIR=str(clone), SLURM_JOB_ID="7")
        assert done.returncode == code, done.stderr
        assert ("scontrol requeue 7" in done.stdout) is is_queued
