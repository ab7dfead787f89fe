"""A picture of spans on text, for people: for a terminal, as plain text, and as a page of HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence

from megadistill.data.spans import Span

# Two colors in turn, so that neighbors differ: black on cyan and on yellow.
_TERMINAL = ("\x1b[30;46m", "\x1b[30;43m")
_RESET = "\x1b[0m"
_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto; }}
p {{ white-space: pre-wrap; border-top: 1px solid #ccc; padding-top: .5em; }}
mark {{ padding: .1em .2em; border-radius: .2em; background: #bde; }}
mark.odd {{ background: #fe9; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def plain(text: str, spans: Sequence[Span]) -> str:
    """Brackets around each span."""
    return _marked(text, spans, lambda number, phrase: f"[{phrase}]", str)


def colored(text: str, spans: Sequence[Span]) -> str:
    """Two background colors in turn, for terminals."""
    return _marked(text, spans, lambda number, phrase: f"{_TERMINAL[number % 2]}{phrase}{_RESET}", str)


def page(title: str, rows: Iterable[tuple[str, Sequence[Span]]]) -> str:
    """A page of HTML without scripts or other files, a paragraph for each text."""

    def mark(number: int, phrase: str) -> str:
        return f"<mark{' class=odd' if number % 2 else ''}>{html.escape(phrase)}</mark>"

    body = "\n".join(f"<p>{_marked(text, spans, mark, html.escape)}</p>" for text, spans in rows)
    return _PAGE.format(title=html.escape(title), body=body)


def _marked(text: str, spans: Sequence[Span], mark: Callable[[int, str], str], between: Callable[[str], str]) -> str:
    parts, at = [], 0
    for number, (start, end) in enumerate(spans):
        parts += [between(text[at:start]), mark(number, text[start:end])]
        at = end
    return "".join([*parts, between(text[at:])])
