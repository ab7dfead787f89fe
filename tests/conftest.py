"""Settings that must be in the environment before torch, Triton or a test's own processes read them."""

import os
import shutil

from hypothesis import settings

# Without a GPU Triton's kernels run in its interpreter; it decides when the kernels are imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch.compile in the process that asked for it: no pool of workers beside the tests' own processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# An example that takes long on a busy machine is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
