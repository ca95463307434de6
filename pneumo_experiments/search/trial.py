"""The trials of a study that one process runs: short trainings, each in a child run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.exceptions import TrialPruned
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.dashboard import show_trial
from pneumo_experiments.search.space import Space, in_words, short, suggest, with_values
from pneumo_experiments.search.storage import AS_GIVEN, ERROR, PROCESS, RUN_ID, retry
from pneumo_experiments.search.study import (
    CONFIRM_RUN,
    FALSE_ALARMS,
    PATIENT_DICE,
    TrainingResult,
    best_trials,
    count_trials,
    counts_toward_total,
    excess,
    first_value,
    set_confirmation,
    trials_to_confirm,
    violation,
)
from pneumo_experiments.search.trial_training import TrialScores, TrialTraining, second_settings
from pneumo_experiments.serving import new_folder
from pneumo_experiments.settings import Recipe, Search, is_none

OVERLAYS = ("best image", "worst image")  # of a trial that is kept, by their Dice
# What ends one trial, not the search: a training that diverged, or that did not fit in the memory.
TRIAL_ERRORS = (UserError, RuntimeError, MemoryError)


class TrialFailed(Exception):
    """A trial ended with an error of its own, which is the message."""


class StudyComplete(Exception):
    """Other workers have started the last trials."""


@dataclass(frozen=True)
class TrialResult:
    """A trial's training that has ended; whether it was pruned, and how long it took."""

    scores: TrialScores
    state: Literal["complete", "pruned"]
    seconds: float


