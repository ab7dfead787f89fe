#!/usr/bin/env bash
# Sets up <clone>/.venv if needed, and runs the whole job on a small corpus: docs/demo.md.
#   bash launchers/demo.sh [--help]          DRY_RUN=1 prints the command
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${DRY_RUN:-}" ]; then bash "$root/launchers/setup.sh"; fi
export PATH="$root/.venv/bin:$PATH"
set -- python -m megadistill demo "$@"
if [ -z "${DRY_RUN:-}" ]; then exec "$@"; fi
printf '%q ' "$@"
echo
