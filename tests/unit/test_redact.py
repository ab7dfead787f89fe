"""What looks secret in the environment or in a URL is in nothing that the program prints or writes about itself."""

from __future__ import annotations

import io
import logging
import os
import warnings
from pathlib import Path

import pytest

from megadistill.cli.main import main
from megadistill.observability import get_logger
from megadistill.observability.redact import holds_url_credentials, keep_secrets, redact

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_something_secret"
PASSWORD = "pass-of-the-proxy"


@pytest.mark.parametrize("name", ["HF_TOKEN", "wandb_api_key", "AWS_SECRET", "DB_PASSWORD", "X_PASSWD", "CREDENTIALS"])
def test_values_of_secret_names_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"a {SECRET}, b{SECRET}c") == "a ***, b***c"


def test_other_values_and_short_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("MASTER_KEY", "train")
    assert redact("falsehood in train.jsonl") == "falsehood in train.jsonl"


def test_every_spelling_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "first line/of it\nsecond + line")
    monkeypatch.setenv("B_TOKEN", "second + line and more")
    for text in ("first line/of it", "x second + line x", repr(os.environ["A_KEY"]), "u?t=first%20line%2Fof%20it"):
        assert "first" not in redact(text) and "second" not in redact(text)
    assert redact("second + line and more") == "***", "the longer secret goes first"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a", "https://***@host/a"),
        ("('https://ghp_x@host:80/a@b', 'http://host/c')", "('https://***@host:80/a@b', 'http://host/c')"),
        ("s3://me:p/w@host, then ftp://you:p@w@host/x", "s3://***@host, then ftp://***@host/x"),
    ],
)
def test_users_and_passwords_of_urls_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown and holds_url_credentials(text)


@pytest.mark.parametrize("text", ["https://host:8080/a b@c", "me@host", "hub/name@main", "http://host/a@b"])
def test_urls_without_them_stay(text: str) -> None:
    assert redact(text) == text and not holds_url_credentials(text)


def test_log_lines_and_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    get_logger().info("the token is %s", SECRET)
    assert main([SECRET]) == 2
    assert main(["export", f"./{SECRET}", "out"]) == 2
    out, err = capsys.readouterr()
    assert "the token is ***" in out and "unknown verb '***'" in err and "no such checkpoint: ***" in err
    assert SECRET not in out + err


def test_log_records_and_warnings_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        keep_secrets()
        stream = io.StringIO()
        logger = logging.getLogger("some.library")
        logger.addHandler(handler := logging.StreamHandler(stream))
        logger.warning("cannot reach %s: %d %%", f"http://me:{PASSWORD}@host", 5)
        try:
            raise RuntimeError(SECRET)
        except RuntimeError:
            logger.exception("failed")
        logger.removeHandler(handler)
        assert stream.getvalue().startswith("cannot reach http://***@host: 5 %\nfailed\nTraceback")
        assert "RuntimeError: ***" in stream.getvalue()
        assert "UserWarning: ***" in warnings.formatwarning(SECRET, UserWarning, "file.py", 1)
    finally:
        logging.setLogRecordFactory(before)


def test_a_setting_with_a_password_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"run.dir={tmp_path / 'run'}", "model.teacher.path=./t", "model.student.path=./s"]
    setting = f"data.train_path=https://me:{PASSWORD}@host/train.jsonl"
    assert main(["train", "--config", str(ROOT / "configs" / "base.yaml"), *paths, setting]) == 2
    out, err = capsys.readouterr()
    assert "data.train_path is a URL with a user or password" in err and PASSWORD not in out + err
    assert not (tmp_path / "run").exists()
