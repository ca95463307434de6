"""The model card of a version, as Markdown: what runs, scores and the model itself know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pneumo_experiments.metrics.scores import notes
from pneumo_experiments.registry.lineage import Lineage, changes, score_links
from pneumo_experiments.registry.promotion import Decision
from pneumo_experiments.registry.scores import read_artifact, read_table
from pneumo_experiments.registry.versions import CHALLENGER, CHAMPION, NONE, Version
from pneumo_experiments.serving import Detector
from pneumo_experiments.tracking import tracking_uri
from pneumo_experiments.words import plural, printable

MAX_CHARACTERS = 4800  # of a description; PostgreSQL refuses more than 5000
MAX_REASON = 700
MAX_FOLDS = 5  # that are named
MAX_CHANGES = 15  # since the champion, that are named
DECISIONS = {CHAMPION: "made the champion", CHALLENGER: "a challenger", NONE: "no alias"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ModelCard:
    """What a card tells; what is not known is left out."""

    version: Version
    detector: Detector
    decision: Decision
    code_version: str
    links: Mapping[str, str]
    """address by text"""
    groups: Sequence[Row]
    """rows of the table by_group of the run that scored the model, with notes; none if they are lost"""
    parts: Mapping[str, Mapping[str, int]]
    """images, patients and positives of each part of the split, where one training has one split"""
    changes: Mapping[str, tuple[str, str]]
    """the champion's and this model's value of what shaped the weights and differs"""

    @property
    def text(self) -> str:
        """At most MAX_CHARACTERS; links at the end are left out where there is no room."""
        text = _template().render(card=self, thresholds=self.detector.thresholds, most=MAX_CHANGES)
        if len(text) > MAX_CHARACTERS and self.links:
            return replace(self, links=dict([*self.links.items()][:-1])).text
        return text[:MAX_CHARACTERS]

    @property
    def outcome(self) -> str:
        """The decision and its reason."""
        return f"{DECISIONS[self.decision.alias]}; {self.decision.reason[:MAX_REASON]}"

    @property
    def serve(self) -> str:
        """The command that serves the model, without the password of the store."""
        address = f"models:/{self.version.name}/{self.version.number}"
        command = f"mlflow models serve -m {address} --env-manager local --port 5001"
        return f"MLFLOW_TRACKING_URI={quote(tracking_uri())} {command}"

    @property
    def everyone(self) -> Row:
        """The row of all images; empty if it is lost."""
        return next((row for row in self.groups if row["group"] == "all"), dict[str, Any]())

    @property
    def sizes(self) -> list[tuple[str, Row]]:
        """Name and row of all images, and of each third of the findings by area."""
        thirds = [(row["value"], row) for row in self.groups if row["group"] == "area"]
        return [("all images", self.everyone), *thirds] if self.everyone else []

    @property
    def data(self) -> dict[str, str]:
        """Name and value of what is known of data set and split."""
        settings = [member.settings for member in self.detector.members]
        first, folds = settings[0], [str(each["fold"]) for each in settings]
        fold = ",".join(folds[:MAX_FOLDS]) + (",…" if len(folds) > MAX_FOLDS else "")
        seed = first["split_seed"]
        return {
            "data set": Path(str(first.get("dataset", "unknown"))).name,
            "fingerprint": self.detector.data_fingerprint[:16],
            "image size": f"{self.detector.image_size} px",
            "split": f"holdout={first['holdout']} folds={first['folds']} fold={fold} split_seed={seed}",
            **({"networks": str(len(settings))} if len(settings) > 1 else {}),
        }


def model_card(version: Version, detector: Detector, decision: Decision, lineage: Lineage) -> ModelCard:
    """Gathers what a card tells."""
    score, runs = decision.challenge.score, lineage.training_runs
    groups, parts = list[Row](), dict[str, dict[str, int]]()
    with suppress(LookupError, TypeError, ValueError):  # damaged: as if it were lost
        rows = read_table(score.run_id, "by_group") if score else []
        groups = [row | notes(row) for row in rows if {"group", "value", "images"} <= row.keys()]
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        split: Any = read_artifact(runs[0], "split.json") if len(runs) == 1 else None
        for name, part in split["parts"].items():
            parts[name] = {key: int(part[key]) for key in ("images", "patients", "positives")}
    return ModelCard(
        version,
        detector,
        decision,
        lineage.code_version,
        {**lineage.links, **(score_links(score.run_id) if score else {})},
        groups,
        parts,
        changes(champion.model_id, lineage) if (champion := decision.challenge.champion) else {},
    )


def _score_text(row: Row, name: str, digits: int = 3) -> str:
    """``0.912 (0.858 to 0.956), 31 of 34``, without what is undefined."""
    value, *ends = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "–"
    interval = "" if None in ends else f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    note = f", {row[f'{name}_note']}" if row.get(f"{name}_note") else ""
    return f"{value:.{digits}f}{interval}{note}"


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
    filters.update(code=_code, plural=plural, score=_score_text)
    return environment.get_template("model_card.md.j2")


def _finalize(value: Any) -> Any:
    """Texts on one line, without what Markdown or HTML would read as markup."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(value))


def _code(text: str) -> Markup:
    """Text in code style, where no character is markup."""
    return Markup(f"`{re.sub('[`|<>]', '?', printable(text))}`")
