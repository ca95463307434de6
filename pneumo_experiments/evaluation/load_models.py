"""Models by address, several as one, and the images on which they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import warn
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, all_images, describe_seen, image_set_id, make_split
from pneumo_experiments.learning.predict import Ensemble
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts
from pneumo_experiments.serving import Detector, load, make_ensemble
from pneumo_experiments.settings import Device


def addresses_of(model: str) -> list[str]:
    """The addresses in a setting that takes several with commas between, sorted.

    So that the order in which they were given changes nothing. Raises UserError if one is empty or repeated.
    """
    addresses = sorted(address.strip() for address in model.split(","))
    if len(addresses) > 1 and ("" in addresses or len(set(addresses)) < len(addresses)):
        raise UserError(f"model={model}: names a model twice, or none between commas; give each one once")
    return addresses


def load_model(address: str | Path, setting: str = "model") -> Detector:
    """The model at a ``models:/`` or ``runs:/`` address, or in the folder of a logged model.

    On the best available device. An address is looked up in the store that MLFLOW_TRACKING_URI names, by
    default mlflow.db in the working folder; a folder needs no store. Nothing in a model is executed.
    ``setting`` is what errors call it. Raises UserError if it cannot be loaded, or if another project logged
    it.

    >>> load_model("model").image_size
    16
    >>> load_model("models:/pneumothorax@champion").thresholds
    Thresholds(presence_threshold=..., top_score=..., min_area_px=..., bottom_score=...)
    """
    if not Path(address).is_dir():
        store = tracking.database_file(tracking.tracking_uri())
        if store is not None and not store.exists():  # MLflow would create it
            raise UserError(
                f"{setting}={address}: no folder, and there is no store {store}; give a model's folder, or"
                " name the store in MLFLOW_TRACKING_URI"
            )
        tracking.connect_store()
    return load(tracking.model_data(str(address), setting))


def load_models(model: str, dataset: Path, compute: Device, setting: str = "model") -> Detector:
    """The model at an address, or the ensemble of those at several with commas between, on a device.

    The thresholds of an ensemble are the best for its predictions of the validation images, if ``dataset`` is
    that of the training: networks with one split predict theirs together, as the ensemble does. Else they
    are means of the models' thresholds, with a warning. ``setting`` is what errors call the model.
    """
    detectors = [load(tracking.model_data(each, setting)).on(compute) for each in addresses_of(model)]
    if len(detectors) == 1:
        return detectors[0]
    joined = make_ensemble(detectors)
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(Dataset.open(dataset))
            if opened.fingerprint != joined.data_fingerprint:
                raise UserError(f"dataset={dataset}: is another data set than that of their training")
        except UserError as error:
            warn(
                "each threshold of the ensemble is the mean of the models', which costs Dice where"
                f" they disagree; name the data set of their training in dataset to search them ({error})"
            )
            return joined
        counts = list[ThresholdCounts]()
        for split in dict.fromkeys(member.split for member in joined.members):
            alike = Ensemble(tuple(one.predictor for one in joined.members if one.split == split))
            counts.append(Subset(opened, make_split(opened, split).validation).count(alike, "thresholds"))
    return replace(joined, thresholds=best_of_all(ThresholdCounts.joined(counts)).thresholds)


def check_unseen(address: str, baseline: Detector, subset: Subset) -> None:
    """Raises UserError if the baseline model has seen some of the images or patients, or another size."""
    size = subset.dataset.image_size
    if baseline.image_size != size:
        raise UserError(
            f"baseline={address}: was trained on {baseline.image_size} px, the data set has {size} px; score"
            " both models on data sets of their own and compare their dice"
        )
    if seen := describe_seen(subset, baseline.training_images, "it"):
        raise UserError(
            f"baseline={address}: {seen}; compare models whose split has the same hold-out (holdout and"
            " split_seed), or on external images"
        )


def common_images(path: Path, detectors: Mapping[str, Detector]) -> tuple[Literal["holdout", "all"], str]:
    """Images whose patients none of the models has seen: their common hold-out, or all of another data set.

    The subset as ``score`` names it, and the identity of its images. ``detectors`` are the models by name.
    Raises UserError, with the reason, if there are no such images.
    """
    with Dataset.open(path) as dataset:
        if not dataset.labelled:
            raise UserError(f"dataset={path}: has no annotations to score by; name one that has")
        for name, detector in detectors.items():
            if detector.image_size != dataset.image_size:
                raise UserError(
                    f"dataset={path}: has images of {dataset.image_size} px, {name} was trained on"
                    f" {detector.image_size} px; run score for each on data sets of the same images"
                )
        trained = {name: d for name, d in detectors.items() if d.data_fingerprint == dataset.fingerprint}
        if trained and len(trained) < len(detectors):
            others = " and ".join(name for name in detectors if name not in trained)
            raise UserError(
                f"dataset={path}: trained {' and '.join(trained)}, but not {others}; name a data set that"
                " neither has seen"
            )
        subset = _holdout(path, dataset, trained) if trained else all_images(dataset)
        for name, detector in detectors.items():
            if seen := describe_seen(subset, detector.training_images, name):
                raise UserError(
                    f"dataset={path}: {seen}; name a data set that neither has seen, or leave out what"
                    " scores.csv of score with subset=all marks as seen"
                )
        return "holdout" if trained else "all", image_set_id(subset)


def _holdout(path: Path, dataset: Dataset, detectors: Mapping[str, Detector]) -> Subset:
    splits = [member.split for detector in detectors.values() for member in detector.members]
    holdouts = dict.fromkeys((split.holdout, split.split_seed) for split in splits)
    if len(holdouts) > 1:
        texts = " and ".join(f"holdout={holdout} split_seed={seed}" for holdout, seed in holdouts)
        raise UserError(
            f"dataset={path}: the models were trained with {texts}; train with the same, or name a data set"
            " that neither has seen"
        )
    indices = make_split(dataset, splits[0]).holdout
    if not len(indices):
        raise UserError(
            f"dataset={path}: the models were trained with holdout=0; name one they have not seen"
        )
    return Subset(dataset, indices)
