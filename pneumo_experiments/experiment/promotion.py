"""Whether a new version earns the alias champion: the paired comparison with the champion, and the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.scoring.comparison import Comparison, compare
from pneumo_experiments.settings import Registry
from pneumo_experiments.tracking import UnseenScore, Version

MIN_PATIENTS = 20  # with fewer the bootstrap of the difference covers too rarely
CHAMPION, CHALLENGER, NONE = tracking.CHAMPION, tracking.CHALLENGER, "none"


@dataclass(frozen=True)
class Pair:
    """Two models' scores on the same images, and how they differ."""

    new: UnseenScore
    current: UnseenScore
    comparison: Comparison
    patients: int


@dataclass(frozen=True)
class Decision:
    """The alias that a version gets (``none`` moves none), why, and the score that is told of it."""

    alias: str
    reason: str
    score: UnseenScore | None
    pair: Pair | None

    def tags(self, champion: Version | None) -> dict[str, str]:
        """Tags of the version about its score and the comparison."""
        score, tags = self.score, dict[str, str]()
        if score is not None:
            ends = {f"dice_{end}": score.metrics.get(f"dice_{end}") for end in ("low", "high")}
            tags = {"dice": score.dice, **ends, "dice_baseline": score.dice_baseline, "images": score.images}
            tags |= {"identity": score.identity, "subset": score.subset}
        if self.pair is not None and champion is not None:
            found = self.pair.comparison
            tags |= {"compared_with": champion.number, "gain": found.difference}
            tags |= {"probability_better": found.probability_better}
        return {name: str(value) for name, value in tags.items() if value is not None}


def compared(
    scores: Mapping[str, UnseenScore], champion: Version, champions: Mapping[str, UnseenScore]
) -> Pair | None:
    """The comparison on common unseen images of two models, by their scores; None without such images.

    Those that decided the champion come first, then the hold-outs and external data sets scored last.
    """
    deciding = (champion.tags or {}).get("identity")
    common = [scores[identity] for identity in scores.keys() & champions.keys()]
    common.sort(key=lambda s: (s.identity == deciding, s.subset == "holdout", s.timestamp), reverse=True)
    for new in common:
        if (pair := _pair(new, champions[new.identity])) is not None:
            return pair
    return None


def decide(
    registry: Registry,
    scores: Mapping[str, UnseenScore],
    champion: Version | None,
    pair: Pair | None,
    why: str,
) -> Decision:
    """The decision about a new version with these scores; ``why`` tells why there is no pair."""
    score = pair.new if pair else tracking.latest([*scores.values()]) if scores else None
    favoured, reason = _verdict(registry, score, champion, pair, why)
    if registry.promote == "never":
        return Decision(NONE, "promote=never", score, pair)
    if registry.promote == "always":
        return Decision(
            CHAMPION, "promote=always" if favoured else f"promote=always, although: {reason}", score, pair
        )
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
    baseline = f"above the all-empty baseline {score.dice_baseline:.4f}"
    if score.dice <= score.dice_baseline:
        return False, f"{dice} is not {baseline}"
    if champion is None:
        return True, f"the first champion: {dice} is {baseline}"
    if pair is None:
        return False, (
            f"{dice} cannot be compared with the champion, version {champion.number}: they have no scores of"
            f" the same images{because}; score both on the same images, or use promote=always"
        )
    found = pair.comparison
    favoured = found.difference > registry.min_gain and found.probability_better >= registry.min_probability
    few = f", unreliable with {pair.patients} patients" if pair.patients < MIN_PATIENTS else ""
    numbers = (
        f"{dice} against {pair.current.dice:.4f} of the champion, version {champion.number}:"
        f" {found.line}{few}"
    )
    if favoured:
        return True, numbers
    gain = f" and a gain above min_gain={registry.min_gain:g}"
    remedy = "score both on more images, or use promote=always"
    if found.difference <= 0:
        return False, f"{numbers}; not better"
    return False, f"{numbers}; needs min_probability={registry.min_probability:g}{gain}: {remedy}"


def _pair(new: UnseenScore, current: UnseenScore) -> Pair | None:
    """The comparison of two scores; None if a table of their images is lost, or they differ."""
    mine, others = dices_by_image(new), dices_by_image(current)
    if mine is None or others is None or mine.keys() != others.keys():
        return None
    ids = sorted(mine)  # whatever the order of the data sets: the same resamples
    patients = [mine[image_id][0] for image_id in ids]
    dices, before = (np.array([rows[image_id][1] for image_id in ids]) for rows in (mine, others))
    return Pair(new, current, compare(dices, before, patients), len({*patients}))


def dices_by_image(score: UnseenScore) -> dict[str, tuple[str, float]] | None:
    """Patient and Dice of each image by id; None without a table that has the score's images."""
    rows: list[dict[str, Any]] | None = tracking.read_table(score.run_id, "scores")
    try:
        found = {str(r["image_id"]): (str(r["patient"]), float(r["dice"])) for r in rows or []}
    except (LookupError, TypeError, ValueError):
        return None
    # A damaged table could otherwise decide.
    is_whole = len(found) == score.images and abs(
        float(np.mean([dice for _, dice in found.values()])) - score.dice
    ) < 1e-6  # fmt: skip
    return found if is_whole else None
