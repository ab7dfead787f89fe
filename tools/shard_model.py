#!/usr/bin/env python3
"""Hugging Face model -> a file for each rank, for fast starts, for scripts: the same as ``megadistill shard``.

python tools/shard_model.py models/teacher sharded/teacher --tp-size 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
