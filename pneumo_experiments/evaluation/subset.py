"""Subsets of a data set's images: splits, predictions, and which images a model knows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.hdf5 import Dataset, Entry
from pneumo_experiments.dataset.label_table import LabelTable
from pneumo_experiments.dataset.packed_image import salted
from pneumo_experiments.dataset.patients import warn, warn_about_grouping
from pneumo_experiments.dataset.splits import Split, audit, split
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import (
    InMemoryData,
    StreamedData,
    choose_cache,
    fits_host,
    prefetch,
)
from pneumo_experiments.learning.predict import AnyPredictor, Prediction
from pneumo_experiments.learning.threshold_counts import ThresholdCounter
from pneumo_experiments.metrics.thresholds import ThresholdCounts
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import SplitSettings
from pneumo_experiments.words import plural

CHUNK_SIZE = 64  # images read at once, so that a large validation set needs little memory


@dataclass(frozen=True)
class LabelledImages:
    """Some images with labels, by index; those of a table have no pixels."""

    dataset: Dataset | LabelTable
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def entries(self) -> list[Entry]:
        """The index row of each image."""
        return [self.dataset.entries[int(i)] for i in self.indices]

    @property
    def patients(self) -> NDArray[np.str_]:
        """The patient of each image."""
        return np.array([entry.patient for entry in self.entries], np.str_)

    @property
    def areas_px(self) -> NDArray[np.int64]:
        """Annotated pixels of each image at native size."""
        return np.array([entry.area_px for entry in self.entries], np.int64)


@dataclass(frozen=True)
class Subset(LabelledImages):
    """Some images of a labelled data set, by index; the processes of a group divide the predictions.

    ``pixels`` (n, S, S) are the 8-bit images of this process, when they are held in memory.
    """

    dataset: Dataset
    pixels: NDArray[np.uint8] | None = None

    def choose_cache(self, cache: str, compute: ComputeConfig) -> str:
        """Where the training data are held: device, host or stream; for auto where there is room."""
        return choose_cache(cache, 2 * len(self) * self.dataset.image_size**2, compute.device)

    def training_data(self, cache: str, compute: ComputeConfig) -> InMemoryData | StreamedData:
        """The training data, held as ``choose_cache`` says. Raises UserError without a positive image."""
        require_positives(self)
        cache = self.choose_cache(cache, compute)
        _, patients = np.unique(self.patients, return_inverse=True)
        data = StreamedData(self.dataset, self.indices, self.areas_px > 0, patients)
        if cache == "stream":
            return data
        with ProgressBar("load", len(self), is_shown=distributed.is_main_process()) as bar:
            return data.load(str(compute.device) if cache == "device" else "cpu", bar.update)

    def in_memory(self, cache: str) -> Subset:
        """The subset with its images in memory, if there is room and ``cache`` is not stream."""
        if cache == "stream" or not fits_host(len(self._own_indices) * self.dataset.image_size**2):
            return self
        return replace(self, pixels=self.dataset.images(self._own_indices))

    def predictions(self, predictor: AnyPredictor) -> Iterator[tuple[int, Prediction]]:
        """Index and prediction of each image, in order."""
        for chunk, images in self._chunks(self.indices):
            yield from zip(chunk.tolist(), predictor.predict(images), strict=True)

    def count(self, predictor: AnyPredictor, desc: str = "") -> ThresholdCounts:
        """Threshold counts of the predictions at native size; shows a progress bar named ``desc``.

        In a group of processes each predicts some of the images, and all return the counts of all.
        """
        counter = ThresholdCounter(predictor)
        with ProgressBar(desc, len(self._own_indices), is_shown=bool(desc), is_kept=True) as bar:

            def truth(index: int) -> NDArray[np.bool_]:
                bar.update()
                return self.dataset.mask(index)

            for chunk, images in self._chunks(self._own_indices, self.pixels):
                counter.add(images, map(truth, chunk.tolist()))
        own, images = counter.read(), len(self)
        return ThresholdCounts(
            distributed.all_gather_rows(own.pixels, images),
            distributed.all_gather_rows(own.presence, images),
            self.patients,
            np.zeros(images, np.int64),
        )

    @property
    def _own_indices(self) -> NDArray[np.int64]:
        """The indices that this process predicts."""
        return self.indices[distributed.rank() :: distributed.world_size()]

    def _chunks(
        self, indices: NDArray[np.int64], pixels: NDArray[np.uint8] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Indices and their images in chunks, from memory or read while the device computes."""
        starts = range(0, len(indices), CHUNK_SIZE)
        chunks = [indices[start : start + CHUNK_SIZE] for start in starts]
        if pixels is not None:
            yield from zip(chunks, (pixels[start : start + CHUNK_SIZE] for start in starts), strict=True)
        else:
            yield from zip(chunks, prefetch(self.dataset.images, chunks), strict=True)


