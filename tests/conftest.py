"""Settings that must be in the environment before torch, Triton or a test's own processes read them."""

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Without a GPU Triton's kernels run in its interpreter; it decides when the kernels are imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch.compile in the process that asked for it: no pool of workers beside the tests' own processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# An example that takes long on a busy machine is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Fails a test that leaves this process a rank of some world: a later one would wait for the others."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    assert {name: os.environ.get(name) for name in names} == before
