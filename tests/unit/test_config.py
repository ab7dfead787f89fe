from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from megadistill.config import RunConfig, dump_resolved, load_config, require
from megadistill.config.fields import nearest_key, walk
from megadistill.config.reference import MARK, base_yaml, coming_from_markdown, reference_markdown
from megadistill.config.section import allowed, section_type
from megadistill.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "run: {dir: out}\nmodel: {teacher: {path: big}, student: {path: small}}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message


def test_defaults_come_from_the_schema(minimal: Path) -> None:
    config = load_config(minimal)
    assert config == RunConfig.model_validate(
        {"run": {"dir": "out"}, "model": {"teacher": {"path": "big"}, "student": {"path": "small"}}}
    )
    assert (config.optim.lr, config.optim.betas, config.parallel.tp_size) == (1e-4, (0.9, 0.95), "auto")
    assert config.generation.scrg.enabled and config.eval.seeds == (10, 20, 30, 40, 50)


def test_overrides_win_and_are_read_as_yaml(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "optim.lr=1",
            "optim.lr=3e-4",
            "optim.betas=[0.8, 0.99]",
            "eval.seeds=[1]",
            "parallel.tp_size=4",
            "loss.clip=off",
            "data.train_path=a=b c.jsonl",
            "model.tokenizer=",
            "loss={sft: 0, span: 2}",
        ],
    )
    assert config.optim.lr == 3e-4 and config.optim.betas == (0.8, 0.99) and config.eval.seeds == (1,)
    assert config.parallel.tp_size == 4 and config.loss.clip == "off" and config.model.tokenizer is None
    assert config.data.train_path == "a=b c.jsonl"
    assert (config.loss.sft, config.loss.dac_kl, config.loss.span) == (0, 1, 2)


