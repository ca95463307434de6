"""The images of one part of a data set: their split, their predictions and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset, Entry
from pneumo_experiments.dataset.splits import Split, audit, split
from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.grouping import warn_about_grouping
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
from pneumo_experiments.learning.predict import Prediction, Predictor, to_native
from pneumo_experiments.scoring.figures import contact_sheet, overlay
from pneumo_experiments.scoring.scores import Scores, score
from pneumo_experiments.scoring.thresholds import (
    HUNDREDTHS,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
)
from pneumo_experiments.settings import SplitSettings

CHUNK = 64  # images read from the file at once, so that a large validation part needs little memory


@dataclass(frozen=True)
class Subset:
    """Some images of a labelled data set, by index; in a group of processes each predicts its part of them.

    ``greys`` (n, S, S) are the images of this process's part, where they are kept in memory.
    """

    dataset: Dataset
    indices: NDArray[np.int64]
    greys: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def entries(self) -> list[Entry]:
        """What the index tells of each image."""
        return [self.dataset.entries[int(i)] for i in self.indices]

    def examples(self, wish: str, compute: ComputeConfig) -> InMemoryData | StreamedData:
        """Everything that training needs, where ``cache`` wishes it or there is room; logs where that is."""
        present = np.array([entry.area_px > 0 for entry in self.entries])
        side = self.dataset.image_size
        place = choose_cache(wish, 2 * len(self) * side**2, compute.device)
        tracking.log_params({"cache_used": place})
        if place == "stream":
            return StreamedData(self.dataset, self.indices, present)
        where = str(compute.device) if place == "device" else "cpu"
        quiet = None if distributed.is_main_process() else True
        with tqdm(total=len(self), desc="load", unit="image", disable=quiet, leave=False) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            return load(self.dataset, self.indices, present, side, where, advance)

    def in_memory(self, wish: str) -> Subset:
        """The same with its images in memory, where there is room and ``cache`` does not ask for a stream."""
        if wish == "stream" or not fits_host(len(self._part) * self.dataset.image_size**2):
            return self
        return replace(self, greys=self.dataset.images(self._part))

    def predictions(self, predictor: Predictor) -> Iterator[tuple[int, Prediction]]:
        """Index and prediction of each image, in order."""
        for chunk, images in self._chunks(self.indices):
            yield from zip(chunk.tolist(), predictor.predict(images), strict=True)

    def count(self, predictor: Predictor, desc: str = "") -> ThresholdCounts:
        """Predictions against the truth at native size; a bar shows the progress where ``desc`` names it.

        In a group of processes each predicts its part, and all get the whole.
        """
        counter = ThresholdCounter(predictor, HUNDREDTHS)
        with tqdm(total=len(self._part), desc=desc, unit="image", disable=None if desc else True) as bar:

            def truth(index: int) -> NDArray[np.bool_]:
                bar.update()
                return self.dataset.mask(index)

            for chunk, images in self._chunks(self._part, self.greys):
                counter.add(images, map(truth, chunk.tolist()))
        counts = ThresholdCounts()
        tables, presence = counter.read()
        counts.append(
            distributed.all_gather_rows(tables, len(self)), distributed.all_gather_rows(presence, len(self))
        )
        return counts

    @property
    def _part(self) -> NDArray[np.int64]:
        """The indices that this process predicts."""
        return self.indices[distributed.rank() :: distributed.world_size()]

    def _chunks(
        self, indices: NDArray[np.int64], greys: NDArray[np.uint8] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Indices and their images, ``CHUNK`` at once; read while the device computes, or from memory."""
        starts = range(0, len(indices), CHUNK)
        chunks = [indices[start : start + CHUNK] for start in starts]
        if greys is not None:
            yield from zip(chunks, (greys[start : start + CHUNK] for start in starts), strict=True)
        else:
            yield from zip(chunks, prefetch(self.dataset.images, chunks), strict=True)

    def score(self, counts: ThresholdCounts, thresholds: Thresholds) -> Scores:
        """Scores of a tally of this cohort."""
        return score(counts, thresholds, [entry.patient for entry in self.entries])


