"""The short training of a trial, and the scores of each of its epochs."""

from __future__ import annotations

import copy
import hashlib
import json
import timeit
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.splits import Split, assign_folds
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.pictures import Picture, ranked_overlays
from pneumo_experiments.evaluation.subset import Subset, make_split, require_positives
from pneumo_experiments.figures import outlines
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.fit import fit
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.locks import work_folder
from pneumo_experiments.metrics.thresholds import Thresholds, best_dice_on_positives, cross_fitted
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import save
from pneumo_experiments.settings import Recipe, Search, SplitSettings, weight_shaping
from pneumo_experiments.training.fold import initial_network, make_detector, seen_by_start
from pneumo_experiments.training.loop import EpochResult, FoldImages, train_and_validate
from pneumo_experiments.training.resume import VERSION
from pneumo_experiments.words import plural

TIMED_IMAGES = 16
CHECKPOINTS = Path("output/checkpoints")


@dataclass(frozen=True)
class TrialScores:
    """Scores of a trial after an epoch; means over its folds so far."""

    dice: float
    """cross-fitted: each half of the validation patients scored with the thresholds of the other"""
    dice_optimistic: float
    """thresholds chosen and scored on the same images"""
    dice_positive: float
    """cross-fitted, over the images with truth; NaN without any"""
    false_alarms: float
    """fraction of all images with a mask but no truth"""
    empty_loss: float
    """1 minus the best Dice on positives if every mask is empty, else 0; the least of the folds"""
    thresholds: Thresholds
    """the best of the coarse grid for the first fold's validation images"""
    seconds_per_image: float
    """of a prediction by this machine; NaN before the last epoch, and if it is no objective"""
    patient_dice: NDArray[np.float64]
    """what each validation patient adds to the Dice (p,), which is their mean; the folds one after another"""


@dataclass(frozen=True)
class _Fold:
    split: Split
    images: FoldImages
    half: NDArray[np.int64]  # of the validation patients


