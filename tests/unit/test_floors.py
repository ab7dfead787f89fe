"""The shape of the code: floors, fences around libraries, sizes. docs/architecture.md says why."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megadistill"
FLOORS = {
    "errors": 0,
    "files": 0,
    "config": 1,
    "observability": 1,
    "parallel": 2,
    "data": 3,
    "losses": 3,
    "launch": 3,
    "decoding": 4,
    "models": 5,
    "engines": 6,
    "checkpoint": 7,
    "generation": 7,
    "evaluation": 8,
    "training": 9,
    "cli": 10,
    "demo": 11,
}
# Which parts may import a library, inside functions too; nobody else may.
FENCES = {
    "deepspeed": {"engines", "launch"},
    "transformers": {"models", "data", "checkpoint", "decoding", "demo"},
    "peft": {"checkpoint"},
    "torch.distributed": {"parallel", "engines", "launch"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = sorted([*MODULES, *ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.py")])


def part_of(file: Path) -> str:
    """The name in FLOORS that a module belongs to; "" for megadistill/__init__.py and __main__.py."""
    inner = file.relative_to(PACKAGE)
    if len(inner.parts) > 1:
        return inner.parts[0]
    return "" if inner.stem in ("__init__", "__main__") else inner.stem


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported or reached as torch.distributed; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which floor it reaches"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def floor_faults(part: str, tree: ast.AST) -> list[str]:
    """Imports of a higher floor, or of another package on the same floor."""
    faults = []
    for line, name in imported(tree):
        if not name.startswith("megadistill."):
            continue
        other = name.split(".")[1]
        if other not in FLOORS:  # `from megadistill import __version__`
            continue
        if part and other != part and FLOORS[other] >= FLOORS[part]:
            faults.append(f"line {line}: {part} (floor {FLOORS[part]}) imports {name} (floor {FLOORS[other]})")
    return faults


def typing_lines(tree: ast.AST) -> set[int]:
    """Lines under ``if TYPE_CHECKING:``, which load no library."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {line for block in blocks for line in range(block.lineno, block.body[-1].lineno + 1)}


def fence_faults(part: str, tree: ast.AST) -> list[str]:
    """Imports of a library outside the parts that FENCES names, but for those that only annotations use."""
    unloaded = typing_lines(tree)
    return [
        f"line {line}: {part or 'the package'} imports {name}; only {', '.join(sorted(owners))} may"
        for line, name in imported(tree)
        for library, owners in FENCES.items()
        if (name + ".").startswith(library + ".") and part not in owners and line not in unloaded
    ]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_floors_and_its_own_libraries(file: Path) -> None:
    part = part_of(file)
    assert part in FLOORS or part == "", f"{file}: name the floor of {part!r} in FLOORS"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    faults = floor_faults(part, tree) + fence_faults(part, tree)
    assert not faults, f"{file.relative_to(ROOT)}: " + "; ".join(faults)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    name, num_lines = file.relative_to(ROOT), text.count("\n")
    assert num_lines <= MAX_FILE_LINES, f"{name} has {num_lines} lines, {MAX_FILE_LINES} are allowed: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{name}:{node.lineno}: {node.name} has {length} lines, {MAX_FUNCTION_LINES} are allowed: split it"
            )


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("config", "import megadistill.parallel.vocab"),
        ("data", "from megadistill.losses import Head"),
        ("losses", "def f():\n    from megadistill.engines import student"),
        ("config", "from megadistill import observability"),
    ],
)
def test_the_floors_refuse(part: str, source: str) -> None:
    assert floor_faults(part, ast.parse(source))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("data", "import deepspeed"),
        ("training", "def f():\n    import torch.distributed as dist"),
        ("losses", "from torch import distributed"),
        ("losses", "import torch\ntorch.distributed.barrier()"),
        ("generation", "from transformers.cache_utils import Cache"),
        ("cli", "if TYPE_CHECKING:\n    import torch\nelse:\n    import transformers"),
    ],
)
def test_the_fences_refuse(part: str, source: str) -> None:
    assert fence_faults(part, ast.parse(source))


def test_the_visible_top_level_is_fixed() -> None:
    allowed = {"README.md", "LICENSE", "setup.py", "megadistill", "launchers", "configs", "tests", "tools", "docs"}
    # Where runs write by default, and what `pip install .` leaves behind; both are in .gitignore.
    ignored = {"runs", "build", "dist", "megadistill.egg-info"}
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - ignored <= allowed
