"""The shape of the code: floors, fences around libraries, import cycles, sizes. Reasons: docs/architecture.md."""

import ast
import graphlib
from collections.abc import Iterator, Mapping
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
    "planning": 10,
    "cli": 11,
    "api": 12,
    "demo": 12,
}
# The parts that import a library, inside functions too: exactly these. Annotations alone (under TYPE_CHECKING) may name
# any library. A library that is not here may be imported everywhere.
FENCES = {
    "datasets": {"data"},
    "deepspeed": {"engines", "launch"},
    "filelock": {"demo", "observability"},
    "huggingface_hub": {"checkpoint", "data"},
    "matplotlib": {"demo", "observability"},
    "mpi4py": {"cli", "launch"},
    "numpy": {"data"},
    "omegaconf": {"config"},
    "peft": {"checkpoint"},
    "psutil": {"launch"},
    "pyarrow": {"data"},
    "rouge_score": {"evaluation"},
    "safetensors": {"checkpoint", "models"},
    "sentencepiece": {"demo"},
    "spacy": {"data"},
    "textblob": {"data", "demo"},
    "tokenizers": {"demo"},
    "torch.distributed": {"engines", "launch", "parallel", "planning"},
    "tqdm": {"observability"},
    "transformers": {"checkpoint", "data", "decoding", "demo", "models"},
    "triton": {"losses"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = {"megadistill": 60, "tools": 80, "tests": 80, "setup.py": 80}
LONGER_FUNCTIONS = {"sums_kernel": 100}  # a Triton kernel, which cannot return a part of its many running sums
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


def module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from module_level(statement.orelse)
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.ClassDef):
            for block in ("body", "orelse", "handlers", "finalbody"):
                inner = getattr(statement, block, [])
                yield from module_level([s for part in inner for s in getattr(part, "body", [part])])


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module name -> the modules of ``sources`` that it imports at its own import."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = [name for node in module_level(ast.parse(source).body) for _, name in imported(node)]
        # ``from a import b`` is the module a.b, or a name in the module a.
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & sources.keys()
    return graph


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


def test_every_floor_is_that_of_a_part() -> None:
    assert {part_of(file) for file in MODULES} - {""} == set(FLOORS)


@pytest.mark.parametrize("library", FENCES)
def test_a_fence_allows_only_parts_that_import_the_library(library: str) -> None:
    importers = set()
    for file in MODULES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        unloaded = typing_lines(tree)
        if any((name + ".").startswith(library + ".") and line not in unloaded for line, name in imported(tree)):
            importers.add(part_of(file))
    assert FENCES[library] - importers == set(), f"{library}: take these parts out of FENCES"


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in MODULES}
    sources = {name: file.read_text(encoding="utf-8") for file, name in names.items()}
    graphlib.TopologicalSorter(import_graph(sources)).prepare()  # raises CycleError with the modules of a cycle


@pytest.mark.parametrize(
    "source",
    [
        "from megadistill import b",
        "from megadistill.b import name",
        "import megadistill.b",
        "try:\n    import megadistill.b\nexcept ImportError:\n    pass",
        "if condition:\n    pass\nelse:\n    from megadistill import b",
        "try:\n    pass\nexcept ImportError:\n    from megadistill import b",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from megadistill import b",
    ],
)
def test_cycles_are_found(source: str) -> None:
    graph = import_graph({"megadistill.a": source, "megadistill.b": "import megadistill.a"})
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "source", ["def f():\n    import megadistill.b", "if TYPE_CHECKING:\n    import megadistill.b"]
)
def test_imports_that_do_not_run_at_import_are_not_cycles(source: str) -> None:
    graph = import_graph({"megadistill.a": source, "megadistill.b": "import megadistill.a"})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    name, num_lines = file.relative_to(ROOT), text.count("\n")
    assert num_lines <= MAX_FILE_LINES, f"{name} has {num_lines} lines, {MAX_FILE_LINES} are allowed: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            allowed = LONGER_FUNCTIONS.get(node.name, MAX_FUNCTION_LINES[name.parts[0]])
            assert length <= allowed, (
                f"{name}:{node.lineno}: {node.name} has {length} lines, {allowed} are allowed: split it"
            )


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("config", "import megadistill.parallel.vocab"),
        ("data", "from megadistill.losses import Head"),
        ("losses", "def f():\n    from megadistill.engines import student"),
        ("config", "from megadistill import observability"),
        ("parallel", "if TYPE_CHECKING:\n    from megadistill.data.sample import Sample"),
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


def test_annotations_may_name_any_library() -> None:
    assert not fence_faults("cli", ast.parse("if TYPE_CHECKING:\n    import transformers"))


def test_the_visible_top_level_is_fixed() -> None:
    allowed = {"README.md", "LICENSE", "setup.py", "megadistill", "launchers", "configs", "tests", "tools", "docs"}
    # Where runs write by default, and what `pip install .` leaves behind; both are in .gitignore.
    ignored = {"runs", "build", "dist", "megadistill.egg-info"}
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - ignored <= allowed
