"""Several models as one: put together from their addresses, or from the folds of one training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.counts_search import log_counts
from pneumo_experiments.experiment.fold_training import TrainedFold
from pneumo_experiments.experiment.subset import Subset, make_split
from pneumo_experiments.experiment.threshold_search import log_threshold_study, search_thresholds
from pneumo_experiments.learning.predict import Ensemble
from pneumo_experiments.scoring.exact import best_of_all
from pneumo_experiments.scoring.thresholds import ThresholdCounts
from pneumo_experiments.serving import Detector, join, load, new_folder, save
from pneumo_experiments.settings import Device

COMPARED_IMAGES = 64  # enough for a mean over images
MUCH_DISAGREEMENT = 0.15  # the standard deviation of presence; it is at most 0.5


def addresses_of(model: str) -> list[str]:
    """The addresses in a setting that takes several with commas between, sorted.

    So that the order in which they were given changes nothing. Raises UserError if one is empty or repeated.
    """
    addresses = sorted(address.strip() for address in model.split(","))
    if len(addresses) > 1 and ("" in addresses or len(set(addresses)) < len(addresses)):
        raise UserError(f"model={model}: names a model twice, or none between commas; give each one once")
    return addresses


def load_models(model: str, dataset: Path, compute: Device) -> Detector:
    """The model at an address, or the ensemble of those at several with commas between, on a device.

    The thresholds of an ensemble are the best for its predictions of the validation images, if ``dataset`` is
    that of the training: networks with one split predict theirs together, as the ensemble does. Else they
    are means of the models' thresholds, with a warning.
    """
    detectors = [load(tracking.model_data(address)).on(compute) for address in addresses_of(model)]
    if len(detectors) == 1:
        return detectors[0]
    joined = join(detectors)
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(Dataset.open(dataset))
            if opened.fingerprint != joined.data_fingerprint:
                raise UserError(f"dataset={dataset}: is another data set than that of their training")
        except UserError as error:
            print(
                "warning: each threshold of the ensemble is the mean of the models', which costs Dice where"
                f" they disagree; name the data set of their training in dataset to search them ({error})"
            )
            return joined
        counts = list[ThresholdCounts]()
        for split in dict.fromkeys(member.split for member in joined.members):
            alike = Ensemble(tuple(one.predictor for one in joined.members if one.split == split))
            counts.append(Subset(opened, make_split(opened, split).validation).count(alike, "thresholds"))
    return replace(joined, thresholds=best_of_all(ThresholdCounts.joined(counts)).thresholds)


def log_ensemble(folds: Sequence[TrainedFold], threshold_trials: int, seed: int) -> str:
    """Logs the networks of all folds as one model of the active run; returns its address.

    Its thresholds are the best for all out-of-fold predictions. Their mean Dice on these very predictions is
    logged as ``val_dice_optimistic``; ``oof_dice`` beside it is that of thresholds from other folds.
    """
    counts = ThresholdCounts.joined(fold.counts for fold in folds)
    patients = [entry.patient for fold in folds for entry in fold.validation.entries]
    log_counts(counts, patients, np.repeat(np.arange(len(folds)), [len(fold.counts) for fold in folds]))
    search = search_thresholds(counts, threshold_trials, seed)
    tracking.log_metrics(search.as_metrics() | {"val_dice_optimistic": search.optimum.dice})
    tracking.log_params(asdict(search.thresholds))
    log_threshold_study(search)
    detector = replace(join([fold.detector for fold in folds]), thresholds=search.thresholds)
    log_disagreement(detector, folds[0].validation)
    with new_folder() as folder:
        save(folder, detector)
        return tracking.log_model(folder)


def log_disagreement(detector: Detector, validation: Subset) -> None:
    """Logs how far the networks disagree, as ``members_disagreement``; warns if that is far.

    The standard deviation of their probabilities of presence, a mean over up to 64 images of the hold-out,
    which trained none of them and choose nothing here; without a hold-out, of the validation images given.
    """
    dataset, split = validation.dataset, detector.members[0].split
    indices = make_split(dataset, split).holdout if split.holdout > 0 else validation.indices
    images = dataset.images(indices[:COMPARED_IMAGES])
    presence = [[one.presence for one in member.predictor.predict(images)] for member in detector.members]
    disagreement = float(np.std(presence, axis=0).mean())
    tracking.log_metrics({"members_disagreement": disagreement})
    if disagreement > MUCH_DISAGREEMENT:
        print(
            f"train: warning: the networks' probabilities of presence differ by {disagreement:.2f} (standard"
            " deviation): their mean, and common thresholds, suit none of them; look at the folds' own scores"
        )
