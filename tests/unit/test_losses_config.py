"""The settings of the losses: one definition for Python and for a run's configuration, and spellings of old runs."""

import warnings
from pathlib import Path
from typing import get_args

import pytest

from megadistill.config import dump_resolved, load_config
from megadistill.config.loss import TokenLoss
from megadistill.errors import ConfigError
from megadistill.losses import LossConfig
from megadistill.losses.divergences import DIVERGENCES
from megadistill.observability import redact

OLD, NEW = (
    {"remainder": "renormalise", "gate_objective": "maximise"},
    {"remainder": "renormalize", "gate_objective": "maximize"},
)


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: out}\nmodel: {teacher: {path: big}, student: {path: small}}\n", encoding="utf-8")
    return path


def test_every_divergence_can_be_asked_for():
    assert set(get_args(TokenLoss)) == {"dac_kl", *DIVERGENCES}


def test_a_configuration_holds_what_the_losses_take(run_yaml):
    assert load_config(run_yaml, ["loss.sft=2", "loss.clip=off"]).loss == LossConfig(sft=2.0, clip="off")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"sft": -1.0}, ["loss.sft=-1.0", "a number >= 0"]),
        ({"dac_kl": float("nan")}, ["loss.dac_kl=nan"]),
        ({"span": "x"}, ["loss.span='x'"]),
        ({"sft": True}, ["loss.sft=True"]),
        ({"temperature": 0.0}, ["loss.temperature=0.0", "a number > 0"]),
        ({"temperature": 10**400}, ["loss.temperature="]),
        ({"softness": 0}, ["loss.softness=0"]),
        ({"span_eps": 0.0}, ["loss.span_eps"]),
        ({"clip": "of"}, ["loss.clip='of'", "gate | fixed | entropy | off"]),
        ({"remainder": "x"}, ["loss.remainder='x'", "bucket | truncate | renormalize | none"]),
        ({"coverage": "x"}, ["absolute | relative"]),
        ({"gate_objective": "x"}, ["minimize | maximize | student | frozen"]),
        ({"divergence": "kl"}, ["loss.divergence='kl'", "dac_kl | forward_kl"]),
        ({"backend": "x"}, ["auto | torch | compile | triton"]),
        ({"top_k": 0}, ["loss.top_k=0", "a whole number >= 1"]),
        ({"top_k": 2.5}, ["loss.top_k=2.5"]),
        ({"chunk_tokens": 0}, ["loss.chunk_tokens=0", "auto, or a whole number >= 1"]),
        ({"chunk_tokens": "x"}, ["loss.chunk_tokens='x'"]),
        ({"lower": -0.1}, ["loss.lower=-0.1"]),
        ({"upper": 1.1}, ["loss.upper=1.1"]),
        ({"lower": 0.5, "upper": 0.5}, ["loss.lower=0.5", "less than loss.upper=0.5"]),
        ({"quantile": "mass"}, ["loss.quantile", "unknown key"]),
        ({"lower_max": 0.95}, ["loss.lower_max=0.95", "less than loss.upper_min=0.9"]),
        ({"guards": 1}, ["loss.guards=1", "true or false"]),
        ({"coverage_weight": -1}, ["loss.coverage_weight"]),
        ({"skew": 1.0}, ["loss.skew=1.0"]),
        ({"jensen_shannon_beta": 0.0}, ["loss.jensen_shannon_beta"]),
        ({"softnes": 1.0}, ["loss.softnes", "did you mean loss.softness?"]),
        ({"qqq": 1.0}, ["loss.qqq", "sft, dac_kl, span"]),
    ],
)
def test_settings_that_are_not_allowed_are_refused(change, parts):
    """From Python, whether at once or by changing a copy, in one line."""
    for build in (LossConfig, LossConfig().replace):
        with pytest.raises(ConfigError) as caught:
            build(**change)
        message = str(caught.value)
        assert "\n" not in message and all(part in message for part in parts)


def test_a_changed_copy():
    config = LossConfig(sft=0.5)
    changed = config.replace(clip="off", span=0)
    assert (changed.sft, changed.clip, changed.span, config.clip) == (0.5, "off", 0.0, "gate")


