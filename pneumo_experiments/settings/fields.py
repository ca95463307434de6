"""What a setting is, how its text is read, and the flat names that users see, whatever the groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from pneumo_experiments.passwords import hide_passwords

NONE = "none"  # how an absent value is written on the command line, in config files and in params
AUTO = "auto"  # how "choose what suits best" is written
LONGEST_TEXT = 1000  # characters, of an address for example
# By these people compare runs: each run has them as params, and of the others those that were changed.
KEY_SETTINGS = {
    *("dataset", "image_size", "fold", "seed", "network", "weights", "epochs", "search_epochs", "trials"),
    *("learning_rate", "batch_size", "bce_weight", "dice_weight", "focal_weight", "presence_weight"),
    *("model", "subset"),
}
# Names of settings in earlier versions: still understood, in commands, files, studies and models.
EARLIER_NAMES = {
    "positive_share": "positive_fraction",
    "final_positive_share": "final_positive_fraction",
}
TRUE, FALSE = {"1", "true", "t", "yes", "y", "on"}, {"0", "false", "f", "no", "n", "off"}

Settings = TypeVar("Settings")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Arg:
    """What a setting means and accepts, for ``Annotated``.

    ``min`` and ``max`` limit a number; ``pattern`` is a regular expression for a text, and what that means.
    ``check`` gives the value that a text stands for, or a ValueError; shells complete it to one ``offered``.
    ``shapes_weights`` is False for what may change when an interrupted training continues, or between the
    searches of one study. ``declared`` ones are parameters in MLproject: what goes in and out. A text that
    ``names_file`` is a file's path unless it is one of these words; one that ``is_database`` is its address.
    A path that is read has ``missing``: what to do if nothing is there. It may be a folder if that is
    ``folder_too``, and is not read where one of the settings in ``unless`` is given. ``earlier`` are the
    words for false and true, which were the values in an earlier version.
    """

    help: str
    min: float | None = None
    max: float | None = None
    pattern: tuple[str, str] | None = None
    shapes_weights: bool = True
    declared: bool = False
    names_file: tuple[str, ...] = ()
    is_database: bool = False
    missing: str = ""
    folder_too: bool = False
    unless: tuple[str, ...] = ()
    earlier: tuple[str, str] | None = None
    check: Callable[[str], str] | None = None
    offered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """One setting of an entry point: its flat name, and what it accepts."""

    name: str
    type: Any  # int, float, bool, str, Path, one of int, float and Path or None, or a Literal
    arg: Arg
    default: Any
    heading: str = ""  # of the group it stands in; empty on the top level


@cache
def leaves(kind: type) -> tuple[Leaf, ...]:
    """All settings of an entry point or a group, in the order of the fields."""
    return tuple(_leaves(kind, ""))


def _leaves(kind: type, heading: str) -> Iterator[Leaf]:
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        hint = hints[f.name]
        if is_dataclass(hint):
            yield from _leaves(cast("type", hint), (hint.__doc__ or "").split("\n")[0].rstrip("."))
        else:
            accepted, arg = get_args(hint)
            yield Leaf(f.name, accepted, arg, f.default, heading)


def no_setting(name: object, names: Iterable[str]) -> str:
    """Says that no setting has this name, and which of these is the nearest."""
    nearest = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help for the names"
    return f"no setting is called {str(name)[:60]!r}; {hint}"


def from_flat(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from values by flat name; a setting that is not among them takes its default."""
    chosen: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            chosen[name] = from_flat(cast("type", hint), values)
        elif name in values:
            chosen[name] = values[name]
    return kind(**chosen)


def flat(settings: object) -> dict[str, Any]:
    """The values of all settings by flat name."""
    values: dict[str, Any] = {}
    for name, value in vars(settings).items():
        values |= flat(value) if is_dataclass(value) else {name: value}
    return values


def parse(leaf: Leaf, text: str) -> Any:
    """The value that a text stands for; ValueError, which says why, if the setting does not accept it."""
    if get_origin(leaf.type) is Literal:
        choices = get_args(leaf.type)
        if leaf.arg.earlier is not None and text not in choices and text.lower() in TRUE | FALSE:
            return leaf.arg.earlier[text.lower() in TRUE]
        if text.replace("-", "_") not in choices:  # as in names, a dash is an underscore
            raise ValueError(f"{text!r} is not one of {', '.join(map(repr, choices))}")
        return text.replace("-", "_")
    if leaf.type is bool:
        if (word := text.strip().lower()) not in TRUE | FALSE:
            raise ValueError(f"{text!r} is not a valid boolean; give true or false")
        return word in TRUE
    if leaf.type is str:
        return _parse_text(leaf.arg, text)
    options = get_args(leaf.type) or (leaf.type,)
    if type(None) in options and text in (("", NONE) if Path in options else ("", NONE, AUTO)):
        return None
    return _parse_path(text) if Path in options else _parse_number(leaf.arg, text, int in options)


