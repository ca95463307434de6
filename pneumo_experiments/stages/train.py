"""Entry point ``train``: fit a network, keep its best weights, log it as a model."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.checkpoint import Checkpoint, lock_checkpoints
from pneumo_experiments.learning.launch import is_launched, launch
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.search.winner import best_of_study
from pneumo_experiments.settings import Train, is_none
from pneumo_experiments.training.fold import TrainedFold, train_fold
from pneumo_experiments.training.folds import log_ensemble, log_out_of_fold
from pneumo_experiments.training.progress import checkpoint_of
from pneumo_experiments.training.settings_source import Origin, origin_of


@dataclass(frozen=True)
class TrainResult:
    """Address of the logged model, and its scores on the validation images; of an ensemble out of fold."""

    model: str
    scores: Scores


def train(settings: Train, keep_checkpoint: bool = False) -> TrainResult:
    """Trains one network, or for ``fold=all`` one per fold, and then returns their ensemble.

    With ``processes``, or started by torchrun, several processes do it together. Waits while another training
    with the same settings runs. With ``keep_checkpoint`` it stays until ``clear_checkpoints`` removes it.
    """
    if is_launched():
        distributed.init_process_group()
    # Read once: a search that still runs could change its mind.
    origin: Origin = distributed.broadcast(_read_origin(settings) if distributed.is_main_process() else None)
    settings = origin.settings
    with _open_dataset(settings) as dataset:
        checkpoints = _checkpoints(settings, dataset) if distributed.is_main_process() else []
        with lock_checkpoints(checkpoints, patience=0 if is_launched() else -1):
            if settings.schedule.processes > 1 and not is_launched():
                tracking.open_store()  # a store that does not open is reported once, not by every process
                tracking.end_with_mlflow_run()  # the processes of the training end with this one
                result = launch(settings.schedule.processes, _train_in_group, origin, tracking.active_run())
            else:
                with _only_main_process_speaks():
                    result = _train_folds(origin, dataset, None)
            # Only now: if a later fold is interrupted, those that have ended are not trained again.
            if not keep_checkpoint:
                for checkpoint in checkpoints:
                    checkpoint.clear()
    return result


def _read_origin(settings: Train) -> Origin:
    is_searched = not is_none(settings.from_study) and is_none(settings.reproduce)
    best = best_of_study(settings.storage, settings.from_study) if is_searched else None
    return origin_of(settings, best)


def _open_dataset(settings: Train) -> Dataset:
    """Opens the data set; one that cannot be opened leaves a failed run."""
    try:
        return Dataset.open(settings.dataset)
    except UserError:
        with tracking.run("train", settings):
            raise


def clear_checkpoints(settings: Train) -> None:
    """Removes the checkpoints of ``train``, unless another training with the same settings uses them."""
    with suppress(UserError), Dataset.open(settings.dataset) as dataset:
        checkpoints = _checkpoints(settings, dataset)
        with lock_checkpoints(checkpoints, patience=0):
            for checkpoint in checkpoints:
                checkpoint.clear()


def _train_in_group(origin: Origin, parent: str | None) -> TrainResult:
    """What each process of a group runs."""
    with Dataset.open(origin.settings.dataset) as dataset, _only_main_process_speaks():
        return _train_folds(origin, dataset, parent)


@contextmanager
def _only_main_process_speaks() -> Generator[None]:
    if distributed.is_main_process():
        yield
        return
    with tracking.disabled(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _train_folds(origin: Origin, dataset: Dataset, parent: str | None) -> TrainResult:
    settings = origin.settings
    if settings.split.fold != "all":
        fold = train_fold("train", origin, dataset, parent)
        return TrainResult(fold.model, fold.scores)
    with tracking.run("train", settings, parent=parent):
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training")
        folds = [
            train_fold(
                f"fold {number}", replace(origin, settings=one), dataset, None, settings.split.folds - number
            )
            for number, one in enumerate(_settings_per_fold(settings))
        ]
        if not distributed.is_main_process():
            return TrainResult("", folds[0].scores)
        return _finish_folds(settings, folds)


def _finish_folds(settings: Train, folds: list[TrainedFold]) -> TrainResult:
    """Logs the out-of-fold scores, and the networks of all folds as one model."""
    scores = log_out_of_fold(folds)
    model = log_ensemble(folds, settings.evaluation.threshold_trials, settings.recipe.seed)
    dataset = folds[0].validation.dataset
    tracking.describe(
        f"{settings.recipe.network.network} at {dataset.image_size} px, one for each of"
        f" {len(folds)} folds; together {model}.\n"
        f"Out-of-fold Dice {scores.dice:.3f} (all-empty {scores.dice_baseline:.3f}),"
        f" on positives {scores.on_positives}."
    )
    print(f"train: {len(folds)} folds, out-of-fold Dice {scores.dice:.4f}, together logged as {model}")
    return TrainResult(model, scores)


def _settings_per_fold(settings: Train) -> list[Train]:
    """The settings of each network to train."""
    if settings.split.fold != "all":
        return [settings]
    folds = range(settings.split.folds)
    return [replace(settings, split=replace(settings.split, fold=str(fold))) for fold in folds]


def _checkpoints(settings: Train, dataset: Dataset) -> list[Checkpoint]:
    return [checkpoint_of(one, dataset.fingerprint) for one in _settings_per_fold(settings)]
