"""Span priors: which neighboring response tokens belong to one phrase (docs/method.md, section 7).

A prior divides text into character spans; ``token_span_ids`` carries them over to the tokens of any response, a
reference or a sampled one. A token belongs to the span in which its first character that is not white space lies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import regex

from megadistill.data.surface import token_char_starts
from megadistill.errors import ConfigError, needs_extra
from megadistill.files import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Function words of some European languages, in one set: a word that opens a chunk in one language does little harm in
# another.
_FUNCTION_WORDS = """
a an the this that these those and or but nor so if of in on at by for with from to into onto over under about as than
because while when is are was were be been being am do does did have has had will would can could may might shall
should must not no i you he she it we they my your his her its our their me him us them who whom which what whose
there der die das den dem des ein eine einen einem einer eines und oder aber von zu mit auf für bei aus nach im ist
sind war waren nicht ich du er sie es wir ihr sich dass wenn weil als wie zur zum vom le la les un une de et ou mais à
au aux dans sur pour par avec est sont était ne pas je tu il elle nous vous ils elles que qui se ce el los las una
unos y o pero en con por para del al son era yo tú él ella su lo gli uno e ma di da per nel nella della che è sono non
si os um uma mas em na dos com não é são het een maar van op met voor door uit zijn niet ik jij hij zij wij dat te
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


class SpanPrior(Protocol):
    """Divides a text into phrases."""

    def spans(self, text: str) -> list[Span]:
        """Character spans (start, end) of ``text``: increasing, not overlapping, none empty."""
        ...


class PhrasePrior:
    """English noun, verb and prepositional phrases by TextBlob's shallow parser, which its wheel contains.

    A prepositional phrase is a preposition with its noun phrase ("on the mat"): the noun phrase inside it is not a
    span of its own, because spans do not overlap. A preposition alone is one where no noun phrase follows it.

    Words are split here, in Penn Treebank style and with their positions, before the parser gets them: its own
    splitting loses the positions, divides "didn't" into four words and joins emoticons. A phrase never crosses the end
    of a sentence or a line break.

    Args:
        verb_objects: A verb phrase takes the noun phrase that follows it, its object.
    """

    # Kept whole: addresses, numbers with separators, abbreviations, words with inner hyphens or apostrophes.
    _WORD = regex.compile(
        r"""
        (?:https?://|www\.)[^\s<>"]*[^\s<>".,;:!?)\]'’]
        | \p{N}+(?:[.,:]\p{N}+)*(?:st|nd|rd|th)?(?![\p{L}\p{N}])
        | (?:\p{L}\.){2,}
        | (?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|al|cf|No|Inc|Ltd|Co)\.(?=\s)
        | n['’]t(?![\p{L}\p{M}\p{N}_])
        | (?:(?!n['’]t(?![\p{L}\p{N}]))[\p{L}\p{M}\p{N}_])+(?:-[\p{L}\p{M}\p{N}_]+)*
        | ['’](?:s|S|m|M|d|D|ll|LL|re|RE|ve|VE)(?![\p{L}\p{N}])
        | \.{2,} | -{2,} | [^\s]
        """,
        regex.VERBOSE,
    )
    _SENTENCE_ENDS = frozenset({".", "!", "?", "…", "...", "。", "！", "？"})
    _PHRASES = frozenset({"NP", "VP", "PP"})

    def __init__(self, verb_objects: bool = False) -> None:
        with needs_extra("spans", "span prior phrases", setting="data.span_prior"):
            from textblob.en import parse

        self._parse: Callable[..., list[list[list[str]]]] = parse
        self._verb_objects = verb_objects

    def spans(self, text: str) -> list[Span]:
        """See ``SpanPrior.spans``."""
        sentences = list(self._sentences(text))
        # The parser's lexicon does not have the typographic apostrophe; replaced one for one, so positions stay.
        words_only = "\n".join(" ".join(text[a:b].replace("’", "'") for a, b in words) for words in sentences)
        tagged = self._parse(words_only, tokenize=False, chunks=True, collapse=False) if sentences else []
        spans: list[Span] = []
        for words, tags in zip(sentences, tagged, strict=True):
            previous = "O"
            for (start, end), (_, _, chunk, phrase) in zip(words, tags, strict=True):
                label = chunk if phrase == "O" else phrase  # the outer phrase, where there is one
                kind = label[2:] if phrase != "O" or label[2:] in self._PHRASES else "O"
                goes_on = kind != "O" and label.startswith("I-") and kind == previous
                if goes_on or (self._verb_objects and (previous, kind) == ("VP", "NP")):
                    spans[-1] = (spans[-1][0], end)
                elif kind != "O":
                    spans.append((start, end))
                previous = kind
        return spans

    def _sentences(self, text: str) -> Iterator[list[Span]]:
        offset = 0
        for line in text.splitlines(keepends=True):
            words: list[Span] = []
            for match in self._WORD.finditer(line):
                words.append((offset + match.start(), offset + match.end()))
                if match.group() in self._SENTENCE_ENDS:
                    yield words
                    words = []
            if words:
                yield words
            offset += len(line)


