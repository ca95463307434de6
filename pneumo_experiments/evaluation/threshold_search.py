"""The search for thresholds on threshold counts: the exact optimum and an Optuna study; counts as a file."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from pneumo_experiments.dataset.splits import assign_folds
from pneumo_experiments.errors import UserError
from pneumo_experiments.figures import pyplot_picture
from pneumo_experiments.metrics.best_thresholds import Optimum, best_of_all
from pneumo_experiments.metrics.scores import ScoredImages, Scores, score_images
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid, cross_fitted
from pneumo_experiments.words import plural

TRIAL_COLUMNS = ("trial", *asdict(Thresholds()), "dice")
FILE = "threshold_counts.npz"
FOLDS = 5  # of patients in the file: thresholds that a search finds are scored on other patients
MAX_BYTES = 2**31  # uncompressed: the counts of 2.6 million images
DTYPES = {"counts": np.int32, "presence": np.float32, "patients": np.int32, "parts": np.int32}


@dataclass(frozen=True)
class ThresholdSearch:
    """The best thresholds, and how near the study came to them; the study decides nothing."""

    optimum: Optimum
    study: optuna.Study | None

    @property
    def thresholds(self) -> Thresholds:
        """The exact optimum, centred in its plateau."""
        return self.optimum.thresholds

    def as_metrics(self) -> dict[str, float]:
        """Mean Dice of the exact optimum, and that of the study's best trial with its distance to it."""
        exact = {"thresholds/dice_exact": self.optimum.dice}
        if self.study is None:
            return exact
        value = self.study.best_value
        return exact | {
            "thresholds/dice_optuna": value,
            "thresholds/dice_distance": self.optimum.dice - value,
        }

    def trials(self) -> list[tuple[float, ...]]:
        """The study's trials, with the columns of TRIAL_COLUMNS."""
        trials = self.study.get_trials(deepcopy=False) if self.study else []
        return [(trial.number, *asdict(_thresholds(trial)).values(), trial.values[0]) for trial in trials]

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """History and contour plots of the study, RGB (h, w, 3) by file name; none without a study."""
        if (study := self.study) is None:
            return {}
        from optuna.visualization import matplotlib as plots  # takes a third of a second

        history, contours = plots.plot_optimization_history, plots.plot_contour
        return {
            "threshold_history.png": pyplot_picture(lambda: history(study, target_name="Dice")),
            "threshold_contours.png": pyplot_picture(
                lambda: contours(study, target_name="Dice"), inches=(14, 12)
            ),
        }


def search_thresholds(counts: ThresholdCounts, trials: int, seed: int) -> ThresholdSearch:
    """The exact optimum of n >= 1 counted images, and a study of so many trials; none of 0 trials."""
    optimum = best_of_all(counts)
    if trials == 0:
        return ThresholdSearch(optimum, None)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(asdict(best_on_grid(counts)))

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("presence_threshold", 0.0, 0.95, step=0.01)
        trial.suggest_float("top_score", 0.05, 0.95, step=0.01)
        trial.suggest_int("min_area_px", 0, 10_000, step=50)
        trial.suggest_float("bottom_score", 0.05, 0.95, step=0.01)
        return float(counts.dice(_thresholds(trial)).mean())

    study.optimize(objective, n_trials=trials)
    return ThresholdSearch(optimum, study)