@pytest.mark.parametrize(
    ("overrides", "is_fine"),
    [
        (["loss.lower=0"], False),
        (["loss.upper=1"], True),
        (["loss.lower=0", "loss.upper=1", "loss.clip=fixed"], True),
        (["loss.lower=0", "loss.divergence=reverse_kl"], True),
    ],
)
def test_a_gate_cannot_start_at_an_open_end(run_yaml, overrides, is_fine):
    if is_fine:
        assert load_config(run_yaml, overrides).loss.lower in (0, 0.02)
        return
    with pytest.raises(ConfigError, match="command line: loss.lower=.* loss.upper=.*the gate starts there"):
        load_config(run_yaml, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "loss.clip=fixed",
            "gate_objective=student has no effect with loss.clip=fixed: there is no gate.*needs loss.clip=gate",
        ),
        ("loss.divergence=reverse_kl", "with loss.divergence=reverse_kl: there is no gate"),
        ("loss.dac_kl=0", "with loss.dac_kl=0: there is no gate"),
        ("loss.coverage_weight=20", "coverage_weight=20 has no effect with loss.gate_objective=student"),
        ("loss.coverage=relative", "coverage=relative has no effect"),
        ("loss.lower_max=0.2", None),
    ],
)
def test_what_a_gate_that_looks_ahead_cannot_use_is_refused(run_yaml, override, message):
    if message is None:
        assert load_config(run_yaml, ["loss.gate_objective=student", override]).loss.looks_ahead
        return
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(run_yaml, ["loss.gate_objective=student", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "setting"),
    [
        ("loss.clip=fixed", "loss.gate_objective=maximize"),
        ("loss.clip=entropy", "loss.guards=false"),
        ("loss.divergence=forward_kl", "loss.coverage=relative"),
        ("loss.dac_kl=0", "loss.lower_max=0.2"),
        ("loss.guards=false", "loss.upper_min=0.8"),
        ("loss.gate_objective=frozen", "loss.coverage_target=0.1"),
    ],
)
def test_settings_of_the_gate_without_effect_are_refused(run_yaml, cause, setting):
    assert load_config(run_yaml, [cause]) and load_config(run_yaml, [setting])
    with pytest.raises(ConfigError, match=f"{setting} has no effect with {cause}"):
        load_config(run_yaml, [cause, setting])


def test_old_spellings_from_python_are_accepted_with_a_line_that_names_the_new_one():
    for name, old in OLD.items():
        with pytest.warns(FutureWarning, match=f"loss.{name}={old} is now spelled {NEW[name]}") as caught:
            config = LossConfig(**{name: old})
        assert len(caught) == 1 and getattr(config, name) == NEW[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossConfig(**NEW)
    with pytest.warns(FutureWarning, match="minimize"):
        assert LossConfig(gate_objective="minimise") == LossConfig()


def test_old_spellings_in_files_and_on_the_command_line_give_the_same_run(run_yaml, tmp_path):
    """So a run of a former release resumes: its resolved.yaml equals the configuration of today."""
    new = load_config(run_yaml, [f"loss.{name}={value}" for name, value in NEW.items()])
    with pytest.warns(FutureWarning, match="renormalize"):
        assert load_config(run_yaml, [f"loss.{name}={value}" for name, value in OLD.items()]) == new
    dump_resolved(new, tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text(encoding="utf-8")
    for name, value in OLD.items():
        text = text.replace(f"{name}: {NEW[name]}", f"{name}: {value}")
    assert "renormalise" in text and "maximise" in text
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    with pytest.warns(FutureWarning, match="maximize"):
        assert load_config(tmp_path / "resolved.yaml") == new


def test_a_run_of_a_former_release_keeps_its_upper_edge_and_is_told_of_its_quantiles(run_yaml, tmp_path):
    """The default became 1, and resolved.yaml has what it was; quantiles of ranks cannot go on."""
    old = load_config(run_yaml, ["loss.upper=0.98"])
    dump_resolved(old, tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text(encoding="utf-8")
    for name, line in {"mass": "loss:\n  quantile: mass", "rank": "loss:\n  quantile: rank"}.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("loss:", line, 1), encoding="utf-8")
    with pytest.warns(FutureWarning, match="mass.yaml: loss.quantile is gone: .* the former ones") as caught:
        assert load_config(tmp_path / "mass.yaml", is_record=True) == old
    assert len(caught) == 1 and load_config(run_yaml).loss.upper == 1
    with pytest.raises(ConfigError, match="rank.yaml: loss.quantile=.rank. is gone: "):
        load_config(tmp_path / "rank.yaml", is_record=True)


def test_a_warning_is_printed_in_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", redact._format_warning)
    line = warnings.formatwarning("the message", FutureWarning, __file__, 1)
    assert "FutureWarning: the message" in line and line.count("\n") == 1
