#!/usr/bin/env python3
"""Whether a conversion is right, for scripts: the same as ``megadistill verify``.

python tools/verify_checkpoint.py runs/demo exported/student [--text rows.jsonl]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
