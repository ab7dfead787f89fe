#!/usr/bin/env python3
"""Base model + LoRA adapter -> Hugging Face folder, for scripts: the same as ``megadistill merge``.

python tools/merge_lora.py BASE ADAPTER merged/model [--dtype bf16]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
