"""docs/reliability.md's table from what the fault tests measured.

FAULT_TABLE=faults.jsonl python -m pytest tests/integration/test_faults.py
python -m tests.support.fault_table faults.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megadistill.errors import ExitCode

MEANINGS = {
    ExitCode.DONE: "done",
    1: "a defect: traceback",
    ExitCode.USER_ERROR: "an error; one line describes it",
    ExitCode.STOPPED: "stopped, with a checkpoint",
    ExitCode.LOST_RANKS: "a rank was lost; one line names it",
    247: "DeepSpeed's code for a rank ended by SIGKILL; the other rank exits with 87",
}


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    print("| fault | until the last process is gone, s | exit code of `deepspeed` | |\n|---|---|---|---|")
    for line in lines:
        meaning = MEANINGS.get(line["code"], "")
        if "launcher" in line["fault"]:
            meaning = "DeepSpeed's runner's own code; the ranks saved and stopped"
        print(f"| {line['fault']} | {line['seconds']} | {line['code']} | {meaning} |")


if __name__ == "__main__":
    main()
