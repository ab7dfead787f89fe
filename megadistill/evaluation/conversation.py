"""A conversation with a model, in one process: turns in, answers out as they are written."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megadistill.data.chats import ASSISTANT, Chat, Message
from megadistill.data.dataset import Example
from megadistill.data.encode import TokenizedExample, tokenize_examples
from megadistill.data.prompts import CHAT, PromptSettings, choose_template
from megadistill.data.sample import Sample
from megadistill.data.tokenize import decode_response
from megadistill.decoding.protocols import Decoder
from megadistill.decoding.sampling import Sampling
from megadistill.decoding.stream import stream_tokens
from megadistill.errors import ConfigError
from megadistill.evaluation.answers import AnswerSettings
from megadistill.parallel.rng import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


def conversation_template(prompts: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> PromptSettings:
    """Settings with the template that turns are written in: ``auto`` is the tokenizer's chat template if it has one.

    Raises:
        ConfigError: As ``choose_template``.
    """
    has_own = bool(prompts.chat_template or tokenizer.chat_template)
    return replace(prompts, template=choose_template(prompts, tokenizer, are_chats=has_own))


class Conversation:
    """Turns of a user and a model.

    With a chat template the model reads the earlier turns, as many as its limit allows. Text templates hold one
    instruction, so each turn stands alone there.

    Args:
        model: Writes the answers.
        prompts: From ``conversation_template``; ``long_prompt`` should be "truncate".
        answers: Limits, end tokens, and sampling.
        seed: Of the sampled answers. Turn i of a conversation, from 0, is drawn as row i of ``generate``.
        system: System prompt; None for none.

    Attributes:
        is_shortened: Whether the last answer was written without the oldest turns, or without the beginning of a text.

    Raises:
        ConfigError: A system prompt, and a template without a place for it.
    """

    def __init__(
        self, model: Decoder, prompts: PromptSettings, answers: AnswerSettings, *, seed: int, system: str | None = None
    ) -> None:
        if system is not None and prompts.template != CHAT:
            raise ConfigError(f"the template {prompts.template} has no place for a system prompt; chat has")
        self._model, self._prompts, self._answers, self._seed = model, prompts, answers, seed
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._num_turns = 0
        self.is_shortened = False

    def reset(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self._turns.clear()

    def answer(self, text: str) -> Generator[str]:
        """The model's answer to a turn, in pieces as they are written; what was read of it is what it remembers.

        Raises:
            DataError: The turn cannot be a prompt, or is over the limit by itself; nothing is remembered of it.
            DivergenceError: Logits are not finite.
        """
        row = self._row(text)
        answer = ""
        try:
            for piece in self._written(row):
                answer += piece
                yield piece
        finally:  # also where the reader stops early
            self._num_turns += 1
            if self._prompts.template == CHAT:
                self._turns += [{"role": "user", "content": text}, {"role": ASSISTANT, "content": answer}]

    def _row(self, text: str) -> TokenizedExample:
        chat = None
        if self._prompts.template == CHAT:
            chat = Chat((*self._system, *self._turns, {"role": "user", "content": text}))
        example = Example(self._num_turns, text, "", (), "this turn", chat)
        done = tokenize_examples([example], self._answers.tokenizer, self._prompts)
        self.is_shortened = done.num_truncated > 0
        return done.rows[0]

    def _written(self, row: TokenizedExample) -> Iterator[str]:
        answers = self._answers
        tokens = stream_tokens(
            self._model,
            Sample(row.id, row.prompt_ids),
            limit=answers.limit(row.prompt_ids),
            eos_ids=answers.eos_ids,
            sampling=Sampling(self._seed, answers.temperature, answers.options),
            stream=Stream.EVALUATION,
        )
        return text_pieces(tokens, answers.eos_ids, answers.tokenizer)


def text_pieces(
    tokens: Iterator[int] | Sequence[int], eos_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """What each token adds to a text; a character of several tokens comes whole. Joined, it is the decoded text."""
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        if token in eos_ids:
            break
        ids.append(token)
        text = decode_response(tokenizer, ids)
        if text.startswith(shown) and not text.endswith(_UNFINISHED) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]
