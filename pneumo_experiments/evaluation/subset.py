"""Subsets of a data set's images: splits, predictions and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset, Entry
from pneumo_experiments.dataset.patients import warn, warn_about_grouping
from pneumo_experiments.dataset.splits import Split, audit, split
from pneumo_experiments.errors import UserError
from pneumo_experiments.figures import contact_sheet, overlay
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.evaluate import ThresholdCounter
from pneumo_experiments.learning.loader import (
    InMemoryData,
    StreamedData,
    choose_cache,
    fits_host,
    load,
    prefetch,
)
from pneumo_experiments.learning.predict import AnyPredictor, Prediction, to_native
from pneumo_experiments.metrics.scores import ScoredImages, Scores, score_images
from pneumo_experiments.metrics.thresholds import (
    HUNDREDTHS,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
)
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import SplitSettings

CHUNK_SIZE = 64  # images read at once, so that a large validation set needs little memory


@dataclass(frozen=True)
class Subset:
    """Some images of a labelled data set, by index; the processes of a group divide the predictions.

    ``pixels`` (n, S, S) are the 8-bit images of this process, when they are held in memory.
    """

    dataset: Dataset
    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def entries(self) -> list[Entry]:
        """The index row of each image."""
        return [self.dataset.entries[int(i)] for i in self.indices]

    def training_data(self, cache: str, compute: ComputeConfig) -> InMemoryData | StreamedData:
        """The training data, held as ``cache`` says, for auto where there is room; logs the choice.

        Raises UserError without a positive image.
        """
        require_positives(self)
        present = np.array([entry.area_px > 0 for entry in self.entries])
        size = self.dataset.image_size
        cache = choose_cache(cache, 2 * len(self) * size**2, compute.device)
        tracking.log_params({"cache_used": cache})
        if cache == "stream":
            return StreamedData(self.dataset, self.indices, present)
        device = str(compute.device) if cache == "device" else "cpu"
        with ProgressBar("load", len(self), is_shown=distributed.is_main_process()) as bar:
            return load(self.dataset, self.indices, present, size, device, bar.update)

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
        counter = ThresholdCounter(predictor, HUNDREDTHS)
        with ProgressBar(desc, len(self._own_indices), is_shown=bool(desc), is_kept=True) as bar:

            def truth(index: int) -> NDArray[np.bool_]:
                bar.update()
                return self.dataset.mask(index)

            for chunk, images in self._chunks(self._own_indices, self.pixels):
                counter.add(images, map(truth, chunk.tolist()))
        counts = ThresholdCounts()
        pixels, presence = counter.read()
        counts.append(
            distributed.all_gather_rows(pixels, len(self)), distributed.all_gather_rows(presence, len(self))
        )
        return counts

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

    def score(self, counts: ThresholdCounts, thresholds: Thresholds) -> Scores:
        """Scores of the counts of this subset."""
        return score_images(self.scored(counts, thresholds))

    def scored(self, counts: ThresholdCounts, thresholds: Thresholds) -> ScoredImages:
        """What the scores of the counts of this subset are made of."""
        return ScoredImages.of(counts, thresholds, [entry.patient for entry in self.entries])


def require_positives(training: Subset) -> None:
    """Raises UserError if no training image has a finding; warns if each one has."""
    positives = sum(entry.area_px > 0 for entry in training.entries)
    if positives == 0:
        raise UserError(
            f"dataset: none of the {len(training)} training images has a pneumothorax, so there is nothing to"
            " learn; give a data set with annotated ones, or another split_seed or fold"
        )
    if positives == len(training):
        warn("every training image has a pneumothorax: expect false alarms on others")


def make_split(dataset: Dataset, settings: SplitSettings) -> Split:
    """The split of the data set's patients; the same for the same data set and settings."""
    dataset.require_labels()
    if not settings.fold.isdecimal():
        raise UserError(
            f"fold={settings.fold}: give a number from 0 to {settings.folds - 1}; only train accepts all"
        )
    entries = dataset.entries
    areas = np.array([entry.area_px for entry in entries])
    if distributed.is_main_process():
        warn_about_grouping(dataset)
    return split(
        [entry.patient for entry in entries],
        areas,
        holdout=settings.holdout,
        folds=settings.folds,
        fold=int(settings.fold),
        seed=settings.split_seed,
    )


