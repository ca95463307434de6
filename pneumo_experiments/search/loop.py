"""Runs the trials of a study, together with any number of other workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments import tracking
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.search.storage import (
    AS_GIVEN,
    CONFIRMS,
    ERROR,
    fail_stale_trials,
    retry_dead_trials,
)
from pneumo_experiments.search.study import (
    best_trials,
    count_trials,
    first_value,
    is_counted,
    violation,
)
from pneumo_experiments.search.trial import Objective, Surplus, TrialFailed

MAX_OUTAGES = 5  # of the database in a row
MAX_FAILURES = 3  # of trials in a row: then the cause is not a trial's settings
POLL_SECONDS = 2.0  # between looks at the trials of other workers


def run_trials(
    study: Study,
    storage: BaseStorage,
    objective: Objective,
    deadline: float = inf,
    target: float = 0.0,
    queue: Callable[[], None] = lambda: None,
) -> None:
    """Runs trials until the study has its total, together with other workers, and waits for theirs.

    Starts none after ``deadline`` (of time.monotonic), or once a Dice reaches ``target``. ``queue`` is called
    before each trial. Raises UserError when several trials in a row have failed.
    """
    failures, outages, is_waiting = 0, 0, False
    first_seen: dict[int, float] = {}
    while True:
        try:
            if _is_over(study, objective.total, deadline, target):
                return
            queue()
            retry_dead_trials(study, storage, first_seen)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if count_trials(study) + len(running) >= objective.total:
                if not is_waiting:
                    print(f"search: waiting for other workers, which still run {len(running)}")
                is_waiting = True
                time.sleep(POLL_SECONDS)
                fail_stale_trials(study)
                continue
            error = _run_one(study, objective)
        except StorageInternalError:
            outages += 1
            if outages >= MAX_OUTAGES:
                raise UserError("storage: the database does not respond; the same command goes on") from None
            print("search: storage: the database does not respond; trying again")
            time.sleep(POLL_SECONDS)
        except UpdateFinishedTrialError:
            print("search: this process was silent for so long that its trial is repeated")
        except ServerUnreachable:
            tracking.wait_for_store()
        else:
            outages = 0
            failures = failures + 1 if error else 0
            if failures >= MAX_FAILURES:
                raise UserError(f"search: the last {failures} trials failed: {error}")


def _run_one(study: Study, objective: Objective) -> str | None:
    """Runs one trial; returns its error, if it failed."""
    ended: list[FrozenTrial] = []
    study.optimize(
        objective,
        n_trials=1,
        catch=(TrialFailed, Surplus),
        callbacks=[lambda _, trial: ended.append(trial)],
    )
    return ended[0].user_attrs.get(ERROR)


def confirm_trials(study: Study, confirmations: Study, storage: BaseStorage, objective: Objective) -> None:
    """Trains the settings as given and the best others again, each once, whoever does it.

    They are the trials of ``confirmations``; the ``objective`` is theirs.
    """
    best = best_trials(study)
    given = [trial for trial in best if AS_GIVEN in trial.user_attrs]
    others = [trial for trial in best if trial not in given and not violation(trial)]
    others = others[: objective.settings.study.confirm]
    numbers = {trial.number: trial for trial in [*given, *others]} if others else {}

    def queue() -> None:
        trials = confirmations.get_trials(deepcopy=False)
        active = [t for t in trials if is_counted(t) or t.state in (TrialState.RUNNING, TrialState.WAITING)]
        for number in numbers.keys() - {trial.user_attrs.get(CONFIRMS) for trial in active}:
            confirmations.enqueue_trial(numbers[number].params, user_attrs={CONFIRMS: number})

    earlier = {t.user_attrs[CONFIRMS] for t in confirmations.get_trials(deepcopy=False) if is_counted(t)}
    total = len(numbers.keys() | earlier)
    run_trials(confirmations, storage, replace(objective, total=total), queue=queue)


def _is_over(study: Study, total: int, deadline: float, target: float) -> bool:
    best = best_trials(study)
    reached = target > 0 and bool(best) and not violation(best[0]) and first_value(best[0]) >= target
    return reached or time.monotonic() >= deadline or count_trials(study) >= total
