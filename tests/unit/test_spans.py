"""Span priors, and the way from character spans to tokens for canonical and arbitrary ids."""

import random
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.spans import (
    SPAN_PRIORS,
    PunctuationPrior,
    SpacyPrior,
    WindowPrior,
    make_span_prior,
    pair_mask_from_span_ids,
    token_span_ids,
)
from megadistill.data.surface import token_char_starts
from megadistill.data.tokenize import decode_responses, encode_responses, load_tokenizer
from megadistill.errors import ConfigError
from tests.support.tokenizers import byte_level, sentence_piece, word_piece
from tools import show_spans

KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "word_piece": word_piece}
SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, make in KINDS.items():
        make(root / kind)
    return {kind: load_tokenizer(root / kind) for kind in KINDS}


@pytest.fixture(params=["byte_level", "sentence_piece"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def phrases(name, text, **options):
    return [text[start:end] for start, end in make_span_prior(name, **options).spans(text)]


def test_phrases_of_a_sentence():
    assert phrases("phrases", "The quick brown fox sat on the mat.") == ["The quick brown fox", "sat", "on the mat"]
    found = phrases("phrases", "She has been told a long story in Paris because of the rain.")
    assert found == ["She", "has been told", "a long story", "in Paris", "because of the rain"]


def test_prepositions_have_their_noun_phrases():
    found = phrases("phrases", "The fox sat on the mat in the old house and looked up.")
    assert found == ["The fox", "sat", "on the mat", "in the old house", "looked", "up"]
    # A noun phrase before the preposition is none of its phrase, and an infinitive's "to" has none.
    assert phrases("phrases", "I want to go to Paris with my dog") == [
        "I", "want", "to", "go", "to Paris", "with my dog",
    ]  # fmt: skip


def test_verbs_may_have_their_objects():
    text = "She has been eating three red apples with a silver spoon. It sat on the mat."
    assert phrases("phrases", text, verb_objects=True) == [
        "She", "has been eating three red apples", "with a silver spoon", "It", "sat", "on the mat",
    ]  # fmt: skip
    assert phrases("phrases", text)[1:3] == ["has been eating", "three red apples"]


def test_phrases_stop_at_punctuation_sentences_and_lines():
    assert phrases("phrases", "red apples, green pears") == ["red apples", "green pears"]
    assert phrases("phrases", "He eats apples. Pears are green") == ["He", "eats", "apples", "Pears", "are"]
    assert phrases("phrases", "old apples\nold pears") == ["old apples", "old pears"]
    assert phrases("phrases", "- old apples\r\n\r\n- old pears\n") == ["old apples", "old pears"]


def test_phrases_keep_words_with_inner_punctuation_whole():
    for word in ("state-of-the-art", "U.S.A.", "3,000.5", "naïve", "https://a.org/b?c=d"):
        text = f"We saw the {word} house"
        spans = make_span_prior("phrases").spans(text)
        at = text.index(word)
        assert any(start <= at and at + len(word) <= end for start, end in spans), (word, spans)
    assert "can't see" in phrases("phrases", "They can't see it")
    assert "can’t see" in phrases("phrases", "They can’t see it")


def test_function_words_open_chunks_in_any_language():
    assert phrases("punctuation", "Der Hund schläft in dem Haus, und die Katze auch.") == [
        "Der Hund schläft",
        "in dem Haus",
        "und die Katze auch",
    ]
    assert phrases("punctuation", "कुत्ता घर में सोता है। बिल्ली") == ["कुत्ता घर में सोता है", "बिल्ली"]
    assert phrases("punctuation", "他喜欢狗，我喜欢猫。") == ["他喜欢狗", "我喜欢猫"]
    assert phrases("punctuation", "one two\nthree") == ["one two", "three"]


def test_windows():
    assert phrases("window", "a b c d e f", window=4) == ["a b c d", "e f"]
    assert phrases("window", "他喜欢狗", window=2) == ["他喜", "欢狗"]
    with pytest.raises(ConfigError, match="window of 0 words"):
        make_span_prior("window", 0)


def test_names():
    for name in SPAN_PRIORS:
        if name != "spacy":
            assert make_span_prior(name).spans("") == []
    assert make_span_prior("none").spans(SENTENCE) == []
    with pytest.raises(ConfigError, match=r"'phrase'; allowed: phrases, spacy.*did you mean phrases\?") as error:
        make_span_prior("phrase")
    assert error.value.setting == "data.span_prior"


def test_spacy_absent_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"spacy is not installed.*pip install 'megadistill\[spacy\]'"):
        make_span_prior("spacy")
    missing = types.ModuleType("spacy")
    missing.load = lambda name, exclude: (_ for _ in ()).throw(OSError("[E050] Can't find model"))
    monkeypatch.setitem(sys.modules, "spacy", missing)
    with pytest.raises(ConfigError, match="'en_core_web_sm' is not installed.*python -m spacy download en_core_web_sm"):
        make_span_prior("spacy")


class FakeToken:
    def __init__(self, i, idx, text, pos_):
        self.i, self.idx, self.text, self.pos_ = i, idx, text, pos_

    def __len__(self):
        return len(self.text)


class FakeChunk(list):
    start_char = property(lambda self: self[0].idx)
    end_char = property(lambda self: self[-1].idx + len(self[-1]))


def test_spacy_documents_become_noun_verb_and_prepositional_spans():
    text, tokens, at = "The dog has slept in the house", [], 0
    for i, (word, pos) in enumerate(
        zip(text.split(), ["DET", "NOUN", "AUX", "VERB", "ADP", "DET", "NOUN"], strict=True)
    ):
        tokens.append(FakeToken(i, at, word, pos))
        at += len(word) + 1

    class Document(list):
        noun_chunks = [FakeChunk(tokens[0:2]), FakeChunk(tokens[5:7])]

    spans = SpacyPrior(lambda _: Document(tokens)).spans(text)
    assert [text[start:end] for start, end in spans] == ["The dog", "has slept", "in the house"]


def test_spacys_verbs_may_have_their_objects():
    text = "dogs eat big bones cats eat"
    tokens = [
        FakeToken(i, text.index(word) if i < 5 else text.rindex(word), word, pos)
        for i, (word, pos) in enumerate(zip(text.split(), ["NOUN", "VERB", "ADJ", "NOUN", "NOUN", "VERB"], strict=True))
    ]

    class Document(list):
        noun_chunks = []

    document = Document(tokens)
    document.noun_chunks = [FakeChunk(tokens[0:1]), FakeChunk(tokens[2:4]), FakeChunk(tokens[4:5])]
    for verb_objects, expected in [
        (False, ["dogs", "eat", "big bones", "cats", "eat"]),
        (True, ["dogs", "eat big bones", "cats", "eat"]),
    ]:
        spans = SpacyPrior(lambda _: document, verb_objects=verb_objects).spans(text)
        assert [text[start:end] for start, end in spans] == expected


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from(SENTENCE.split() + ["\n", "—", "n't", "'s", "\u2028", "."])).map(" ".join)
)
def test_every_prior_gives_increasing_nonempty_spans_of_any_text(text):
    for prior in (PHRASES, PunctuationPrior(), WindowPrior(3)):
        previous_end = 0
        for start, end in prior.spans(text):
            assert previous_end <= start < end <= len(text)
            previous_end = end


