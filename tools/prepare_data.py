#!/usr/bin/env python3
"""The same as ``megadistill prepare``, for mpirun: the ranks share the tokenizing.

mpirun -n 8 python tools/prepare_data.py SOURCE FOLDER --tokenizer MODEL_FOLDER
mpirun -n 8 python tools/prepare_data.py --config FILE data.cache_dir=FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# One tokenizing thread a rank: under mpirun the ranks are the parallelism.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from megadistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