class SpacyPrior:
    """Noun chunks, verb groups and prepositions with their noun chunks by a spaCy pipeline with a tagger and a parser.

    Args:
        pipeline: The pipeline, or the name of an installed one.
        verb_objects: A verb group takes the noun chunk that follows it.
    """

    def __init__(self, pipeline: str | Any = "en_core_web_sm", verb_objects: bool = False) -> None:
        if isinstance(pipeline, str):
            with needs_extra("spacy", "span prior spacy", setting="data.span_prior"):
                import spacy
            try:
                pipeline = spacy.load(pipeline, exclude=["ner", "lemmatizer"])
            except OSError:
                raise ConfigError(
                    f"span prior spacy: the model {pipeline!r} is not installed; install it with: "
                    f"python -m spacy download {pipeline}",
                    setting="data.span_prior",
                ) from None
        self._pipeline, self._takes_noun = pipeline, ("PP", "VP") if verb_objects else ("PP",)

    def spans(self, text: str) -> list[Span]:
        """See ``SpanPrior.spans``."""
        document = self._pipeline(text)
        noun_of = {token.i: number for number, chunk in enumerate(document.noun_chunks) for token in chunk}
        spans: list[Span] = []
        previous: tuple[str, int] = ("", -1)  # kind of the last token's span, and which noun chunk
        for token in document:
            kind = {"VERB": "VP", "AUX": "VP", "ADP": "PP"}.get(token.pos_, "")
            this = ("NP", noun_of[token.i]) if token.i in noun_of else (kind, -1)
            end = token.idx + len(token)
            if this[0] and (this == previous or (this[0] == "NP" and previous[0] in self._takes_noun)):
                spans[-1] = (spans[-1][0], end)
            elif this[0]:
                spans.append((token.idx, end))
            previous = this
        return spans


class PunctuationPrior:
    """Chunks of any language: punctuation and line breaks end one, a function word opens one.

    These are the "chinks and chunks" of Liberman and Church (1992). Text without spaces between words (Chinese,
    Japanese, Thai) is divided by its punctuation alone.
    """

    _WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['’_-][\p{L}\p{M}\p{N}]+)*")

    def spans(self, text: str) -> list[Span]:
        """See ``SpanPrior.spans``."""
        spans: list[Span] = []
        has_content, previous_end = False, -1
        for match in self._WORD.finditer(text):
            start, end = match.span()
            gap = text[previous_end:start] if spans else "."
            is_function_word = match.group().casefold() in FUNCTION_WORDS
            joins = gap.isspace() and "\n" not in gap and not (is_function_word and has_content)
            if joins:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
            has_content = not is_function_word or (joins and has_content)
            previous_end = end
        return spans


class WindowPrior:
    """Fixed windows of ``window`` words. A character of a script without spaces between words counts as a word."""

    _WORD = regex.compile(
        r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
        r"|[^\s\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+"
    )

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ConfigError(f"a window of {window} words; at least 1 is needed", setting="data.span_window")
        self._window = window

    def spans(self, text: str) -> list[Span]:
        """See ``SpanPrior.spans``."""
        words = [match.span() for match in self._WORD.finditer(text)]
        groups = (words[at : at + self._window] for at in range(0, len(words), self._window))
        return [(group[0][0], group[-1][1]) for group in groups]


class NoPrior:
    """No spans: the span loss is zero."""

    def spans(self, text: str) -> list[Span]:
        """See ``SpanPrior.spans``."""
        return []


SPAN_PRIORS = ("phrases", "spacy", "punctuation", "window", "none")


def make_span_prior(name: str, window: int = 4, verb_objects: bool = False) -> SpanPrior:
    """The prior called ``name``.

    Args:
        name: One of SPAN_PRIORS.
        window: Words per span, for the prior ``window``.
        verb_objects: Verb phrases take their objects, for the priors ``phrases`` and ``spacy``.

    Raises:
        ConfigError: Unknown name, spaCy or its model missing, or a window below 1.
    """
    makers: dict[str, Callable[[], SpanPrior]] = {
        "phrases": lambda: PhrasePrior(verb_objects),
        "spacy": lambda: SpacyPrior(verb_objects=verb_objects),
        "punctuation": PunctuationPrior,
        "window": lambda: WindowPrior(window),
        "none": NoPrior,
    }
    if name not in makers:
        hint = did_you_mean(name, SPAN_PRIORS)
        raise ConfigError(
            f"unknown span prior {name!r}; allowed: {', '.join(SPAN_PRIORS)}{hint}", setting="data.span_prior"
        )
    return makers[name]()


def span_prior_version(name: str) -> str:
    """The prior with the version of the package that parses, whose next version may find other phrases."""
    package = {"phrases": "textblob", "spacy": "spacy"}.get(name)
    return name if package is None else f"{name} by {package} {version(package)}"


def token_span_ids(response_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, prior: SpanPrior) -> list[int]:
    """The number of each response token's span, increasing along the response; -1 outside spans and for special tokens.

    Works for any ids, canonical or sampled: a token's position is that of its first byte in the decoded text.
    """
    text, starts = token_char_starts(tokenizer, response_ids)
    spans = prior.spans(text)
    if not spans:
        return [-1] * len(starts)
    opens = [start for start, _ in spans]
    numbers = []
    for start in starts:
        span = -1 if start is None else bisect_right(opens, start) - 1
        numbers.append(span if span >= 0 and start is not None and start < spans[span][1] else -1)
    return numbers


def pair_mask_from_span_ids(ids: Sequence[int]) -> list[bool]:
    """True at i where tokens i and i + 1 lie in one span. As long as ``ids``; the last is False."""
    pairs = [a == b and a >= 0 for a, b in zip(ids, ids[1:], strict=False)]
    return [*pairs, False] if ids else []
