"""A step of the demo uses no more memory, communication and operations than was recorded."""

from __future__ import annotations

import json

import pytest

from tests.support.step_bar import CASES, COMMAND, RECORD, differences, used


def test_a_step_uses_no_more_than_recorded() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    found = list(differences(used(), recorded))
    assert not found, (
        f"what a step uses is not what {RECORD.name} says. Where it should not be like that, mend it; otherwise renew "
        f"the record with `{COMMAND}` and commit it:\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    ("name", "new", "is_noticed"),
    [
        ("train: peak bytes", 1009, False),
        ("train: peak bytes", 1011, True),
        ("train: peak bytes", 849, True),
        ("train: all_reduce calls over tp", 1001, True),
        ("train: all_reduce calls over tp", 1000, False),
        ("train: broadcast bytes over dp", 1, True),
    ],
)
def test_growth_is_noticed(name: str, new: int, is_noticed: bool) -> None:
    recorded = {"train: peak bytes": 1000.0, "train: all_reduce calls over tp": 1000.0}
    lines = list(differences({"case": recorded | {name: new}}, {"case": recorded}))
    assert len(lines) == is_noticed
    assert all(line.startswith(f"case: {name} ") and f"to {new:,}" in line for line in lines)


def test_every_case_is_recorded() -> None:
    assert json.loads(RECORD.read_text(encoding="utf-8")).keys() == CASES.keys()
