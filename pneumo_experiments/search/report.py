"""The report on a study: its best settings, the table of trials, curves and pictures."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments.figures import history_of_trials, pyplot_picture
from pneumo_experiments.search.space import short, with_values
from pneumo_experiments.search.storage import AS_GIVEN, ERROR, RUN_ID
from pneumo_experiments.search.study import (
    METRIC_NAMES,
    best_trials,
    counts_toward_total,
    first_value,
    violation,
)
from pneumo_experiments.search.trial import Trials
from pneumo_experiments.search.trial_training import all_empty_dice
from pneumo_experiments.search.winner import Winner
from pneumo_experiments.settings import Recipe, as_config, flat

TRIALS_FOR_IMPORTANCE = 10  # completed ones; of fewer, importances and contours are noise
MAX_DESCRIBED = 20  # trials in the description
BEST_VALUE = "search/best_value"
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
    """plots by name, RGB (h, w, 3)"""
    curves: list[tuple[int, dict[str, float]]]
    """number of each completed trial, and the metrics of the study at that step"""
    notes: list[str]
    """what the result does not say by itself"""


def make_report(trials: Trials, winner: Winner | None) -> StudyReport:
    """The report; without a winner nothing but the table."""
    every = trials.study.get_trials(deepcopy=False)
    columns = ["trial", "state", "value", *trials.space, "confirmed", *COLUMNS]
    rows = _rows(every, [*trials.space], winner.confirmed if winner else {})
    if winner is None:
        return StudyReport(columns, rows, {}, "", {}, [], [])
    settings = trials.settings
    recipe, dataset = with_values(settings.recipe, winner.trial.params), {"dataset": str(settings.dataset)}
    best = dataset | as_config(recipe) | as_config(settings.split) | as_config(settings.compute)
    notes = _notes(trials, winner)
    description = f"Study {trials.study.study_name}: {_description(trials.study, winner, notes)}"
    plots, curves = pictures(trials.study), [*_curves(trials.study)]
    return StudyReport(columns, rows, best, description, plots, curves, notes)


def pictures(study: Study) -> dict[str, NDArray[np.uint8]]:
    """The history, and Optuna's own plots by name, RGB (h, w, 3), for which the study has enough trials."""
    from optuna.visualization import matplotlib as plots  # takes a third of a second

    completed = best_trials(study)
    names = [name for name in completed[0].params if len({t.params.get(name) for t in completed}) > 1]
    is_single = len(study.directions) == 1
    # With a target of ours Optuna no longer knows that higher is better.
    target: dict[str, Any] = {"target_name": METRIC_NAMES["dice"]}
    target |= {} if is_single else {"target": first_value}
    drawn = {"history": _history(study)}
    if is_single and any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        drawn["intermediate_values"] = _draw(plots.plot_intermediate_values, study)
    if not is_single:
        drawn["pareto_front"] = _draw(plots.plot_pareto_front, study)
    if len(completed) < 2 or not names:
        return drawn
    drawn["parallel_coordinate"] = _draw(plots.plot_parallel_coordinate, study, params=names, **target)
    width = 3.2 * len(names) + 1.5
    drawn["slice"] = pyplot_picture(lambda: _slices(plots, study, params=names, **target), (width, 4))
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


def _slices(plots: Any, study: Study, **arguments: Any) -> None:
    for axes in np.atleast_1d(plots.plot_slice(study, **arguments)):
        axes.tick_params("x", which="both", labelrotation=60)  # else they overlap on a logarithmic axis


def _history(study: Study) -> NDArray[np.uint8]:
    """The Dice of each trial in order, of pruned ones the last, and the best so far."""
    trials = study.get_trials(deepcopy=False)
    points = {
        f"{state.name.lower()} trials": [
            (trial.number, value)
            for trial in trials
            if trial.state is state and (value := _value(trial)) is not None
        ]
        for state in (TrialState.COMPLETE, TrialState.PRUNED)
    }
    best = [(number, values[BEST_VALUE]) for number, values in _curves(study) if BEST_VALUE in values]
    return history_of_trials(points, [*best, *((len(trials) - 1, value) for _, value in best[-1:])])


def _curves(study: Study) -> Iterator[tuple[int, dict[str, float]]]:
    """Number of each completed trial, its Dice, and the best Dice of a feasible one so far."""
    best = -1.0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        value = first_value(trial)
        best = max(best, -1.0 if violation(trial) else value)
        yield trial.number, {"trial/value": value} | ({BEST_VALUE: best} if best >= 0 else {})


