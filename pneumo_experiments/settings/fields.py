"""What a setting is, and the flat names that users see, whatever the groups."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

NONE = "none"  # how an absent value is written on the command line, in config files and in params
AUTO = "auto"  # how "choose what suits best" is written

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Arg:
    """What a setting means and accepts, for ``Annotated``.

    ``min`` and ``max`` limit a number; ``pattern`` is a regular expression for a text, and what that means.
    ``shapes_weights`` is False for what may change when an interrupted training continues, or between the
    searches of one study. ``declared`` ones are parameters in MLproject: what goes in and out.
    """

    help: str
    min: float | None = None
    max: float | None = None
    pattern: tuple[str, str] | None = None
    shapes_weights: bool = True
    declared: bool = False


@dataclass(frozen=True)
class Leaf:
    """One setting of an entry point: its flat name, what it accepts, and where it stands."""

    name: str
    type: Any  # int, float, bool, str, Path, one of int, float and Path or None, or a Literal
    arg: Arg
    default: Any
    path: tuple[str, ...]  # field names that lead to it
    heading: str  # of the group it stands in; empty on the top level


@cache
def leaves(kind: type) -> tuple[Leaf, ...]:
    """All settings of an entry point or a group, in the order of the fields."""
    return tuple(_leaves(kind, (), ""))


def _leaves(kind: type, path: tuple[str, ...], heading: str) -> Iterator[Leaf]:
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        hint, here = hints[f.name], (*path, f.name)
        if is_dataclass(hint):
            yield from _leaves(cast("type", hint), here, (hint.__doc__ or "").split("\n")[0].rstrip("."))
        else:
            accepted, arg = get_args(hint)
            yield Leaf(f.name, accepted, arg, f.default, here, heading)


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
    return {leaf.name: _value(settings, leaf) for leaf in leaves(type(settings))}


def absolute(leaf: Leaf, values: Mapping[str, Any]) -> Any:
    """The setting's value, or its default, with absolute paths.

    These are paths, ``patients_csv``, ``weights`` that exist, and the file of an SQLite database; the last
    one not in a folder with %, ? or # in its name.
    """
    value = values.get(leaf.name, leaf.default)
    if isinstance(value, Path):
        return value.absolute()
    if leaf.name in ("patients_csv", "weights") and value not in (AUTO, NONE, "", "imagenet", "coco"):
        with suppress(RuntimeError):  # no such user
            path = Path(value).expanduser()
            if path.exists() or leaf.name == "patients_csv":
                return str(path.absolute())
    if leaf.name == "storage" and not set("%?#") & set(str(Path.cwd())):  # which mean something in addresses
        return re.sub(r"^(sqlite(?:\+\w+)?:///)(?!/|:memory:)(?=.)", lambda m: f"{m[1]}{Path.cwd()}/", value)
    return value


def is_none(text: str) -> bool:
    """Whether a text setting is absent: none, or empty as MLflow passes it."""
    return text in ("", NONE)


def as_text(value: object) -> str:
    """How a setting's value is written: on the command line, in MLproject and as an MLflow param."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def as_params(settings: object) -> dict[str, str]:
    """All settings of an entry point by name, as text."""
    return {name: as_text(value) for name, value in flat(settings).items()}


def as_config(settings: object) -> dict[str, int | float | bool | str]:
    """All settings of an entry point by name, as YAML and JSON can hold them."""
    return {
        name: value if isinstance(value, int | float) else as_text(value)
        for name, value in flat(settings).items()
    }


def weight_shaping(settings: object) -> dict[str, str]:
    """The settings, as text, that change which weights a training ends with."""
    texts = as_params(settings)
    return {leaf.name: texts[leaf.name] for leaf in leaves(type(settings)) if leaf.arg.shapes_weights}


def checked(leaf: Leaf, value: Any) -> Any:
    """The value in the setting's own type; ValueError if the setting does not accept it."""
    if get_origin(leaf.type) is Literal:
        if value not in get_args(leaf.type):
            raise ValueError(f"{value!r} is none of {', '.join(get_args(leaf.type))}")
        return value
    if leaf.type is float and isinstance(value, str):  # YAML reads 1e-3 as text
        value = float(value)
    is_right = isinstance(value, int | float if leaf.type is float else leaf.type)
    if not is_right or (isinstance(value, bool) and leaf.type is not bool):
        raise ValueError(f"{value!r} is not of type {leaf.type.__name__}")
    low, high = leaf.arg.min, leaf.arg.max
    if leaf.type in (int, float):
        if not ((low is None or value >= low) and (high is None or value <= high)):
            raise ValueError(f"{value:g} is not from {low:g} to {high:g}")
        return leaf.type(value)
    return value


def _value(settings: object, leaf: Leaf) -> Any:
    value: Any = settings
    for name in leaf.path:
        value = getattr(value, name)
    return value