def all_images(dataset: Dataset) -> Subset:
    """The whole data set."""
    return Subset(dataset, np.arange(len(dataset)))


def require_positives(training: Subset) -> None:
    """Raises UserError if no training image has a finding; warns if each one has."""
    positives = np.count_nonzero(training.areas_px)
    if positives == 0:
        raise UserError(
            f"dataset: none of the {len(training)} training images has a pneumothorax, so there is nothing to"
            " learn; give a data set with annotated ones, or another split_seed or fold"
        )
    if positives == len(training):
        warn("every training image has a pneumothorax: expect false alarms on others")


def make_split(dataset: Dataset, settings: SplitSettings) -> Split:
    """The split of the data set's patients; the same for the same data set and settings.

    Rows of the images that train, validate and are held out; no patient is in two. Raises UserError for a
    data set without labels, and if ``fold`` is none of the folds.

    >>> with Dataset.open("dataset.h5") as dataset:
    ...     split = make_split(dataset, Train.of(fold=1, holdout=0.25).split)
    >>> len(split.train), len(split.validation), len(split.holdout)
    (14, 4, 6)
    """
    dataset.require_labels()
    if not settings.fold.isdecimal():
        raise UserError(
            f"fold={settings.fold}: give a number from 0 to {settings.folds - 1}; only train accepts all"
        )
    everyone = all_images(dataset)
    if distributed.is_main_process():
        warn_about_grouping(dataset)
    return split(
        everyone.patients.tolist(),
        everyone.areas_px,
        holdout=settings.holdout,
        folds=settings.folds,
        fold=int(settings.fold),
        seed=settings.split_seed,
    )


def describe_split(dataset: Dataset, subsets: Split) -> dict[str, Any]:
    """Images, patients, positives and areas of each subset, and that no patient is in two."""
    names = [f.name for f in fields(subsets)]
    number_of = np.empty(len(dataset), np.int64)
    for number, name in enumerate(names):
        number_of[getattr(subsets, name)] = number
    everyone = all_images(dataset)
    report = audit(everyone.patients.tolist(), everyone.areas_px, number_of)
    return report.as_dict() | {"parts": {names[part.part]: asdict(part) for part in report.parts}}


def image_set_id(subset: LabelledImages) -> str:
    """Digest, 32 hex digits, of the image ids and the true masks at native size.

    Independent of order, stored image size and pixel format: scores with the same one are comparable.
    """
    lines = [
        f"{entry.image_id} {entry.rows}x{entry.columns} {subset.dataset.rle(index)}\n"
        for entry, index in zip(subset.entries, subset.indices.tolist(), strict=True)
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:32]


def hash_image_ids(subset: Subset) -> frozenset[str]:
    """Keyed digests of images and patients, stored in a model to recognise those that it was trained on."""
    return frozenset(digest for entry in subset.entries for digest in _hashes(entry).values())


def _hashes(entry: Entry) -> dict[str, str]:
    """The keyed digest of an image and that of its patient; an unknown patient is this image's own."""
    return {"image": salted(f"image {entry.image_id}"), "patient": salted(f"patient {entry.patient}")}


def seen_by(subset: LabelledImages, seen: frozenset[str]) -> list[str]:
    """What of each image is among these digests: ``image``, else ``patient``, else nothing: empty."""
    each = map(_hashes, subset.entries)
    return [next((name for name, digest in own.items() if digest in seen), "") for own in each]


def describe_seen(subset: LabelledImages, seen: frozenset[str], model: str) -> str:
    """How many images the model has seen, and of how many others the patients; empty if none."""
    by = Counter(seen_by(subset, seen))
    text = f"{by['image']:,} of {plural(len(subset), 'image')} trained {model} or chose its thresholds"
    if by["patient"]:
        text += (
            f", the patients of {by['patient']} more did (rename them by patients_csv if others are meant)"
        )
    return text if by["image"] or by["patient"] else ""