PHRASES = make_span_prior("phrases")


def test_tokens_belong_to_the_phrase_that_they_start_in(tokenizer):
    text = "The quick brown fox sat on the mat."
    ids = [*encode_responses(tokenizer, [text])[0], tokenizer.eos_token_id]
    numbers = token_span_ids(ids, tokenizer, PHRASES)
    groups = {}
    for id_, number in zip(ids, numbers, strict=True):
        groups.setdefault(number, []).append(id_)
    texts = {number: tokenizer.decode(group, skip_special_tokens=True).strip() for number, group in groups.items()}
    assert texts == {0: "The quick brown fox", 1: "sat", 2: "on the mat", -1: "."}
    assert numbers[-1] == -1


def test_a_piece_with_a_leading_space_belongs_to_its_word(tokenizer):
    """The space before a phrase's first word is outside of the phrase, the piece that holds it is not."""

    class SecondWord:
        def spans(self, text):
            start = text.index("dog")
            return [(start, start + 3)]

    ids = encode_responses(tokenizer, ["the dog sleeps"])[0]
    numbers = token_span_ids(ids, tokenizer, SecondWord())
    inside = tokenizer.decode([id_ for id_, number in zip(ids, numbers, strict=True) if number == 0])
    assert inside.strip() == "dog" and numbers[0] == -1 and numbers[-1] == -1


