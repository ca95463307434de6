"""Whether a new version earns the alias champion: the paired comparison with the champion, and the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pneumo_experiments.metrics.comparison import Comparison, compare, required_probability
from pneumo_experiments.registry import champions, model_scores, versions
from pneumo_experiments.registry.model_scores import UnseenScore
from pneumo_experiments.registry.versions import Version
from pneumo_experiments.settings import Registry

CHAMPION, CHALLENGER, NONE = versions.CHAMPION, versions.CHALLENGER, "none"
# Patients with a finding, for a first champion and for one that replaces another: with fewer the bootstrap of
# the difference covers too rarely.
MIN_FIRST, MIN_REPLACING = 10, 20
ImageRow = tuple[str, float, bool]  # patient, Dice, whether the truth has pixels


@dataclass(frozen=True)
class Pair:
    """A model's score on some images, and how it differs there from the champion's or the baseline's."""

    new: UnseenScore
    other_dice: float
    comparison: Comparison
    positives: int
    """patients with a finding"""
    decision: int = 0
    """which decision on these images it is, from 1"""
    models: int = 1
    """of so many the new one is the best on these images"""
    required: float = 1.0
    """the probability that this decision requires"""

    @property
    def line(self) -> str:
        """The comparison in words, with what the decision requires."""
        chosen = f", of the best of {self.models} models," if self.models > 1 else ""
        which = f"decision {self.decision} on these images{chosen} requires {self.required:.6g}"
        return f"{self.comparison.line}; {which}" if self.decision else self.comparison.line


@dataclass(frozen=True)
class Decision:
    """The alias that a version gets (``none`` moves none), why, and the score that is told of it."""

    alias: str
    reason: str
    score: UnseenScore | None
    pair: Pair | None

    def tags(self, champion: Version | None) -> dict[str, str]:
        """Tags of the version about its score and the comparison."""
        score, tags = self.score, dict[str, Any]()
        if score is not None:
            ends = {f"dice_{end}": score.metrics.get(f"dice_{end}") for end in ("low", "high")}
            tags = {"dice": score.dice, **ends, "dice_baseline": score.dice_baseline, "images": score.images}
            tags |= {"identity": score.identity, "subset": score.subset}
        if self.pair is not None:
            found = self.pair.comparison
            tags |= {"compared_with": champion.number if champion else "baseline", "gain": found.difference}
            tags |= {"probability_better": found.probability_better}
            if self.pair.decision:
                tags |= {"decision_number": self.pair.decision}
                tags |= {"required_probability": round(self.pair.required, 9)}
        return {name: str(value) for name, value in tags.items() if value is not None}


def compared(
    scores: Mapping[str, UnseenScore], champion: Version | None, champions: Mapping[str, UnseenScore]
) -> Pair | None:
    """The comparison on unseen images of a model and the champion, by their scores; None without common ones.

    Without a champion it is with all-empty masks. Images of enough patients with a finding come first, then
    those that decided the champion, then the hold-outs and external data sets scored last.
    """
    deciding = (champion.tags or {}).get("identity") if champion else None
    common = [new for new in scores.values() if champion is None or new.identity in champions]
    common.sort(key=lambda s: (s.identity == deciding, s.subset == "holdout", s.timestamp), reverse=True)
    first: Pair | None = None
    for new in common:
        if (pair := _pair(new, champions.get(new.identity))) is not None:
            if pair.positives >= _least_positives(champion):
                return pair
            first = first or pair
    return first


def _least_positives(champion: Version | None) -> int:
    return MIN_REPLACING if champion else MIN_FIRST


def counted(pair: Pair, registry: Registry, number: str, models: int) -> Pair:
    """Counts the decision about a version by this pair, and sets what it requires."""
    decision = champions.count_decision(registry.name, number, pair.new.identity)
    required = required_probability(registry.min_probability, decision, models)
    return replace(pair, decision=decision, models=models, required=required)