@dataclass
class Trials:
    """The trials of a study that this process runs."""

    study: Study
    dataset: Dataset
    settings: Search
    space: Space
    parent: str | None = None  # the run above those of the trials
    started: float = field(default_factory=time.monotonic)
    first_seen: dict[int, float] = field(default_factory=dict[int, float])
    """see ``retry_dead_trials``"""
    _training: TrialTraining | None = None
    _error: str | None = None

    def run_next(self) -> str | None:
        """Runs the next trial of the study; returns its error, if it failed."""
        self._error = None
        self.study.optimize(self._objective, n_trials=1, catch=(TrialFailed, StudyComplete))
        return self._error

    def confirm(self, number: int) -> str | None:
        """Trains a trial's settings again; returns the error, if that failed.

        The run of a process that died in it ends as KILLED.
        """
        if run_id := self.study.user_attrs.get(f"{CONFIRM_RUN}{number}"):
            tracking.end_if_running(run_id, "KILLED")
        values = self.study.get_trials(deepcopy=False)[number].params
        left = len(trials_to_confirm(self.study, self.settings.study.confirm))
        try:
            scores = self._train(number, second_settings(self.settings), values, left).scores
        except TrialFailed as failure:
            set_confirmation(self.study, number, str(failure))
            return str(failure)
        patients = scores.patient_dice.round(5).tolist()
        set_confirmation(self.study, number, TrainingResult(scores.dice, patients, self._constraints(scores)))
        return None

    def _objective(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The trial's values. Raises TrialPruned, TrialFailed and StudyComplete."""
        trial.set_user_attr(PROCESS, tracking.process_tags())  # first: without it a dead trial is a riddle
        earlier = trial.study.get_trials(deepcopy=False)[: trial.number]
        active = [each for each in earlier if counts_toward_total(each) or each.state is TrialState.RUNNING]
        if len(active) >= self.settings.study.trials:
            raise StudyComplete
        try:
            try:
                values = suggest(trial, self.space)
            except TRIAL_ERRORS as error:  # of the sampler
                raise _failure(f"trial {trial.number}", error) from error
            result = self._train(trial.number, self.settings, values, self._trials_left(), trial)
        except TrialFailed as failure:
            self._error = str(failure)
            trial.set_user_attr(ERROR, self._error)
            raise
        except BaseException:
            # Not a failure of its settings: they are tried again, by the next command at the latest.
            retry(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
            raise
        if result.state == "pruned":
            raise TrialPruned
        scores = result.scores
        is_single = self.settings.study.has_one_objective
        return (scores.dice,) if is_single else (scores.dice, scores.seconds_per_image)

    def _train(
        self,
        number: int,
        settings: Search,
        values: dict[str, Any],
        trials_left: int,
        trial: optuna.Trial | None = None,
    ) -> TrialResult:
        """Trains in a child run; only a ``trial`` may be pruned, and keeps its model. Raises TrialFailed."""
        training, title = self._training_with(settings), f"{'confirm' if trial is None else 'trial'} {number}"
        recipe, line = with_values(settings.recipe, values), in_words(values)
        tried, start = replace(settings, recipe=recipe), time.perf_counter()
        epochs = settings.study.search_epochs * settings.study.folds_per_trial
        try:
            with tracking.run("trial", tried, title, parent=self.parent) as run_id:
                if trial is not None:
                    trial.set_user_attr(RUN_ID, run_id)
                else:
                    self.study.set_user_attr(f"{CONFIRM_RUN}{number}", run_id)
                tracking.log_params(values)  # those that equal their defaults, too
                data = self.dataset
                tracking.log_dataset(settings.dataset, data.fingerprint, "trial", data.profile)
                epoch, scores = self._run_epochs(training, recipe, trials_left, trial)
                state = "pruned" if epoch < epochs else "complete"
                result = TrialResult(scores, state, time.perf_counter() - start)
                self._log(result, trial)
                pictures = list[NDArray[np.uint8]]()
                if trial is not None and state == "complete":
                    pictures = self._keep_model(trial, training, recipe, scores.dice)
                pruned, in_full = "", state
                if state == "pruned":
                    pruned, in_full = "pruned ", f"pruned after epoch {epoch} of {epochs}"
                tracking.rename(f"{title} {pruned}{scores.dice:.4f} · {line}")
                tracking.describe(f"{title}, {in_full}: {line}.\nCross-fitted Dice {scores.dice:.4f}.")
                if trial is not None and not is_none(self.settings.study.storage):
                    reached = f"Dice {scores.dice:.4f}, on positives {scores.dice_positive:.4f}"
                    note = f"{in_full}: {reached}; MLflow run {run_id}"
                    show_trial(trial, self.settings.study.storage, note, pictures)
        except ServerUnreachable:
            raise
        except TRIAL_ERRORS as error:
            raise _failure(title, error) from error
        cells = "  ".join(f"{short(values[name]):>{max(len(name), 8)}}" for name in self.space)
        empty = "  all empty" if scores.empty_loss else ""
        tqdm.write(
            f"  {title:<11}{scores.dice:>8.4f}{scores.dice_positive:>14.4f}  {cells}"
            f"  {result.seconds:>7.1f} s  {in_full}{empty}"
        )
        return result

    def _training_with(self, settings: Search) -> TrialTraining:
        """What trains with these settings, made when a trial first needs it."""
        if self._training is None or self._training.settings != settings:
            self._training = None  # its images leave the memory first
            with tracking.disabled():  # it belongs to no trial's run
                self._training = TrialTraining(self.dataset, settings)
            tracking.log_params({"cache_used": self._training.cache})
            names = "  ".join(f"{name:>8}" for name in self.space)
            print(f"  {'':<11}{'Dice':>8}{'on positives':>14}  {names}  {'time':>9}")
        return self._training

    def _run_epochs(
        self, training: TrialTraining, recipe: Recipe, trials_left: int, trial: optuna.Trial | None
    ) -> tuple[int, TrialScores]:
        """The number of the last epoch that ran, over all folds, and the scores after it."""
        study, epoch, scores = self.settings.study, 0, None
        for epoch, (scores, metrics) in enumerate(training.epochs(recipe, trials_left), start=1):
            tracking.log_metrics(metrics, step=epoch)
            if trial is None or not study.has_one_objective:
                continue
            # A pruner knows no constraints.
            trial.report(scores.dice - excess(self._constraints(scores)), epoch)
            # The settings as given are never pruned: the others are compared with them.
            is_last = epoch == study.search_epochs * study.folds_per_trial
            if not is_last and AS_GIVEN not in trial.user_attrs and trial.should_prune():
                break
        assert scores is not None  # a trial has one epoch at least
        return epoch, scores

    def _constraints(self, scores: TrialScores) -> dict[str, float]:
        """Optuna's constraints, each violated above 0."""
        limit = self.settings.study.max_false_alarms
        empty = {"all_empty": scores.empty_loss}
        return empty if limit is None else empty | {FALSE_ALARMS: scores.false_alarms - limit}

    def _trials_left(self) -> int:
        """Trials that this worker has still to run, this one included, if the others run as many."""
        study = self.settings.study
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        again = len(trials_to_confirm(self.study, study.confirm))  # as far as is known
        return -(-(study.trials - count_trials(self.study) + again) // max(1, len(running)))

    def _log(self, result: TrialResult, trial: optuna.Trial | None) -> None:
        """Logs the scores in the run, and keeps them with the trial."""
        scores, thresholds = result.scores, asdict(result.scores.thresholds)
        facts = {"trial_state": result.state, "is_all_empty": scores.empty_loss > 0}
        tracking.log_metrics({"trial/value": scores.dice, "trial/seconds": result.seconds})
        tracking.log_params(facts)
        tracking.log_thresholds(thresholds)
        if trial is None:
            return
        for name, value in self._constraints(scores).items():
            trial.set_constraint(name, value)
        names = ("dice", "dice_optimistic", "dice_positive", "false_alarms")
        measured: dict[str, Any] = {name: getattr(scores, name) for name in names}
        measured |= facts | {"seconds": round(result.seconds, 3), "thresholds": thresholds}
        if result.state == "complete":
            measured[PATIENT_DICE] = scores.patient_dice.round(5).tolist()
        for name, value in measured.items():
            trial.set_user_attr(name, value)

    def _keep_model(
        self, trial: optuna.Trial, training: TrialTraining, recipe: Recipe, dice: float
    ) -> list[NDArray[np.uint8]]:
        """Logs the model if the trial is among the best so far, and deletes the one that it displaces.

        Returns its overlays, which the search's run has, too; none of a trial that is not kept.
        """
        keep, best, rank = self.settings.study.keep, best_trials(trial.study), (violation(trial), -dice)
        if sum((violation(other), -first_value(other)) <= rank for other in best) >= keep:
            return []
        with new_folder() as folder:
            training.save_model(folder, recipe)
            name = f"{recipe.network.network}-{self.dataset.image_size}px-trial{trial.number}"
            trial.set_user_attr("model", tracking.log_model(folder, name))
        delete_models(best[keep - 1 : keep])
        pictures = training.overlays(len(OVERLAYS))
        for key, picture in zip(OVERLAYS, pictures, strict=False):
            tracking.log_image_step(picture, key, trial.number, self.parent)
        return pictures


def _failure(title: str, error: Exception) -> TrialFailed:
    """Prints the first line of an error; returns it as what ends the trial."""
    reason = hide_passwords(str(error).split("\n")[0])[:500]
    tqdm.write(f"search: {title} failed: {reason}")
    return TrialFailed(reason)


def delete_models(trials: list[FrozenTrial]) -> None:
    """Deletes the logged models of trials."""
    for trial in trials:
        address = str(trial.user_attrs.get("model", ""))
        if address.startswith("models:/"):
            tracking.delete_model(address)
