"""Closed formulas for host memory and disk, and what a process itself takes."""

from __future__ import annotations

from megadistill.planning.case import Case

# Of a process that computes on a CPU: Python, torch, transformers, DeepSpeed, gloo and the allocator's small change, as
# measured by tools/benchmark.py memory.
PROCESS, PROCESS_BYTES = "process", 600_000_000
# Bytes of a parameter's float32 weight and two moments.
_TRAINED = 12


def host_while_loading(case: Case) -> int:
    """Bytes of a process in host memory: its slice of one model, and the two largest tensors that it is cut from."""
    models = [(case.student, case.student_bytes), (case.teacher, case.teacher_bytes)]
    return max(itemsize * (model.size + 2 * model.largest_tensor) for model, itemsize in models if model is not None)


def host_while_saving(case: Case) -> int:
    """Bytes of a process's copies of weights, moments, and exported weights, from which a checkpoint is written."""
    exported = case.student_bytes if case.world_size > 1 else 0
    return (_TRAINED + exported) * -(-case.models.student.num_trained // case.world_size)


def checkpoint_bytes(case: Case) -> int:
    """Bytes of a checkpoint on the disk: weights and moments, and the exported student."""
    return (_TRAINED + case.student_bytes) * case.models.student.num_trained
