"""A search whose trials only sleep and report: what the framework costs, and whether it loses any.

    python benchmarks/sleeping_search.py trials=40 search_epochs=2 storage=… study=… [sleep=0.1] [model_mb=0]

Every other word is a setting of `search`. The value of a trial is a smooth function of its settings; a kept
model is a file of ``model_mb`` megabytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import measure  # noqa: F401 # makes the package importable from its folder
import numpy as np

from pneumo_experiments.errors import UserError
from pneumo_experiments.interrupts import Interrupted, Terminated, handle_signals
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.search.trial_training import TrialScores
from pneumo_experiments.settings import Recipe, Search, from_flat, leaves
from pneumo_experiments.stages.search import run_study

FINGERPRINT = "0" * 64


@dataclass(frozen=True)
class Sleeping:
    """Epochs that last ``seconds`` each."""

    seconds: float
    model_mb: float
    count: int

    def epochs(self, recipe: Recipe, trials_left: int) -> Iterator[TrialScores]:
        for epoch in range(1, self.count + 1):
            time.sleep(self.seconds)
            yield scores_of(recipe, epoch / self.count)

    def save_model(self, folder: Path, recipe: Recipe) -> None:
        (folder / "weights.pt").write_bytes(_weights(self.model_mb))


@cache
def _weights(megabytes: float) -> bytes:
    return np.random.default_rng(0).bytes(int(megabytes * 1e6))


def scores_of(recipe: Recipe, progress: float) -> TrialScores:
    """Highest for a dice_weight of 2 and a focal_weight of 0.5; the seed adds what looks like noise."""
    loss = recipe.loss
    distance = log(loss.dice_weight / 2) ** 2 + log(loss.focal_weight / 0.5) ** 2
    noise = 0.01 * ((loss.presence_weight * 1e6 + recipe.seed * 0.37) % 1)
    value = (0.85 - 0.02 * distance + noise) * progress
    scores = (value, value + 0.01, value / 2, 0.0, 0.0, Thresholds(), 0.01)
    return TrialScores(*scores, np.full(2, value))


def settings_of(words: list[str]) -> tuple[Search, Sleeping]:
    """Settings and training from words ``name=value``."""
    texts = dict(word.split("=", 1) for word in words)
    seconds, model_mb = float(texts.pop("sleep", 0.1)), float(texts.pop("model_mb", 0))
    types = {leaf.name: leaf.type for leaf in leaves(Search)}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        values[name] = types[name](text) if types[name] in (int, float, str) else text
    settings = from_flat(Search, values)
    return settings, Sleeping(seconds, model_mb, settings.study.search_epochs)


def search(settings: Search) -> None:
    """One worker, or as many as the settings say."""
    training = settings_of(sys.argv[1:])[1]
    run_study(settings, FINGERPRINT, lambda settings: training, search)


def main(words: list[str]) -> None:
    """Searches with these settings, and ends this process as the command line would."""
    handle_signals()
    try:
        search(settings_of(words)[0])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (Interrupted, Terminated) as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
