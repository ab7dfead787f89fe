#!/usr/bin/env bash
# Sets up <clone>/.venv where that is still to be done and runs every test that this machine can run.
#   bash tests/run.sh [pytest options]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/launchers/setup.sh" test
bash "$root/tests/support/install_cluster_tools.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
# The integration tests start several processes each, and wait for them: two files at a time, each in order.
status=0
python -m pytest -n 2 tests/unit tests/distributed || status=$?
python -m pytest -n 2 --dist loadfile --durations=15 tests/integration || status=$?
exit $status
