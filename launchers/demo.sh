#!/usr/bin/env bash
# Sets up <clone>/.venv where that is still to be done and runs the whole job on a small corpus: README.md, "The demo".
#   bash launchers/demo.sh [--help]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/launchers/setup.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"
exec python -m megadistill demo "$@"
