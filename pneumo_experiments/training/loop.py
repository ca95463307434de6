"""The train-and-validate loop that train and search share, and how far a training has come."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import Any

from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.loader import InMemoryData, StreamedData
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import State
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import ThresholdCounts, best_on_grid
from pneumo_experiments.settings import Recipe, Train, weight_shaping

VERSION = 2  # of checkpoints: increase when an earlier one would continue as another training


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
    seconds_left: float  # until the last epoch ends, at the rate so far

    @property
    def scores(self) -> Scores:
        """The scores of the validation images."""
        return self.evaluation.scores

    @property
    def metrics(self) -> dict[str, float]:
        """Losses, scores as ``val_dice`` and so on, and speed."""
        return self.epoch.losses | self.scores.as_metrics("val_") | self.epoch.speed


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
    start = time.perf_counter()
    trained = fit(predictor, images.training, recipe, epochs, advance, state)
    for done, epoch in enumerate(trained, start=1):
        counts = images.validation.count(replace(predictor, network=epoch.network))
        advance(images.validating(predictor))
        left = (time.perf_counter() - start) / done * (epochs - epoch.number)
        yield EpochResult(epoch, Evaluation(images.validation, counts, best_on_grid(counts)), left)


@dataclass
class TrainingState:
    """How far a training has come: what its checkpoint holds, but for ``counts``.

    The dicts have the best epochs by number, the best first.
    """

    run_id: str = ""
    """the run that has its metrics"""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """metrics of each epoch"""
    dices: dict[int, float] = field(default_factory=dict[int, float])
    networks: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    """state dicts, in host memory"""
    trainer: State | None = None
    """from which training continues"""
    counts: dict[int, ThresholdCounts] = field(default_factory=dict[int, ThresholdCounts])
    """of the validation images; an epoch before an interruption is predicted again"""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> TrainingState | None:
        """What was saved last; None without a checkpoint of this version that can be read."""
        last = checkpoint.last()
        if last is None:
            return None
        if last.get("version") != VERSION:
            warnings.warn(
                f"{checkpoint.folder}: written by another version; training starts over", stacklevel=2
            )
            return None
        return cls(last["run_id"], last["history"], last["dices"], last["networks"], last["state"])

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes everything that continuing after the latest epoch needs."""
        last = {"version": VERSION, "run_id": self.run_id, "history": self.history, "dices": self.dices}
        checkpoint.save(last | {"state": self.trainer}, self.networks)

    def add(self, result: EpochResult, best_k: int) -> None:
        """Keeps the epoch's network if it is among the best; of equal ones the later."""
        number = result.epoch.number
        self.history.append(result.metrics)
        self.trainer = result.epoch.state()
        self.dices[number] = result.scores.dice
        best = sorted(self.dices, key=lambda epoch: (self.dices[epoch], epoch), reverse=True)[:best_k]
        if number in best:
            # In host memory, as after resuming: the device needs its own.
            state = result.epoch.network.state_dict()
            self.networks[number] = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self.counts[number] = result.evaluation.counts
        self.dices = {epoch: self.dices[epoch] for epoch in best}
        self.networks = {epoch: self.networks[epoch] for epoch in best}
        self.counts = {epoch: self.counts[epoch] for epoch in best if epoch in self.counts}

    @property
    def learned(self) -> list[dict[str, float]]:
        """Metrics from the first epoch on that finds something; of all epochs if there is nothing to find."""
        return list(dropwhile(lambda metrics: metrics.get("val_dice_positive") == 0, self.history))

    def is_stuck(self, patience: int) -> bool:
        """Whether so many epochs of ``learned`` brought no better Dice; never for a patience of 0."""
        dices = [metrics["val_dice"] for metrics in self.learned]
        return bool(dices) and 0 < patience < len(dices) - dices.index(max(dices))


def checkpoint_of(settings: Train, fingerprint: str) -> Checkpoint:
    """Where a training with these settings on the data set with this fingerprint keeps its checkpoint."""
    key = json.dumps([fingerprint, weight_shaping(settings)], sort_keys=True)
    return Checkpoint(settings.schedule.checkpoints / hashlib.sha256(key.encode()).hexdigest()[:16])
