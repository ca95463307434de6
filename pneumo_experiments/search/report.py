"""The report on a study: its best settings, the table of trials and Optuna's pictures."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments.figures import pyplot_picture
from pneumo_experiments.search.space import with_values
from pneumo_experiments.search.storage import ERROR, RUN_ID
from pneumo_experiments.search.study import METRIC_NAMES, best_trials, first_value, violation
from pneumo_experiments.search.trial import Trials
from pneumo_experiments.search.winner import Winner
from pneumo_experiments.settings import as_config

TRIALS_FOR_IMPORTANCE = 5  # completed ones; of fewer, importances and contours say nothing
COLUMNS = (
    *("dice", "dice_optimistic", "dice_positive", "false_alarms", "is_all_empty", "seconds"),
    *(RUN_ID, ERROR),
)


@dataclass(frozen=True)
class StudyReport:
    """What the run of a search shows of its study."""

    columns: list[str]
    rows: list[list[object]]
    """a trial each"""
    best: dict[str, Any]
    """the settings of ``train`` that the winner was found with, by name"""
    description: str
    pictures: dict[str, NDArray[np.uint8]]
    """Optuna's plots by name, RGB (h, w, 3)"""


def make_report(trials: Trials, winner: Winner | None) -> StudyReport:
    """The report; without a winner nothing but the table."""
    every = trials.study.get_trials(deepcopy=False)
    columns = ["trial", "state", "value", *trials.space, "confirmed", *COLUMNS]
    rows = _rows(every, [*trials.space], winner.confirmed if winner else {})
    if winner is None:
        return StudyReport(columns, rows, {}, "", {})
    settings = trials.settings
    recipe, dataset = with_values(settings.recipe, winner.trial.params), {"dataset": str(settings.dataset)}
    best = dataset | as_config(recipe) | as_config(settings.split) | as_config(settings.compute)
    description = f"Study {trials.study.study_name}: {_description(every, winner)}"
    return StudyReport(columns, rows, best, description, pictures(trials.study))


def pictures(study: Study) -> dict[str, NDArray[np.uint8]]:
    """Optuna's own plots by name, RGB (h, w, 3); those for which the study has enough trials."""
    from optuna.visualization import matplotlib as plots  # takes a third of a second

    completed = best_trials(study)
    names = [name for name in completed[0].params if len({t.params.get(name) for t in completed}) > 1]
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
    if len({first_value(trial) for trial in completed}) > 1:
        low = {"params": names, "target": loss_of}  # as PED-ANOVA wants it
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes")
            drawn["importances"] = _draw(plots.plot_param_importances, study, **(target | low))
            names = [*optuna.importance.get_param_importances(study, params=names, target=loss_of)]
    if len(names) >= 2:
        drawn["contour"] = _draw(plots.plot_contour, study, params=names[:2], **target)
    return drawn


def _draw(plot: Callable[..., Any], study: Study, **arguments: Any) -> NDArray[np.uint8]:
    return pyplot_picture(lambda: plot(study, **arguments))


def loss_of(trial: FrozenTrial) -> float:
    """What a completed trial violates less its Dice: low is good."""
    return violation(trial) - first_value(trial)


def _rows(trials: list[FrozenTrial], names: list[str], confirmed: dict[int, float]) -> list[list[object]]:
    rows: list[list[object]] = []
    for trial in trials:
        if trial.state is TrialState.WAITING or (trial.state is TrialState.FAIL and not trial.params):
            continue  # nothing has happened yet, or it was one too many
        value = trial.values[0] if trial.values else trial.user_attrs.get("dice")
        values = [trial.params.get(name) for name in names]
        attributes = [trial.user_attrs.get(name) for name in COLUMNS]
        state = trial.state.name.lower()
        rows.append([trial.number, state, value, *values, confirmed.get(trial.number), *attributes])
    return rows


def _description(trials: list[FrozenTrial], winner: Winner) -> str:
    states = Counter(trial.state.name.lower() for trial in trials if trial.params)
    best = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in winner.trial.params.items()
    }
    lines = [
        ", ".join(f"{count} {state}" for state, count in states.items()) + ".",
        f"Best: trial {winner.line}.",
        *("", "| setting | best value |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in best.items()),
        "",
    ]
    if winner.confirmed:
        again = ", ".join(f"{number} ({dice:.4f})" for number, dice in sorted(winner.confirmed.items()))
        lines.append(
            f"Trained again with another seed, on another fold where there is one: trials {again}. Others"
            " take the place of the settings as given only if they are better beyond noise."
        )
    completed = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if empty := sum(bool(trial.user_attrs.get("is_all_empty")) for trial in completed):
        lines.append(
            f"{empty} of {len(completed)} completed trials predict every image empty: they rank behind the"
            " others, by the Dice on positives at the best single score."
        )
    return "\n".join(lines)
