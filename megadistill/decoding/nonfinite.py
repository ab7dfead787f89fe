"""What happens where a model has no distribution to draw a token from: NaN or infinite logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megadistill.data.encode import TokenizedExample
from megadistill.errors import DivergenceError

# Called with (index of the example, response position) where logits are not finite.
OnNonFinite = Callable[[int, int], None]
_SHOWN_CHARACTERS = 60


def logits_error(where: str, position: int | None = None) -> DivergenceError:
    """The error of a text for which a model has no distribution.

    Args:
        where: The text, such as ``row_name`` gives it.
        position: Response position of the token; None where it is not known.
    """
    token = "a token" if position is None else f"token {position + 1}"
    return DivergenceError(
        f"{where}: the logits for {token} of the answer are NaN or infinite; the model's weights are damaged, "
        "or it overflows in this type"
    )


def row_name(row: TokenizedExample) -> str:
    """A row as its user knows it: its number, and the end of its prompt, because templates begin all prompts alike."""
    text = " ".join(row.prompt.split())
    cut = "..." if len(text) > _SHOWN_CHARACTERS else ""
    return f"row {row.id} ({cut + text[-_SHOWN_CHARACTERS:]!r})"


@contextmanager
def faults_in(what: str) -> Iterator[None]:
    """Puts ``what`` (a model, a step) before the message of a DivergenceError of the block."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{what}: {error}") from None


class FirstFault:
    """Keeps the first error of this data-parallel rank until all of them communicate; raises it at once on one rank.

    A rank that left alone would let the others wait until their timeout. So it finishes its share.

    Args:
        dp_size: Number of data-parallel ranks.

    Attributes:
        error: The error, or None.
    """

    def __init__(self, dp_size: int) -> None:
        self._is_alone = dp_size == 1
        self.error: DivergenceError | None = None

    def add(self, error: DivergenceError) -> None:
        """Raises or keeps an error."""
        if self._is_alone:
            raise error
        self.error = self.error or error
