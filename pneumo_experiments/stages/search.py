"""Entry point ``search``: a study over the settings of short trainings, shared by any number of workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from pathlib import Path

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.loop import confirm_trials, run_trials
from pneumo_experiments.search.report import is_reporter, log_study
from pneumo_experiments.search.space import search_space, unsearched_ranges, with_values
from pneumo_experiments.search.storage import open_storage
from pneumo_experiments.search.study import (
    PARENT,
    best_trials,
    count_trials,
    open_confirmations,
    open_study,
    parent_run,
)
from pneumo_experiments.search.table import in_words, print_header
from pneumo_experiments.search.trial import Objective, Training, delete_models
from pneumo_experiments.search.trial_training import (
    TrialTraining,
    second_settings,
    split_folds,
    warmup_checkpoint,
    warmup_weights,
)
from pneumo_experiments.search.winner import choose_winner
from pneumo_experiments.search.workers import count_workers, run_workers
from pneumo_experiments.settings import Recipe, Search, is_none


@dataclass(frozen=True)
class SearchResult:
    """The recipe with the best settings, and the best trial's number."""

    recipe: Recipe
    trial: int
    start: Path | None = None
    """state dict of the network that the trials started from, if it is kept"""


def search(settings: Search, keep_start: bool = False) -> SearchResult:
    """Runs the study's trials, together with other workers: each a short training in a child run.

    With ``keep_start`` the file of the network after the warm-up epochs stays, for the training that follows.
    """
    with ExitStack() as stack:
        try:
            dataset = stack.enter_context(Dataset.open(settings.dataset))
            split_folds(dataset, settings)  # an unsuitable data set is an error before there is a study
            if settings.study.confirm:
                split_folds(dataset, second_settings(settings))
        except UserError:
            with tracking.run("search", settings):
                raise

        def make_training(settings: Search) -> Training:
            tracking.log_dataset(settings.dataset, dataset.fingerprint, "search")
            return TrialTraining(dataset, settings)

        result = run_study(settings, dataset.fingerprint, make_training, search)
        warmup_checkpoint(second_settings(settings), dataset.fingerprint).clear()
        start = warmup_weights(settings, dataset.fingerprint)
        if not keep_start:
            warmup_checkpoint(settings, dataset.fingerprint).clear()
        elif settings.study.search_warmup_epochs > 0:
            if not start.is_file():  # the study had ended before this command
                with tracking.run("search", settings):
                    TrialTraining(dataset, settings)
            if start.is_file():
                return replace(result, start=start)
    return result


def run_study(
    settings: Search,
    fingerprint: str,
    make_training: Callable[[Search], Training],
    worker: Callable[[Search], object],
) -> SearchResult:
    """The search on data with this fingerprint; what a trial does is up to ``make_training``.

    Each process of several calls ``worker`` with settings of its own. Raises UserError if the study belongs
    to other data or settings, and if no trial completes.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a failed trial is printed as one line
    study_settings, start = settings.study, time.monotonic()
    workers = count_workers(settings.workers)
    try:
        if workers > 1 and is_none(study_settings.storage):
            raise UserError(f"workers={workers}: they need a storage, such as sqlite:///optuna.db")
        tracking.open_store()
        space = search_space(study_settings, settings.recipe)
        storage = open_storage(study_settings.storage)
        study, is_new = open_study(storage, settings, fingerprint, space)
        confirmations = open_confirmations(study, storage)
    except UserError:
        with tracking.run("search", settings):
            raise

    @cache
    def training(settings: Search) -> Training:
        made = make_training(settings)
        print_header(space)
        return made

    def is_shared() -> bool:
        return _others_work(study) or _others_work(confirmations)

    parent = parent_run(study, is_new)
    with tracking.run("search", settings, continues=parent, is_shared=is_shared) as run_id:
        if run_id != parent:
            study.set_user_attr(PARENT, run_id)
        tracking.log_params({"study_used": study.study_name})
        print("search: study", hide_passwords(study.study_name), "in", hide_passwords(study_settings.storage))
        if (count := count_trials(study)) >= study_settings.trials:
            print(f"search: the study has {count} trials already; a higher trials asks for more")
        if others := unsearched_ranges(study_settings):
            print(f"search: space has ranges of {', '.join(others)}, too; searched names what is searched")
        if workers > 1:
            run_workers(workers, worker, replace(settings, workers=1))
        deadline = start + study_settings.timeout if study_settings.timeout else inf
        objective = Objective(settings, space, lambda: training(settings), study_settings.trials)
        run_trials(study, storage, objective, deadline, study_settings.target)
        training.cache_clear()  # its images leave the memory
        again = second_settings(settings)
        objective = replace(objective, settings=again, training=lambda: training(again), confirms=True)
        confirm_trials(study, confirmations, storage, objective)
        winner = choose_winner(study, confirmations)
        if is_reporter(study, confirmations):
            log_study(study, winner, settings, space)
            delete_models(best_trials(study)[study_settings.keep :])
        if winner is None:
            raise UserError("search: no trial has completed; give it more trials, or more time")
        print(f"search: best is trial {winner.line}: {in_words(winner.trial.params)}")
    return SearchResult(with_values(settings.recipe, winner.trial.params), winner.trial.number)


def _others_work(study: Study) -> bool:
    """Whether another worker has a trial; False if the database does not respond."""
    with suppress(Exception):  # of many kinds; the run must end in any case
        return bool(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    return False
