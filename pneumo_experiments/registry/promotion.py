"""Whether a new version earns the alias champion: the paired comparison with the champion, and the rules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pneumo_experiments.metrics.comparison import Comparison, compare, required_probability
from pneumo_experiments.registry.scores import UnseenScore, images_of, latest, scores_of
from pneumo_experiments.registry.versions import CHALLENGER, CHAMPION, NONE, Version, count_decision
from pneumo_experiments.settings import Registry

# Patients with a finding, for a first champion and for one that replaces another: with fewer the bootstrap of
# the difference covers too rarely.
MIN_FIRST, MIN_REPLACING = 10, 20


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
class Challenge:
    """What is known of a new version: its score, and its comparison with the champion or all-empty masks."""

    champion: Version | None
    score: UnseenScore | None
    pair: Pair | None
    problem: str = ""
    """why there is no pair"""

    @property
    def opponent(self) -> str:
        """What a new version is compared with: the champion's number, or ``baseline``."""
        return self.champion.number if self.champion else "baseline"

    def is_known_to(self, version: Version) -> bool:
        """Whether the version was decided by the same comparison, as its tags tell."""
        pair, tags = self.pair, version.tags
        is_same = pair is not None and version.is_decided_on(pair.new.identity)
        return is_same and tags.get("compared_with") == self.opponent

    def counted(self, registry: Registry, version: Version, models: int) -> Challenge:
        """Counts the decision about the version, unless it is none, and sets what it requires."""
        if self.pair is None or registry.promote == "never":
            return self
        decision = count_decision(version, self.pair.new.identity)
        required = required_probability(registry.min_probability, decision, models)
        return replace(self, pair=replace(self.pair, decision=decision, models=models, required=required))


@dataclass(frozen=True)
class Decision:
    """The alias that a version gets (``none`` moves none), why, and what was known."""

    alias: str
    reason: str
    challenge: Challenge

    def tags(self) -> dict[str, str]:
        """Tags of the version: the reason, its Dice, the images and what it was compared with on them.

        Few, since the list of versions shows them; the model card has the rest.
        """
        score, tags = self.challenge.score, {"reason": self.reason}
        if score is not None:
            tags |= {"dice": f"{score.dice:.4f}", "identity": score.identity}
            low, high = (score.metrics.get(f"dice_{end}") for end in ("low", "high"))
            tags |= {} if low is None or high is None else {"dice_interval": f"{low:.4f} to {high:.4f}"}
        if self.challenge.pair is not None:
            tags |= {"compared_with": self.challenge.opponent}
        return tags


def challenge(model_id: str | None, champion: Version | None) -> Challenge:
    """Compares a model with the champion, or without one with all-empty masks, by their scores.

    Images of enough patients with a finding come first, then those that decided about the champion, then the
    hold-outs and external data sets scored last.
    """
    scores, others = scores_of(model_id), scores_of(champion.model_id) if champion else {}
    deciding = champion.tags.get("identity") if champion else None
    common = [new for new in scores.values() if champion is None or new.identity in others]
    common.sort(key=lambda s: (s.identity == deciding, s.subset == "holdout", s.timestamp), reverse=True)
    first: Pair | None = None
    for new in common:
        pair = _pair(new, others.get(new.identity))
        first = first or pair
        if pair is not None and pair.positives >= _least_positives(champion):
            return Challenge(champion, new, pair)
    score = first.new if first else latest(scores.values()) if scores else None
    return Challenge(champion, score, first)


def decide(registry: Registry, challenge: Challenge) -> Decision:
    """The decision about a new version."""
    if registry.promote == "never":
        return Decision(NONE, "promote=never", challenge)
    favoured, reason = _verdict(registry, challenge)
    if registry.promote == "always":
        reason = f"promote=always: {reason}" if favoured else f"promote=always, although: {reason}"
        return Decision(CHAMPION, reason, challenge)
    return Decision(CHAMPION if favoured else CHALLENGER, reason, challenge)


def _verdict(registry: Registry, challenge: Challenge) -> tuple[bool, str]:
    """Whether the rules favour the new version, and why."""
    champion, score, pair = challenge.champion, challenge.score, challenge.pair
    because = f" ({challenge.problem})" if challenge.problem else ""
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
        lack = "they have no scores of the same images", "score both on the same images"
        if champion is None:
            lack = "the table of its images is lost", "score it again"
        return False, (
            f"{dice} cannot be compared with {who}: {lack[0]}{because}; {lack[1]}, or use promote=always"
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
    return True, line


def _least_positives(champion: Version | None) -> int:
    return MIN_REPLACING if champion else MIN_FIRST


def _pair(new: UnseenScore, current: UnseenScore | None) -> Pair | None:
    """The comparison of two scores, or of one with all-empty masks; None if tables are lost or differ."""
    mine, others = images_of(new), images_of(current) if current else None
    if mine is None or (current and (others is None or mine.keys() != others.keys())):
        return None
    ids = sorted(mine)  # whatever the order of the data sets: the same resamples
    images = [mine[image_id] for image_id in ids]
    before = [others[image_id].dice if others else float(not mine[image_id].positive) for image_id in ids]
    dices, patients = np.array([image.dice for image in images]), [image.patient for image in images]
    positives = {image.patient for image in images if image.positive}
    comparison = compare(dices, np.array(before), patients)
    return Pair(new, current.dice if current else new.dice_baseline, comparison, len(positives))
