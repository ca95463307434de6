"""Optuna studies: opened by any number of workers at once, and tied to the data they were made with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
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
from pneumo_experiments.settings import AUTO, Search, flat, is_none, read_config, weight_shaping

# Attributes of a study
METRIC_NAMES = {"dice": "cross-fitted Dice", "seconds": "seconds per image"}
MADE_WITH = "made_with"  # data, fixed settings and space, as text by name
PARENT = "parent_run"  # id of the run above those of the trials
# How long a worker waits until the one that created the study has made it ready, and started its run
CREATION_SECONDS = 30
WARM_STARTS = 3  # best trials of another study to try first


def open_study(storage: BaseStorage, settings: Search, fingerprint: str, space: Space) -> tuple[Study, bool]:
    """The study that the settings name, and whether this process created it.

    The first trial of a new study has the settings' values.
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
        is_new = True
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, **chosen)
        if study.directions != directions:
            _refuse_foreign(study, made_with)
        is_new = not _is_ready(study)
    except Exception as error:
        raise cannot_be_opened(settings.study.storage, error) from error
    if is_new:
        _set_metric_names(study, metric_names)
        for number, values in enumerate(first):
            marks = {} if number else {AS_GIVEN: True}
            study.enqueue_trial(values, user_attrs=marks, skip_if_exists=True)
        study.set_user_attr(MADE_WITH, made_with)  # last: the others wait for it
    _refuse_foreign(study, made_with)
    return study, is_new


def open_confirmations(study: Study, storage: BaseStorage) -> Study:
    """The study of trainings that confirm trials of another one: see ``second_settings``."""
    confirmations = optuna.create_study(
        study_name=confirm_name(study.study_name),
        storage=storage,
        directions=study.directions,
        load_if_exists=True,
    )
    if study.metric_names and not confirmations.metric_names:
        _set_metric_names(confirmations, study.metric_names)
    return confirmations


def _set_metric_names(study: Study, names: list[str]) -> None:
    with allow_experimental():
        study.set_metric_names(names)


def confirm_name(name: str) -> str:
    """The name of the study that confirms trials of another one."""
    return f"{name}-confirm"


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's ``trials``: not a killed one, which another one repeats."""
    finished = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return finished or (trial.state is TrialState.FAIL and ERROR in trial.user_attrs)


def parent_run(study: Study, is_new: bool) -> str | None:
    """Id of the run above those of the trials; None if this process is to start it."""
    if not is_new:
        _wait_for(study, PARENT)
    return study.user_attrs.get(PARENT)


def best_trials(study: Study) -> list[FrozenTrial]:
    """The completed trials, the best first; of equal ones the earlier."""
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(completed, key=lambda trial: (*rank(trial, first_value(trial)), trial.number))


def rank(trial: FrozenTrial | optuna.Trial, dice: float) -> tuple[float, float]:
    """Sorts trials, the best first: those that violate no constraint by Dice, then those that do so least."""
    return violation(trial), -dice


def violation(trial: FrozenTrial | optuna.Trial) -> float:
    """By how much a trial violates its constraints, as Optuna's samplers add it up; 0 if it is feasible."""
    return excess(trial.constraints)


def excess(constraints: Mapping[str, float]) -> float:
    """The sum of what constraints are above 0."""
    return sum(max(0.0, value) for value in constraints.values())


def loss(trial: FrozenTrial) -> float:
    """What a completed trial violates less its Dice: low is good."""
    return violation(trial) - first_value(trial)


def first_value(trial: FrozenTrial) -> float:
    """The Dice of a completed trial: its only objective, or the first of several."""
    return cast("list[float]", trial.values)[0]


def count_trials(study: Study) -> int:
    """The trials that count towards the study's total."""
    return sum(map(is_counted, study.get_trials(deepcopy=False)))


def _is_ready(study: Study) -> bool:
    """Waits until the worker that created the study has made it ready; False if that one must have died."""
    has_ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return bool(has_ended) or _wait_for(study, MADE_WITH)  # if it has ended trials, of another program


def _wait_for(study: Study, attribute: str) -> bool:
    """Waits until another worker has set an attribute of the study; False if that one must have died."""
    start = time.monotonic()
    while attribute not in study.user_attrs:
        if time.monotonic() - start > CREATION_SECONDS:
            return False
        time.sleep(0.2)
    return True


def _made_with(settings: Search, fingerprint: str, space: Space) -> dict[str, str]:
    fixed = {name: text for name, text in weight_shaping(settings).items() if name not in space}
    if settings.study.space is not None:
        fixed["space"] = settings.study.space.name  # it may lie elsewhere on another machine
    ranges = {f"range of {name}": as_range_text(range_) for name, range_ in space.items()}
    return {"data": fingerprint[:16]} | fixed | ranges


def _refuse_foreign(study: Study, made_with: Mapping[str, str]) -> None:
    stored: object = study.user_attrs.get(MADE_WITH)
    if isinstance(stored, dict):
        recorded = cast("dict[str, str]", stored)
        names = [name for name in {**made_with, **recorded} if made_with.get(name) != recorded.get(name)]
        differences = [
            f"{name} {recorded.get(name, 'not searched')}, not {made_with.get(name, 'not searched')}"
            for name in names
        ]
    else:
        differences = ["another program"]
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
        return [within(read_config(Path(source), Search), space)]
    other = load_study("warm_start", storage, source)
    return [within(trial.params, space) for trial in best_trials(other)[:WARM_STARTS]]
