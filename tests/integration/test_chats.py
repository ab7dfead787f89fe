"""An Instruct pair as people have it, all the way from `prepare` to plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cli.main import main
from tests.support.chats import qwen3_pair

ROOT = Path(__file__).parents[2]
CONFIG = """
run: {dir: run}
model: {teacher: {path: teacher}, student: {path: student}}
data:
  train_path: data/train.jsonl
  valid_path: data/valid.jsonl
  max_prompt_tokens: 192
  max_tokens: 256
  train_on: all
generation: {max_new_tokens: 8}
loss: {backend: torch}
optim: {lr: 1.0e-3}
train:
  max_steps: 2
  global_batch_size: 4
  micro_batch_size: 2
  eval_every: 2
  eval_rows: 2
eval: {path: data/valid.jsonl, seeds: [1], max_new_tokens: 8, batch_size: 4}
"""


def _row(number: int) -> dict[str, object]:
    """A system prompt and three turns."""
    turns = [{"role": "system", "content": "Be brief."}]
    for turn in range(3):
        turns.append({"role": "user", "content": f"The quick brown fox {number}, turn {turn}?"})
        turns.append({"role": "assistant", "content": f"The old dog sleeps {number * turn}."})
    return {"messages": turns}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "settings.json").write_text(json.dumps(qwen3_pair(folder)), encoding="utf-8")
    lines = "".join(json.dumps(_row(number)) + "\n" for number in range(14))
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def test_an_instruct_pair_goes_all_the_way(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    limits = ["--max-prompt-tokens", "192", "--max-tokens", "256"]
    assert main(["prepare", "rows.jsonl", "data", "--tokenizer", "student", "--valid", "4", *limits]) == 0
    assert "14 chats (messages); template chat" in capsys.readouterr().out
    sft = ["run.dir=sft", "loss.dac_kl=0", "loss.span=0", "generation.mode=dataset", "model.teacher.path=null"]
    assert main(["train", "--config", "config.yaml", *sft]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / "launchers" / "run.sh"), "--config", "config.yaml", "model.student.path=sft"]
    done = subprocess.run(
        [*command, "parallel.tp_size=2"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Three turns of the assistant in each of four rows are references, each with its end token.
    assert all(record["num_sft_tokens"] > 12 for record in metrics) and "eval/nll" in metrics[-1]
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples[0]["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert main(["evaluate", "--config", "run/resolved.yaml", "parallel.tp_size=auto", "--model", "run"]) == 0
    assert main(["export", "run", "exported"]) == 0
    _check_files(work)
    capsys.readouterr()
    prompts = ["--input", "data/valid.jsonl", "--temperature", "0", "--max-new-tokens", "24"]
    assert main(["generate", "--model", "run", *prompts, "--output", "answers.jsonl"]) == 0
    assert "--template chat" in capsys.readouterr().err
    _check_text(work)


def _check_files(work: Path) -> None:
    """What came in with the student went out with it."""
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        before, after = ((work / folder / name).read_text(encoding="utf-8") for folder in ("student", "exported"))
        if name == "generation_config.json":
            assert (
                json.loads(after)
                == json.loads(before)
                == json.loads((work / "settings.json").read_text(encoding="utf-8"))
            )
        else:
            assert after == before, name
    before, after = (
        json.loads((work / folder / "config.json").read_text(encoding="utf-8")) for folder in ("student", "exported")
    )
    for name in ("eos_token_id", "tie_word_embeddings", "vocab_size"):
        assert after[name] == before[name], name


def _check_text(work: Path) -> None:
    """Plain transformers writes the same greedy text, and stops where megadistill does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "exported")
    model = AutoModelForCausalLM.from_pretrained(work / "exported")
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    given = [json.loads(line) for line in (work / "data" / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 4
    for answer, row in zip(answers, given, strict=True):
        ids = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(ids["input_ids"][0]) == answer["prompt"]
        assert tokenizer.decode(written, skip_special_tokens=True) == answer["response"]
