"""docs/reliability.md's table from what the fault tests measured.

FAULT_TABLE=faults.jsonl python -m pytest tests/integration/test_faults.py
python -m tests.support.fault_table faults.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MEANINGS = {
    0: "done",
    1: "a fault of ours: traceback",
    2: "one line of what is wrong",
    85: "stopped and saved",
    87: "lost a rank: one line names it",
    247: "DeepSpeed's word for SIGKILL of a rank; the other says 87",
}


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    print("| fault | until the last process is gone, s | exit code of `deepspeed` | |\n|---|---|---|---|")
    for line in lines:
        meaning = MEANINGS.get(line["code"], "")
        if "launcher" in line["fault"]:
            meaning = "that of DeepSpeed's runner; the ranks stopped and saved"
        print(f"| {line['fault']} | {line['seconds']} | {line['code']} | {meaning} |")


if __name__ == "__main__":
    main()
