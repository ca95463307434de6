"""Several models as one: put together from their addresses, or from the folds of one training."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.learning.predict import Ensemble
from pneumo_experiments.metrics.exact import best_of_all
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


def load_models(model: str, dataset: Path, compute: Device) -> Detector:
    """The model at an address, or the ensemble of those at several with commas between, on a device.

    The thresholds of an ensemble are the best for its predictions of the validation images, if ``dataset`` is
    that of the training: networks with one split predict theirs together, as the ensemble does. Else they
    are means of the models' thresholds, with a warning.
    """
    detectors = [load(tracking.model_data(address)).on(compute) for address in addresses_of(model)]
    if len(detectors) == 1:
        return detectors[0]
    joined = make_ensemble(detectors)
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
