"""Optuna studies: opened by any number of workers at once, and tied to the data they were made with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments.errors import UserError
from pneumo_experiments.search.sampler import make_pruner, make_sampler
from pneumo_experiments.search.space import Space, as_range_text, within
from pneumo_experiments.search.storage import (
    AS_GIVEN,
    ERROR,
    allow_experimental,
    cannot_be_opened,
    load_study,
)
from pneumo_experiments.settings import (
    AUTO,
    Search,
    as_now,
    as_text,
    flat,
    is_none,
    read_config,
    renamed,
    weight_shaping,
)

# Attributes of a study
METRIC_NAMES = {"dice": "cross-fitted Dice", "seconds": "seconds per image"}
MADE_WITH = "made_with"  # data, fixed settings and space, as text by name
RANGE_OF = "range of "  # and the name of a searched setting
PARENT = "parent_run"  # id of the run above those of the trials
PARENT_PROCESS = "parent_process"  # tags of the process that has that run, set after it
REPORTED = "reported"  # the number of trials in the report
CONFIRM = "confirm."  # and a trial's number: its second training's TrainingResult, or an error
CONFIRM_RUN = "confirm_run."  # and a trial's number: id of the latest run of its second training
# Attributes of a trial
PATIENT_DICE = "patient_dice"  # see TrialScores
# Constraints, violated above 0
FALSE_ALARMS = "false_alarms"
# How long a worker waits until the one that created the study has made it ready
CREATION_SECONDS = 30
WARM_STARTS = 3  # best trials of another study to try first


def open_study(storage: BaseStorage, settings: Search, fingerprint: str, space: Space) -> Study:
    """The study that the settings name, created if it is new; its first trial has the settings' values.

    Raises UserError if it was made with other data, settings or ranges: its values could not be compared.
    """
    made_with = _made_with(settings, fingerprint, space)
    metric_names = [METRIC_NAMES[objective] for objective in settings.study.objectives.split(",")]
    name = settings.study.study
    if name == AUTO:
        digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        name = f"search-{digest[:8]}"
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: len(metric_names)]
    chosen: dict[str, Any] = {
        "sampler": make_sampler(settings.study, settings.recipe.seed),
        "pruner": make_pruner(settings.study),
    }
    first = [within(flat(settings.recipe), space), *_warm_start(storage, settings, space)]  # may raise
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=directions, **chosen)
        is_ready = False
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, **chosen)
        is_ready = study.directions != directions or _is_ready(study)
    except Exception as error:
        raise cannot_be_opened(settings.study.storage, error) from error
    if not is_ready:
        with allow_experimental():
            study.set_metric_names(metric_names)
        for number, values in enumerate(first):
            marks = {} if number else {AS_GIVEN: True}
            study.enqueue_trial(values, user_attrs=marks, skip_if_exists=True)
        study.set_user_attr(MADE_WITH, made_with)  # last: the others wait for it
    _check_same_study(study, made_with)
    return study


def _is_ready(study: Study) -> bool:
    """Waits until the worker that created the study has made it ready; False if that one must have died."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    start = time.monotonic()
    while not ended and MADE_WITH not in study.user_attrs:  # if it has ended trials, of another program
        if time.monotonic() - start > CREATION_SECONDS:
            return False
        time.sleep(0.2)
    return True


def _made_with(settings: Search, fingerprint: str, space: Space) -> dict[str, str]:
    fixed = {name: text for name, text in weight_shaping(settings).items() if name not in space}
    if settings.study.space is not None:
        fixed["space"] = settings.study.space.name  # it may lie elsewhere on another machine
    ranges = {RANGE_OF + name: as_range_text(range_) for name, range_ in space.items()}
    return {"data": fingerprint[:16]} | fixed | ranges


def _check_same_study(study: Study, made_with: Mapping[str, str]) -> None:
    recorded = cast("dict[str, str] | None", study.user_attrs.get(MADE_WITH))
    if recorded is None:
        differences = ["another program"]
    else:
        recorded = renamed(recorded)
        with suppress(ValueError):  # of a version that knew other values: they differ
            now = {name: as_text(value) for name, value in as_now(Search, recorded).items()}
            recorded = recorded | {n: now[n] for n in now if n in made_with and RANGE_OF + n not in recorded}
        differences = [
            f"{name} {recorded.get(name, 'not searched')}, now {made_with.get(name, 'not searched')}"
            for name in {**made_with, **recorded}
            if made_with.get(name) != recorded.get(name)
        ]
    if differences:
        raise UserError(
            f"study={study.study_name}: was made with {'; '.join(differences)}; name another study, or auto,"
            " or search with the same data and settings"
        )


def _warm_start(storage: BaseStorage, settings: Search, space: Space) -> list[dict[str, Any]]:
    source = settings.study.warm_start
    if is_none(source):
        return []
    if Path(source).is_file():
        return [within(read_config(Path(source), Search)[0], space)]
    other = load_study("warm_start", storage, source)
    return [within(renamed(trial.params), space) for trial in best_trials(other)[:WARM_STARTS]]


# The trials of a study


@dataclass(frozen=True)
class TrainingResult:
    """What the first or the second training of a trial's settings is compared by."""

    dice: float
    patient_dice: list[float]
    constraints: dict[str, float]


def set_confirmation(study: Study, number: int, result: TrainingResult | str) -> None:
    """Keeps the second training of a trial with the study, or the error that it ended with."""
    attribute = {ERROR: result} if isinstance(result, str) else asdict(result)
    study.set_user_attr(f"{CONFIRM}{number}", attribute)


def confirmations(study: Study) -> dict[int, TrainingResult]:
    """The second trainings that have a result, by the trial's number."""
    return {
        int(name.removeprefix(CONFIRM)): TrainingResult(**attribute)
        for name, attribute in study.user_attrs.items()
        if name.startswith(CONFIRM) and ERROR not in attribute
    }


def trials_to_confirm(study: Study, confirm: int) -> list[int]:
    """The numbers of the trial with the settings as given and of the best others without a second training.

    None if no other trial could win.
    """
    best, attributes = best_trials(study), study.user_attrs
    given = [trial.number for trial in best if AS_GIVEN in trial.user_attrs]
    others = [trial.number for trial in best if trial.number not in given and not violation(trial)][:confirm]
    return [number for number in given + others if others and f"{CONFIRM}{number}" not in attributes]


def counts_toward_total(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's ``trials``: not a killed one, which another one repeats."""
    finished = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return finished or (trial.state is TrialState.FAIL and ERROR in trial.user_attrs)


def count_trials(study: Study) -> int:
    """The trials that count towards the study's total."""
    return sum(map(counts_toward_total, study.get_trials(deepcopy=False)))


def best_trials(study: Study) -> list[FrozenTrial]:
    """The completed trials, the best first; of equal ones the earlier."""
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(completed, key=lambda trial: (violation(trial), -first_value(trial), trial.number))


def violation(trial: FrozenTrial | optuna.Trial | TrainingResult) -> float:
    """By how much a trial violates its constraints, as Optuna's samplers add it up; 0 if it is feasible."""
    return excess(trial.constraints)


def excess(constraints: Mapping[str, float]) -> float:
    """The sum of what constraints are above 0."""
    return sum(max(0.0, value) for value in constraints.values())


def first_value(trial: FrozenTrial) -> float:
    """The Dice of a completed trial: its only objective, or the first of several."""
    return cast("list[float]", trial.values)[0]
