"""A look by hand: conversations from a pipe and at a terminal, and answers of several models side by side."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist

from megadistill.cli.main import main
from megadistill.evaluation.conversation import text_pieces
from megadistill.evaluation.side_by_side import Compared, as_markdown, as_text, wrapped
from tests.integration.test_terminal import Terminal
from tests.support.chats import chat_tokenizer
from tests.support.model_folders import llama_folder
from tests.support.runs import free_port
from tests.support.spawn import run_ranks

FEW = ["--max-new-tokens", "12", "--temperature", "0.7"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/a, FOLDER/b (ChatML), and FOLDER/plain without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "plain")):
        llama_folder(folder / name, seed=seed, max_position_embeddings=300)
        if name != "plain":
            chat_tokenizer(folder / name, "chatml")
    return folder


def _type(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def _generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["generate", *arguments, *FEW]) == 0
    return [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]


def test_turns_are_answered_as_generate_answers_the_same_chats(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row i of generate has the random numbers of turn i. The last turn is after /reset."""
    model, turns = str(models / "a"), ["Hello.", "More,\nplease.", "Again."]
    _type(monkeypatch, "Hello.\n\nMore,\\\nplease.\n/reset\nAgain.")
    assert main(["chat", model, "--system", "Be brief.", *FEW]) == 0
    printed = capsys.readouterr()
    assert "template chat, at most 300 tokens" in printed.err and "are forgotten" in printed.err
    answers: list[str] = []
    messages: list[dict[str, str]] = []
    system = {"role": "system", "content": "Be brief."}
    for number, turn in enumerate(turns):
        messages = [*(messages if number < 2 else []), {"role": "user", "content": turn}]
        rows = json.dumps([[system, *messages]] * (number + 1))
        answers.append(_generated(capsys, "--model", model, "--messages", rows)[number])
        messages.append({"role": "assistant", "content": answers[-1]})
    assert printed.out == "".join(answer + "\n" for answer in answers)
    assert len(set(answers)) == 3