def _parse_number(arg: Arg, text: str, is_whole: bool) -> float:
    try:
        number = int(text) if is_whole else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a valid {'whole ' if is_whole else ''}number") from None
    if isinstance(number, float) and not isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    if not (-inf if arg.min is None else arg.min) <= number <= (inf if arg.max is None else arg.max):
        raise ValueError(f"{number} is not in the range {limits(arg)}")
    return number


def limits(arg: Arg) -> str:
    """The range of a number, such as ``0<=x<=1``."""
    low, high = ("" if limit is None else f"{limit}" for limit in (arg.min, arg.max))
    return f"{low}<=x<={high}".removeprefix("<=").removesuffix("<=")


def _parse_path(text: str) -> Path:
    if text in ("", NONE):
        raise ValueError("give a path")
    if "\0" in text:
        raise ValueError(f"{text!r} holds a character that no path can have")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text!r} names the home of a user whom this machine does not know") from None


def _parse_text(arg: Arg, text: str) -> str:
    if arg.pattern is not None and not re.fullmatch(arg.pattern[0], text):
        raise ValueError(f"{text!r} is not {arg.pattern[1]}")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{text!r} has {len(text)} characters, more than {LONGEST_TEXT}")
    if not text.isprintable():  # line breaks, control characters, bytes that are not UTF-8
        raise ValueError(f"{text!r} holds characters that cannot be shown")
    return text if arg.check is None else arg.check(text)


def checked(leaf: Leaf, value: object) -> Any:
    """A text or a value of YAML, JSON or Python in the setting's own type; ValueError if not accepted."""
    if isinstance(value, str):
        return parse(leaf, value)
    is_boolean = leaf.type is bool or (leaf.arg.earlier is not None and isinstance(value, bool))
    if isinstance(value, dict | list) or isinstance(value, bool) != is_boolean:
        raise ValueError(f"{value!r} is not {'a boolean' if leaf.type is bool else 'a number or a text'}")
    return parse(leaf, as_text(value))


def renamed(values: Mapping[str, Value]) -> dict[str, Value]:
    """The values of settings by the names that these have now."""
    return {EARLIER_NAMES.get(name, name): value for name, value in values.items()}


def as_now(kind: type, recorded: Mapping[str, object]) -> dict[str, Any]:
    """The values of the settings that shape the weights, as an earlier version may have recorded them.

    A setting that it did not know has its default, with which all is as it was. Raises ValueError for a value
    that a setting does not accept.
    """
    values, recorded = dict[str, Any](), renamed(recorded)
    for leaf in leaves(kind):
        if leaf.arg.shapes_weights:
            values[leaf.name] = checked(leaf, recorded.get(leaf.name, as_text(leaf.default)))
    return values


def absolute(leaf: Leaf, value: Any) -> Any:
    """The setting's value with absolute paths: so what is printed and logged opens from anywhere.

    A text that may be something else than a file's path changes only if there is that file. The address of a
    database in a file does not change in a folder with %, ? or # in its name.
    """
    if isinstance(value, Path):
        return value.absolute()
    arg, here = leaf.arg, Path.cwd()
    if arg.names_file and value not in ("", *arg.names_file):
        try:
            path = Path(value).expanduser()
            return str(path.absolute()) if path.exists() else value
        except (RuntimeError, OSError):  # no such user; a name that is too long
            return value
    if arg.is_database and not set("%?#") & set(str(here)):  # which mean something in addresses
        return re.sub(r"^(sqlite(?:\+\w+)?:///)(?!/|:memory:)(?=.)", lambda m: f"{m[1]}{here}/", value)
    return value


def is_none(text: str) -> bool:
    """Whether a text setting is absent: none, or empty as MLflow passes it."""
    return text in ("", NONE)


def as_text(value: object) -> str:
    """How a setting's value is written: on the command line, in MLproject and as an MLflow param."""
    if value is None:
        return NONE
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_texts(settings: object) -> dict[str, str]:
    """All settings of an entry point by name, as text."""
    return {name: as_text(value) for name, value in flat(settings).items()}


def as_params(settings: object) -> dict[str, str]:
    """The key settings, and those that differ from their defaults, by name, as text."""
    names = KEY_SETTINGS | {*chosen(settings)}
    return {name: text for name, text in as_texts(settings).items() if name in names}


def chosen(settings: object) -> dict[str, str]:
    """The settings that differ from their defaults, by name, as text."""
    values = flat(settings)
    return {
        leaf.name: as_text(values[leaf.name])
        for leaf in leaves(type(settings))
        if absolute(leaf, values[leaf.name]) != absolute(leaf, leaf.default)
    }


def as_config(settings: object) -> dict[str, int | float | bool | str]:
    """All settings of an entry point by name, as YAML and JSON can hold them, without passwords."""
    return {
        n: v if isinstance(v, int | float) else hide_passwords(as_text(v)) for n, v in flat(settings).items()
    }


def weight_shaping(settings: object) -> dict[str, str]:
    """The settings, as text, that change which weights a training ends with."""
    texts = as_texts(settings)
    return {leaf.name: texts[leaf.name] for leaf in leaves(type(settings)) if leaf.arg.shapes_weights}
