"""Images on which models can be compared: new to all of them, in one data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.scored_images import describe_seen, identity
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.serving import Detector


@dataclass(frozen=True)
class CommonImages:
    """A subset of a data set, as ``score`` names it, and the identity of its images."""

    subset: Literal["holdout", "all"]
    identity: str


def common_images(path: Path, detectors: Mapping[str, Detector]) -> CommonImages:
    """Images whose patients none of the models has seen: their common hold-out, or all of another data set.

    ``detectors`` are the models by name. Raises UserError, with the reason, if there are no such images.
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
        subset = _holdout(path, dataset, trained) if trained else Subset(dataset, np.arange(len(dataset)))
        for name, detector in detectors.items():
            if seen := describe_seen(subset, detector.training_images, name):
                raise UserError(
                    f"dataset={path}: {seen}; name a data set that neither has seen, or leave out what"
                    " scores.csv of score with subset=all marks as seen"
                )
        return CommonImages("holdout" if trained else "all", identity(subset))


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