class TrialTraining:
    """Short trainings on one data set, which is read once; each starts from the same weights."""

    def __init__(self, dataset: Dataset, settings: Search) -> None:
        """Reads the images of all folds, and trains the network that the trials start from."""
        self._dataset, self.settings = dataset, settings
        self._compute = choose_compute(settings.compute)
        self._folds = [self._fold(split) for split in split_folds(dataset, settings)]
        # On the first fold, in the latest trial that was not pruned.
        self._trained: tuple[Predictor, Evaluation] | None = None
        self._is_announced = False  # how long all trials take
        self._initial = self._initial_network()

    def epochs(self, recipe: Recipe, trials_left: int = 1) -> Iterator[tuple[TrialScores, dict[str, float]]]:
        """Trains with a recipe on each fold in turn; scores and metrics after each epoch of each fold.

        The caller may stop at any time. ``trials_left``, with this one, are announced on the terminal in the
        first trial: how long they take together.
        """
        epochs, finished = self.settings.study.search_epochs, list[TrialScores]()
        is_announced, self._is_announced = self._is_announced, True
        for number, fold in enumerate(self._folds):
            predictor, scores = self._predictor(recipe), None
            images, pieces = fold.images, trials_left * len(self._folds) - number
            pieces = 1 if is_announced else pieces  # the search says more, once a trial has ended
            with ProgressBar("trial", epochs * images.work(predictor), pieces=pieces) as bar:
                for result in train_and_validate(predictor, images, recipe, epochs, advance=bar.update):
                    scores = _score_fold(fold, result)
                    if number == 0 and result.epoch.number == epochs:
                        last = replace(predictor, network=result.epoch.network)
                        scores = replace(scores, seconds_per_image=self._seconds_per_image(last))
                        self._trained = last, result.evaluation
                    mean = _mean([*finished, scores])
                    yield mean, result.metrics | {"epoch/dice_cross_fitted": mean.dice}
            assert scores is not None
            finished.append(scores)

    def save_model(self, folder: Path, recipe: Recipe) -> None:
        """Saves what ``epochs`` has trained on the first fold as a model, with its thresholds."""
        assert self._trained is not None
        predictor, evaluation = self._trained
        settings, split = replace(self.settings, recipe=recipe), self._folds[0].split
        save(folder, make_detector(predictor, settings, evaluation.thresholds, self._dataset, split))

    def overlays(self, count: int) -> list[Picture]:
        """So many validation images of the first fold, from best to worst, as ``epochs`` ended there."""
        assert self._trained is not None
        predictor, evaluation = self._trained
        return ranked_overlays(evaluation, predictor, count, outlines)

    def _fold(self, split: Split) -> _Fold:
        settings, training = self.settings, split.train
        if limit := settings.study.search_images:
            shuffled = np.random.default_rng(settings.recipe.seed).permutation(training)
            training = np.sort(shuffled[:limit])
        cache = settings.recipe.batches.cache
        validation = validation_images(self._dataset, settings, split).in_memory(cache)
        images = Subset(self._dataset, training)
        self.cache = images.choose_cache(cache, self._compute)
        data = images.training_data(self.cache, self._compute)
        return _Fold(split, FoldImages(data, validation), _halves(validation))

    def _predictor(self, recipe: Recipe) -> Predictor:
        own, other = self.settings.recipe, recipe.network
        is_same = (other.network, other.weights) == (own.network.network, own.network.weights)
        if is_same and (recipe.seed == own.seed or self.settings.study.search_warmup_epochs):
            network = copy.deepcopy(self._initial)
        else:
            network = initial_network(other, recipe.seed)
        return Predictor(network, self._compute, other.tta)

    def _seconds_per_image(self, predictor: Predictor) -> float:
        """The shorter of two predictions of the same images, per image."""
        if self.settings.study.has_one_objective:
            return np.nan
        validation = self._folds[0].images.validation
        images = self._dataset.images(validation.indices[:TIMED_IMAGES])
        return min(timeit.repeat(lambda: list(predictor.predict(images)), number=1, repeat=2)) / len(images)

    def _initial_network(self) -> PneumothoraxNet:
        """The network that every trial starts from, after the warm-up epochs if there are any.

        Its weights are saved for other workers and for the next command.
        """
        recipe, epochs = self.settings.recipe, self.settings.study.search_warmup_epochs
        network = initial_network(recipe.network, recipe.seed)
        if epochs == 0:
            return network
        checkpoint = warmup_checkpoint(self.settings, self._dataset.fingerprint)
        with work_folder(checkpoint.folder, "search: another worker trains the first network; waiting"):
            saved = checkpoint.last()
            if saved is None:
                state = self._warm_up(network, epochs)
                checkpoint.save({"epochs": epochs}, {epochs: state})
            else:
                state = saved["networks"][epochs]
        network.load_state_dict(state)
        return network

    def _warm_up(self, network: PneumothoraxNet, epochs: int) -> dict[str, Any]:
        recipe = self.settings.recipe
        # Only images that train in every fold: the network must not know what a fold validates on.
        training = reduce(np.intersect1d, [fold.split.train for fold in self._folds])
        data = Subset(self._dataset, training).training_data(recipe.batches.cache, self._compute)
        with ProgressBar("search: warm-up", len(data) * epochs) as bar:
            *_, last = fit(Predictor(network, self._compute), data, recipe, epochs, bar.update)
        print(f"search: every trial starts from one network, trained for {plural(epochs, 'epoch')}")
        return {name: tensor.cpu() for name, tensor in last.network.state_dict().items()}


def fold_settings(settings: Search) -> list[SplitSettings]:
    """The settings of the split of each fold of a trial. Raises UserError if there are fewer folds."""
    k, folds = settings.study.folds_per_trial, settings.split.folds
    if k > folds:
        raise UserError(f"folds_per_trial={k}: there are {folds} folds; give no more")
    first = settings.split.fold  # make_split refuses all
    others = [str((int(first) + i) % folds) for i in range(1, k)] if first.isdecimal() else []
    return [replace(settings.split, fold=number) for number in [first, *others]]


def split_folds(dataset: Dataset, settings: Search) -> list[Split]:
    """The split of each fold of a trial. Raises UserError if the data set has too few patients."""
    splits = [make_split(dataset, each) for each in fold_settings(settings)]
    for split in splits:
        require_positives(Subset(dataset, split.train))
        _halves(Subset(dataset, split.validation))
    return splits


