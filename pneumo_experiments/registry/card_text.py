"""The model card of a registered version as Markdown, from the template ``model_card.md.j2``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pneumo_experiments.words import plural, printable

MAX_CHARACTERS = 4800  # of a description; PostgreSQL refuses more than 5000
MAX_REASON = 700


@dataclass(frozen=True)
class CardScore:
    """A score with its 95% interval, all NaN or None where it is undefined, and a note."""

    value: float | None
    low: float | None
    high: float | None
    note: str | None = None

    @property
    def text(self) -> str:
        """``0.912 (0.858 to 0.956), 31 of 34``, without what is undefined."""
        if not _is_number(self.value):
            return "–"
        ends = (
            f" ({self.low:.3f} to {self.high:.3f})" if _is_number(self.low) and _is_number(self.high) else ""
        )
        return f"{self.value:.3f}{ends}{f', {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class SizeRow:
    """Sensitivity and specificity of images by size of the finding."""

    name: str
    images: int
    sensitivity: CardScore
    specificity: CardScore
    dice: CardScore


@dataclass(frozen=True)
class ModelCard:
    """What the card tells; ``dice`` is None for a model without a score on unseen images."""

    name: str
    number: str
    network: str
    dice: CardScore | None
    dice_baseline: float
    scored_images: str
    scored_patients: int | None
    decision: str
    reason: str
    sizes: Sequence[SizeRow]
    thresholds: Mapping[str, float]
    data: Mapping[str, str]
    """name and value of what is known of data and split"""
    parts: Mapping[str, Mapping[str, int]]
    """images, patients and positives of each part of the split"""
    code_version: str
    links: Sequence[tuple[str, str]]


def card_text(card: ModelCard) -> str:
    """The card as Markdown, at most MAX_CHARACTERS; links at the end are left out where there is no room."""
    card = replace(card, reason=card.reason[:MAX_REASON])
    while True:
        text = _template().render(card=card)
        if len(text) <= MAX_CHARACTERS or not card.links:
            return text[:MAX_CHARACTERS]
        card = replace(card, links=card.links[:-1])


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pneumo_experiments.registry", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters.update(code=_code, plural=plural)
    return environment.get_template("model_card.md.j2")


def _finalize(value: Any) -> Any:
    """Texts on one line, without what Markdown or HTML would read as markup."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(value))


def _code(text: str) -> Markup:
    """Text in code style, where no character is markup."""
    return Markup(f"`{re.sub('[`|<>]', '?', printable(text))}`")


def _is_number(value: float | None) -> bool:
    return value is not None and value == value
