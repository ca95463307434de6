"""What an option accepts: click types made from a setting's type and limits."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from pneumo_experiments.settings import AUTO, NONE, Leaf, is_none

LONGEST_NAME = 255  # bytes, of a file or folder: the limit of all usual file systems
LONGEST_TEXT = 1000  # characters, of an address for example


class WholeNumber(click.IntRange):
    """A whole number within limits."""

    name = "whole number"


class Number(click.FloatRange):
    """A number within limits; click's own range lets nan pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class PathType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A path; where it is optional, empty or ``none`` is None."""

    name = "path"

    def __init__(self, optional: bool) -> None:
        self.optional = optional

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | None:
        if is_none(value):
            if self.optional:
                return None
            self.fail("give a path", param, ctx)
        try:
            path = Path(value).expanduser()
        except RuntimeError:  # no such user
            self.fail(f"{value!r} names the home of a user whom this machine does not know", param, ctx)
        if "\0" in str(path):
            self.fail(f"{value!r} holds a character that no path can have", param, ctx)
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if longest > LONGEST_NAME:
            self.fail(f"{value!r} has a name of {longest} bytes, more than {LONGEST_NAME}", param, ctx)
        return path


class Text(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """One line of text that matches ``pattern`` (regular expression, its meaning) where one is given."""

    name = "text"

    def __init__(self, pattern: tuple[str, str] | None) -> None:
        self.pattern = pattern

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if self.pattern is not None and not re.fullmatch(self.pattern[0], value):
            self.fail(f"{value!r} is not {self.pattern[1]}", param, ctx)
        if len(value) > LONGEST_TEXT:
            self.fail(f"{value!r} has {len(value)} characters, more than {LONGEST_TEXT}", param, ctx)
        if not value.isprintable():  # line breaks, control characters, bytes that are not UTF-8
            self.fail(f"{value!r} holds characters that cannot be shown", param, ctx)
        return value


class Bool(click.types.BoolParamType):
    """True or false; nothing at all is neither."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail(f"{value!r} is not a valid boolean; give true or false", param, ctx)
        return super().convert(value, param, ctx)


class OrNone(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A value of another type; empty, ``none`` or ``auto`` is None."""

    def __init__(self, of: WholeNumber | Number) -> None:
        self.of, self.name = of, f"{of.name} or none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value in ("", NONE, AUTO) else self.of.convert(value, param, ctx)


def type_of(leaf: Leaf) -> Any:
    """The click type of a setting."""
    if get_origin(leaf.type) is Literal:
        return click.Choice(get_args(leaf.type))
    if leaf.type is bool:
        return Bool()
    if leaf.type in (int, int | None):
        number = WholeNumber(_whole(leaf.arg.min), _whole(leaf.arg.max))
        return number if leaf.type is int else OrNone(number)
    if leaf.type in (float, float | None):
        number = Number(leaf.arg.min, leaf.arg.max)
        return number if leaf.type is float else OrNone(number)
    if leaf.type is str:
        return Text(leaf.arg.pattern)
    return PathType(optional=leaf.type is not Path)


def _whole(limit: float | None) -> int | None:
    return None if limit is None else int(limit)