def doubt_of_start(settings: Search, dataset: Dataset) -> str:
    """What ``seen_by_start`` means for the trials and their second trainings; empty if nothing."""
    both = [settings, *([second_settings(settings)] if settings.study.confirm else [])]
    splits = [split for each in both for split in fold_settings(each)]
    seen = seen_by_start(settings.recipe.network.weights, splits, dataset)
    return seen and (
        f"{seen}: Dice of trials is too optimistic, and may favour settings that change that model little;"
        " start from a model of the same fold, holdout and split_seed, and set confirm=0: second trainings"
        " are of another fold"
    )


def validation_images(dataset: Dataset, settings: Search, split: Split) -> Subset:
    """The images that a trial validates on: a part of them, if the settings limit their number."""
    validation, limit = Subset(dataset, split.validation), settings.study.search_validation_images
    if limit and (parts := len(validation) // limit) > 1:
        validation = replace(validation, indices=validation.indices[_parts(validation, parts) == 0])
    return validation


def all_empty_dice(dataset: Dataset, settings: Search) -> float:
    """The Dice of a trial that predicts every image empty: the mean over its folds."""
    subsets = [validation_images(dataset, settings, split) for split in split_folds(dataset, settings)]
    return float(np.mean([(subset.areas_px == 0).mean() for subset in subsets]))


def second_settings(settings: Search) -> Search:
    """What confirms a trial: the next seed, and the folds that follow, where there are others."""
    first, study = int(settings.split.fold), settings.study
    split = replace(settings.split, fold=str((first + study.folds_per_trial) % settings.split.folds))
    recipe = replace(settings.recipe, seed=(settings.recipe.seed + 1) % 2**32)
    return replace(settings, recipe=recipe, split=split)


def warmup_checkpoint(settings: Search, fingerprint: str) -> Checkpoint:
    """Where the network from which trials start is saved."""
    study = settings.study
    key = [VERSION, fingerprint, weight_shaping(settings.recipe), weight_shaping(settings.split)]
    key += [study.search_warmup_epochs, study.folds_per_trial]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Checkpoint((CHECKPOINTS / f"warm-up-{digest}").absolute())


def warmup_weights(settings: Search, fingerprint: str) -> Path:
    """The file with that network's state dict."""
    return warmup_checkpoint(settings, fingerprint).network_file(settings.study.search_warmup_epochs)


def _mean(folds: list[TrialScores]) -> TrialScores:
    """Means over folds; thresholds and seconds of the first one."""
    names = ("dice", "dice_optimistic", "dice_positive", "false_alarms")
    patients = sum(len(fold.patient_dice) for fold in folds)
    return replace(
        folds[0],
        **{name: float(np.mean([getattr(fold, name) for fold in folds])) for name in names},
        empty_loss=min(fold.empty_loss for fold in folds),
        patient_dice=np.concatenate(
            [fold.patient_dice * (patients / len(folds) / len(fold.patient_dice)) for fold in folds]
        ),
    )


def _score_fold(fold: _Fold, result: EpochResult) -> TrialScores:
    counts = result.evaluation.counts
    crossed = cross_fitted(counts, fold.half)
    _, patient = np.unique(counts.patient, return_inverse=True)
    sums = np.bincount(patient, crossed.dices)
    return TrialScores(
        dice=crossed.dice,
        dice_optimistic=result.scores.dice,
        dice_positive=crossed.dice_positive,
        false_alarms=crossed.false_alarms,
        empty_loss=1 - best_dice_on_positives(counts) if crossed.is_all_empty else 0.0,
        thresholds=result.evaluation.thresholds,
        seconds_per_image=float("nan"),
        patient_dice=np.asarray(sums * (len(sums) / len(patient)), np.float64),
    )


def _halves(validation: Subset) -> NDArray[np.int64]:
    """The half, 0 or 1, of each image (n,), by patient and stratified by area; the same for every trial."""
    return _parts(validation, 2)


def _parts(validation: Subset, parts: int) -> NDArray[np.int64]:
    entries = validation.entries
    patients = [entry.patient for entry in entries]
    if len(set(patients)) < parts:
        raise UserError(
            f"folds: {len(set(patients))} patients to validate, but a search needs {parts}; give fewer folds"
        )
    return assign_folds(patients, np.array([entry.area_px for entry in entries]), parts, seed=0)
