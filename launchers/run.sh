#!/usr/bin/env bash
""":"
# Trains. bash runs this part up to exec; Python, which deepspeed starts on this same file, takes it for a docstring.
#   deepspeed launchers/run.sh --config configs/demo.yaml [section.field=value ...]
#   bash launchers/run.sh --config configs/demo.yaml [section.field=value ...]
# The second one takes the clone's .venv, and NPROC processes (default: one for each GPU, 2 where there is none).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$root/.venv/bin/deepspeed" ]; then export PATH="$root/.venv/bin:$PATH"; fi
if ! command -v deepspeed >/dev/null; then
    echo "launchers/run.sh: deepspeed is not installed; set it up with: bash launchers/setup.sh" >&2
    exit 2
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    NPROC=${NPROC:-2}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
# A port of its own: two runs on one machine would meet on deepspeed's fixed one.
port=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
exec deepspeed --log_level warning --master_port "$port" ${NPROC:+--num_gpus "$NPROC"} "$root/launchers/run.sh" "$@"
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Before torch is imported: ranks that each take all cores slow each other down many times.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ.get("LOCAL_SIZE", "1")))))
    sys.path.insert(0, ROOT)
    from megadistill.cli.main import main as command

    sys.exit(command(["train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
