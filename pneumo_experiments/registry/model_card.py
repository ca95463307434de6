"""The model card of a version: gathers what runs, scores and the model itself know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pneumo_experiments.metrics.scores import notes
from pneumo_experiments.registry import model_scores
from pneumo_experiments.registry.card_text import CardScore, ModelCard, SizeRow, card_text
from pneumo_experiments.registry.lineage import Lineage
from pneumo_experiments.registry.model_scores import UnseenScore
from pneumo_experiments.registry.promotion import CHALLENGER, CHAMPION, Decision
from pneumo_experiments.serving import Detector

DECISIONS = {CHAMPION: "made the champion", CHALLENGER: "a challenger", "none": "no alias"}
MAX_FOLDS = 5  # that are named


def model_card(name: str, number: str, detector: Detector, decision: Decision, lineage: Lineage) -> str:
    """The card as Markdown; what is not known is left out."""
    score = decision.score
    rows = [] if score is None else _groups(score)
    everyone = next((row for row in rows if row.get("group") == "all"), None)
    return card_text(
        ModelCard(
            name=name,
            number=number,
            network=detector.networks,
            dice=None if score is None else _dice(score, (everyone or {}).get("dice_note")),
            dice_baseline=0.0 if score is None else score.dice_baseline,
            scored_images="" if score is None else f"{score.images} {score.subset} images",
            scored_patients=None if everyone is None else int(everyone["patients"]),
            decision=DECISIONS[decision.alias],
            reason=decision.reason,
            sizes=_sizes(rows),
            thresholds=asdict(detector.thresholds),
            data=_data(detector),
            parts=_parts(lineage.training_runs),
            code_version=lineage.code_version,
            links=[(link.text, link.address) for link in lineage.links],
        )
    )


def _dice(score: UnseenScore, note: str | None) -> CardScore:
    return CardScore(score.dice, score.metrics.get("dice_low"), score.metrics.get("dice_high"), note)


def _groups(score: UnseenScore) -> list[dict[str, Any]]:
    """Rows of the table by_group of the run that scored the model, with notes; none if they are lost."""
    return [row | notes(row) for row in model_scores.read_table(score.run_id, "by_group") or []]


def _sizes(rows: Sequence[dict[str, Any]]) -> list[SizeRow]:
    """All images and each third of the findings by area."""

    def row(name: str, row: dict[str, Any]) -> SizeRow:
        def score(key: str) -> CardScore:
            return CardScore(
                row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"), row.get(f"{key}_note")
            )

        return SizeRow(name, int(row["images"]), score("sensitivity"), score("specificity"), score("dice"))

    everyone = [row("all images", each) for each in rows if each.get("group") == "all"]
    names = ("small", "medium", "large")  # thirds are numbered from 1
    thirds = [each for each in rows if each.get("group") == "area"]
    return everyone + [
        row(f"{names[int(str(each['value'])[0]) - 1]} ({str(each['value'])[3:]})", each) for each in thirds
    ]


def _data(detector: Detector) -> dict[str, str]:
    settings = [member.settings for member in detector.members]
    first, folds = settings[0], [str(each["fold"]) for each in settings]
    named = ",".join(folds[:MAX_FOLDS]) + (",…" if len(folds) > MAX_FOLDS else "")
    split = f"holdout={first['holdout']} folds={first['folds']} fold={named} split_seed={first['split_seed']}"
    return {
        "data set": Path(str(first.get("dataset", "unknown"))).name,
        "fingerprint": detector.data_fingerprint[:16],
        "image size": f"{detector.image_size} px",
        "split": split,
        **({"networks": str(len(settings))} if len(settings) > 1 else {}),
    }


def _parts(training_runs: Sequence[str]) -> dict[str, dict[str, int]]:
    """Images, patients and positives of each part of the split, where one training has one split."""
    content: Any = model_scores.read_json(training_runs[0], "split.json") if len(training_runs) == 1 else {}
    parts = dict[str, dict[str, int]]()
    try:
        for name, part in cast("dict[str, Any]", content["parts"]).items():
            parts[name] = {key: int(part[key]) for key in ("images", "patients", "positives")}
    except (TypeError, LookupError, ValueError, AttributeError):
        return {}
    return parts
