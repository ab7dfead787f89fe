"""Prompts, token ids and limits, for the tokenizer kinds of causal models."""

import pytest

from megadistill.data.dataset import Example
from megadistill.data.encode import tokenize_examples
from megadistill.data.prompts import PromptSettings, render_prompt
from megadistill.data.tokenize import (
    decode_responses,
    encode_responses,
    leading_special_ids,
    load_tokenizer,
)
from megadistill.errors import ConfigError, DataError
from tests.support.tokenizers import byte_level, edited, sentence_piece

KINDS = ("byte_level", "byte_level_bos", "sentence_piece")
TEXTS = [
    "The dog sleeps in the house.",
    "didn't know\n\n- one\n- two",
    "café 北京 🙂 zzq",
    "x",
    "Two  spaces and a trailing one ",
    "</s> <s> <|endoftext|> are plain words here",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level(root / "byte_level")
    byte_level(root / "byte_level_bos", bos=True)
    sentence_piece(root / "sentence_piece")
    return root


@pytest.fixture(params=KINDS)
def tokenizer(request, folders):
    return load_tokenizer(folders / request.param)


def example(instruction="Add.", text="", references=("3",), row=0, where=""):
    return Example(row, instruction, text, tuple(references), where)


def test_the_alpaca_template_is_minillms_word_for_word():
    assert render_prompt(example("Say {hi}.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}.\n\n### Response:\n"
    )
    assert render_prompt(example("Add.", "{1} 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n{1} 2\n\n### Response:\n"
    )
    assert render_prompt(example("Add.", "1 2"), "plain") == "Add.\n1 2\n"
    assert render_prompt(example("Add."), "plain") == "Add.\n"
    with pytest.raises(ConfigError, match=r"'alpacca'; allowed: alpaca, plain; did you mean alpaca\?"):
        render_prompt(example(), "alpacca")


def test_leading_special_ids(folders):
    found = {kind: leading_special_ids(load_tokenizer(folders / kind)) for kind in KINDS}
    assert found["byte_level"] == ()
    assert found["byte_level_bos"] == (load_tokenizer(folders / "byte_level_bos").bos_token_id,)
    assert found["sentence_piece"] == (load_tokenizer(folders / "sentence_piece").bos_token_id,)


def test_prompt_and_response_join_to_the_text(tokenizer):
    examples = [example(text, references=(text,), row=row) for row, text in enumerate(TEXTS)]
    rows = tokenize_examples(examples, tokenizer, PromptSettings(max_prompt_tokens=600, max_tokens=900)).rows
    specials = set(tokenizer.all_special_ids)
    for row, text in zip(rows, TEXTS, strict=True):
        prompt, response = list(row.prompt_ids), list(row.response_ids)
        lead = list(leading_special_ids(tokenizer))
        assert prompt[: len(lead)] == lead and not specials & set(prompt[len(lead) :])
        assert response[-1] == tokenizer.eos_token_id and not specials & set(response[:-1])
        assert tokenizer.decode(prompt + response, skip_special_tokens=True) == row.prompt + text
        assert tokenizer.decode(response, skip_special_tokens=True) == text
        assert decode_responses(tokenizer, [response]) == [text]


def test_a_response_has_the_ids_that_it_has_after_its_prompt(tokenizer):
    """The joined text as the tokenizer splits it, wherever it splits at the boundary."""
    prompt = "### Response:\n"
    for text in ("The dog sleeps.", "didn't know", "café"):
        joined = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        response = encode_responses(tokenizer, [text])[0]
        assert joined[len(joined) - len(response) :] == response
    assert encode_responses(tokenizer, []) == []


def test_text_that_merges_with_the_line_break_before_it_stays_exact(tokenizer):
    for text in ("\n\nlate start", " indented", "\tx", ""):
        ids = encode_responses(tokenizer, [text])[0]
        assert decode_responses(tokenizer, [ids])[0].strip() == text.strip()


def test_rows_without_references(tokenizer):
    done = tokenize_examples([example(references=()), example(references=("a", "b"))], tokenizer)
    assert [row.response_ids is None for row in done.rows] == [True, False]
    assert done.num_without_reference == 1
    assert done.rows[1].references == ("a", "b")
    assert list(done.rows[1].response_ids[:-1]) == encode_responses(tokenizer, ["a"])[0]


def test_long_prompts_are_dropped_truncated_or_refused(tokenizer):
    examples = [example("dog " * 300, row=0, where="rows.jsonl:7"), example("dog", row=1)]
    limit = len(tokenize_examples(examples[1:], tokenizer, PromptSettings("plain")).rows[0].prompt_ids) + 5
    settings = {"template": "plain", "max_prompt_tokens": limit, "max_tokens": limit + 20}
    dropped = tokenize_examples(examples, tokenizer, PromptSettings(long_prompt="drop", **settings))
    assert ([row.id for row in dropped.rows], dropped.num_dropped, dropped.num_truncated) == ([1], 1, 0)
    short = tokenize_examples(examples, tokenizer, PromptSettings(long_prompt="truncate", **settings))
    assert (short.num_dropped, short.num_truncated) == (0, 1)
    whole = tokenize_examples(
        examples[:1], tokenizer, PromptSettings("plain", max_prompt_tokens=4000, max_tokens=5000)
    ).rows[0]
    lead = leading_special_ids(tokenizer)
    assert len(short.rows[0].prompt_ids) == limit
    assert short.rows[0].prompt_ids == lead + whole.prompt_ids[len(whole.prompt_ids) - (limit - len(lead)) :]
    ended = tokenize_examples(examples, tokenizer, PromptSettings(long_prompt="truncate_end", **settings))
    assert (ended.num_dropped, ended.num_truncated) == (0, 1)
    assert ended.rows[0].prompt_ids == whole.prompt_ids[:limit] and whole.prompt.startswith(ended.rows[0].prompt)
    assert ended.rows[0].response_ids == whole.response_ids
    with pytest.raises(
        DataError, match=rf"rows\.jsonl:7 .*the prompt has {len(whole.prompt_ids)} tokens, over"
    ) as error:
        tokenize_examples(examples, tokenizer, PromptSettings(long_prompt="error", **settings))
    assert f"the limit of {limit}" in str(error.value)
    assert error.value.setting == "data.max_prompt_tokens, data.long_prompt"
    with pytest.raises(DataError, match="all 1 prompts are over"):
        tokenize_examples(examples[:1], tokenizer, PromptSettings(long_prompt="drop", **settings))


def test_a_prompt_of_exactly_the_limit_stays(tokenizer):
    size = len(tokenize_examples([example()], tokenizer).rows[0].prompt_ids)
    assert (
        tokenize_examples(
            [example()], tokenizer, PromptSettings(max_prompt_tokens=size, max_tokens=size + 1)
        ).num_dropped
        == 0
    )
    with pytest.raises(DataError):
        tokenize_examples([example()], tokenizer, PromptSettings(max_prompt_tokens=size - 1, max_tokens=size + 1))


def test_long_responses_are_cut_and_lose_their_eos(tokenizer):
    examples = [example(references=("dog " * 50,))]
    whole = tokenize_examples(examples, tokenizer).rows[0]
    limit, fits = len(whole.prompt_ids), len(whole.prompt_ids) + len(whole.response_ids)
    exact = tokenize_examples(examples, tokenizer, PromptSettings(max_prompt_tokens=limit, max_tokens=fits))
    assert exact.num_truncated_responses == 0 and exact.rows == [whole]
    short = tokenize_examples(examples, tokenizer, PromptSettings(max_prompt_tokens=limit, max_tokens=fits - 1))
    assert short.num_truncated_responses == 1
    assert short.rows[0].response_ids == whole.response_ids[:-1]
    assert tokenizer.eos_token_id not in short.rows[0].response_ids
    assert short.rows[0].references == whole.references


def test_bad_limits_and_policies(tokenizer):
    with pytest.raises(ConfigError, match="'shorten'.*allowed: drop, truncate, truncate_end, error"):
        tokenize_examples([example()], tokenizer, PromptSettings(long_prompt="shorten"))
    with pytest.raises(ConfigError, match="leave no token for a response"):
        tokenize_examples([example()], tokenizer, PromptSettings(max_prompt_tokens=256, max_tokens=256))
    assert tokenize_examples([], tokenizer).rows == []


def test_padding_falls_back_to_eos(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_tokenizers_that_cannot_be_used(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no such file or folder: .*byte_levle; did you mean .*byte_level\?"):
        load_tokenizer(folders / "byte_levle")
    with pytest.raises(ConfigError, match="no-such-owner/no-such-model, and the hub cannot be reached"):
        load_tokenizer("no-such-owner/no-such-model")
    with pytest.raises(ConfigError, match="has no usable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    without_eos = edited(folders / "byte_level", tmp_path / "no_eos", eos_token=None)
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(without_eos)
