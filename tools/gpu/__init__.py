"""The parts of ``tools/gpu_report.py``: everything that waits for a GPU, in one call."""
