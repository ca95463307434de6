"""The work of a search: trials and second trainings, shared with other processes on any machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Literal

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.interrupts import Terminated, handle_signals
from pneumo_experiments.learning.device import count_gpus
from pneumo_experiments.learning.loader import require_crop
from pneumo_experiments.progress_bar import duration
from pneumo_experiments.search.claims import claim, heartbeat
from pneumo_experiments.search.space import search_space
from pneumo_experiments.search.storage import open_storage, retry_dead_trials
from pneumo_experiments.search.study import (
    best_trials,
    count_trials,
    counts_toward_total,
    first_value,
    open_study,
    trials_to_confirm,
    violation,
)
from pneumo_experiments.search.trial import Trials
from pneumo_experiments.search.trial_training import second_settings, split_folds
from pneumo_experiments.settings import Search, is_none
from pneumo_experiments.spawning import environment, without_main
from pneumo_experiments.terminal import make_streams_unfailing
from pneumo_experiments.words import plural

MAX_OUTAGES = 5  # of the database in a row
MAX_FAILURES = 3  # of trials in a row: then the cause is not a trial's settings
POLL_SECONDS = 2.0  # between looks at the trials of other workers
GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@contextmanager
def open_search(settings: Search) -> Generator[Trials]:
    """Opens data set and study, as one of the processes that work for it.

    Raises UserError for an unsuitable data set, before there is a study, and for a study of other data or
    settings.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a failed trial is printed as one line
    if count_workers(settings.workers) > 1 and is_none(settings.study.storage):
        raise UserError(f"workers={settings.workers}: they need a storage, such as sqlite:///optuna.db")
    with Dataset.open(settings.dataset) as dataset:
        split_folds(dataset, settings)
        require_crop(settings.recipe, dataset.image_size)
        if settings.study.confirm:
            split_folds(dataset, second_settings(settings))
        tracking.open_store()
        space = search_space(settings.study, settings.recipe)
        study = open_study(open_storage(settings.study.storage), settings, dataset.fingerprint, space)
        with heartbeat(study):
            yield Trials(study, dataset, settings, space)


def work(trials: Trials) -> None:
    """Runs trials until the study has its total, then second trainings, and waits for those of others.

    In several processes, if the settings say so. Starts no trial after the time limit, or once a Dice reaches
    the target. The trial of a worker that dies is repeated. Raises UserError when several in a row fail.
    """
    if count_workers(trials.settings.workers) > 1:
        _run_workers(trials)  # what they leave, after an error, is for this process
    outages, is_waiting = 0, False
    failures = {True: 0, False: 0}  # in a row: of trials, of second trainings
    while True:
        try:
            task = _next_task(trials)
            if task == "end":
                return
            if task == "wait":
                if not is_waiting:
                    print("search: waiting for other workers")
                is_waiting = True
                time.sleep(POLL_SECONDS)
                continue
            error = trials.run_next() if task == "trial" else trials.confirm(task)
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
            outages, is_trial = 0, task == "trial"
            failures[is_trial] = failures[is_trial] + 1 if error else 0
            if is_trial and (line := _progress(trials)):
                print(line)
            if failures[is_trial] >= MAX_FAILURES:
                raise UserError(f"search: the last {MAX_FAILURES} trials failed: {error}")


def _progress(trials: Trials) -> str:
    """How many trials are done, and about how long the others take if none is slower; empty after the last.

    With the second trainings that would follow now.
    """
    study, wanted = trials.study, trials.settings.study
    done = [trial for trial in study.get_trials(deepcopy=False) if counts_toward_total(trial)]
    if not done or len(done) >= wanted.trials:
        return ""
    seconds = [trial.user_attrs["seconds"] for trial in done if "seconds" in trial.user_attrs]
    at_once = max(1, len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))))
    left = wanted.trials - len(done) + len(trials_to_confirm(study, wanted.confirm))
    about = f", {duration(left / at_once * sum(seconds) / len(seconds))} left" if seconds else ""
    return f"search: {len(done)} of {plural(wanted.trials, 'trial')} done{about}"


def _next_task(trials: Trials) -> Literal["trial", "wait", "end"] | int:
    """A trial, or the number of one to confirm, which this process has claimed."""
    study, wanted = trials.study, trials.settings.study
    retry_dead_trials(study, trials.first_seen)
    count, best = count_trials(study), best_trials(study)
    running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    is_late = time.monotonic() >= trials.started + (wanted.timeout or inf)
    highest = first_value(best[0]) if best and not violation(best[0]) else -inf
    reached = wanted.target > 0 and highest >= wanted.target
    if count + running < wanted.trials and not is_late and not reached:
        return "trial"
    if count < wanted.trials and running:
        return "wait"
    missing = trials_to_confirm(study, wanted.confirm)
    for number in missing:
        if claim(study, f"confirm.{number}"):
            return number
    return "wait" if missing else "end"


# Several processes on this machine


def count_workers(requested: int) -> int:
    """The number of workers: for 0 one per GPU, or one."""
    return requested or max(1, count_gpus())


def _run_workers(trials: Trials) -> None:
    """Works in as many new processes as the settings say, each with a GPU or a part of the cores.

    A process that dies leaves its trial to the others; it is reported, not an error. When this process is
    interrupted, so are they.
    """
    count, context = count_workers(trials.settings.workers), get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for number in range(count):
            with environment(_fraction(number, count)), without_main():
                arguments = (replace(trials.settings, workers=1), trials.parent)
                process = context.Process(target=_work, args=arguments, name=f"search worker {number}")
                process.start()
            processes.append(process)
        for process in processes:
            process.join()
            if process.exitcode not in (0, UserError.exit_code):
                print(f"search: {process.name} ended with exit code {process.exitcode}", file=sys.stderr)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _fraction(number: int, count: int) -> dict[str, str]:
    """Environment of a worker: its GPU, or its part of the cores."""
    gpus = count_gpus()
    if gpus:
        visible = os.environ.get(GPUS, ",".join(map(str, range(gpus)))).split(",")
        return {GPUS: visible[number % gpus]}
    return {THREADS: str(max(1, available_cores() // count))}


def _work(settings: Search, parent: str) -> None:
    handle_signals()
    make_streams_unfailing()
    # Ctrl-C reaches the whole process group; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("MLFLOW_RUN_ID", None)  # the run of the main process
    try:
        with open_search(settings) as trials, tracking.joined_run(parent):
            work(replace(trials, parent=parent))
    except UserError as error:
        print(f"search: a worker stopped: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated as stop:
        sys.exit(stop.exit_code)
