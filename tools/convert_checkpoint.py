#!/usr/bin/env python3
"""Checkpoint -> Hugging Face folder, for scripts: the same converter as ``megadistill export``.

python tools/convert_checkpoint.py runs/demo exported/student [--dtype bf16]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
