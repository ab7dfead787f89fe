"""Whether two models can be compared token by token: their tokenizers must agree wherever both have a token."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from megadistill.data.encode import TokenizedExample
from megadistill.data.row_file import MappedRows
from megadistill.data.tokenize import leading_special_ids
from megadistill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = "The 3 quick foxes didn't jump;\n  naïve Größe — 你好, мир 🙂 for(i=0;i<10;++i){}"


def pair_tokenizers(used: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: tuple[str, str]) -> list[str]:
    """Compares the tokenizer that a run uses with that of one of its models.

    They may differ in what their special tokens are and are called (a reserved one gets a use), and one may have more
    tokens at the end. All other ids that both have must be the same tokens, and text must become the same ids.

    Args:
        used: The run's tokenizer.
        other: That of a model.
        names: What to call them.

    Returns:
        The allowed differences in words.

    Raises:
        ConfigError: Names the first other difference.
    """
    renamed = _special_ids(used) & _special_ids(other)
    _check_shared_ids(used, other, names, may_differ=renamed)
    _check_same_text(used, other, names, add_special_tokens=False)
    tokens = [tokenizer.convert_ids_to_tokens(sorted(renamed)) for tokenizer in (used, other)]
    notes = [
        f"the special token {id_} is {_quoted(ours)} for {names[0]} and {_quoted(theirs)} for {names[1]}"
        for id_, ours, theirs in zip(sorted(renamed), *tokens, strict=True)
        if ours != theirs
    ]
    notes += [
        f"{special} is {_quoted(ours)} for {names[0]} and {_quoted(theirs)} for {names[1]}"
        for special in _SPECIAL
        if (ours := getattr(used, special)) != (theirs := getattr(other, special))
    ]
    leading = (t.convert_ids_to_tokens(list(leading_special_ids(t))) for t in (used, other))
    starts = [" ".join(map(str, tokens)) or "no token" for tokens in leading]
    if starts[0] != starts[1]:
        notes.append(f"a text starts with {starts[0]} for {names[0]} and {starts[1]} for {names[1]}")
    sizes = [len(t.get_vocab()) for t in (used, other)]
    if sizes[0] != sizes[1]:
        notes.append(f"{names[0]} has {sizes[0]} tokens and {names[1]} {sizes[1]}")
    return notes


def assert_same_vocabulary(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("teacher", "student"),
) -> None:
    """Refuses two tokenizers that differ in the id of a token, or that tokenize text differently.

    The padding token is not compared: padding is masked everywhere, and models of one family often differ in it.

    Raises:
        ConfigError: Names the first differing id or special token.
    """
    _check_shared_ids(tokenizer_a, tokenizer_b, names)
    for special in ("bos_token", "eos_token", "unk_token"):
        token_a, token_b = getattr(tokenizer_a, special), getattr(tokenizer_b, special)
        if token_a != token_b:
            raise ConfigError(f"{special} is {_quoted(token_a)} for {names[0]} and {_quoted(token_b)} for {names[1]}")
    _check_same_text(tokenizer_a, tokenizer_b, names, add_special_tokens=True)


def check_ids(
    rows: Iterable[TokenizedExample], vocab_size: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Checks that the models have a vocabulary row for every token of tokenized rows.

    Args:
        rows: The rows.
        vocab_size: V, the tokens that both models have.
        tokenizer: The run's tokenizer, which may have more.
        where: The file of the rows, for the error.

    Raises:
        ConfigError: Names the first row with another token, and the token.
    """
    if isinstance(rows, MappedRows):
        over = rows.first_over(vocab_size)
        rows = [] if over is None else [over]
    for row in rows:
        largest = max((*row.prompt_ids, *(row.response_ids or ())))
        if largest >= vocab_size:
            raise ConfigError(
                f"{where}, row {row.id}: token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but "
                f"the models share {vocab_size} vocabulary rows; use the tokenizer of the model with fewer",
                setting="model.tokenizer",
            )


def _check_shared_ids(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    names: tuple[str, str],
    *,
    may_differ: Collection[int] | None = None,
) -> None:
    """Compares the token of every id; with ``may_differ``, of those ids that both have, but for these."""
    name_a, name_b = names
    ids_a, ids_b = ({id_: token for token, id_ in t.get_vocab().items()} for t in (tokenizer_a, tokenizer_b))
    shared_end = None if may_differ is None else min(max(ids_a), max(ids_b)) + 1
    for id_ in sorted(ids_a.keys() | ids_b.keys()):
        if shared_end is not None and id_ >= shared_end:
            return
        token_a, token_b = ids_a.get(id_), ids_b.get(id_)
        if token_a != token_b and id_ not in (may_differ or ()):
            raise ConfigError(
                f"{name_a} and {name_b} have different vocabularies ({len(ids_a)} and {len(ids_b)} tokens): id {id_} "
                f"is {_quoted(token_a)} for {name_a} and {_quoted(token_b)} for {name_b}"
                + ("; token-level distillation needs one tokenizer" if may_differ is not None else "")
            )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


def _check_same_text(
    tokenizer_a: PreTrainedTokenizerBase,
    tokenizer_b: PreTrainedTokenizerBase,
    names: tuple[str, str],
    *,
    add_special_tokens: bool,
) -> None:
    ids_a, ids_b = (t(_PROBE, add_special_tokens=add_special_tokens)["input_ids"] for t in (tokenizer_a, tokenizer_b))
    if ids_a != ids_b:
        raise ConfigError(
            f"{names[0]} and {names[1]} have the same tokens but tokenize the same text differently: use one for both"
        )


def _quoted(token: str | None) -> str:
    return "absent" if token is None else repr(token)
