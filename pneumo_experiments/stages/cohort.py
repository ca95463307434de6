"""What train, search and score share: the images of one part of a data set, judged by a network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.data.folds import Parts, audit, split
from pneumo_experiments.data.store import Dataset, Entry
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import group
from pneumo_experiments.learning.device import Machine
from pneumo_experiments.learning.fit import Epoch, State, fit
from pneumo_experiments.learning.loader import (
    Examples,
    Streamed,
    batches,
    choose_cache,
    fits_host,
    load,
    prefetch,
)
from pneumo_experiments.learning.predict import Prediction, Predictor, to_native
from pneumo_experiments.learning.tables import Counter
from pneumo_experiments.scoring.figures import contact_sheet, overlay
from pneumo_experiments.scoring.scores import Scores, score
from pneumo_experiments.scoring.thresholds import HUNDREDTHS, Tally, Thresholds, best_on_grid, outline
from pneumo_experiments.settings import Recipe, Split
from pneumo_experiments.stages.patients import warn_of_grouping

SHOWN = 12  # images of the first batch
CHUNK = 64  # images read from the file at once, so that a large validation part needs little memory


@dataclass(frozen=True)
class Cohort:
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

    def examples(self, wish: str, machine: Machine) -> Examples | Streamed:
        """Everything that training needs, where ``cache`` wishes it or there is room; logs where that is."""
        present = np.array([entry.area_px > 0 for entry in self.entries])
        side = self.dataset.image_size
        place = choose_cache(wish, 2 * len(self) * side**2, machine.device)
        tracking.log_found({"cache_used": place})
        if place == "stream":
            return Streamed(self.dataset, self.indices, present)
        where = str(machine.device) if place == "device" else "cpu"
        quiet = None if group.leads() else True
        with tqdm(total=len(self), desc="load", unit="image", disable=quiet, leave=False) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            return load(self.dataset, self.indices, present, side, where, advance)

    def in_memory(self, wish: str) -> Cohort:
        """The same with its images in memory, where there is room and ``cache`` does not ask for a stream."""
        if wish == "stream" or not fits_host(len(self._part) * self.dataset.image_size**2):
            return self
        return replace(self, greys=self.dataset.images(self._part))

    def predictions(self, predictor: Predictor) -> Iterator[tuple[int, Prediction]]:
        """Index and prediction of each image, in order."""
        for chunk, images in self._chunks(self.indices):
            yield from zip(chunk.tolist(), predictor.predict(images), strict=True)

    def tally(self, predictor: Predictor, desc: str = "") -> Tally:
        """Predictions against the truth at native size; a bar shows the progress where ``desc`` names it.

        In a group of processes each predicts its part, and all get the whole.
        """
        counter = Counter(predictor, HUNDREDTHS)
        with tqdm(total=len(self._part), desc=desc, unit="image", disable=None if desc else True) as bar:

            def truth(index: int) -> NDArray[np.bool_]:
                bar.update()
                return self.dataset.mask(index)

            for chunk, images in self._chunks(self._part, self.greys):
                counter.add(images, map(truth, chunk.tolist()))
        tally = Tally()
        tables, presence = counter.read()
        tally.add_tables(group.interleaved(tables, len(self)), group.interleaved(presence, len(self)))
        return tally

    @property
    def _part(self) -> NDArray[np.int64]:
        """The indices that this process predicts."""
        return self.indices[group.rank() :: group.size()]

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

    def score(self, tally: Tally, thresholds: Thresholds) -> Scores:
        """Scores of a tally of this cohort."""
        return score(tally, thresholds, [entry.patient for entry in self.entries])


def parts_of(dataset: Dataset, recipe: Split) -> Parts:
    """The recipe's division of the data set's patients: the same for the same data set and settings."""
    dataset.require_labels()
    if not recipe.fold.isdecimal():
        raise UserError(f"fold={recipe.fold}: give a part from 0 to {recipe.folds - 1}; only train takes all")
    entries = dataset.entries
    areas = np.array([entry.area_px for entry in entries])
    if group.leads():
        warn_of_grouping(dataset)
    return split(
        [entry.patient for entry in entries],
        areas,
        holdout=recipe.holdout,
        folds=recipe.folds,
        fold=int(recipe.fold),
        seed=recipe.split_seed,
    )


def split_of(model: Mapping[str, str]) -> Split:
    """The division that the settings stored in a model tell; of old models, ``seed`` drew it, too."""
    return Split(
        holdout=float(model["holdout"]),
        folds=int(model["folds"]),
        fold=model["fold"],
        split_seed=int(model.get("split_seed", model["seed"])),
    )


def log_split(dataset: Dataset, parts: Parts) -> None:
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


def log_first_batch(examples: Examples | Streamed, recipe: Recipe, epochs: int, machine: Machine) -> None:
    """Logs what the network sees: the first images of its first batch, with the outline of the annotation."""
    batch = next(batches(examples, recipe, 1, epochs, machine.device))
    greys = (batch.images[:SHOWN, 0] * 255).round().byte().cpu().numpy()
    truths = (batch.shares[:SHOWN] >= 0.5).cpu().numpy()
    pairs = zip(greys, truths, strict=True)
    drawn = [overlay(grey, truth, None, f"annotated {truth.mean():.1%}", 256) for grey, truth in pairs]
    tracking.log_picture(contact_sheet(drawn, columns=3), "first_batch.png")


def _spread(ordered: list[int], count: int) -> dict[int, str]:
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
    cohort: Cohort, tally: Tally, predictor: Predictor, thresholds: Thresholds, count: int
) -> str:
    """Logs overlays of the positives from best to worst Dice; others where there are too few of them.

    Of three and more one is the best, one the median and one the worst, and their captions say so. Returns
    where the sheet of all of them lies; empty for a count of 0.
    """
    if count == 0:
        return ""
    dices = tally.dice(thresholds)
    positives = [i for i in np.argsort(-dices, kind="stable").tolist() if tally.truth_area[i] > 0]
    others = [i for i in np.argsort(dices, kind="stable").tolist() if tally.truth_area[i] == 0]
    chosen = _spread(positives, count) | dict.fromkeys(others[: max(0, count - len(positives))], "")
    some = Cohort(cohort.dataset, cohort.indices[list(chosen)])
    drawn: list[NDArray[np.uint8]] = []
    for (place, name), (index, prediction) in zip(chosen.items(), some.predictions(predictor), strict=True):
        truth = some.dataset.mask(index)
        mask = outline(to_native(prediction.mask, truth.shape), prediction.presence, thresholds)
        image = some.dataset.images(np.array([index]))[0]
        areas = f"truth {np.count_nonzero(truth):,} px, predicted {np.count_nonzero(mask):,} px"
        drawn.append(overlay(image, truth, mask, f"{name} Dice {dices[place]:.2f}, {areas}".strip()))
        tracking.log_picture(drawn[-1], f"overlays/{len(drawn):02}.png")
    tracking.log_picture(contact_sheet(drawn, columns=2), "overlays.png")
    return f"{tracking.artifacts_of_active_run()}/overlays.png"


@dataclass(frozen=True)
class JudgedEpoch:
    """An epoch of training, and its predictions and scores on the validation images."""

    epoch: Epoch
    tally: Tally
    scores: Scores
    metrics: dict[str, float]  # all that was logged


def judged_epochs(
    desc: str,
    predictor: Predictor,
    examples: Examples | Streamed,
    validation: Cohort,
    recipe: Recipe,
    epochs: int,
    state: State | None = None,
) -> Iterator[JudgedEpoch]:
    """Trains the predictor's network in place; logs each epoch in the active run and on the terminal.

    Scores are those at the best thresholds of the coarse grid, logged as ``val_dice`` and so on: these images
    choose the epoch and the thresholds. The caller may stop at any time; from the ``state`` of an epoch the
    training goes on.
    """
    quiet = None if group.leads() else True  # None: where no terminal shows it
    with tqdm(total=len(examples) * epochs, desc=desc, unit="image", disable=quiet, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        trained = fit(predictor.network, examples, recipe, epochs, predictor.machine, advance, state)
        start = time.perf_counter()
        for done, epoch in enumerate(trained, start=1):
            tally = validation.tally(replace(predictor, network=epoch.network))
            scores = validation.score(tally, best_on_grid(tally))
            metrics = epoch.losses | scores.as_metrics("val_") | epoch.speed
            tracking.log_metrics(metrics, step=epoch.number)
            left = (time.perf_counter() - start) / done * (epochs - epoch.number)
            tqdm.write(
                f"  epoch {epoch.number}/{epochs}  loss {epoch.losses['loss']:.4f}  validation Dice"
                f" {scores.dice:.4f}  on positives {scores.on_positives}"
                f"  {epoch.images_per_second:.1f} images/s  {tqdm.format_interval(left)} left"
            )
            yield JudgedEpoch(epoch, tally, scores, metrics)
