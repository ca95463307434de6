"""Templates of pages that are one file: every text escaped, no external resources."""

from __future__ import annotations

from functools import cache
from typing import Any, cast
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pneumo_experiments.words import plural, printable


@cache
def template(room: str, name: str) -> Template:
    """A template in the folder of a room; what it prints is escaped."""
    folders = (room, "data_report")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"pneumo_experiments.{name}", ".") for name in folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters.update(thousands="{:,}".format, plural=plural)
    return environment.get_template(name)


def address(source: str) -> str:
    """Source of an image: its data URI, else a file name beside the page; never an external address."""
    return source if source.startswith("data:image/") else "./" + quote(source)


def _finalize(value: Any) -> Any:
    """Texts without characters that cannot be printed; output of macros unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