def log_split(dataset: Dataset, subsets: Split) -> None:
    """Logs the images, patients, positives and areas of each subset, and that no patient is in two."""
    names = [f.name for f in fields(subsets)]
    number_of = np.empty(len(dataset), np.int64)
    for number, name in enumerate(names):
        number_of[getattr(subsets, name)] = number
    entries = dataset.entries
    report = audit([entry.patient for entry in entries], np.array([e.area_px for e in entries]), number_of)
    content = report.as_dict()
    content["parts"] = {names[part.part]: asdict(part) for part in report.parts}
    tracking.log_json(content, "split.json")


def _evenly_spaced(ordered: list[int], count: int) -> dict[int, str]:
    """At most ``count`` items of a list from best to worst, evenly spaced on both sides of the median.

    Returns their labels: three and more items include the best, median and worst, so labelled; others are "".
    """
    middle, last = (len(ordered) - 1) // 2, len(ordered) - 1
    count = min(count, len(ordered))
    before = np.linspace(0, middle, (count + 1) // 2)
    after = np.linspace(middle, last, count // 2 + 1)[1:]
    names = {0: "best:", middle: "median:", last: "worst:"} if len(ordered) >= 3 else {}
    return {ordered[i]: names.get(i, "") for i in np.append(before, after).round().astype(int).tolist()}


def log_overlays(
    subset: Subset, counts: ThresholdCounts, predictor: AnyPredictor, thresholds: Thresholds, count: int
) -> None:
    """Logs overlays of positives from best to worst Dice, with negatives when there are too few.

    Three and more include the best, median and worst, so labelled.
    """
    if count == 0:
        return
    dices, truth = counts.dice(thresholds), counts.truth_area
    positives = [i for i in np.argsort(-dices, kind="stable").tolist() if truth[i] > 0]
    negatives = [i for i in np.argsort(dices, kind="stable").tolist() if truth[i] == 0]
    chosen = _evenly_spaced(positives, count) | dict.fromkeys(negatives[: max(0, count - len(positives))], "")
    texts = describe_images(counts, thresholds)
    captions = {position: f"{label} {texts[position]}".strip() for position, label in chosen.items()}
    drawn: list[NDArray[np.uint8]] = []
    for picture in draw_overlays(subset, predictor, thresholds, captions):
        drawn.append(picture)
        tracking.log_image(picture, f"overlays/{len(drawn):02}.png")
    tracking.log_image(contact_sheet(drawn, columns=2), "overlays.png")


def describe_images(counts: ThresholdCounts, thresholds: Thresholds) -> list[str]:
    """Dice, true and predicted area of each image in words."""
    columns = (counts.dice(thresholds), counts.truth_area, counts.predicted_area(thresholds))
    return [
        f"Dice {dice:.2f}, truth {truth:,} px, predicted {predicted:,} px"
        for dice, truth, predicted in zip(*columns, strict=True)
    ]


def draw_overlays(
    subset: Subset,
    predictor: AnyPredictor,
    thresholds: Thresholds,
    captions: Mapping[int, str],
    size_px: int = 384,
) -> Iterator[NDArray[np.uint8]]:
    """Overlays of the images at some positions, with their captions."""
    shown = Subset(subset.dataset, subset.indices[list(captions)])
    for caption, (index, prediction) in zip(captions.values(), shown.predictions(predictor), strict=True):
        truth = shown.dataset.mask(index)
        mask = apply_thresholds(to_native(prediction.mask, truth.shape), prediction.presence, thresholds)
        yield overlay(shown.dataset.images(np.array([index]))[0], truth, mask, caption, size_px)
