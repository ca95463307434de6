"""The train-and-validate loop that train and search share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import contact_sheet, overlay
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.loader import InMemoryData, StreamedData, batches, count_batches
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import State
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import Recipe

MAX_SHOWN = 12  # images of the first batch


def log_first_batch(
    data: InMemoryData | StreamedData, recipe: Recipe, epochs: int, compute: ComputeConfig
) -> None:
    """Logs the first images of the first training batch, as the network sees them, with their masks."""
    batch = next(batches(data, recipe, 1, epochs, compute.device))
    images = (batch.images[:MAX_SHOWN, 0] * 255).round().byte().cpu().numpy()
    truths = (batch.targets[:MAX_SHOWN] >= 0.5).cpu().numpy()
    pairs = zip(images, truths, strict=True)
    drawn = [overlay(image, truth, None, f"annotated {truth.mean():.1%}", 256) for image, truth in pairs]
    tracking.log_image(contact_sheet(drawn, columns=3), "first_batch.png")


@dataclass(frozen=True)
class EpochResult:
    """An epoch of training, and its predictions and scores on the validation images."""

    epoch: Epoch
    counts: ThresholdCounts
    thresholds: Thresholds  # the best of the coarse grid, at which it is scored
    scores: Scores
    metrics: dict[str, float]  # as logged


def train_and_validate(
    name: str,
    predictor: Predictor,
    data: InMemoryData | StreamedData,
    validation: Subset,
    recipe: Recipe,
    epochs: int,
    state: State | None = None,
    *,
    first_step: int = 0,
    lines: bool = True,
    pieces: int = 1,
) -> Iterator[EpochResult]:
    """Trains the predictor's network in place; logs each epoch in the active run and on the terminal.

    Scores at the best thresholds of the coarse grid are logged as ``val_dice`` and so on: these images choose
    the epoch and the thresholds. The caller may stop at any time; training continues from the ``state`` of an
    epoch. Metrics of epoch e are logged at step ``first_step`` + e. Without ``lines`` the terminal shows the
    progress bar alone, named ``name``; so many ``pieces`` of such work are to come, this one included.
    """
    # A backward pass takes twice the arithmetic of the forward pass.
    validating = len(validation) * predictor.work / 3
    earlier = 0 if state is None else state["steps"] // count_batches(len(data), recipe.batches.batch_size)
    with ProgressBar(
        name,
        epochs * (len(data) + validating),
        finished=earlier * (len(data) + validating),
        pieces=pieces,
        is_shown=distributed.is_main_process(),
    ) as bar:
        trained_epochs = fit(predictor, data, recipe, epochs, bar.update, state)
        start = time.perf_counter()
        for done, epoch in enumerate(trained_epochs, start=1):
            counts = validation.count(replace(predictor, network=epoch.network))
            bar.update(validating)
            thresholds = best_on_grid(counts)
            scores = validation.score(counts, thresholds)
            metrics = epoch.losses | scores.as_metrics("val_") | epoch.speed
            tracking.log_metrics(metrics, step=first_step + epoch.number)
            left = (time.perf_counter() - start) / done * (epochs - epoch.number)
            if lines:
                tqdm.write(
                    f"  epoch {epoch.number}/{epochs}  loss {epoch.losses['loss']:.4f}  validation Dice"
                    f" {scores.dice:.4f}  on positives {scores.on_positives}"
                    f"  {epoch.images_per_second:.1f} images/s  {tqdm.format_interval(left)} left"
                )
            yield EpochResult(epoch, counts, thresholds, scores, metrics)