def decide(
    registry: Registry,
    scores: Mapping[str, UnseenScore],
    champion: Version | None,
    pair: Pair | None,
    why: str,
) -> Decision:
    """The decision about a new version with these scores; ``why`` tells why there is no pair."""
    score = pair.new if pair else model_scores.latest([*scores.values()]) if scores else None
    if registry.promote == "never":
        return Decision(NONE, "promote=never", score, pair)
    favoured, reason = _verdict(registry, score, champion, pair, why)
    if registry.promote == "always":
        reason = f"promote=always: {reason}" if favoured else f"promote=always, although: {reason}"
        return Decision(CHAMPION, reason, score, pair)
    return Decision(CHAMPION if favoured else CHALLENGER, reason, score, pair)


def _verdict(
    registry: Registry, score: UnseenScore | None, champion: Version | None, pair: Pair | None, why: str
) -> tuple[bool, str]:
    because = f" ({why})" if why else ""
    if score is None:
        return False, (
            "no score on unseen images (train and validation do not count); run score with subset=holdout,"
            f" or on another data set with subset=all{because}"
        )
    dice = f"Dice {score.dice:.4f} on {score.images_text}"
    if score.dice <= score.dice_baseline:
        return False, f"{dice} is not above the all-empty baseline {score.dice_baseline:.4f}"
    who = f"the champion, version {champion.number}" if champion else "the all-empty baseline"
    if pair is None:
        problem = "they have no scores of the same images", "score both on the same images"
        if champion is None:
            problem = "the table of its images is lost", "score it again"
        return False, (
            f"{dice} cannot be compared with {who}: {problem[0]}{because}; {problem[1]}, or use"
            " promote=always"
        )
    found, least = pair.comparison, _least_positives(champion)
    line = f"{dice} against {pair.other_dice:.4f} of {who}: {pair.line}"
    more = "score on more images (a larger holdout, an external data set), or use promote=always"
    if pair.positives < least:
        return False, f"{line}; has {pair.positives} patients with a finding, needs {least}: {more}"
    if found.difference <= 0:
        return False, f"{line}; not better"
    if champion is None and found.low <= 0:
        return False, f"{line}; needs an interval above 0: {more}"
    if champion and found.difference <= registry.min_gain:
        return False, f"{line}; needs a gain above min_gain={registry.min_gain:g}: {more}"
    if found.probability_better < pair.required:
        return False, f"{line}; not sure enough: {more}"
    return True, line if champion else f"the first champion: {line}"


def _pair(new: UnseenScore, current: UnseenScore | None) -> Pair | None:
    """The comparison of two scores, or of one with all-empty masks; None if tables are lost or differ."""
    mine, others = rows_by_image(new), rows_by_image(current) if current else None
    if mine is None or (current and (others is None or mine.keys() != others.keys())):
        return None
    ids = sorted(mine)  # whatever the order of the data sets: the same resamples
    patients, dices, has_finding = zip(*(mine[image_id] for image_id in ids), strict=True)
    before = [others[image_id][1] if others else float(not mine[image_id][2]) for image_id in ids]
    positives = {patient for patient, here in zip(patients, has_finding, strict=True) if here}
    comparison = compare(np.array(dices), np.array(before), patients)
    return Pair(new, current.dice if current else new.dice_baseline, comparison, len(positives))


def rows_by_image(score: UnseenScore) -> dict[str, ImageRow] | None:
    """Patient, Dice and truth of each image by id; None without a table that has the score's images."""
    rows: list[dict[str, Any]] | None = model_scores.read_table(score.run_id, "scores")
    try:
        found = {
            str(r["image_id"]): (str(r["patient"]), float(r["dice"]), float(r["truth_area_px"]) > 0)
            for r in rows or []
        }
    except (LookupError, TypeError, ValueError):
        return None
    # A damaged table could otherwise decide.
    means = [(dice, not has_finding) for _, dice, has_finding in found.values()]
    is_whole = len(found) == score.images and np.allclose(
        np.mean(means, axis=0), [score.dice, score.dice_baseline], rtol=0, atol=1e-6
    )
    return found if is_whole else None