def test_the_tree_is_frozen(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(pydantic.ValidationError):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_bases_are_relative_to_the_file_and_merged_by_key(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/first.yaml").write_text(
        "optim: {lr: 1.0, eps: 0.5}\neval: {seeds: [1, 2, 3]}\n", encoding="utf-8"
    )
    (tmp_path / "second.yaml").write_text(
        "base: deep/first.yaml\noptim: {lr: 2.0}\nloss:\n  # sft: 0\n", encoding="utf-8"
    )
    top = tmp_path / "top.yaml"
    top.write_text("base: second.yaml\neval: {seeds: [7]}\nloss: {sft: 0.5}\n" + MINIMAL, encoding="utf-8")
    config = load_config(top, ["optim.weight_decay=0.1"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (2.0, 0.5, 0.1)
    assert config.eval.seeds == (7,) and config.loss.sft == 0.5


@pytest.mark.parametrize("name", ["smoke.yaml", "configs/smoke.yaml"])
def test_a_base_of_a_shipped_name_is_found_from_anywhere(tmp_path: Path, name: str) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"base: {name}\nrun: {{seed: 3}}\n", encoding="utf-8")
    assert load_config(top).run.prepare == "smoke" and load_config(top).run.seed == 3


def test_a_base_beside_the_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_text(MINIMAL, encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: smoke.yaml\n", encoding="utf-8")
    assert load_config(tmp_path / "top.yaml").run.dir == "out"


def test_a_misspelled_base_names_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "papers.yaml").write_text(MINIMAL, encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: papr.yaml\n", encoding="utf-8")
    message = error_of(tmp_path / "top.yaml")
    assert "papr.yaml: no such file; did you mean paper.yaml?" in message


def test_an_empty_section_leaves_the_base_alone(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("loss: {sft: 0.25}\n" + MINIMAL, encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nloss:\n", encoding="utf-8")
    assert load_config(tmp_path / "top.yaml").loss.sft == 0.25


def test_references_between_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        MINIMAL + "data: {train_path: '${run.dir}/train.jsonl'}\neval: {max_new_tokens: '${data.max_tokens}'}\n",
        encoding="utf-8",
    )
    config = load_config(path, ["run.dir=moved"])
    assert config.data.train_path == "moved/train.jsonl" and config.eval.max_new_tokens == 512


@pytest.mark.parametrize("override", ["loss.clip=off", "parallel.tp_size=2", "run.dir='12'", "run.dir='a: #b'"])
def test_resolved_yaml_gives_the_same_tree(minimal: Path, tmp_path: Path, override: str) -> None:
    config = load_config(minimal, [override])
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert [path.name for path in tmp_path.glob("*.partial")] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("train.lr=1", ["train.lr", "did you mean optim.lr?"]),
        ("seed=1", ["did you mean run.seed?"]),
        ("trian.max_steps=1", ["did you mean train?"]),
        ("--optim.lr=1", ["did you mean optim.lr?"]),
        ("generation.scrg.round=1", ["did you mean generation.scrg.rounds?"]),
        ("parallel.teacher_tp_size=2", ["unknown key", "teacher and student share parallel.tp_size"]),
        ("model.teacher.tp_size=2", ["unknown key", "teacher and student share parallel.tp_size"]),
        ("generation.mode=offpolicy", ["off_policy", "teacher"]),
        ("qqqq.zzzz=1", ["qqqq", "sections are run, model"]),
        ("optim.lr", ["write optim.lr=VALUE"]),
        ("learning_rate", ["write section.field=value"]),
        ("deepspeed=ds.json", ["deepspeed", "a mapping", "not the name of a file"]),
        ("data.train_path=[a, b]", ['data.train_path=["a", "b"]', "put the files into a folder"]),
        ("eval.path=[a, b]", ["put the files into a folder"]),
        ("optim.lr=abc", ['optim.lr="abc"', "a number > 0"]),
        ("optim.lr='1'", ["a number > 0"]),
        ("optim.lr=-1", ["optim.lr=-1", "a number > 0"]),
        ("optim.lr=.nan", ["optim.lr=NaN"]),
        ("optim.lr=[1", ["optim.lr=[1", "YAML"]),
        ("optim.betas=[1, 2]", ["optim.betas=[1, 2]", "list of 2"]),
        ("optim.betas=3", ["optim.betas=3", "list of 2"]),
        ("train.max_steps=1.5", ["train.max_steps=1.5", "whole number >= 1"]),
        ("train.max_steps=true", ["whole number >= 1"]),
        ("train.max_steps=0", ["whole number >= 1"]),
        ("loss.clip=gat", ["loss.clip", "gate | fixed | entropy | off"]),
        ("loss=3", ["loss=3", "section", "loss.sft"]),
        ("loss={softnes: 1}", ["loss.softnes", "did you mean loss.softness?"]),
        ("parallel.tp_size=two", ["auto, or a whole number >= 1"]),
        ("parallel.zero_stage=4", [">= 0 and <= 3"]),
        ("run.dir=12", ["run.dir=12", "text", "quotes"]),
        ("run.dir=''", ["not empty"]),
        ("model.student.path=null", ["model.student.path=null"]),
        ("optim.lr=${oc.env:HOME}", ["optim.lr", "environment variables are not read"]),
        ("train.micro_batch_size=5", ["train.global_batch_size=16", "train.micro_batch_size=5"]),
        ("data.max_tokens=256", ["data.max_tokens=256", "data.max_prompt_tokens=256"]),
        ("model.teacher.path=null", ["model.teacher.path", "plain SFT"]),
        ("loss={sft: 0, dac_kl: 0, span: 0}", ["loss.sft, loss.dac_kl, loss.span and loss.policy"]),
        ("loss.lower=1.0", ["loss.lower=1", "loss.upper=1"]),
        ("loss.upper_min=0.05", ["loss.lower_max=0.1", "loss.upper_min=0.05"]),
        ("data.prompts_ratio=0.5", ["data.prompts_ratio=0.5", "data.prompts_path"]),
        ("train.eval_every=5", ["train.eval_every=5", "data.valid_path"]),
        ("eval={seeds: [], greedy: false}", ["eval.seeds", "eval.greedy"]),
    ],
)
def test_mistakes_on_the_command_line(minimal: Path, override: str, parts: list[str]) -> None:
    message = error_of(minimal, override)
    assert message.startswith("command line: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["run.dir (text that is not empty), model.student.path (text that is not empty) are missing"]),
        ("run: {dir: out}", ["model.student.path (text that is not empty) is missing"]),
        ("optim: {lr: fast}", ["run.dir", "model.student.path", "are missing", "1 more"]),
        (MINIMAL + "optim: {lrr: 1}", ["optim.lrr", "did you mean optim.lr?"]),
        (MINIMAL + "optim: {lr: fast}", ['optim.lr="fast"', "a number > 0"]),
        (MINIMAL + "optim: 3", ["optim=3", "section"]),
        (MINIMAL + "optim: {lr: 1}\noptim: {lr: 2}", [":4", "duplicate"]),
        (MINIMAL + "optim: {lr: [", ["not valid YAML"]),
        (MINIMAL + "optim: {lr: '${optim.lrr}'}", ["optim.lrr"]),
        ("- 1", ["sections"]),
        ("3", ["cannot be read"]),
        ("base: [a]", ["base", "one YAML file"]),
        ("base: none.yaml", ["none.yaml", "no such file"]),
        ("base: run.yaml", ["circular"]),
        ("1: 2", ["1: unknown key"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    message = error_of(path)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_bytes(b"\xff")
    assert "cannot be read" in error_of(tmp_path / "demo.yaml")
    assert f"did you mean {tmp_path / 'demo.yaml'}?" in error_of(tmp_path / "dmeo.yaml")
    assert "no folder" in error_of(tmp_path / "none" / "x.yaml")
    assert "cannot be read" in error_of(tmp_path)


def test_the_error_names_the_file_that_said_it(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("optim: {lr: fast}\n", encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: low.yaml\n" + MINIMAL, encoding="utf-8")
    assert error_of(tmp_path / "top.yaml").startswith(str(tmp_path / "low.yaml"))


def test_plain_sft_needs_no_teacher(minimal: Path) -> None:
    config = load_config(
        minimal, ["model.teacher.path=null", "loss.dac_kl=0", "loss.span=0", "generation.mode=dataset"]
    )
    assert not config.needs_teacher
    assert load_config(minimal).needs_teacher


def test_require(minimal: Path) -> None:
    config = load_config(minimal, ["data.train_path=x"])
    assert require(config, "data.train_path", "needed") == "x"
    with pytest.raises(ConfigError, match="eval.path is missing: evaluate needs rows"):
        require(config, "eval.path", "evaluate needs rows")


def test_every_key_is_described_and_says_what_it_allows() -> None:
    for key, field in walk():
        assert field.description and field.description.endswith("."), key
        assert "|" not in field.description, key
        assert section_type(field) or allowed(field), key
        assert nearest_key(key) == key


@pytest.mark.parametrize(
    ("page", "tables"), [("configuration.md", reference_markdown), ("coming_from.md", coming_from_markdown)]
)
def test_the_pages_are_up_to_date(page: str, tables: Callable[[], str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.partition(MARK)[2].strip() == tables().strip(), "run: python -m megadistill.config.reference"


def test_the_base_file_is_up_to_date() -> None:
    hint = "run: python -m megadistill.config.reference"
    assert (ROOT / "configs/base.yaml").read_text(encoding="utf-8") == base_yaml(), hint


def test_the_base_file_is_the_defaults(minimal: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"base: {ROOT / 'configs/base.yaml'}\n{MINIMAL}", encoding="utf-8")
    assert load_config(top) == load_config(minimal)
