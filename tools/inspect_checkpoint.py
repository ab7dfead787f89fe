#!/usr/bin/env python3
"""What a checkpoint, a model folder or a run holds, for scripts: the same as ``megadistill inspect``.

python tools/inspect_checkpoint.py runs/demo --check
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
