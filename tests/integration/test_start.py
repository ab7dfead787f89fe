"""How programs start: more than once in one process, and without what they do not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT, losses, settings

_TWICE = """
import json, sys
from megadistill.cli.main import main
print([int(main(["train", *words])) for words in json.loads(sys.argv[1])])
"""


def test_one_process_may_train_more_than_once(assets: Path, tmp_path: Path) -> None:
    """A run does not meet the process groups, or anything else, of the one before; nor one that failed."""
    config = ["--config", str(ROOT / "configs" / "base.yaml")]
    one = settings(assets, "llama", "train.max_steps=2")
    other = settings(assets, "qwen3", "train.max_steps=1", "parallel.zero_stage=1")
    runs = [
        [*config, f"run.dir={tmp_path / 'first'}", *one],
        [*config, f"run.dir={tmp_path / 'refused'}", *one, "parallel.tp_size=3"],
        [*config, f"run.dir={tmp_path / 'other'}", *other],
        [*config, f"run.dir={tmp_path / 'again'}", *one],
    ]
    done = subprocess.run([sys.executable, "-c", _TWICE, json.dumps(runs)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[0, 2, 0, 0]"], done.stdout + done.stderr
    assert losses(tmp_path / "first") == losses(tmp_path / "again")


def test_generate_in_one_process_starts_without_deepspeed_and_its_warning(assets: Path, tmp_path: Path) -> None:
    code = "import sys; from megadistill.cli.main import main; assert main(sys.argv[1:]) == 0"
    code += "; assert 'deepspeed' not in sys.modules"
    row = {"instruction": "Name a number.", "output": "One."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = [
        "generate",
        "--model",
        str(assets / "llama" / "student" / "config.json"),
        "--tokenizer",
        str(assets / "tokenizer"),
    ]
    arguments += ["--input", str(tmp_path / "rows.jsonl"), "--max-prompt-tokens", "124", "--max-new-tokens", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--template", "plain"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "accelerator" not in done.stdout + done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 1
