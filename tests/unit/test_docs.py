"""The documentation: its code runs, its paths exist, its line counts are right, its lines are short.

docs/benchmarks is left out: its pages are written by tools/benchmark.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "examples" / "README.md"]
WIDTH = 100
# `training/step.py` (190), or (190 lines), maybe with a line break between the two.
COUNT = re.compile(r"`([\w/]+\.py)`\s+\((\d+)(?: lines)?\)")
TOLERANCE = 0.1
# Code that names `path/to` something of the reader's is left out.
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    if "path/to" not in block
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_there_are_python_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {})


def long_lines(text: str) -> list[str]:
    """Lines of prose that are too long: not those of tables and code blocks, and without the addresses in them."""
    found, is_fenced = [], False
    for line in text.splitlines():
        is_fenced ^= line.startswith("```")
        is_code = is_fenced or line.startswith("    ")
        shown = re.sub(r"\]\([^)]*\)|https?://\S+", "]()", line)
        if len(shown) > WIDTH and not is_code and not line.startswith("|"):
            found.append(line)
    return found


@pages
def test_prose_wraps(page: Path) -> None:
    assert not long_lines(page.read_text(encoding="utf-8")), f"{page.name}: wrap at {WIDTH} columns"


def test_long_lines_are_found() -> None:
    long = "word " * 21
    assert long_lines(f"short\n{long}\n- {long}") == [long, f"- {long}"]
    assert not long_lines(f"| {long} |\n    {long}\n```\n{long}\n```\n[a]({'b' * 100})")


def paths(text: str) -> Iterator[str]:
    """Files and folders of the repository that a page names: link targets, scripts, and what is in a known folder."""
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            yield target
    text = re.sub(r"https?://\S+|\[[^]]*\]\([^)]*\)", "", text)
    named = re.findall(r"(?<![\w/.-])[\w-][\w./-]*\.(?:py|sh|sbatch|md)\b", text)
    named += re.findall(r"(?<![\w/.-])(?:megadistill|configs|launchers|tools|tests|docs)/[\w./-]*(?:/|\.\w+)", text)
    yield from (path for path in named if "NAME" not in path)


def exists(path: str, page: Path) -> bool:
    """Relative to the repository, to the package, or to the page."""
    return any((folder / path).exists() for folder in (ROOT, ROOT / "megadistill", page.parent))


@pages
def test_paths_exist(page: Path) -> None:
    missing = sorted({path for path in paths(page.read_text(encoding="utf-8")) if not exists(path, page)})
    assert not missing, f"{page.name} names {', '.join(missing)}, which do not exist"


@pytest.mark.parametrize(
    "text", ["[a](gone.md)", "`training/gone.py`", "bash launchers/gone.sh", "`configs/gone.yaml`", "see `tools/gone/`"]
)
def test_missing_paths_are_found(text: str) -> None:
    found = list(paths(text))
    assert found and not any(exists(path, README) for path in found)


def line_count(path: str) -> int:
    return len((ROOT / "megadistill" / path).read_text(encoding="utf-8").splitlines())


def is_near(stated: int, true: int) -> bool:
    return abs(stated - true) <= TOLERANCE * true


def reading_tour() -> str:
    """The section of that name; elsewhere, numbers of lines are sizes of changes."""
    found = re.search(r"^## Reading tour\n.*?(?=^## )", ARCHITECTURE.read_text(encoding="utf-8"), re.S | re.M)
    assert found, f"{ARCHITECTURE.name} has no reading tour"
    return found[0]


def test_line_counts_are_right() -> None:
    counts = COUNT.findall(reading_tour())
    assert len(counts) >= 10
    stated = [(path, int(count), line_count(path)) for path, count in counts]
    wrong = [f"{path} has {true}, not {count}" for path, count, true in stated if not is_near(count, true)]
    assert not wrong, f"{ARCHITECTURE.name}, number of lines: {'; '.join(wrong)}"


def test_a_step_has_as_many_lines_as_the_tour_states() -> None:
    tour = re.search(r"One step is (\d+) lines in (\w+) files(.*?)\n\n[^0-9]", reading_tour(), re.S)
    assert tour, f"{ARCHITECTURE.name}: One step is N lines in ... files, and the list of them"
    files = [path for path, _ in COUNT.findall(tour[3])]
    assert {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}[tour[2]] == len(files)
    assert "training/step.py" in files
    total = sum(map(line_count, files))
    assert is_near(int(tour[1]), total), f"{ARCHITECTURE.name}: {total} lines, not {tour[1]}"


def test_the_floors_of_the_table_are_those_of_the_test() -> None:
    from tests.unit.test_floors import FLOORS

    rows = re.findall(r"^\| (\d+) \| (`[^|]+) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.M)
    stated = [(package, int(floor)) for floor, packages in rows for package in re.findall(r"`(\w+)`", packages)]
    assert len(stated) == len(dict(stated)) and dict(stated) == FLOORS


def test_every_page_is_linked_from_the_readme() -> None:
    links = {target for target in re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8"))}
    pages_ = {str(page.relative_to(ROOT)) for page in PAGES if page != README} | {"docs/benchmarks/README.md"}
    assert pages_ <= links, f"README.md links no {', '.join(sorted(pages_ - links))}"
