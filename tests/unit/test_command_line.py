"""The command line itself: its version, its output streams in every locale, and what an error line may hold."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill import __version__
from megadistill.cli.main import main
from megadistill.observability.log import _BesideBars, get_logger, printable

ROOT = Path(__file__).resolve().parents[2]
# An ASCII locale in which Python does not put UTF-8 in the place of the locale's encoding.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_ROWS = """
import sys
from megadistill.cli import main, resumable

def run(arguments):
    resumable.StandardOutput(sys.stdout).write(['{"text": "Gr\\u00f6\\u00dfe \\u4f60 \\ud83d"}'])
    raise main.MegadistillError("\\u4f60 \\x1b[31m \\ud83d")

sys.modules["megadistill.cli.generate"] = sys.modules["__main__"]
sys.exit(main.main(["generate"]))
"""


def _piped(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | variables
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, timeout=120)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"megadistill {__version__}\n"


@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_verb_alone_says_what_it_needs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2 and "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megadistill", *arguments],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_rows_and_messages_are_utf_8_in_every_locale() -> None:
    done = _piped("-c", _ROWS, **ASCII)
    assert done.returncode == 2
    # A lone surrogate is an escape, which JSON reads as what it was.
    assert done.stdout.decode("utf-8") == '{"text": "Größe 你 \\ud83d"}\n'
    assert done.stderr.decode("utf-8") == "megadistill: 你 \\x1b[31m \\ud83d\n"


def test_a_file_name_is_shown_as_it_is_in_an_ascii_locale() -> None:
    done = _piped("-m", "megadistill", "train", "--config", "größe你.yaml", **ASCII)
    assert done.stderr.decode("utf-8") == "megadistill: größe你.yaml: no such file\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc é 你 🙂", "a\tb\nc é 你 🙂"),
        ("\x1b[2Jgone\r\x00\x7f\x9b", "\\x1b[2Jgone\\r\\x00\\x7f\\x9b"),
        ("\u202egpj.exe\u202c", "\\u202egpj.exe\\u202c"),
        (os.fsdecode("größe".encode()), "größe"),
        (b"gr\xf6".decode("utf-8", "surrogateescape"), "gr\\udcf6"),
        ("\ud83d", "\\ud83d"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_control_characters_of_an_argument_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "x\x1b]0;owned\x07.yaml"]) == 2
    assert "x\\x1b]0;owned\\x07.yaml: no such file" in capsys.readouterr().err
    assert main(["tra\x1b[31min"]) == 2
    assert "unknown verb 'tra\\x1b[31min'" in capsys.readouterr().err


def test_control_characters_do_not_reach_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    # Not through the logger: pytest may capture it, and pytest-xdist cannot send a lone surrogate.
    record = logging.LogRecord("megadistill.train", logging.INFO, __file__, 1, "row \x1b[31m 你 \ud83d", None, None)
    next(handler for handler in get_logger().handlers if isinstance(handler, _BesideBars)).handle(record)
    assert capsys.readouterr().out.endswith("train: row \\x1b[31m 你 \\ud83d\n")
