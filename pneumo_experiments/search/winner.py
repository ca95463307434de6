"""The trial that a study ends with: the settings as given, unless another is better beyond noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.comparison import required_probability
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.storage import AS_GIVEN, load_study, open_storage
from pneumo_experiments.search.study import (
    CONFIRM,
    FALSE_ALARMS,
    PATIENT_DICE,
    TrainingResult,
    best_trials,
    confirmations,
    first_value,
    violation,
)
from pneumo_experiments.settings import renamed

CONFIDENCE = 0.97  # that no trial of a study that is no better than the settings as given takes their place
# Standard deviation of what a seed adds to the Dice of all images alike, which paired images do not show.
# Assumed, not measured: benchmarks/search_choice.py shows what follows if it is another.
SEED_SD = 0.0022


def probability_better(dices: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """How sure it is that settings are better than others, from a training of each.

    Both (p,) hold what each of the same p >= 2 patients adds to the Dice, which is their mean. The difference
    of the means is taken as normal; its variance is that of paired patients, plus that of two seeds.
    """
    differences = dices - reference
    noise = np.sqrt(differences.var(ddof=1) / len(differences) + 2 * SEED_SD**2)
    return NormalDist().cdf(float(differences.mean() / noise))


def better_than(
    reference: NDArray[np.float64], others: Mapping[int, NDArray[np.float64]]
) -> dict[int, float]:
    """The mean Dice of those of the others that are better than the reference beyond noise, by number.

    All (p,), as for ``probability_better``. The more there are, the surer it must be of each (Bonferroni).
    """
    level = required_probability(CONFIDENCE, 1, max(1, len(others)))
    return {
        number: float(dices.mean())
        for number, dices in others.items()
        if probability_better(dices, reference) >= level
    }


@dataclass(frozen=True)
class Winner:
    """The trial that a study ends with."""

    trial: FrozenTrial
    value: float
    """Dice of its second training; of its first one, if it has no other; the mean, if no trial is as given"""
    confirmed: dict[int, float]
    """Dice of the second training of each trial that has one, by number"""

    @property
    def line(self) -> str:
        """The winner in words."""
        given = ", the settings as given" if AS_GIVEN in self.trial.user_attrs else ""
        unconfirmed = "" if self.trial.number in self.confirmed else " (not confirmed)"
        return f"{self.trial.number}{given}, cross-fitted Dice {self.value:.4f}{unconfirmed}"


def choose_winner(study: Study) -> Winner | None:
    """The winner; None if no trial has completed.

    The second trainings decide; without that of the settings as given, the first ones. A trial that violates
    a constraint in either does not win. Where the settings as given exceed the limit of false alarms, the
    best of those that keep it wins.
    """
    best = {trial.number: trial for trial in best_trials(study)}
    if not best:
        return None
    second = confirmations(study)
    confirmed = {number: each.dice for number, each in second.items()}
    given = next((number for number, trial in best.items() if AS_GIVEN in trial.user_attrs), None)
    if given is None:  # they failed, or a version that did not mark them made the study: the best mean wins
        allowed = {number: each for number, each in second.items() if not violation(each)}
        values = {number: (first_value(best[number]) + each.dice) / 2 for number, each in allowed.items()}
        number = max(values, key=values.__getitem__, default=next(iter(best)))
    else:
        values = confirmed
        compared = second if given in second else {number: _first(trial) for number, trial in best.items()}
        dices = {
            number: np.array(each.patient_dice)
            for number, each in compared.items()
            if number != given and not violation(each) and not violation(best[number])
        }
        if compared[given].constraints.get(FALSE_ALARMS, 0) > 0:
            better = {number: float(each.mean()) for number, each in dices.items()}
        else:
            better = better_than(np.array(compared[given].patient_dice), dices)
        number = max(better, key=better.__getitem__, default=given)
    return Winner(best[number], values.get(number, first_value(best[number])), confirmed)


def _first(trial: FrozenTrial) -> TrainingResult:
    """The first training of a trial, to compare it as a second one."""
    return TrainingResult(first_value(trial), trial.user_attrs[PATIENT_DICE], trial.constraints)


def best_of_study(address: str, name: str) -> dict[str, Any]:
    """The best settings of a study in a storage, by name; UserError if there is none."""
    if (file := tracking.database_file(address)) and not file.is_file():  # it would be created
        raise UserError(
            f"storage={hide_passwords(address)}: no such database; name the one in which search has"
            f" from_study={name}"
        )
    storage = open_storage(address)
    study = load_study("from_study", storage, name)
    has_earlier = f"{name}-confirm" in optuna.get_all_study_names(storage)
    if has_earlier and not any(key.startswith(CONFIRM) for key in study.user_attrs):
        raise UserError(
            f"from_study={name}: its second trainings are of an earlier version; run search with the same"
            " settings again, which repeats them"
        )
    winner = choose_winner(study)
    if winner is None:
        raise UserError(f"from_study={name}: no trial of it has completed; search some")
    return renamed(winner.trial.params)
