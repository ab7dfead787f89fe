#!/usr/bin/env python3
"""Checkpoint -> checkpoint for another tp x dp, for scripts: the same as ``megadistill reshard``.

python tools/reshard_checkpoint.py runs/mine resharded/step_1000 --tp-size 4 --dp-size 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["reshard", *sys.argv[1:]]))