def test_text_templates_stand_alone_and_mistakes_are_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = str(models / "plain")
    rows = _generated(capsys, "--model", plain, "--prompt", "Hi.", "--prompt", "Hi.")
    _type(monkeypatch, "Hi.\nHi.\n/quit\nnever read\n")
    assert main(["chat", plain, *FEW]) == 0
    assert capsys.readouterr().out == "".join(row + "\n" for row in rows)
    for arguments, text, words in (
        ([str(models / "a")], "/rest\n", "unknown command /rest; allowed: /reset, /quit, /help; did you mean /reset?"),
        ([str(models / "a")], "no <|im_end|>\n", "this turn: a turn of the user holds the control token"),
        (
            [str(models / "a")],
            "long " * 300,
            "all 1 prompts are over the limit of 288 tokens: no row is left (see --m",
        ),
        ([plain, "--system", "x"], "", "the template alpaca has no place for a system prompt"),
        ([plain, "--template", "chat"], "", "has no chat template; name a file with one"),
        ([plain, "--max-tokens", "9"], "", "--max-new-tokens 12 leaves no token of --max-tokens 9"),
        ([plain, "--max-tokens", "999"], "", "--max-tokens=999, but MODEL"),
        ([str(models / "none")], "", "none"),
    ):
        _type(monkeypatch, text)
        assert main(["chat", *arguments, *FEW]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert words in line


def test_old_turns_leave_where_there_is_no_place(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(models / "a")
    _type(monkeypatch, "one two three four\n" + "five six seven\n")
    assert main(["chat", model, *FEW, "--max-tokens", "50"]) == 0
    printed = capsys.readouterr()
    assert "the model did not read the oldest turns" in printed.err
    rows = json.dumps([[{"role": "user", "content": "five six seven"}]] * 2)
    assert printed.out.splitlines()[-1] == _generated(capsys, "--model", model, "--messages", rows)[1].splitlines()[-1]


def test_characters_of_several_tokens_come_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: object) -> str:
            return bytes(ids).decode("utf-8", "replace")

    tokenizer, tokens = Bytes(), [*"aé北".encode(), 10]
    pieces = list(text_pieces([*tokens, 0, 65], frozenset({0}), tokenizer))  # type: ignore[arg-type]
    assert pieces == ["a", "é", "北", "\n"]
    assert list(text_pieces(tokens[:2], frozenset(), tokenizer)) == ["a", "\N{REPLACEMENT CHARACTER}"]  # type: ignore[arg-type]


def test_at_a_terminal(models: Path) -> None:
    """Prompts, commands, Ctrl-C at the prompt and in an answer, and Ctrl-D."""
    command = [sys.executable, "-m", "megadistill", "chat", str(models / "a"), "--max-new-tokens", "150"]
    terminal = Terminal(command)
    try:
        assert terminal.wait(lambda: terminal.text.count(b"> ") == 1)
        terminal.type(b"/help\n")
        assert terminal.wait(lambda: b"forget the turns" in terminal.text, 20)
        terminal.type(b"\x03")
        assert terminal.wait(lambda: b"/quit or Ctrl-D ends" in terminal.text, 20)
        terminal.type(b"no <|im_end|>\n")
        assert terminal.wait(lambda: b"holds the control token" in terminal.text, 20)
        seen = terminal.text.count(b"> ")
        terminal.type(b"Hello.\n")
        terminal.wait(lambda: terminal.text.count(b"Hello.") == 1 and len(terminal.text.split(b"Hello.")[1]) > 10, 20)
        terminal.type(b"\x03")
        assert terminal.wait(lambda: terminal.text.count(b"> ") > seen, 20)
        terminal.type(b"\x04")
        pid = terminal.leader.pid
        ended = {}

        def is_over() -> bool:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended["code"] = os.waitstatus_to_exitcode(status)
            return bool(done)

        assert terminal.wait(is_over, 30) and ended == {"code": 0}
        assert b"Traceback" not in terminal.text
    finally:
        terminal.close()
        if terminal.leader.is_running():
            terminal.leader.send_signal(signal.SIGKILL)


def _compare(rank: int, arguments: list[str], port: str) -> str:
    """What a rank prints."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    # The group is that of run_ranks, which takes it down.
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda *_, **__: None
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(arguments) == 0
    dist.destroy_process_group = destroy
    return printed.getvalue()


LIMITS = ["--max-prompt-tokens", "150", "--max-new-tokens", "6"]


def test_answers_side_by_side(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(models / "a"), f"again={models / 'a'}", str(models / "b")]
    rows = tmp_path / "rows.jsonl"
    row = {"id": "r1", "instruction": "Name a river.", "input": "In France.", "output": "The Loire.", "tag": 3}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    output = tmp_path / "new" / "answers.jsonl"
    compare = ["compare", *names, "--input", str(rows), *LIMITS]
    assert main([*compare, "--output", str(output)]) == 0
    assert "0 of 1 answers are the same; written to" in capsys.readouterr().out
    (written,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert written.items() >= row.items() and list(written["responses"]) == ["a", "again", "b"]
    assert written["responses"]["a"] == written["responses"]["again"] != written["responses"]["b"]
    assert main(["generate", "--model", names[2], "--input", str(rows), *LIMITS, "--temperature", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["response"] == written["responses"]["b"]
    assert main([*compare]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[r1] Name a river.\n\nIn France.\n") and "The Loire." in printed
    before = output.read_bytes()
    for arguments, words in (
        ([*compare, "--output", str(output)], "exists already; --overwrite replaces it"),
        ([*compare, "--output", str(tmp_path / "x.csv")], "the name must end in .txt, .md, .jsonl"),
        (["compare", names[0], "--prompt", "x"], "two models or more are compared"),
        (["compare", names[0], names[0], "--prompt", "x"], "two arguments have the name 'a'"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert output.read_bytes() == before


def test_ranks_compare_as_one_process_does(models: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        both = [str(models / "a"), str(models / "b")]
        return ["compare", *both, "--prompt", "x", "--prompt", "y", "--output", str(tmp_path / name), *LIMITS]

    assert main(arguments("one.md")) == 0
    printed = run_ranks(_compare, 2, arguments("two.md"), free_port())
    assert [bool(text) for text in printed] == [True, False]  # rank 0 alone prints and writes
    one, two = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one.md", "two.md"))
    assert one == two and one.startswith("|  | prompt | a | b |\n| --- | --- | --- | --- |\n| 0 | x |")


def test_tables_fit_the_terminal() -> None:
    row = Compared(
        1, "Q " * 40, {"a": "word " * 30 + "x" * 90, "b": "北京欢迎你" * 20, "c": None}, ["*ref* | <b>\n\x1b[1m"]
    )
    for width in (40, 100, 130, 200):
        lines = as_text([row], width).splitlines()
        assert all(len(line) + sum(c in "北京欢迎你" for c in line) <= width for line in lines)
        assert "".join(lines).count("北") == 20 and lines[-1] == "0 of 1 answers are the same"
        assert ("a:" in lines) == (width < 4 * 24 + 9) and "\x1b" not in "".join(lines)
    assert wrapped("", 5) == [""] and wrapped("a\n\nb", 5) == ["a", "", "b"] and wrapped("ab cd", 2) == ["ab", "cd"]
    table = as_markdown([row])
    assert r"\*ref\* \| &lt;b&gt;<br>" in table and all(line.count(" | ") == 5 for line in table.splitlines()[:3])
