#!/usr/bin/env bash
#SBATCH --job-name=megadistill
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.%j.out
""":"
# Trains, or with the word doctor in front examines the machines. bash runs this part up to exec; Python, which deepspeed starts on this same file, takes it for a docstring.
#   deepspeed launchers/run.sh --config configs/demo.yaml [section.field=value ...]
#   bash launchers/run.sh --config configs/demo.yaml [section.field=value ...]
#   sbatch --nodes=2 --gpus-per-node=8 launchers/run.sh --config configs/paper.yaml [section.field=value ...]
# The second one uses the clone's .venv, starts NPROC processes (default: one per GPU, 2 where there is none), and keeps
# DeepSpeed's messages in RUN/launcher.log; the third one continues in launchers/slurm.sbatch. DRY_RUN=1 prints the command of the last two.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
    # SLURM runs a copy of this file from another folder.
    if ! [ -f "$root/launchers/slurm.sbatch" ]; then root=${MEGADISTILL_ROOT:-${SLURM_SUBMIT_DIR:-}}; fi
    if ! [ -f "$root/launchers/slurm.sbatch" ]; then
        echo "launchers/run.sh: submit it from the clone, or set MEGADISTILL_ROOT to the clone" >&2
        exit 2
    fi
    export MEGADISTILL_ROOT="$root"
    exec bash "$root/launchers/slurm.sbatch" "$@"
fi
if [ -x "$root/.venv/bin/python3" ]; then export PATH="$root/.venv/bin:$PATH"; fi
if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
    echo "launchers/run.sh: deepspeed is not installed; set it up with: bash launchers/setup.sh" >&2
    exit 2
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    NPROC=${NPROC:-2}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
# A free port: two runs on one machine would meet on deepspeed's fixed one.
port=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
# DeepSpeed's launcher for one machine, whose messages go to RUN/launcher.log.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
set -- python3 -u -m megadistill.launch.quiet_deepspeed "${NPROC:-gpus}" "$port" "$root/launchers/run.sh" "$@"
if [ -z "${DRY_RUN:-}" ]; then exec "$@"; fi
printf '%q ' "$@"
echo
exit
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    sys.path.insert(0, ROOT)
    from megadistill.launch.launchers import local_size_of

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Before torch is imported. Ranks that each use all cores would be many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size_of(os.environ))))
    from megadistill.cli.main import main as command

    words = sys.argv[1:]
    # The deepspeed launcher puts --local_rank=N before them.
    verb = next((word for word in words if not word.startswith("--local_rank")), None)
    if verb == "doctor":
        words.remove(verb)
    sys.exit(command(["doctor" if verb == "doctor" else "train", *words]))


if __name__ == "__main__":
    main()
