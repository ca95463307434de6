"""Division of the images into parts: a patient is in one part only, and the parts are alike.

Alike in the number of images, of positives, of negatives, and of positives of each class of area.
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
    """Ascending indices of the images in each part."""

    train: Indices
    validation: Indices
    holdout: Indices


@dataclass(frozen=True)
class PartFacts:
    """What one part holds; deciles (9) of the area of its positives, none where it has no positive."""

    part: int
    images: int
    patients: int
    positives: int
    area_deciles_px: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """Whether a division keeps patients together, and its parts in ascending order.

    ``separated_images`` counts the images whose patient also has an image in another part.
    """

    images: int
    shared_patients: int
    separated_images: int
    parts: tuple[PartFacts, ...]

    @property
    def separated_share(self) -> float:
        """Share of all images that are separated from another image of their patient; 0.0 of no images."""
        return self.separated_images / self.images if self.images else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything under its name, for JSON."""
        return asdict(self) | {"separated_share": self.separated_share}


def audit(patients: Sequence[str], areas: NDArray[Any], parts: NDArray[np.integer[Any]]) -> Audit:
    """Facts about any division, from patient, area in pixels and part number of each image (n,).

    Raises ValueError where the three are not of one length.
    """
    if not len(patients) == len(areas) == len(parts):
        raise ValueError(
            f"{len(patients)} patients, {len(areas)} areas and {len(parts)} part numbers:"
            " each image needs one of each"
        )
    names, patient = np.unique(np.asarray(patients, np.str_), return_inverse=True)
    numbers, part = np.unique(parts, return_inverse=True)
    member = np.zeros((len(names), len(numbers)), np.bool_)
    member[patient, part] = True
    shared = member.sum(axis=1) > 1
    return Audit(
        images=len(patients),
        shared_patients=int(np.count_nonzero(shared)),
        separated_images=int(np.count_nonzero(shared[patient])),
        parts=tuple(
            _facts(int(number), int(member[:, k].sum()), areas[part == k])
            for k, number in enumerate(numbers.tolist())
        ),
    )


def assign_folds(patients: Sequence[str], areas: NDArray[Any], folds: int, seed: int) -> Indices:
    """Fold of each image (n,), from 0; depends on who the patients are, not on the images' order."""
    if folds < 2:
        raise UserError(f"folds={folds}: one part must validate and another train; set folds to 2 or more")
    _require(len(set(patients)), folds, f"folds={folds}")
    return _assign(patients, areas, np.full(folds, 1 / folds), seed)


def split(
    patients: Sequence[str], areas: NDArray[Any], *, holdout: float, folds: int, fold: int, seed: int
) -> Split:
    """Holdout, and of the rest one fold to validate and the others to train.

    The holdout is the same for each ``fold`` and for any number of folds.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout={holdout:g}: no share of the patients; set holdout to 0 or more, below 1")
    if not 0 <= fold < folds:
        raise UserError(f"fold={fold}: there is no such part; set fold from 0 to {folds - 1}, or more folds")
    kept = np.zeros(len(patients), np.bool_)
    if holdout > 0:
        _require(len(set(patients)), folds + 1, f"folds={folds} and a holdout")
        kept = _assign(patients, areas, np.array([1 - holdout, holdout]), seed) == 1
        if not kept.any():
            raise UserError(f"holdout={holdout:g}: too small to keep a patient; set holdout to 0, or higher")
    rest = np.flatnonzero(~kept)
    parts = assign_folds([patients[index] for index in rest.tolist()], areas[rest], folds, seed)
    return Split(train=rest[parts != fold], validation=rest[parts == fold], holdout=np.flatnonzero(kept))


def _facts(part: int, patients: int, areas: NDArray[Any]) -> PartFacts:
    found = areas[areas > 0]
    deciles: list[float] = np.quantile(found, np.arange(1, 10) / 10).tolist() if found.size else []
    return PartFacts(part, len(areas), patients, len(found), tuple(deciles))


def _require(patients: int, needed: int, wish: str) -> None:
    if patients < needed:
        mend = ("set fewer folds, or " if patients > 1 else "") + "name the patients in patients_csv"
        raise UserError(f"{wish}: needs {needed} patients, the data set has {patients} to divide; {mend}")


def _assign(patients: Sequence[str], areas: NDArray[Any], shares: NDArray[np.float64], seed: int) -> Indices:
    """Part of each image (n,) where the parts take ``shares`` (sum 1) of every kind of image.

    Greedy: patients with most positives first, each into the part where it adds least to
    sum over parts and kinds of count² / (share · n²), n the number of all images of that kind.
    That sum is least where each part has its share of each kind, and rare kinds weigh most.
    """
    names, patient_of_image = np.unique(np.asarray(patients), return_inverse=True)
    kinds = _kinds(areas, float(shares.min()))
    images = np.zeros((len(names), kinds.shape[1]))  # of each patient and kind
    np.add.at(images, patient_of_image, kinds)

    shuffled = np.random.default_rng(seed).permutation(len(names))
    total, positives = images[shuffled, 0], images[shuffled, 1]
    order = shuffled[np.lexsort((-total, -positives))]
    of_kind = np.maximum(kinds.sum(axis=0), 1)  # a kind that no image is of adds nothing
    weights = 1 / (of_kind**2 * shares[:, None])  # (parts, kinds)
    counts = np.zeros((len(shares), kinds.shape[1]))
    part_of_patient = np.zeros(len(names), np.int64)
    for patient in order:
        added = ((2 * counts + images[patient]) * weights) @ images[patient]
        part = int(np.argmin(added))
        part_of_patient[patient] = part
        counts[part] += images[patient]
    return part_of_patient[patient_of_image]


def _kinds(areas: NDArray[Any], least_share: float) -> NDArray[np.float64]:
    """Which kinds an image is of (n, kinds), 1 or 0: image, positive, negative, then each class of area."""
    positive = areas > 0
    # A class that gives the smallest part less than two images would not divide anything.
    classes = int(np.clip(positive.sum() * least_share / 2, 1, AREA_CLASSES))
    inner = np.linspace(0, 1, classes + 1)[1:-1]
    edges = np.quantile(areas[positive], inner) if positive.any() else inner
    area_class = np.searchsorted(edges, areas, side="right")
    columns = [np.ones_like(positive), positive, ~positive]
    columns += [positive & (area_class == k) for k in range(classes)]
    return np.stack(columns, axis=1).astype(np.float64)