def _value(trial: FrozenTrial) -> float | None:
    """The Dice of a trial, of a pruned one the last; None without any.

    Optuna's value of a pruned one is what the pruner saw: less by what violates a constraint.
    """
    return first_value(trial) if trial.state is TrialState.COMPLETE else trial.user_attrs.get("dice")


def loss_of(trial: FrozenTrial) -> float:
    """What a completed trial violates less its Dice: low is good."""
    return violation(trial) - first_value(trial)


def _rows(trials: list[FrozenTrial], names: list[str], confirmed: dict[int, float]) -> list[list[object]]:
    rows: list[list[object]] = []
    for trial in trials:
        if trial.state is TrialState.WAITING or (trial.state is TrialState.FAIL and not trial.params):
            continue  # nothing has happened yet, or it was one too many
        values = [trial.params.get(name) for name in names]
        attributes = [trial.user_attrs.get(name) for name in COLUMNS]
        row = [trial.number, _state(trial), _value(trial), *values, confirmed.get(trial.number)]
        rows.append([*row, *attributes])
    return rows


def _state(trial: FrozenTrial) -> str:
    if trial.state is not TrialState.FAIL:
        return trial.state.name.lower()
    return "failed" if counts_toward_total(trial) else "interrupted"  # by the death of its process


def _notes(trials: Trials, winner: Winner) -> list[str]:
    notes, best = list[str](), max(map(first_value, best_trials(trials.study)))
    if best <= (empty := all_empty_dice(trials.dataset, trials.settings)):
        notes.append(
            f"no trial beat all-empty masks, which have a Dice of {empty:.4f}; raise search_epochs or"
            " search_images"
        )
    if AS_GIVEN in winner.trial.user_attrs:
        defaults, given = flat(Recipe()), winner.trial.params
        are_defaults = all(defaults[name] == value for name, value in given.items())
        these = "these are the defaults" if are_defaults else "these are the settings as given"
        notes.append(f"{these}: no other trial is better beyond noise")
    return notes


def _description(study: Study, winner: Winner, notes: Sequence[str]) -> str:
    trials = study.get_trials(deepcopy=False)
    states = Counter(_state(trial) for trial in trials if counts_toward_total(trial))
    completed = best_trials(study)
    lines = [
        ", ".join(f"{count} {state}" for state, count in states.items()) + ".",
        f"Best: trial {winner.line}.",
        *(f"{note[0].upper()}{note[1:]}." for note in notes),
        "",
        *_table(completed, winner),
        "",
    ]
    if winner.confirmed:
        again = ", ".join(f"{number} ({dice:.4f})" for number, dice in sorted(winner.confirmed.items()))
        lines.append(
            f"Trained again with another seed, on another fold where there is one: trials {again}. Others"
            " take the place of the settings as given only if they are better beyond noise."
        )
    if empty := sum(bool(trial.user_attrs.get("is_all_empty")) for trial in completed):
        lines.append(
            f"{empty} of {len(completed)} completed trials predict every image empty: they rank behind the"
            " others, by the Dice on positives at the best single score."
        )
    return "\n".join(lines)


def _table(completed: Sequence[FrozenTrial], winner: Winner) -> Iterator[str]:
    """The best of the completed trials as Markdown, the best first and the winner among them in bold."""
    names, shown = [*winner.trial.params], [*completed[:MAX_DESCRIBED]]
    if winner.trial.number not in [trial.number for trial in shown]:
        shown[-1:] = [winner.trial]
    header = ["trial", "Dice", "on positives", *names, "seconds"]
    yield f"| {' | &emsp;'.join(header)} |"
    yield "|" + "---|" * len(header)
    for trial in shown:
        facts = (first_value(trial), trial.user_attrs.get("dice_positive"))
        cells = [str(trial.number), *("–" if fact is None else f"{fact:.4f}" for fact in facts)]
        cells += [short(trial.params.get(name)) for name in names]
        cells.append(f"{trial.user_attrs.get('seconds', 0):.0f}")
        mark = "**" if trial.number == winner.trial.number else ""
        yield f"| {' | &emsp;'.join(f'{mark}{cell}{mark}' for cell in cells)} |"
    if len(completed) > len(shown):
        yield f"\nThe best {len(shown)} of {len(completed)} completed trials; trials.csv has all."
