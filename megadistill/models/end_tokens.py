"""Which tokens end the text of a model.

Instruct models have several: a turn ends in one, a document in another. The tokenizer names one of them,
``generation_config.json`` (where it names none: ``config.json``) often all. Any of them ends a response, of the model
whose files they are. A reference ends in the tokenizer's, or as the chat template ends a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from megadistill.data.tokenize import added_ids, encode_texts, has_tokenizer
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean
from megadistill.models.model_files import CONFIG, GENERATION_CONFIG, read_model_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "model.eos_tokens"


def end_tokens(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    asked: Sequence[int | str] | None = None,
    more: Collection[int] = (),
) -> frozenset[int]:
    """The ids that end a text of a model: the tokenizer's EOS, those that the model's files name, and ``more``.

    Ids of a model without a tokenizer of its own count where they are special or added tokens of the run's: in another
    vocabulary they would be any piece of text.

    Args:
        model: Folder, configuration file, or hub name of the model that writes.
        tokenizer: The run's tokenizer.
        vocab_size: Ids from here on have no class in the head and are left out: they can never be written.
        asked: ``model.eos_tokens``: texts or ids, in place of all others; None: the rule above.
        more: Further ids, such as the one that ends a turn of a chat template.

    Raises:
        ConfigError: ``asked`` names what is not one token below ``vocab_size``, a file of the model is damaged, or no
            id is left.
    """
    if asked is not None:
        return frozenset(_asked_id(token, tokenizer, vocab_size) for token in asked)
    named = set(named_end_tokens(model))
    if not has_tokenizer(model):
        named &= added_ids(tokenizer)
    ids = frozenset(id_ for id_ in {tokenizer.eos_token_id, *named, *more} if id_ < vocab_size)
    if not ids:
        raise ConfigError(
            f"{model} has {vocab_size} vocabulary rows, and its end token {tokenizer.eos_token!r} has the id "
            f"{tokenizer.eos_token_id}: nothing would end its text",
            setting=SETTING,
        )
    return ids


def named_end_tokens(model: str) -> tuple[int, ...]:
    """The ids that ``generation_config.json``, else ``config.json`` of a model names, in their order; or none.

    Args:
        model: A model folder, a configuration file, or a hub name.

    Raises:
        ConfigError: A file is damaged.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        content = read_model_json(model, name) or {}
        ids = ids_of(content.get("eos_token_id"), f"{model}: {name}")
        if ids:
            return ids
    return ()


def ids_of(value: Any, where: str) -> tuple[int, ...]:
    """The ids of an ``eos_token_id`` as files hold it: an id, a list of ids, or null.

    Args:
        value: The entry.
        where: The file, for the error.

    Raises:
        ConfigError: It is something else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in values):
        # -1 stands for none in a few old files.
        if value == -1:
            return ()
        raise ConfigError(f"{where}: eos_token_id must be a token's id, a list of ids or null, not {value!r}")
    return tuple(dict.fromkeys(values))


def cut_end(ids: Sequence[int], eos_ids: Collection[int]) -> Sequence[int]:
    """A response without the token that ended it: an end token need not be one that decoding hides."""
    return ids[:-1] if ids and ids[-1] in eos_ids else ids


def describe_end_tokens(eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """End tokens for people and records: "<|endoftext|> (0), <|im_end|> (1)"."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(id_) or 'unknown'} ({id_})" for id_ in sorted(eos_ids))


def _asked_id(token: int | str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    if isinstance(token, int):
        if token < vocab_size:
            return token
        raise ConfigError(f"no token has the id {token}; ids are 0 to {vocab_size - 1}", setting=SETTING)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token]] if token in vocabulary else encode_texts(tokenizer, [token])[0]
    if len(ids) != 1 or ids[0] >= vocab_size:
        names = [added.content for added in tokenizer.added_tokens_decoder.values()]
        raise ConfigError(f"{token!r} is not one token of the tokenizer{did_you_mean(token, names)}", setting=SETTING)
    return ids[0]
