"""The search for thresholds, on threshold counts: the exact optimum, and a study with Optuna beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import optuna
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.figures import pyplot_picture
from pneumo_experiments.metrics.exact import Optimum, best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid

TRIAL_COLUMNS = ("trial", *asdict(Thresholds()), "dice")


@dataclass(frozen=True)
class ThresholdSearch:
    """The best thresholds, and how near the study came to them; the study decides nothing."""

    optimum: Optimum
    study: optuna.Study | None

    @property
    def thresholds(self) -> Thresholds:
        """The exact optimum, in the middle of its equals."""
        return self.optimum.thresholds

    def as_metrics(self) -> dict[str, float]:
        """Mean Dice of the exact optimum, and that of the study's best trial with its distance to it."""
        exact = {"threshold_dice_exact": self.optimum.dice}
        if self.study is None:
            return exact
        value = self.study.best_value
        return exact | {"threshold_dice_optuna": value, "threshold_dice_distance": self.optimum.dice - value}

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


def log_threshold_study(search: ThresholdSearch) -> None:
    """Logs the study's trials, history and contours in the active run; nothing without a study."""
    if trials := search.trials():
        tracking.log_table(TRIAL_COLUMNS, trials, "threshold_trials")
    for file_name, picture in search.pictures().items():
        tracking.log_image(picture, file_name)


def _thresholds(trial: optuna.Trial | optuna.trial.FrozenTrial) -> Thresholds:
    """The thresholds of a trial; a bottom_score above top_score counts as top_score."""
    thresholds = Thresholds(**trial.params)
    bottom = min(thresholds.bottom_score, thresholds.top_score)
    return Thresholds(thresholds.presence_threshold, thresholds.top_score, thresholds.min_area_px, bottom)
