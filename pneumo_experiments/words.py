"""Counts, names and lists as texts for terminal, pages and errors."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = 3  # names of a list


def plural(count: int, noun: str) -> str:
    """A count with its noun: '1 file', '2 files'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are: 'a, b, c and 4 more'."""
    more = f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def printable(text: str) -> str:
    """The text with characters that cannot be printed replaced: file names may contain any bytes."""
    if text.isprintable():  # as almost all are, and the pictures of a page are long
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
