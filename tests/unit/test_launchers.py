"""The scripts in launchers/, in copies of the tree whose path has a space, with stand-ins for deepspeed and pip."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launchers/*.sh"), ROOT / "launchers/slurm.sbatch", ROOT / "tests/run.sh", ROOT / ".ci/run"]
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
    path.write_text(text)
    path.chmod(0o755)


def run(*command: str | Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "HOME": str(path.parent), **variables}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_and_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    # launchers/run.sh goes on in Python where its docstring ends.
    shell_part = script.read_text().partition('\n"""\n')[0]
    subprocess.run(["bash", "-n"], input=shell_part, text=True, check=True)


def test_ci_calls_the_test_script() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[1:] == ['exec bash "$(dirname "$0")/../tests/run.sh"']


PRINT_ARGUMENTS = '#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\n'


def test_run_from_the_shell_starts_deepspeed_on_itself(clone: Path, tools: Path) -> None:
    write_script(tools / "deepspeed", PRINT_ARGUMENTS)
    done = run("bash", clone / "launchers/run.sh", "--config", "a b.yaml", "eval.seeds=[1, 2]", path=tools)
    words = re.findall(r"\[(.*)\]", done.stdout)
    assert done.returncode == 0, done.stderr
    assert words[-4:] == [f"{clone}/launchers/run.sh", "--config", "a b.yaml", "eval.seeds=[1, 2]"]
    assert words[words.index("--num_gpus") + 1] == "2"
    assert 1024 < int(words[words.index("--master_port") + 1]) < 65536


def test_run_takes_all_gpus_or_what_nproc_says(clone: Path, tools: Path) -> None:
    write_script(tools / "deepspeed", PRINT_ARGUMENTS)
    write_script(tools / "nvidia-smi", "#!/bin/sh\n")
    assert "num_gpus" not in run("bash", clone / "launchers/run.sh", path=tools).stdout
    chosen = run("bash", clone / "launchers/run.sh", path=tools, NPROC="3", MASTER_PORT="12345").stdout
    assert "[--num_gpus]\n[3]" in chosen and "[--master_port]\n[12345]" in chosen


def test_run_prefers_the_environment_of_the_clone(clone: Path, tools: Path) -> None:
    write_script(tools / "deepspeed", "#!/bin/sh\necho other\n")
    write_script(clone / ".venv/bin/deepspeed", "#!/bin/sh\necho own\n")
    assert run("bash", clone / "launchers/run.sh", path=tools).stdout == "own\n"


def test_run_without_deepspeed(clone: Path, tools: Path) -> None:
    done = run("bash", clone / "launchers/run.sh", path=tools)
    assert done.returncode == 2 and "bash launchers/setup.sh" in done.stderr


def test_run_from_python_is_the_train_verb(clone: Path) -> None:
    command = clone / "megadistill/cli/main.py"
    command.parent.mkdir(parents=True)
    (clone / "megadistill/__init__.py").touch()
    command.write_text(
        "import os\n\n\ndef main(words):\n    print(words, os.environ['OMP_NUM_THREADS'])\n    return len(words)\n"
    )
    words = [sys.executable, "-S", clone / "launchers/run.sh", "--local_rank=1", "--config", "a b", "x.y=--z"]
    alone = run(*words, path=clone, LOCAL_SIZE="100000")
    assert alone.stdout == "['train', '--local_rank=1', '--config', 'a b', 'x.y=--z'] 1\n" and alone.returncode == 5
    assert run(*words, path=clone, OMP_NUM_THREADS="7").stdout.endswith(" 7\n")
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
    calls = pip_log.read_text().splitlines()
    assert len(calls) == 2 and all(f"-c {clone}/launchers/constraints.txt" in call for call in calls)
    assert calls[0].endswith(" torch setuptools") and calls[1].endswith(" -e .")
    again = run("bash", clone / "launchers/setup.sh", path=tools)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    run("bash", clone / "launchers/setup.sh", "test", path=tools)
    assert pip_log.read_text().splitlines()[-1].endswith(" -e .[test]")
    assert len(pip_log.read_text().splitlines()) == 4


def test_setup_installs_again_after_a_change(clone: Path, tools: Path, pip_log: Path) -> None:
    run("bash", clone / "launchers/setup.sh", "test", path=tools)
    assert run("bash", clone / "launchers/setup.sh", path=tools).stdout == "", "test has all that base has"
    with (clone / "launchers/constraints.txt").open("a") as constraints:
        constraints.write("another==1\n")
    run("bash", clone / "launchers/setup.sh", path=tools)
    assert len(pip_log.read_text().splitlines()) == 4


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
    lines = (ROOT / "launchers/constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def declared() -> dict[str, list[str]]:
    """install_requires and the extras of setup.py."""
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if _is_setup(node))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}  # type: ignore[attr-defined]
    return {"": ast.literal_eval(keywords["install_requires"]), **ast.literal_eval(keywords["extras_require"])}


def _is_setup(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"


def test_every_package_is_pinned_exactly() -> None:
    assert pins()["torch"] == "2.13.0"
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_pins_satisfy_setup_and_reach_every_dependency() -> None:
    todo = [requirement for group in declared().values() for requirement in group]
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


def test_slurm_prints_what_it_would_run(clone: Path, tools: Path) -> None:
    script = clone / "launchers" / "slurm.sbatch"
    done = run("bash", script, "--config", "a b.yaml", path=tools, DRY_RUN="1", SLURM_SUBMIT_DIR=str(clone))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("srun --kill-on-bad-exit=0 bash -c ")
    assert done.stdout.rstrip().endswith("/launchers/run.sh --config a\\ b.yaml")


def test_slurm_queues_a_stopped_run_again_and_no_other(clone: Path, tools: Path) -> None:
    """With stand-ins for srun and scontrol; docs/log.md has the real ones."""
    write_script(tools / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    write_script(tools / "date", "#!/bin/sh\necho now\n")
    for code, is_queued in ((85, True), (0, False), (1, False)):
        write_script(tools / "srun", f"#!/bin/sh\nexit {code}\n")
        script = clone / "launchers" / "slurm.sbatch"
        done = run("bash", script, path=tools, SLURM_SUBMIT_DIR=str(clone), SLURM_JOB_ID="7")
        assert done.returncode == code, done.stderr
        assert ("scontrol requeue 7" in done.stdout) is is_queued
