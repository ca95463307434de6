"""What a study found: its best settings, the table of trials and Optuna's pictures, in the parent run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments import tracking
from pneumo_experiments.figures import pyplot_picture
from pneumo_experiments.search.space import Space, with_values
from pneumo_experiments.search.storage import (
    ERROR,
    GRACE_SECONDS,
    PROCESS,
    RUN_ID,
)
from pneumo_experiments.search.study import (
    METRIC_NAMES,
    best_trials,
    first_value,
    is_counted,
    loss,
)
from pneumo_experiments.search.winner import Winner
from pneumo_experiments.settings import Search, as_config

TRIALS_FOR_IMPORTANCE = 5  # completed ones; of fewer, importances and contours say nothing
COLUMNS = (
    *("dice", "dice_optimistic", "dice_positive", "false_alarms", "is_all_empty", "seconds"),
    *(RUN_ID, ERROR),
)


def is_reporter(study: Study, confirmations: Study) -> bool:
    """Whether this worker writes the report: it ended the last trial, or the worker that did has died."""
    trials = [trial for each in (study, confirmations) for trial in each.get_trials(deepcopy=False)]
    ended = [trial for trial in trials if is_counted(trial) and trial.datetime_complete]
    if not ended:
        return True
    last = max(ended, key=lambda trial: trial.datetime_complete or datetime.min)
    process, complete = last.user_attrs.get(PROCESS), last.datetime_complete or datetime.min
    is_old = datetime.now() - complete > timedelta(seconds=GRACE_SECONDS)
    return is_old or process == tracking.process_tags() or tracking.has_ended(process or {})


def log_study(study: Study, winner: Winner | None, settings: Search, space: Space) -> None:
    """Logs the study's table of trials, and, if a trial has completed, best settings and pictures."""
    trials = study.get_trials(deepcopy=False)
    confirmed = winner.confirmed if winner else {}
    _log_trials(trials, confirmed, space)
    if winner is None:
        return
    tracking.log_yaml(best_settings(winner, settings), "best.yaml")
    tracking.log_metrics({"val_dice": winner.value, "best_trial": float(winner.trial.number)})
    tracking.describe(_description(study, trials, winner))
    for name, picture in pictures(study).items():
        tracking.log_image(picture, f"study/{name}.png")


def best_settings(winner: Winner, settings: Search) -> dict[str, Any]:
    """The settings of ``train`` that the winner was found with, by name."""
    recipe = with_values(settings.recipe, winner.trial.params)
    dataset = {"dataset": str(settings.dataset)}
    return dataset | as_config(recipe) | as_config(settings.split) | as_config(settings.compute)


def pictures(study: Study) -> dict[str, NDArray[np.uint8]]:
    """Optuna's own plots by name, RGB (h, w, 3); those for which the study has enough trials."""
    from optuna.visualization import matplotlib as plots  # takes a third of a second

    completed = best_trials(study)
    names = [name for name in completed[0].params if len({t.params.get(name) for t in completed}) > 1]
    values = {first_value(trial) for trial in completed}
    is_single = len(study.directions) == 1
    # With a target of ours Optuna no longer knows that higher is better.
    target: dict[str, Any] = {"target_name": METRIC_NAMES["dice"]}
    target |= {} if is_single else {"target": first_value}
    drawn = {"history": _draw(plots.plot_optimization_history, study, **target)}
    if is_single and any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        drawn["intermediate_values"] = _draw(plots.plot_intermediate_values, study)
    if not is_single:
        drawn["pareto_front"] = _draw(plots.plot_pareto_front, study)
    if len(completed) < 2 or not names:
        return drawn
    drawn["parallel_coordinate"] = _draw(plots.plot_parallel_coordinate, study, params=names, **target)
    drawn["slice"] = _draw(plots.plot_slice, study, params=names, **target)
    if len(completed) < TRIALS_FOR_IMPORTANCE:
        return drawn
    if len(values) > 1:
        low = {"params": names, "target": loss}  # as PED-ANOVA wants it
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes")
            drawn["importances"] = _draw(plots.plot_param_importances, study, **(target | low))
            names = [*optuna.importance.get_param_importances(study, params=names, target=loss)]
    if len(names) >= 2:
        drawn["contour"] = _draw(plots.plot_contour, study, params=names[:2], **target)
    return drawn


def _draw(plot: Callable[..., Any], study: Study, **arguments: Any) -> NDArray[np.uint8]:
    return pyplot_picture(lambda: plot(study, **arguments))


def _log_trials(trials: list[FrozenTrial], confirmed: dict[int, float], space: Space) -> None:
    columns = ["trial", "state", "value", *space, "confirmed", *COLUMNS]
    rows: list[list[object]] = []
    for trial in trials:
        if trial.state is TrialState.WAITING or (trial.state is TrialState.FAIL and not trial.params):
            continue  # nothing has happened yet, or it was one too many
        state = trial.state.name.lower()
        value = trial.values[0] if trial.values else trial.user_attrs.get("dice")
        values = [trial.params.get(name) for name in space]
        attributes = [trial.user_attrs.get(name) for name in COLUMNS]
        rows.append([trial.number, state, value, *values, confirmed.get(trial.number), *attributes])
    tracking.log_table(columns, rows, "trials")


def _description(study: Study, trials: list[FrozenTrial], winner: Winner) -> str:
    states = Counter(trial.state.name.lower() for trial in trials if trial.params)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [
        f"Study {study.study_name}: {counts}.",
        f"Best: trial {winner.line}.",
        "",
        "| setting | best value |",
        "|---|---|",
        *(
            f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"
            for name, value in winner.trial.params.items()
        ),
        "",
    ]
    if winner.confirmed:
        again = ", ".join(f"{number} ({dice:.4f})" for number, dice in sorted(winner.confirmed.items()))
        lines.append(
            f"Trained again with another seed, on another fold where there is one: trials {again}. Others"
            " take the place of the settings as given only if they are better beyond noise."
        )
    completed = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    empty = sum(bool(trial.user_attrs.get("is_all_empty")) for trial in completed)
    if empty:
        lines.append(
            f"{empty} of {len(completed)} completed trials predict every image empty: they rank behind the"
            " others, by the Dice on positives at the best single score."
        )
    return "\n".join(lines)
