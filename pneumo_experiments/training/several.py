"""Several trainings side by side: what differs, and the mean and spread of their scores over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np

from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.settings import Train, as_texts

FIGURES = ["trainings", "validation Dice", "spread over seeds", "on positives", "all-empty"]


@dataclass(frozen=True)
class SeedGroup:
    """Trainings that differ in their seed alone: their settings that differ from others, and their scores."""

    settings: Mapping[str, str]
    scores: Sequence[Scores]

    @property
    def dice_mean(self) -> float:
        return float(np.mean([one.dice for one in self.scores]))

    @property
    def dice_sd(self) -> float:
        """The sample standard deviation over seeds; NaN of one."""
        return float(np.std([one.dice for one in self.scores], ddof=1)) if len(self.scores) > 1 else nan

    @property
    def metrics(self) -> dict[str, float]:
        """Mean and spread; without that of one."""
        values = {"trainings/dice_mean": self.dice_mean, "trainings/dice_sd": self.dice_sd}
        return {name: value for name, value in values.items() if not isnan(value)}

    @property
    def row(self) -> list[str]:
        """The settings' values, then the FIGURES."""
        positive = float(np.mean([one.dice_positive for one in self.scores]))
        figures = (self.dice_mean, self.dice_sd, positive, self.scores[0].dice_baseline)
        return [*self.settings.values(), str(len(self.scores)), *map(_text, figures)]


def _text(figure: float) -> str:
    return "–" if isnan(figure) else f"{figure:.4f}"


def varied_settings(several: Sequence[Train]) -> list[dict[str, str]]:
    """The settings that are not the same in all trainings, as text, for each."""
    texts = [as_texts(settings) for settings in several]
    names = [name for name in texts[0] if len({one[name] for one in texts}) > 1]
    return [{name: one[name] for name in names} for one in texts]


def group_by_seed(varied: Sequence[Mapping[str, str]], scores: Sequence[Scores]) -> list[SeedGroup]:
    """The scores of trainings with equal settings but for their seed, in order."""
    groups = dict[tuple[tuple[str, str], ...], list[Scores]]()
    for values, one in zip(varied, scores, strict=True):
        key = tuple(item for item in values.items() if item[0] != "seed")
        groups.setdefault(key, []).append(one)
    return [SeedGroup(dict(key), members) for key, members in groups.items()]
