"""The train-and-validate loop that train and search share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isnan

from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.loader import InMemoryData, StreamedData
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import State
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import best_on_grid
from pneumo_experiments.settings import Recipe

CURVES = ("dice", "dice_positive", "sensitivity", "specificity", "auroc")  # scores after each epoch


@dataclass(frozen=True)
class FoldImages:
    """The images of a fold: those that train a network, and those that choose its epoch and thresholds."""

    training: InMemoryData | StreamedData
    validation: Subset

    def work(self, predictor: Predictor) -> float:
        """Work of an epoch, in training images: what ``advance`` of ``train_and_validate`` adds up to."""
        return len(self.training) + self.validating(predictor)

    def validating(self, predictor: Predictor) -> float:
        """Work of a validation: a backward pass takes twice the arithmetic of the forward pass."""
        return len(self.validation) * predictor.work / 3


@dataclass(frozen=True, eq=False)
class EpochResult:
    """An epoch of training, and its evaluation on the validation images, which chose the thresholds."""

    epoch: Epoch
    evaluation: Evaluation

    @property
    def scores(self) -> Scores:
        """The scores of the validation images."""
        return self.evaluation.scores

    @property
    def metrics(self) -> dict[str, float]:
        """Losses, scores as ``epoch/dice`` and so on, speed, and how the optimiser did."""
        scores = {f"epoch/{name}": getattr(self.scores, name) for name in CURVES}
        return self.epoch.as_metrics() | {name: value for name, value in scores.items() if not isnan(value)}


def train_and_validate(
    predictor: Predictor,
    images: FoldImages,
    recipe: Recipe,
    epochs: int,
    state: State | None = None,
    advance: Callable[[float], None] = lambda work: None,
) -> Iterator[EpochResult]:
    """Trains the predictor's network in place; yields each epoch, at the best thresholds of the coarse grid.

    The caller may stop at any time; training continues from the ``state`` of an epoch. ``advance`` is called
    with each bit of work that is done.
    """
    trained = fit(predictor, images.training, recipe, epochs, advance, state)
    for epoch in trained:
        counts = images.validation.count(replace(predictor, network=epoch.network))
        advance(images.validating(predictor))
        yield EpochResult(epoch, Evaluation(images.validation, counts, best_on_grid(counts)))
