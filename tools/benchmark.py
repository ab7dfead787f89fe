"""Benchmarks: one verb each, one table in one run, as ratios, with a JSON file beside it.

python tools/benchmark.py loss --help
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb == "loss":
        from tools.benchmarks.loss import main as run

        return run(arguments)
    if verb == "diversity":
        from tools.benchmarks.diversity import main as run

        return run(arguments)
    if verb == "rollout":
        from tools.benchmarks.rollout import main as run

        return run(arguments)
    if verb == "step":
        from tools.benchmarks.step import main as run

        return run(arguments)
    print(f"{__doc__}\nverbs: loss, rollout, step, diversity", file=sys.stderr)
    if verb in ("-h", "--help"):
        return 0
    print(f"tools/benchmark.py: unknown verb '{verb}'; allowed: loss, rollout, step, diversity", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
