"""What is imported before something is printed: the heavy libraries take seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_HELP = """
import sys
from megadistill.cli.main import VERBS, main
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as done:
        assert done.code == 0
    heavy = {"torch", "numpy", "transformers", "deepspeed", "datasets"} & set(sys.modules)
    assert not heavy, f"{verb} --help imports {heavy}"
"""
_TRAIN = """
import sys
from megadistill.cli.main import main

class Imports:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "numpy", "transformers", "deepspeed", "datasets"):
            print("imports", name, flush=True)
            sys.exit(0)

sys.meta_path.insert(0, Imports())
words = ["run.dir=runs/x", "model.teacher.path=t", "model.student.path=s", "data.train_path=d"]
sys.exit(main(["train", "--config", "configs/base.yaml", *words]))
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    assert "usage: megadistill study" in _run(_HELP)


def test_train_prints_a_line_before_it_imports_anything_heavy() -> None:
    first, second = _run(_TRAIN).splitlines()
    assert "configs/base.yaml -> runs/x" in first and second.startswith("imports ")


def test_templates_of_prepare_are_those_of_the_data() -> None:
    from megadistill.cli.prepare import parser_of
    from megadistill.data.prompts import TEMPLATES

    choices = [action.choices for action in parser_of()._actions if action.dest == "template"]
    assert choices == [tuple(TEMPLATES)]


def test_a_model_of_one_process_needs_no_deepspeed() -> None:
    _run("import sys, megadistill.engines.inference; assert 'deepspeed' not in sys.modules")
