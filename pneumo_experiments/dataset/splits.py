"""Splits images into training, validation and hold-out, and into folds, grouped by patient and stratified.

The parts are balanced in images, positives, negatives, and positives of each area class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError

AREA_CLASSES = 10
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices of the images in each subset, ascending."""

    train: Indices
    validation: Indices
    holdout: Indices


@dataclass(frozen=True)
class PartStatistics:
    """Statistics of one part; the 9 deciles of the area of its positives, empty if it has none."""

    part: int
    images: int
    patients: int
    positives: int
    area_deciles_px: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """Whether an assignment to parts keeps patients together; statistics of the parts in ascending order.

    ``separated_images`` counts the images whose patient also has an image in another part.
    """

    images: int
    shared_patients: int
    separated_images: int
    parts: tuple[PartStatistics, ...]

    @property
    def separated_share(self) -> float:
        """Fraction of all images that are separated from another image of their patient; 0.0 of no images."""
        return self.separated_images / self.images if self.images else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All values by name, for JSON."""
        return asdict(self) | {"separated_share": self.separated_share}


def audit(patients: Sequence[str], areas: NDArray[Any], parts: NDArray[np.integer[Any]]) -> Audit:
    """Audit of any assignment, from patient, area in pixels and part number of each image (n,).

    Raises ValueError if the three differ in length.
    """
    if not len(patients) == len(areas) == len(parts):
        raise ValueError(
            f"{len(patients)} patients, {len(areas)} areas and {len(parts)} part numbers:"
            " lengths must be equal"
        )
    names, patient = np.unique(np.asarray(patients, np.str_), return_inverse=True)
    numbers, part = np.unique(parts, return_inverse=True)
    member = np.zeros((len(names), len(numbers)), np.bool_)
    member[patient, part] = True
    shared, statistics = member.sum(axis=1) > 1, list[PartStatistics]()
    for k, number in enumerate(numbers.tolist()):
        inside = areas[part == k]
        positive = inside[inside > 0]
        deciles = np.quantile(positive, np.arange(1, 10) / 10).tolist() if positive.size else ()
        count = int(member[:, k].sum())
        statistics.append(PartStatistics(number, len(inside), count, len(positive), tuple(deciles)))
    return Audit(
        images=len(patients),
        shared_patients=int(np.count_nonzero(shared)),
        separated_images=int(np.count_nonzero(shared[patient])),
        parts=tuple(statistics),
    )


def assign_folds(patients: Sequence[str], areas: NDArray[Any], folds: int, seed: int) -> Indices:
    """Fold of each image (n,), from 0; independent of the order of the images.

    Raises UserError for fewer than 2 folds or fewer patients than folds.
    """
    if folds < 2:
        raise UserError(f"folds={folds}: training and validation need a fold each; set folds to 2 or more")
    _require(len(set(patients)), folds, f"folds={folds}")
    return _assign(patients, areas, np.full(folds, 1 / folds), seed)


def split(
    patients: Sequence[str], areas: NDArray[Any], *, holdout: float, folds: int, fold: int, seed: int
) -> Split:
    """A hold-out subset, and of the remaining images one fold for validation and the others for training.

    The hold-out is the same for each ``fold`` and for any number of folds. Raises UserError for settings out
    of range or too few patients.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout={holdout:g}: out of range; set holdout to 0 or more, below 1")
    if not 0 <= fold < folds:
        raise UserError(f"fold={fold}: does not exist; set fold from 0 to {folds - 1}, or more folds")
    in_holdout = np.zeros(len(patients), np.bool_)
    if holdout > 0:
        _require(len(set(patients)), folds + 1, f"folds={folds} and a holdout")
        in_holdout = _assign(patients, areas, np.array([1 - holdout, holdout]), seed) == 1
        if not in_holdout.any():
            raise UserError(f"holdout={holdout:g}: less than one patient; set holdout to 0, or higher")
    rest = np.flatnonzero(~in_holdout)
    fold_of = assign_folds([patients[index] for index in rest.tolist()], areas[rest], folds, seed)
    return Split(
        train=rest[fold_of != fold], validation=rest[fold_of == fold], holdout=np.flatnonzero(in_holdout)
    )


def _require(patients: int, needed: int, setting: str) -> None:
    if patients < needed:
        remedy = ("set fewer folds, or " if patients > 1 else "") + "name the patients in patients_csv"
        raise UserError(f"{setting}: needs {needed} patients, the data set has {patients}; {remedy}")


def _assign(
    patients: Sequence[str], areas: NDArray[Any], fractions: NDArray[np.float64], seed: int
) -> Indices:
    """Part of each image (n,), where each part gets its fraction (sum 1) of the images of every stratum.

    Greedy: patients with most positives first, each into the part where it adds least to the sum over parts
    and strata of count² / (fraction · n²), n the number of all images of that stratum. That sum is minimal
    if each part has its fraction of each stratum, and rare strata weigh most.
    """
    names, patient_of_image = np.unique(np.asarray(patients), return_inverse=True)
    strata = _strata(areas, float(fractions.min()))
    images = np.zeros((len(names), strata.shape[1]))  # per patient and stratum
    np.add.at(images, patient_of_image, strata)

    shuffled = np.random.default_rng(seed).permutation(len(names))
    total, positives = images[shuffled, 0], images[shuffled, 1]
    order = shuffled[np.lexsort((-total, -positives))]
    stratum_sizes = np.maximum(strata.sum(axis=0), 1)  # an empty stratum adds nothing
    weights = 1 / (stratum_sizes**2 * fractions[:, None])  # (parts, strata)
    counts = np.zeros((len(fractions), strata.shape[1]))
    part_of_patient = np.zeros(len(names), np.int64)
    for patient in order:
        added = ((2 * counts + images[patient]) * weights) @ images[patient]
        part = int(np.argmin(added))
        part_of_patient[patient] = part
        counts[part] += images[patient]
    return part_of_patient[patient_of_image]


def _strata(areas: NDArray[Any], min_fraction: float) -> NDArray[np.float64]:
    """Membership of each image in each stratum (n, strata), 1 or 0: all, positive, negative, area classes."""
    positive = areas > 0
    # Each class is large enough to give the smallest part two images.
    classes = int(np.clip(positive.sum() * min_fraction / 2, 1, AREA_CLASSES))
    inner = np.linspace(0, 1, classes + 1)[1:-1]
    edges = np.quantile(areas[positive], inner) if positive.any() else inner
    area_class = np.searchsorted(edges, areas, side="right")
    columns = [np.ones_like(positive), positive, ~positive]
    columns += [positive & (area_class == k) for k in range(classes)]
    return np.stack(columns, axis=1).astype(np.float64)