def make_split(dataset: Dataset, recipe: SplitSettings) -> Split:
    """The recipe's division of the data set's patients: the same for the same data set and settings."""
    dataset.require_labels()
    if not recipe.fold.isdecimal():
        raise UserError(f"fold={recipe.fold}: give a part from 0 to {recipe.folds - 1}; only train takes all")
    entries = dataset.entries
    areas = np.array([entry.area_px for entry in entries])
    if distributed.is_main_process():
        warn_about_grouping(dataset)
    return split(
        [entry.patient for entry in entries],
        areas,
        holdout=recipe.holdout,
        folds=recipe.folds,
        fold=int(recipe.fold),
        seed=recipe.split_seed,
    )


def split_settings_of(model: Mapping[str, str]) -> SplitSettings:
    """The division that the settings stored in a model tell; of old models, ``seed`` drew it, too."""
    return SplitSettings(
        holdout=float(model["holdout"]),
        folds=int(model["folds"]),
        fold=model["fold"],
        split_seed=int(model.get("split_seed", model["seed"])),
    )


def log_split(dataset: Dataset, parts: Split) -> None:
    """Logs who is where: images, patients, positives and their areas in each part, and no patient in two."""
    names = [f.name for f in fields(parts)]
    number_of = np.empty(len(dataset), np.int64)
    for number, name in enumerate(names):
        number_of[getattr(parts, name)] = number
    entries = dataset.entries
    found = audit([entry.patient for entry in entries], np.array([e.area_px for e in entries]), number_of)
    told = found.as_dict()
    told["parts"] = {names[part.part]: asdict(part) for part in found.parts}
    tracking.log_json(told, "split.json")


def _evenly_spaced(ordered: list[int], count: int) -> dict[int, str]:
    """At most ``count`` of what is ordered from best to worst, evenly to both sides of the median.

    From a count of 3 on best, median and worst are among them; these have their names, the others "".
    """
    middle, last = (len(ordered) - 1) // 2, len(ordered) - 1
    count = min(count, len(ordered))
    before = np.linspace(0, middle, (count + 1) // 2)
    after = np.linspace(middle, last, count // 2 + 1)[1:]
    names = {0: "best:", middle: "median:", last: "worst:"} if len(ordered) >= 3 else {}
    return {ordered[i]: names.get(i, "") for i in np.append(before, after).round().astype(int).tolist()}


def log_overlays(
    subset: Subset, counts: ThresholdCounts, predictor: Predictor, thresholds: Thresholds, count: int
) -> str:
    """Logs overlays of the positives from best to worst Dice; others where there are too few of them.

    Of three and more one is the best, one the median and one the worst, and their captions say so. Returns
    where the sheet of all of them lies; empty for a count of 0.
    """
    if count == 0:
        return ""
    dices = counts.dice(thresholds)
    positives = [i for i in np.argsort(-dices, kind="stable").tolist() if counts.truth_area[i] > 0]
    others = [i for i in np.argsort(dices, kind="stable").tolist() if counts.truth_area[i] == 0]
    chosen = _evenly_spaced(positives, count) | dict.fromkeys(others[: max(0, count - len(positives))], "")
    some = Subset(subset.dataset, subset.indices[list(chosen)])
    drawn: list[NDArray[np.uint8]] = []
    for (place, name), (index, prediction) in zip(chosen.items(), some.predictions(predictor), strict=True):
        truth = some.dataset.mask(index)
        mask = apply_thresholds(to_native(prediction.mask, truth.shape), prediction.presence, thresholds)
        image = some.dataset.images(np.array([index]))[0]
        areas = f"truth {np.count_nonzero(truth):,} px, predicted {np.count_nonzero(mask):,} px"
        drawn.append(overlay(image, truth, mask, f"{name} Dice {dices[place]:.2f}, {areas}".strip()))
        tracking.log_image(drawn[-1], f"overlays/{len(drawn):02}.png")
    tracking.log_image(contact_sheet(drawn, columns=2), "overlays.png")
    return f"{tracking.artifacts_of_active_run()}/overlays.png"
