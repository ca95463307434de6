"""Search for thresholds with Optuna, on threshold counts."""

from __future__ import annotations

from dataclasses import asdict

import optuna

from pneumo_experiments.scoring.thresholds import ThresholdCounts, Thresholds, best_on_grid


def refine_thresholds(counts: ThresholdCounts, trials: int, seed: int) -> Thresholds:
    """Thresholds with the highest mean Dice: the best of a coarse grid, refined by Optuna."""
    start = best_on_grid(counts)
    if trials == 0 or not len(counts):
        return start
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(asdict(start))

    def objective(trial: optuna.Trial) -> float:
        thresholds = Thresholds(
            presence_threshold=trial.suggest_float("presence_threshold", 0.0, 0.95, step=0.01),
            top_score=trial.suggest_float("top_score", 0.05, 0.95, step=0.01),
            min_area_px=trial.suggest_int("min_area_px", 0, 10_000, step=50),
            bottom_score=trial.suggest_float("bottom_score", 0.05, 0.95, step=0.01),
        )
        return float(counts.dice(thresholds).mean())

    study.optimize(objective, n_trials=trials)
    return Thresholds(**study.best_params)
