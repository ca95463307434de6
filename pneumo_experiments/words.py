"""Counts, names and lists as texts for terminal, pages and errors."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence

EXAMPLES = 3  # names of a list


def plural(count: int, noun: str) -> str:
    """A count with its noun: '1 file', '2 files'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def command(stage: str, **settings: object) -> str:
    """The command line of an entry point with these settings, as one types it here."""
    program = "pneumo" if shutil.which("pneumo") else "python -m pneumo_experiments"
    options = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join([program, stage, *options])


def rows(values: Mapping[str, str]) -> str:
    """Lines of names and values, for the end of a command."""
    return "\n".join(f"{name:<9} {value}" for name, value in values.items())


def some_of(names: Sequence[str], most: int = EXAMPLES) -> str:
    """The first names of a list, and how many more there are: 'a, b, c and 4 more'."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """The text with characters that cannot be printed replaced: file names may contain any bytes."""
    if text.isprintable():  # as almost all are, and the pictures of a page are long
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def escape(text: str) -> str:
    r"""The text in UTF-8: a byte that is not becomes ``\udcff``.

    Python keeps such bytes of file names as lone surrogates, which no codec can encode.
    """
    return text.encode("utf-8", "backslashreplace").decode()
