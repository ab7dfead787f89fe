"""What .pre-commit-config.yaml checks, so that a change cannot leave it behind; and spelling."""

import ast
import configparser
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megadistill", "tools", "tests", "launchers", "configs")
FILES = sorted(
    file
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".sh", ".sbatch", ".yaml") and "__pycache__" not in file.parts
)
PYTHON = [file for file in FILES if file.suffix == ".py"]
CODE = [file for file in PYTHON if file.relative_to(ROOT).parts[0] in ("megadistill", "tools")]
# Modules whose errors mypy ignores: a module may leave, none may be added.
UNCHECKED_MODULES: set[str] = set()
MAX_TYPE_IGNORES = 6  # in megadistill and tools; may only shrink
BRITISH = re.compile(
    r"(?:normal|token|optim|minim|maxim|initial|general|util|real|organ|recogn|special|serial|summar|parallel|"
    r"penal|random|synchron|visual|emphas|custom|author|capital|local)is(?:e|ed|es|er|ers|ing|ation|ations)\b"
    r"|(?:behavi|col|neighb|fav|hon|lab)our|label(?:led|ling)|(?:model|cancel|travel)l(?:ed|ing)|\bcentre|\bgrey\b|distil\b",
    re.IGNORECASE,
)
SINGLE_BACKTICKS = re.compile(r"(?<!`)`[^`\n]+`(?!`)")
# Former spellings that configurations may still use, and their test; this list.
MAY_BE_BRITISH = {"megadistill/config/loss.py", "tests/unit/test_losses_config.py", "tests/unit/test_style.py"}


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_code_is_clean(command: list[str]) -> None:
    pytest.importorskip(command[0])
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_checks_every_module() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".mypy.ini", encoding="utf-8")
    assert settings["mypy"]["files"].split(", ") == ["megadistill", "tools", "setup.py"]
    unchecked = {name for name in settings.sections() if settings[name].getboolean("ignore_errors", fallback=False)}
    assert unchecked == {f"mypy-{module}" for module in UNCHECKED_MODULES}


def test_fewer_and_fewer_lines_are_hidden_from_mypy() -> None:
    hidden = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in CODE
        for line, comment in comments(file.read_text(encoding="utf-8"))
        if "type: ignore" in comment
    ]
    assert len(hidden) == MAX_TYPE_IGNORES, f"{len(hidden)} lines are hidden from mypy: {hidden}"


def test_text_files_are_read_and_written_as_utf_8() -> None:
    """Ruff's PLW1514 misses the calls where it cannot tell that an object is a path."""
    faults = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"
        for file in PYTHON
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text") and all(word.arg != "encoding" for word in node.keywords)
    ]
    assert not faults, "\n".join(faults)


def test_spelling_is_american() -> None:
    faults = [
        f"{file.relative_to(ROOT)}:{number}: {found}"
        for file in FILES
        if str(file.relative_to(ROOT)) not in MAY_BE_BRITISH
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for found in BRITISH.findall(line)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "word", ["normalised", "tokenisation", "neighbours", "Behaviour", "labelled", "centre", "to distil", "minimise"]
)
def test_british_spelling_is_found(word: str) -> None:
    assert BRITISH.search(word)


@pytest.mark.parametrize(
    "word", ["distill", "distilled", "tokenizer", "promise", "precise", "revision", "analysis", "hour"]
)
def test_american_spelling_is_not(word: str) -> None:
    assert not BRITISH.search(word)


def test_docstrings_and_comments_mark_code_with_double_backticks() -> None:
    faults = []
    for file in CODE:
        source = file.read_text(encoding="utf-8")
        marked = [line for line, text in [*docstrings(source), *comments(source)] if SINGLE_BACKTICKS.search(text)]
        faults += [f"{file.relative_to(ROOT)}:{line}" for line in marked]
    assert not faults, "\n".join(faults)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, those of attributes too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
