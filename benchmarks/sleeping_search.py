"""A search whose trials only sleep and report: what the framework around them costs, and whether it loses any.

    python benchmarks/sleeping_search.py trials=40 search_epochs=2 storage=… study=… [sleep=0.1]

Every other word is a setting of `search`. The value of a trial is a smooth function of its settings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.trial_training import TrialScores
from pneumo_experiments.interrupts import Interrupted, handle_signals
from pneumo_experiments.scoring.thresholds import Thresholds
from pneumo_experiments.settings import Recipe, Search, from_flat, leaves
from pneumo_experiments.stages.search import run_study

FINGERPRINT = "0" * 64


@dataclass(frozen=True)
class Sleeping:
    """Epochs that last ``seconds`` each."""

    seconds: float
    count: int

    def epochs(self, recipe: Recipe) -> Iterator[TrialScores]:
        for epoch in range(1, self.count + 1):
            time.sleep(self.seconds)
            yield scores_of(recipe, epoch / self.count)

    def save_model(self, folder: Path, recipe: Recipe) -> None:
        (folder / "model.json").write_text("{}", encoding="utf-8")


def scores_of(recipe: Recipe, progress: float) -> TrialScores:
    """Highest for a dice_weight of 2 and a focal_weight of 0.5; the seed adds what looks like noise."""
    loss = recipe.loss
    distance = log(loss.dice_weight / 2) ** 2 + log(loss.focal_weight / 0.5) ** 2
    noise = 0.01 * ((loss.presence_weight * 1e6 + recipe.seed * 0.37) % 1)
    value = (0.85 - 0.02 * distance + noise) * progress
    return TrialScores(value, value, value + 0.01, value / 2, False, Thresholds(), 0.01)


def settings_of(words: list[str]) -> tuple[Search, float]:
    """Settings from words ``name=value``, and the seconds of an epoch."""
    texts = dict(word.split("=", 1) for word in words)
    seconds = float(texts.pop("sleep", 0.1))
    types = {leaf.name: leaf.type for leaf in leaves(Search)}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        values[name] = types[name](text) if types[name] in (int, float, str) else text
    return from_flat(Search, values), seconds


def search(settings: Search, seconds: float) -> None:
    """One worker, or as many as the settings say."""
    run_study(settings, FINGERPRINT, lambda: Sleeping(seconds, settings.study.search_epochs), _worker)


def _worker(settings: Search) -> None:
    search(settings, settings_of(sys.argv[1:])[1])


if __name__ == "__main__":
    handle_signals()
    try:
        search(*settings_of(sys.argv[1:]))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
