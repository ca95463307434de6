"""Entry point ``train``: a network, its validation epoch by epoch, and the model it leaves."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pneumo_experiments import tracking
from pneumo_experiments.data.store import Dataset
from pneumo_experiments.learning.device import choose_machine
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.scoring.scores import Scores
from pneumo_experiments.scoring.thresholds import Tally
from pneumo_experiments.serving import Detector, save
from pneumo_experiments.settings import Train, as_params
from pneumo_experiments.stages.cohort import Cohort, judged_epochs, log_overlays, log_split, parts_of
from pneumo_experiments.stages.search import refine_thresholds


@dataclass(frozen=True)
class Trained:
    """Address of the logged model, and its scores on the validation images."""

    model: str
    scores: Scores


@dataclass(frozen=True)
class Kept:
    """The best epoch so far: its validation Dice, weights and predictions."""

    epoch: int
    dice: float
    state: dict[str, Any]
    tally: Tally


def train(settings: Train) -> Trained:
    """Trains, keeps the epoch with the best Dice on the validation images, and logs it as a model."""
    with tracking.run("train", settings), Dataset.open(settings.dataset) as dataset:
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training")
        parts = parts_of(dataset, settings)
        log_split(dataset, parts)
        validation = Cohort(dataset, parts.validation)
        examples = Cohort(dataset, parts.train).examples()
        machine = choose_machine(settings)
        tracking.log_found({"device_used": str(machine.device), "precision_used": machine.precision})
        network = build(settings.network, settings.weights, settings.seed)
        predictor = Predictor(network, machine, settings.mirror)
        print(
            f"train: {settings.network} at {dataset.image_size} px, {machine.device}, {machine.precision};"
            f" {len(examples)} images, {examples.present.sum()} positive; {len(validation)} to validate"
        )

        best = Kept(0, -1.0, network.state_dict(), Tally())
        for judged in judged_epochs("train", predictor, examples, validation, settings, settings.epochs):
            if judged.scores.dice >= best.dice:  # of equals the later, which has learned longer
                state = copy.deepcopy(network.state_dict())
                best = Kept(judged.epoch.number, judged.scores.dice, state, judged.tally)
        network.load_state_dict(best.state)

        thresholds = refine_thresholds(best.tally, settings.threshold_trials, settings.seed)
        scores = validation.score(best.tally, thresholds)
        # One step past the last epoch: the epoch that was kept, at its own thresholds.
        tracking.log_metrics(scores.as_metrics() | {"best_epoch": best.epoch}, step=settings.epochs + 1)
        tracking.log_found(asdict(thresholds))
        log_overlays(validation, best.tally, predictor, thresholds, settings.overlays)
        detector = Detector(
            predictor, dataset.image_size, thresholds, as_params(settings), dataset.fingerprint
        )
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), detector)
            model = tracking.log_model(Path(folder))
        print(f"train: kept epoch {best.epoch} of {settings.epochs}, logged as {model}")
        tracking.describe(
            f"{settings.network} at {dataset.image_size} px, {len(examples)} images;"
            f" kept epoch {best.epoch} of {settings.epochs}.\n"
            f"Validation Dice {scores.dice:.3f} (all-empty {scores.dice_baseline:.3f}),"
            f" on positives {scores.dice_positive:.3f}."
        )
    return Trained(model, scores)