@pytest.mark.parametrize("text", [SENTENCE, "café 北京\nhouse 🙂 straße", "  two  spaces ", "a\n\nb\tc", "x" * 50])
def test_surface_agrees_with_the_tokenizers_own_offsets(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    shown, starts = token_char_starts(tokenizer, encoded["input_ids"])
    lead = len(shown) - len(text)
    assert shown[lead:] == text and shown[:lead].strip() == ""
    for (start, end), found in zip(encoded["offset_mapping"], starts, strict=True):
        inside = text[start:end]
        # A piece of white space alone has no first letter; the two disagree about SentencePiece's artificial one.
        if inside.strip() and not shown[found].isspace():
            assert found - lead == end - len(inside.lstrip())


def is_high_byte(tokenizer, id_):
    token = tokenizer.convert_ids_to_tokens(id_)
    return token.startswith("<0x") and int(token[3:5], 16) >= 0x80


def test_surface_of_arbitrary_ids_is_the_decoded_text(tokenizers):
    draw = random.Random(0)
    for kind, tokenizer in tokenizers.items():
        # SentencePiece's decoder shows every byte of a run with one broken byte as U+FFFD: whole characters only there.
        usable = [id_ for id_ in range(len(tokenizer)) if kind != "sentence_piece" or not is_high_byte(tokenizer, id_)]
        for _ in range(60):
            ids = draw.choices(usable, k=draw.randrange(1, 40))
            text, starts = token_char_starts(tokenizer, ids)
            decoded = decode_responses(tokenizer, [ids])[0]
            # The SentencePiece decoder strips one leading space; a broken character is one U+FFFD or several.
            assert text.replace("\ufffd", "").removeprefix(" ") == decoded.replace("\ufffd", "").removeprefix(" "), kind
            placed = [start for start in starts if start is not None]
            assert len(starts) == len(ids) and placed == sorted(placed)
            assert all(0 <= start < len(text) for start in placed)
            for id_, start in zip(ids, starts, strict=True):
                assert (start is None) == (id_ in tokenizer.all_special_ids) or kind == "word_piece"


def test_a_character_cut_over_tokens_lies_in_one_span(tokenizer):
    ids = encode_responses(tokenizer, ["🙂🙂"])[0]
    text, starts = token_char_starts(tokenizer, ids)
    assert text.strip() == "🙂🙂" and len(ids) > 2
    lead = len(text) - 2
    assert sorted(set(starts)) == [lead, lead + 1]
    half = ids[:1]
    broken, where = token_char_starts(tokenizer, half)
    assert broken == "\ufffd" and where == [0]


def test_special_tokens_inside_a_response_break_a_phrase(tokenizer):
    first, second = encode_responses(tokenizer, ["the lazy", " dog"])
    ids = [*first, tokenizer.eos_token_id, *second]
    numbers = token_span_ids(ids, tokenizer, PHRASES)
    at = len(first)
    assert numbers[at] == -1 and numbers[at - 1] == numbers[at + 1] == 0
    mask = pair_mask_from_span_ids(numbers)
    assert not mask[at - 1] and not mask[at]


def test_empty_and_spanless_responses(tokenizer):
    assert token_span_ids([], tokenizer, PHRASES) == []
    assert token_span_ids([tokenizer.eos_token_id], tokenizer, PHRASES) == [-1]
    assert token_span_ids(encode_responses(tokenizer, ["dog"])[0], tokenizer, make_span_prior("none")) == [-1] * len(
        encode_responses(tokenizer, ["dog"])[0]
    )


def test_pair_masks():
    assert pair_mask_from_span_ids([0, 0, 0, 1, -1, -1, 2, 2]) == [True, True, False, False, False, False, True, False]
    assert pair_mask_from_span_ids([4]) == [False]
    assert pair_mask_from_span_ids([]) == []


def test_a_picture_of_spans(tmp_path, capsys, monkeypatch):
    text = "The fox <sat> on the mat."
    assert show_spans.main(["--text", text]) == 0
    assert capsys.readouterr().out == "[The fox] <[sat]> [on the mat].\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show_spans.main(["--text", "old dogs sleep"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\x1b[0m") == 2 and "\x1b[30;46mold dogs\x1b[0m \x1b[30;43msleep" in shown
    rows, out = tmp_path / "rows.jsonl", tmp_path / "spans.html"
    rows.write_text('{"instruction": "i", "output": "The fox <sat>"}\n{"instruction": "i"}\n', encoding="utf-8")
    assert show_spans.main([str(rows), "--html", str(out)]) == 0
    assert "<p><mark>The fox</mark> &lt;<mark class=odd>sat</mark>&gt;</p>" in out.read_text(encoding="utf-8")
    capsys.readouterr()
    for wrong, message in [
        ([], "give either a file of rows or --text"),
        ([str(rows), "--text", "a"], "give either"),
        ([str(tmp_path / "row.jsonl")], "rows.jsonl"),
    ]:
        assert show_spans.main(wrong) == 2
        assert message in capsys.readouterr().err
