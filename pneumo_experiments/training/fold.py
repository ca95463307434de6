"""The training of one fold: prepare, epochs, finish."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.splits import Split
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.counts_search import log_counts
from pneumo_experiments.evaluation.scored_images import digests
from pneumo_experiments.evaluation.subset import Subset, log_overlays, log_split, make_split
from pneumo_experiments.evaluation.threshold_search import log_threshold_study, search_thresholds
from pneumo_experiments.figures import learning_curves
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import STATISTICS_IMAGES, mean_state, update_batch_norm
from pneumo_experiments.learning.calibration import fit_calibration
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import choose_compute, from_numpy
from pneumo_experiments.learning.loader import InMemoryData, StreamedData
from pneumo_experiments.learning.network import PneumothoraxNet, build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.dice import calibration_error
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, TrainedNetwork, load, new_folder, save
from pneumo_experiments.serving.model_folder import WEIGHTS
from pneumo_experiments.settings import Network, Recipe, Search, Train, as_config
from pneumo_experiments.training.loop import log_first_batch, train_and_validate
from pneumo_experiments.training.progress import Progress, checkpoint_of, read_checkpoint
from pneumo_experiments.training.settings_source import Origin


@dataclass(frozen=True)
class TrainedFold:
    """A logged model and its address, and its scores and counts on the validation images."""

    model: str
    detector: Detector
    validation: Subset
    counts: ThresholdCounts
    scores: Scores


@dataclass(frozen=True)
class _Prepared:
    split: Split
    training_data: InMemoryData | StreamedData
    validation: Subset
    predictor: Predictor


def train_fold(
    name: str, origin: Origin, dataset: Dataset, parent: str | None = None, folds_left: int = 1
) -> TrainedFold:
    """Trains, keeps the weights with the best validation Dice, and logs them as a model, in a run of its own.

    An interrupted training with the same settings continues after its last whole epoch, in the same run.
    With this one, ``folds_left`` are to be trained.
    """
    settings = origin.settings
    checkpoint = checkpoint_of(settings, dataset.fingerprint)
    is_main, resume = distributed.is_main_process(), settings.schedule.resume
    last = distributed.broadcast(read_checkpoint(checkpoint) if is_main and resume else None)
    earlier = last["run_id"] if last else None
    with tracking.run(name, settings, continues=earlier, parent=parent, system_metrics=True) as run_id:
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training")
        origin.log_notes(dataset.fingerprint)
        prepared = _prepare(settings, dataset)
        progress = _run_epochs(name, settings, prepared, checkpoint, last, run_id, folds_left)
        return _finish(origin, prepared, progress)


def _prepare(settings: Train, dataset: Dataset) -> _Prepared:
    recipe = settings.recipe
    split = make_split(dataset, settings.split)
    log_split(dataset, split)
    validation = Subset(dataset, split.validation).in_memory(recipe.batches.cache)
    compute = choose_compute(settings.compute)
    training_data = Subset(dataset, split.train).training_data(recipe.batches.cache, compute)
    tracking.log_params({"device_used": str(compute.device), "precision_used": compute.precision})
    if compute.device.type == "cuda":
        tracking.warn_without_gpu_metrics()
    network = initial_network(recipe.network, recipe.seed)
    tracking.log_params({"weights_source": network.source, "weights_sha256": network.source_sha256})
    print(
        f"train: {recipe.network.network} at {dataset.image_size} px, {compute.device}, {compute.precision};"
        f" {len(training_data)} images, {training_data.present.sum()} positive; {len(validation)} to validate"
    )
    predictor = Predictor(network, compute, recipe.network.tta)
    return _Prepared(split, training_data, validation, predictor)


def _run_epochs(
    name: str,
    settings: Train,
    prepared: _Prepared,
    checkpoint: Checkpoint,
    last: dict[str, Any] | None,
    run_id: str,
    folds_left: int,
) -> Progress:
    """All epochs that are left after the checkpoint ``last``, each saved in the checkpoint."""
    epochs, patience = settings.schedule.epochs, settings.schedule.patience
    data, predictor = prepared.training_data, prepared.predictor
    if last is None:
        progress, state = Progress(run_id), None
        if distributed.is_main_process():
            checkpoint.clear()
        log_first_batch(data, settings.recipe, epochs, predictor.compute)
    else:
        progress, state = _restore(last, run_id), last["state"]
        print(f"train: continues after epoch {len(progress.history)} of {epochs}")
    results = train_and_validate(
        *(name, predictor, data, prepared.validation, settings.recipe, epochs, state), pieces=folds_left
    )
    while not progress.is_stuck(patience) and (result := next(results, None)):
        progress.add(result, settings.schedule.best_k)
        if distributed.is_main_process():
            progress.save(checkpoint, result.epoch.state())
    if len(progress.history) < epochs:
        print(f"train: no better Dice in {patience} epochs: stopped early")
    if not progress.learned:
        print(
            "train: every epoch's best answer was an empty mask for every image: try more epochs, another"
            " learning_rate, or pretrained weights"
        )
    return progress


def _restore(last: dict[str, Any], run_id: str) -> Progress:
    """The progress of an interrupted training; its metrics are logged again if the run is another one."""
    if last["run_id"] != run_id:
        for epoch, metrics in enumerate(last["history"], start=1):
            tracking.log_metrics(metrics, step=epoch)
    return Progress(run_id, last["history"], last["dices"], last["networks"])


def _finish(origin: Origin, prepared: _Prepared, progress: Progress) -> TrainedFold:
    """Chooses weights, calibration and thresholds, and logs scores, pictures and model."""
    settings, validation = origin.settings, prepared.validation
    dataset, trained_on = validation.dataset, len(prepared.training_data)
    raw, averaged = _choose_weights(progress, prepared, settings.recipe)
    predictor, counts = _calibrate(prepared.predictor, raw, prevalence(dataset, prepared.split))
    trials = (
        settings.evaluation.threshold_trials if distributed.is_main_process() else 0
    )  # it decides nothing
    search = search_thresholds(counts, trials, settings.recipe.seed)
    thresholds = search.thresholds
    scores = validation.score(counts, thresholds)
    detector = make_detector(predictor, settings, thresholds, dataset, prepared.split)
    if not distributed.is_main_process():
        return TrainedFold("", detector, validation, counts, scores)
    origin.log_weights(predictor.network, settings.split.fold)
    # Beside the curves, not on them: the weights that were kept, at their own thresholds.
    final = {f"{metric}_final": value for metric, value in scores.as_metrics("val_").items()}
    (error,) = calibration_error(raw.truth_area > 0, raw.presence, np.ones((1, len(raw))))
    final["val_calibration_error_raw"] = float(error)
    tracking.log_metrics(final | search.as_metrics(), step=len(progress.history))
    log_threshold_study(search)
    log_counts(counts, [entry.patient for entry in validation.entries])
    chosen_by = {"best_epoch": next(iter(progress.dices)), "averaged_epochs": len(averaged)}
    line = {f"presence_{name}": value for name, value in asdict(predictor.calibration).items()}
    tracking.log_params(chosen_by | asdict(thresholds) | line | scores.as_facts("val_"))
    tracking.log_image(learning_curves(progress.history, scores.dice_baseline), "learning_curves.png")
    log_overlays(validation, counts, predictor, thresholds, settings.evaluation.overlays)
    with new_folder() as folder:
        save(folder, detector)
        model = tracking.log_model(folder)
    epochs = f"epoch{'s' * (len(averaged) > 1)} {', '.join(map(str, sorted(averaged)))}"
    kept = f"kept {epochs} of {len(progress.history)}"
    print(f"train: {kept}, logged as {model}")
    tracking.describe(
        f"{settings.recipe.network.network} at {dataset.image_size} px, {trained_on} images; {kept}.\n"
        f"Validation Dice {scores.dice:.3f} (all-empty {scores.dice_baseline:.3f}),"
        f" on positives {scores.on_positives}."
    )
    return TrainedFold(model, detector, validation, counts, scores)


def initial_network(network: Network, seed: int) -> PneumothoraxNet:
    """See ``build``; the weights may also be those of a model of this project: its address, or its folder.

    What that model has seen, the new network has seen, too. Raises UserError for a model of several networks.
    """
    weights = network.weights
    if not is_model(weights):
        return build(network.network, weights, seed)
    folder = tracking.model_data(weights, "weights")
    model = load(folder)
    if len(model.members) > 1:
        raise UserError(
            f"weights={weights}: is the mean of {len(model.members)} networks; name a model of one"
        )
    built = build(network.network, str(folder / WEIGHTS), seed)
    built.source, built.training_images = weights, model.training_images
    return built


def is_model(weights: str) -> bool:
    """Whether initial weights are an address or a folder, not a file or the name of pretrained ones."""
    is_address = re.match(r"(?i)(?!https?:|ftp:)[\w+.-]{2,}:/", weights) is not None
    return is_address or (weights != "" and Path(weights).is_dir())


def make_detector(
    predictor: Predictor, settings: Train | Search, thresholds: Thresholds, dataset: Dataset, split: Split
) -> Detector:
    """What is saved of a training: it knows the images that trained it or chose its epoch and thresholds."""
    seen = Subset(dataset, np.append(split.train, split.validation))
    member = TrainedNetwork(predictor, as_config(settings))
    size, fingerprint = dataset.image_size, dataset.fingerprint
    known = digests(seen) | predictor.network.training_images
    return Detector((member,), size, thresholds, fingerprint, known, prevalence(dataset, split))


def prevalence(dataset: Dataset, split: Split) -> float:
    """The fraction of the training and validation images that is positive."""
    images = Subset(dataset, np.concatenate([split.train, split.validation]))
    return float(np.mean([entry.area_px > 0 for entry in images.entries]))


def _calibrate(
    predictor: Predictor, raw: ThresholdCounts, prevalence: float
) -> tuple[Predictor, ThresholdCounts]:
    """The predictor with the calibration that fits these counts of the validation images; and its own."""
    line = fit_calibration(raw.presence, raw.truth_area > 0, prevalence)
    predictor, counts = replace(predictor, calibration=line), ThresholdCounts()
    presence = predictor.calibrated(from_numpy(raw.presence).to(predictor.device)).cpu().numpy()
    counts.append(np.stack(raw.pixels(), axis=1).astype(np.int32), presence)
    return predictor, counts


def _choose_weights(
    progress: Progress, prepared: _Prepared, recipe: Recipe
) -> tuple[ThresholdCounts, list[int]]:
    """Loads the best epoch's weights, or the mean of the best ones' where that scores better.

    Averaged weights, those of ``ema`` too, are also tried with batch statistics of their own. Returns the
    threshold counts of the validation images, and the epochs that were averaged.
    """
    predictor, validation, best = prepared.predictor, prepared.validation, list(progress.networks)
    network, candidates = predictor.network, [(progress.networks[best[0]], best[:1], False)]
    if len(best) > 1:
        candidates.append((mean_state(list(progress.networks.values())), best, False))
    if len(best) > 1 or recipe.optimizer.ema > 0:
        network.load_state_dict(candidates[-1][0])
        data, is_shown = prepared.training_data, distributed.is_main_process()
        with ProgressBar("batch statistics", min(STATISTICS_IMAGES, len(data)), is_shown=is_shown) as bar:
            update_batch_norm(network, data, recipe, predictor.compute, bar.update)
        candidates.append((copy.deepcopy(network.state_dict()), best, True))
    results: list[tuple[float, ThresholdCounts]] = []
    for state, _, _ in candidates:
        counts = None if results else progress.counts.get(best[0])
        if counts is None:
            network.load_state_dict(state)
            counts = validation.count(predictor)
        results.append((validation.score(counts, best_on_grid(counts)).dice, counts))
    chosen = max(range(len(results)), key=lambda place: results[place][0])  # of equal ones the first
    state, epochs, has_own = candidates[chosen]
    network.load_state_dict(state)
    tracking.log_params({"own_batch_statistics": has_own})
    return results[chosen][1], epochs
