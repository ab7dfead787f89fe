"""A run of models with several end tokens: who stops where, and what the export says (cases 01 and 02)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import losses, run_layout, samples

TURN = "<|im_end|>"


class Pair:
    """A student and a teacher with one vocabulary and different end tokens, and what the student writes freely."""

    def __init__(self, folder: Path) -> None:
        from megadistill.data.tokenize import load_tokenizer
        from tests.support.tokenizers import byte_level

        byte_level(folder / "bare")
        tokenizer = load_tokenizer(folder / "bare")
        tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
        self.folder, self.tokenizer, self.turn = folder, tokenizer, tokenizer.convert_tokens_to_ids(TURN)
        rows = folder / "rows.jsonl"
        rows.write_text(json.dumps({"instruction": "Name a river.", "output": "Seine."}) + "\n", encoding="utf-8")
        self.free = {name: self._make(name, seed) for name, seed in (("teacher", 2), ("student", 1))}
        # The first token that is another one than the first; and one after it.
        self.second = {name: next(token for token in free if token != free[0]) for name, free in self.free.items()}
        known = (self.free["student"][0], self.second["student"])
        self.third = next(token for token in self.free["student"] if token not in known)

    def _make(self, name: str, seed: int) -> list[int]:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
            eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)
        ids = self.tokenizer("Name a river.\n", return_tensors="pt")["input_ids"]
        free = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        return list(free[0, ids.shape[1] :].tolist())

    def set_ends(self, name: str, content: dict[str, Any]) -> None:
        file = self.folder / name / "generation_config.json"
        file.write_text(json.dumps(content), encoding="utf-8")

    def settings(self, *more: str) -> list[str]:
        return [
            f"model.teacher.path={self.folder / 'teacher'}", f"model.student.path={self.folder / 'student'}",
            f"data.train_path={self.folder / 'rows.jsonl'}", "data.template=plain", "data.max_prompt_tokens=32",
            "data.max_tokens=48", "generation.max_new_tokens=12", "generation.sampling_temperature=0",
            "generation.scrg.enabled=false", "loss.backend=torch", "train.max_steps=1", "train.global_batch_size=1",
            "train.micro_batch_size=1", "train.samples_every=1", "optim.lr=1e-9", *more,
        ]  # fmt: skip


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Runs with the files' end tokens (validated), with those that a setting names, and of the teacher's text."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    for name, id_ in pair.second.items():
        pair.set_ends(name, {**SAMPLING, "eos_token_id": [id_, pair.turn]})
    answer = pair.tokenizer.decode(until(pair, "student", pair.second["student"]))
    rows = pair.folder / "valid.jsonl"
    rows.write_text(json.dumps({"instruction": "Name a river.", "output": answer}) + "\n", encoding="utf-8")
    run_layout(
        1,
        [
            (str(pair.folder / "run"), pair.settings("train.eval_every=1", f"data.valid_path={rows}")),
            (str(pair.folder / "asked"), pair.settings(f"model.eos_tokens=[{pair.third}]")),
            (str(pair.folder / "text"), pair.settings("generation.mode=teacher")),
        ],
    )
    return pair


def until(pair: Pair, name: str, end: int) -> list[int]:
    return pair.free[name][: pair.free[name].index(end)]


def test_the_student_stops_at_its_own_list(pair: Pair) -> None:
    (sample,) = samples(pair.folder / "run")
    written = until(pair, "student", pair.second["student"])
    assert sample["student"] == pair.tokenizer.decode(written) and written != pair.free["student"]
    assert losses(pair.folder / "run", "num_tokens") == [len(written) + 1]
    # The validation's reference is what is written up to there.
    assert losses(pair.folder / "run", "eval/exact_match") == [100.0]


def test_a_setting_replaces_the_lists(pair: Pair) -> None:
    (sample,) = samples(pair.folder / "asked")
    assert sample["student"] == pair.tokenizer.decode(until(pair, "student", pair.third))


def test_the_teachers_text_stops_at_the_teachers_list(pair: Pair) -> None:
    first, line = (pair.folder / "text" / "teacher_text.jsonl").read_text(encoding="utf-8").splitlines()
    end = pair.second["teacher"]
    assert json.loads(first)["eos_ids"] == sorted([0, end, pair.turn])
    assert json.loads(line)["response"] == [*until(pair, "teacher", end), end]


def test_an_export_keeps_what_the_student_brought(pair: Pair) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megadistill.checkpoint.hf_export import export_checkpoint

    export_checkpoint(pair.folder / "run", pair.folder / "exported")
    student = pair.folder / "student"
    for folder in (pair.folder / "run" / "checkpoints" / "step_1" / "hf", pair.folder / "exported"):
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert found == {**SAMPLING, "eos_token_id": [pair.second["student"], pair.turn, 0], "pad_token_id": 0}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (student / name).read_bytes()
    # Plain transformers stops where this project does.
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(pair.folder / "exported")
    ids = tokenizer("Name a river.\n", return_tensors="pt")["input_ids"]
    text = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert text[:-1] == until(pair, "student", pair.second["student"])


def test_an_export_of_other_end_tokens_names_them_too(pair: Pair) -> None:
    hf = pair.folder / "asked" / "checkpoints" / "step_1" / "hf"
    ends = json.loads((hf / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert ends == [pair.second["student"], pair.turn, *sorted([0, pair.third])]
