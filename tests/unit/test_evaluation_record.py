"""evaluation.json gains results and loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError
from megadistill.evaluation.record import add_results, deciding_settings, make_entry, notes_on_rows, read_record
from megadistill.evaluation.rouge import RougeScores
from megadistill.evaluation.suites import SuiteResult


def entry_of(rouge_l: float = 10.0, *, model: str = "student", files: str = "f", rows: str = "r", n: int = 2) -> Any:
    scores = RougeScores(rouge_l, 0.0, 50.0, 60.0, num_scored=n, num_without_references=0)
    result = SuiteResult("test", None, scores, (1, 2), 0, 0, ["text"] * n, rows_checksum=rows)
    described = {"name": model, "path": f"runs/{model}", "files": {"a": files}}
    return make_entry(result, 1.5, model=described, path="test.jsonl", suite=None, settings={"eval.seeds": (1, 2)})


def test_results_of_another_model_or_set_are_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    add_results(path, {"student": {"test": entry_of()}})
    add_results(path, {"student": {"dolly": entry_of(20.0)}})
    record, num_moved = add_results(path, {"teacher": {"test": entry_of(30.0, model="teacher")}})
    assert num_moved == 0 and record["history"] == []
    assert json.loads(path.read_text(encoding="utf-8")) == record == read_record(path)
    found = {(m, s): e["greedy"]["rouge_l"] for m, by_set in record["results"].items() for s, e in by_set.items()}
    assert found == {("student", "test"): 10.0, ("student", "dolly"): 20.0, ("teacher", "test"): 30.0}
    assert record["results"]["teacher"]["test"]["model"]["path"] == "runs/teacher"


def test_no_number_is_lost(tmp_path: Path) -> None:
    """Other numbers, or the same of other files, go before those that were there; a repetition changes the time."""
    path = tmp_path / "evaluation.json"
    for entry in (entry_of(1.0), entry_of(2.0), entry_of(2.0, files="other"), entry_of(2.0, files="other")):
        record, _ = add_results(path, {"student": {"test": entry}})
    assert [e["greedy"]["rouge_l"] for e in record["history"]] == [2.0, 1.0]
    assert [e["model"]["files"]["a"] for e in record["history"]] == ["f", "f"]
    assert record["results"]["student"]["test"]["model"]["files"] == {"a": "other"}
    assert all(e["model"]["name"] == "student" and e["time"] and e["name"] == "test" for e in record["history"])


def test_a_file_of_before_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    old = {"name": "test", "greedy": {"rouge_l": 5.0}, "nll": 2.0, "predictions": ["x"]}
    path.write_text(
        json.dumps({"models": {"student": "runs/a"}, "results": {"student": {"test": old}}}), encoding="utf-8"
    )
    record, num_moved = add_results(path, {"student": {"test": entry_of()}})
    assert num_moved == 1 and record["history"][0].items() >= old.items()
    assert record["history"][0]["model"] == {"name": "student", "path": "runs/a", "files": {}}


OURS = '"format": "megadistill evaluation 2"'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 1}',
        '{"results": [1]}',
        '{"results": {"a": {"b": 1}}}',
        '{"results": {"hellaswag": {"acc": {}}}, "versions": {}}',
        '{"results": {}, "models": null}',
        '{"results": {}, "made_from": ["x"]}',
        f'{{{OURS}, "results": {{}}}}',
        f'{{{OURS}, "results": {{}}, "history": null}}',
        f'{{{OURS}, "results": {{}}, "history": [1]}}',
        '{"format": "megadistill evaluation 3", "results": {}, "history": []}',
    ],
)
def test_a_file_of_something_else_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    for read in (read_record, lambda path: add_results(path, {"student": {"test": entry_of()}})):
        with pytest.raises(ConfigError, match=r"mine\.json exists and holds no results of evaluate"):
            read(path)
    assert path.read_text(encoding="utf-8") == text


def test_scores_of_different_rows_are_noted(tmp_path: Path) -> None:
    """Also those of two commands; a file of before has no checksums."""
    path = tmp_path / "evaluation.json"
    add_results(path, {"a": {"test": entry_of()}, "b": {"test": entry_of()}})
    record, _ = add_results(path, {"old": {"test": {"greedy": None}}})
    assert notes_on_rows(record, ["test", "dolly"]) == []
    record, _ = add_results(path, {"c": {"test": entry_of(rows="other", n=1)}})
    (note,) = notes_on_rows(record, ["test"])
    assert note == "not comparable: the models answered different rows of test (a, b: 2 rows; c: 1 rows)"
    for by_set in record["results"].values():
        by_set["test"].pop("predictions", None)  # they are most of the file, and a user may take them out
    assert notes_on_rows(record, ["test"]) == ["not comparable: the models answered different rows of test (a, b; c)"]


def test_what_decides_the_numbers() -> None:
    def settings(**sections: Any) -> dict[str, Any]:
        tree = {"run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}}, **sections}
        return deciding_settings(RunConfig.model_validate(tree))

    plain = settings()
    assert settings(eval={"batch_size": 3, "path": "f"}, data={"train_path": "g"}) == plain
    for other in ({"eval": {"seeds": [1]}}, {"eval": {"top_k": 5}}, {"data": {"template": "plain"}}):
        assert settings(**other) != plain
    assert {"eval.temperature", "eval.max_new_tokens", "data.max_prompt_tokens", "model.student.dtype"} <= set(plain)


def test_runs_are_evaluated_with_the_prompts_that_they_were_trained_with(tmp_path: Path) -> None:
    """The variables of the chat template, too, unless the user gives others."""
    from megadistill.cli.evaluate import _as_trained
    from megadistill.config.load import dump_resolved

    def config_of(name: str, **variables: Any) -> RunConfig:
        models = {"student": {"path": "s"}, "teacher": {"path": "t"}}
        data = {"chat_template_kwargs": variables}
        return RunConfig.model_validate({"model": models, "run": {"dir": str(tmp_path / name)}, "data": data})

    for name, thinks in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        dump_resolved(config_of(name, enable_thinking=thinks).with_template("chat"), tmp_path / name / "resolved.yaml")
    a, b, config = {"a": str(tmp_path / "a")}, {"b": str(tmp_path / "b")}, config_of("none")
    data = _as_trained(config, a).data
    assert (data.template, data.chat_template_kwargs) == ("chat", {"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"with different prompts: .*False.*a/resolved.yaml.*, .*True") as caught:
        _as_trained(config, a | b)
    assert caught.value.setting == "data.chat_template_kwargs"
    assert _as_trained(config_of("none", x=1), a | b).data.chat_template_kwargs == {"x": 1}
    assert _as_trained(config, {"m": str(tmp_path)}) == config
