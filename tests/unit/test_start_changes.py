"""A run that an earlier release began: what it computed in another way is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.config.load import dump_resolved, load_config
from megadistill.training.resume import Start
from tests.support.runs import ROOT


@pytest.mark.parametrize("key", ["span_verb_objects", "coverage"])
def test_what_changed_since_the_run_began_is_said(tmp_path: Path, key: str) -> None:
    record = tmp_path / "resolved.yaml"
    dump_resolved(load_config(ROOT / "configs" / "smoke.yaml"), record)
    start = Start(tmp_path, (tmp_path / "checkpoints" / "step_1",))
    assert start.changes() == []
    lines = record.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split(":")[0].strip() != key]
    assert len(kept) == len(lines) - 1
    record.write_text("\n".join(kept), encoding="utf-8")
    (said,) = start.changes()
    assert said.startswith(f"{tmp_path} was begun by an earlier release: ")
    assert Start(tmp_path).changes() == []  # a new run
