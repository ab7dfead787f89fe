"""Benchmarks: one verb each, one table in one run, as ratios, with a JSON file beside it.

python tools/benchmark.py loss --help
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


VERBS = ("loss", "rollout", "step", "diversity", "save", "startup", "loading", "memory", "arms", "data")


def main() -> int:
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        return importlib.import_module(f"tools.benchmarks.{verb}").main(arguments)
    names = ", ".join(VERBS)
    print(f"{__doc__}\nverbs: {names}", file=sys.stderr)
    if verb in ("-h", "--help"):
        return 0
    print(f"tools/benchmark.py: unknown verb '{verb}'; allowed: {names}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