@dataclass(frozen=True, eq=False)
class CountsSearch:
    """The thresholds that a search found for counted images, and how those given in their place score."""

    counts: ThresholdCounts
    search: ThresholdSearch
    cross_fitted_dice: float
    """each image with thresholds from other patients"""
    given: Thresholds | None

    @cached_property
    def scores(self) -> Scores:
        """The scores of the optimum."""
        return score_images(ScoredImages.of(self.counts, self.search.thresholds))

    def as_metrics(self) -> dict[str, float]:
        """The Dice of the optimum, of the study, cross-fitted, and as given."""
        values = self.search.as_metrics() | {"thresholds/dice_cross_fitted": self.cross_fitted_dice}
        if self.given is not None:
            values["thresholds/dice_given"] = float(self.counts.dice(self.given).mean())
        return values

    def lines(self) -> list[str]:
        """The result in words."""
        scores, optimum, values = self.scores, self.search.optimum, self.as_metrics()
        lines = [
            f"{plural(scores.images, 'image')} of {plural(scores.patients, 'patient')},"
            f" {scores.positives:,} with pneumothorax, all-empty baseline {scores.dice_baseline:.4f}",
            f"best of {optimum.combinations:,} combinations: Dice {optimum.dice:.4f}"
            f" ({scores.interval}), on positives {scores.on_positives}, with {_text(optimum.thresholds)}",
            f"cross-fitted, thresholds from other patients: Dice {self.cross_fitted_dice:.4f}",
        ]
        if trials := self.search.trials():
            best, distance = values["thresholds/dice_optuna"], values["thresholds/dice_distance"]
            lines.append(
                f"Optuna, {plural(len(trials), 'trial')}: Dice {best:.4f}, below the best by {distance:.4f}"
            )
        if self.given is not None:
            lines.append(f"as given: Dice {values['thresholds/dice_given']:.4f} with {_text(self.given)}")
        return lines


def search_counts(counts: ThresholdCounts, trials: int, given: Mapping[str, float]) -> CountsSearch:
    """Searches thresholds for counted images; where some are ``given``, the others are the optimum's."""
    search = search_thresholds(counts, trials, seed=0)
    crossed = cross_fitted(counts, counts.fold, lambda others: best_of_all(others).thresholds)
    own = replace(search.thresholds, **given) if given else None
    return CountsSearch(counts, search, crossed.dice, own)


def _text(thresholds: Thresholds) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(thresholds).items())


def _thresholds(trial: optuna.Trial | optuna.trial.FrozenTrial) -> Thresholds:
    """The thresholds of a trial; a bottom_score above top_score counts as top_score."""
    thresholds = Thresholds(**trial.params)
    bottom = min(thresholds.bottom_score, thresholds.top_score)
    return Thresholds(thresholds.presence_threshold, thresholds.top_score, thresholds.min_area_px, bottom)


@contextmanager
def counts_file(counts: ThresholdCounts) -> Generator[Path]:
    """The counts as a temporary file, so that thresholds can be searched again without model or images.

    Below 1 kB an image, and no id. Images that are in one fold are divided into 5, stratified by area.
    """
    patients, folds = counts.patient.tolist(), counts.fold
    if len(np.unique(folds)) == 1 and (number := min(FOLDS, len(set(patients)))) > 1:
        folds = assign_folds(patients, counts.truth_area, number, seed=0)
    arrays: dict[str, Any] = {
        "counts": counts.pixels,
        "presence": counts.presence,
        "patients": np.unique(counts.patient, return_inverse=True)[1],
        "parts": folds,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        np.savez_compressed(path, **{name: arrays[name].astype(dtype) for name, dtype in DTYPES.items()})
        yield path


def load_counts(path: Path) -> ThresholdCounts:
    """The n >= 1 images of a ``counts_file``, with patients by number; nothing in the file is executed.

    Raises UserError for a file that cannot be read or holds impossible values.
    """
    try:
        if not path.is_file():  # reading a device or pipe would never end
            raise FileNotFoundError("no such file")
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            pixels, presence, patients, folds = (
                _array(arrays, name, dtype) for name, dtype in DTYPES.items()
            )
        counts = ThresholdCounts(pixels, presence, patients.astype(np.str_), folds.astype(np.int64))
        if not len(counts):
            raise ValueError("no images")
        if len(np.unique(np.stack((patients, folds)), axis=1).T) > len(np.unique(patients)):
            raise ValueError("a patient in two folds")
    except Exception as error:  # damaged bytes raise errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"counts={path}: not threshold counts ({reason}); `train` and `score` log them as"
            " threshold_counts.npz"
        ) from error
    return counts


def _array(arrays: Any, name: str, dtype: type) -> NDArray[Any]:
    array: Any = arrays[name]
    if not isinstance(array, np.ndarray) or array.dtype != dtype:  # pyright: ignore[reportUnknownMemberType]
        raise TypeError(f"{name} is not of type {np.dtype(dtype).name}")
    return array  # pyright: ignore[reportUnknownVariableType]
