"""setup.py, the version and the optional packages, against what the code imports."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megadistill
from megadistill.config.shipped import clone_root, find_config, shipped_root
from megadistill.errors import ConfigError, needs_extra
from tests.support.package import requirements, setup_arguments

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "megadistill").rglob("*.py"))
# transformers needs the first to read the tokenizers of some models, and mlflow the others for a local database.
FOR_OTHERS = {"protobuf", "alembic", "sqlalchemy"}
# Distributions of packages that no test environment has.
NOT_INSTALLED = {"spacy": "spacy", "triton": "triton"}


def names(group: str) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements()[group]}


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(statement, top-level package) of every import of another project's package."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "megadistill":
                # torch's writer is a wrapper around the package tensorboard.
                yield node, "tensorboard" if module == "torch.utils.tensorboard" else top


_installed = functools.cache(packages_distributions)


def distributions(package: str) -> set[str]:
    found = _installed().get(package) or [NOT_INSTALLED[package]]
    return {canonicalize_name(name) for name in found}


def imported() -> dict[str, str]:
    """Top-level package -> a file that imports it."""
    return {top: str(file.relative_to(ROOT)) for file in MODULES for _, top in imports(tree_of(file))}


def test_every_import_is_declared_by_name() -> None:
    declared = {name for group in requirements() if group != "test" for name in names(group)}
    missing = {top: file for top, file in imported().items() if not distributions(top) & declared}
    assert not missing, f"setup.py names no package for these imports: {missing}"


def test_every_declared_package_is_used() -> None:
    used = {name for top in imported() for name in distributions(top)}
    unused = {name for group in requirements() if group != "test" for name in names(group)} - used - FOR_OTHERS
    assert not unused, f"setup.py names packages that nothing imports: {unused}"


def features() -> dict[str, str]:
    """Package of a feature -> its extra."""
    groups = set(requirements()) - {"", "all", "test"}
    return {name: group for group in groups for name in names(group)}


def guarded(tree: ast.AST) -> dict[ast.AST, str]:
    """Statements inside ``with needs_extra(EXTRA, ...)`` -> EXTRA."""
    found = {}
    for node in ast.walk(tree):
        call = node.items[0].context_expr if isinstance(node, ast.With) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "needs_extra":
            found |= {inner: ast.literal_eval(call.args[0]) for inner in ast.walk(node)}
    return found


@pytest.mark.parametrize(("package", "extra"), sorted(features().items()))
def test_a_missing_package_of_a_feature_is_reported_with_its_extra(package: str, extra: str) -> None:
    """One import at least is guarded, by the right extra, and none is at the top of a module that others import."""
    if package == "triton":  # losses.backends asks whether it is there before it imports the kernels
        return
    if package in FOR_OTHERS:
        return
    guards = []
    for file in MODULES:
        tree = tree_of(file)
        guard = guarded(tree)
        at_top = {id(node) for node in tree.body}
        for node, top in imports(tree):
            if package in distributions(top):
                assert id(node) not in at_top, f"{file}:{node.lineno}"  # type: ignore[attr-defined]
                guards += [guard[node]] if node in guard else []
    assert guards and set(guards) == {extra}


def test_all_is_every_feature_that_needs_nothing_else() -> None:
    trackers = {"alembic", "mlflow-skinny", "sqlalchemy", "trackio", "wandb"}
    assert names("all") == set(features()) - {"spacy", "triton"} - trackers


def test_private_parts_of_torch_are_used_so_it_is_capped() -> None:
    torch = next(Requirement(text) for text in requirements()[""] if text.startswith("torch"))
    assert torch.specifier.contains("2.13.9") and not torch.specifier.contains("2.14.0")


def test_there_is_one_version() -> None:
    assert setup_arguments()["version"] == megadistill.__version__
    holders = [
        file
        for file in [*MODULES, ROOT / "setup.py"]
        if f'"{megadistill.__version__}"' in file.read_text(encoding="utf-8")
    ]
    assert holders == [ROOT / "megadistill" / "__init__.py"]


def test_needs_extra_is_one_line_with_the_command() -> None:
    with pytest.raises(ConfigError) as caught, needs_extra("plots", "loss curves"):
        import no_such_package  # noqa: F401
    expected = "loss curves: the package no_such_package is not installed; install it with: "
    assert str(caught.value) == expected + "pip install 'megadistill[plots]'"


def _evaluate() -> None:
    from megadistill.evaluation.rouge import load_scorer

    load_scorer.cache_clear()
    load_scorer()


def _spans() -> None:
    from megadistill.data.spans import make_span_prior

    make_span_prior("phrases")


def _merge() -> None:
    from megadistill.checkpoint import merge

    with mock.patch.object(merge, "_check_adapter"):
        merge.merge_adapter("no", "no", "no")


def _plot() -> None:
    from megadistill.observability.plots import loss_curves

    loss_curves(Path("no"), Path("no"))


def _mpirun() -> None:
    from megadistill.launch.mpi import mpi_variables

    mpi_variables(2, {}, lambda: 1)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("rouge_score", "eval", _evaluate),
        ("textblob", "spans", _spans),
        ("peft", "lora", _merge),
        ("matplotlib", "plots", _plot),
        ("mpi4py", "mpi", _mpirun),
    ],
)
def test_features_without_their_package(
    module: str, extra: str, use: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is not installed.*'megadistill\[{extra}\]'"):
        use()


def test_metrics_are_written_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megadistill.observability.metrics import MetricsWriter

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "loss": 2.0}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "pip install 'megadistill[tensorboard]'" in capsys.readouterr().out


def test_a_shipped_configuration_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clone_root() == shipped_root() == ROOT
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/smoke.yaml") == ROOT / "configs" / "smoke.yaml"
    assert find_config("configs/baselines/gkd.yaml") == ROOT / "configs" / "baselines" / "gkd.yaml"
    for own in ("configs/mine.yaml", "smoke.yaml", "other/configs/smoke.yaml", "configs/../configs/smoke.yaml"):
        assert find_config(own) == Path(own)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text("run: {dir: mine}", encoding="utf-8")
    assert find_config("configs/smoke.yaml") == Path("configs/smoke.yaml")
