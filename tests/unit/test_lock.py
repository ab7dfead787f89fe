"""One writer per place."""

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from megadistill.errors import ConfigError
from megadistill.observability import lock
from megadistill.observability.lock import exclusive_lock

_HOLD = """
import sys, time
from pathlib import Path
from megadistill.observability.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_and_its_lock_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"run.dir=x .*process {holder.pid} on {os.uname().nodename}"),
            exclusive_lock(path, "run.dir=x"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with exclusive_lock(path, "run.dir=x"):
        assert path.read_text(encoding="utf-8").split()[0] == str(os.getpid())
    assert path.exists()


def test_a_file_system_without_locks_is_not_a_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, *, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "lock_descriptor", refuse)
    with exclusive_lock(tmp_path / "lock", "it"), exclusive_lock(tmp_path / "lock", "it"):
        pass


def test_a_place_that_cannot_be_written_is_not_taken_for_locked(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError), exclusive_lock(tmp_path / "lock", "it"):
        pass


def test_a_place_can_be_waited_for(tmp_path: Path) -> None:
    with ExitStack() as held:
        held.enter_context(exclusive_lock(tmp_path / "lock", "it"))
        releasing = threading.Timer(0.2, held.close)
        releasing.start()
        with exclusive_lock(tmp_path / "lock", "it", wait_s=60):
            releasing.join()
