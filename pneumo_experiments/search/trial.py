"""One trial of a study: a short training in a child run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Protocol

import optuna
from optuna.exceptions import TrialPruned
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.space import Space, suggest, with_values
from pneumo_experiments.search.storage import (
    AS_GIVEN,
    CONFIRMS,
    ERROR,
    FALSE_ALARMS,
    PATIENT_DICE,
    PROCESS,
    RUN_ID,
    retry,
)
from pneumo_experiments.search.study import best_trials, excess, first_value, is_counted, rank
from pneumo_experiments.search.table import in_words, print_row
from pneumo_experiments.search.trial_training import TrialScores
from pneumo_experiments.serving import new_folder
from pneumo_experiments.settings import Recipe, Search

# What ends one trial, not the search: a training that diverged, or that did not fit in the memory.
TRIAL_ERRORS = (UserError, RuntimeError, MemoryError)
PARENT_SECONDS = 30  # between looks at the parent run, which another worker may have ended


class Training(Protocol):
    """What a trial does: see TrialTraining."""

    def epochs(self, recipe: Recipe, trials_left: int) -> Iterator[TrialScores]:
        """Scores after each epoch; with this one so many trials are left."""
        ...

    def save_model(self, folder: Path, recipe: Recipe) -> None:
        """Saves what was trained last."""
        ...


class TrialFailed(Exception):
    """A trial ended with an error of its own, which is the cause."""


class Surplus(Exception):
    """Several workers started the last trial at once, and this one is too many."""


@dataclass
class Objective:
    """One trial: a short training in a child run.

    With ``confirms`` it trains a trial of another study again, without pruning.
    """

    settings: Search
    space: Space
    training: Callable[[], Training]  # made by the first trial that this worker runs
    total: int
    confirms: bool = False
    _parent_checked: float = -inf

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The trial's values. Raises TrialPruned, TrialFailed and Surplus."""
        trial.set_user_attr(PROCESS, tracking.process_tags())  # first: without it a dead trial is a riddle
        _refuse_surplus(trial, self.total, self.confirms)
        try:
            return self._run(trial)
        except (TrialPruned, TrialFailed):
            raise
        except BaseException:
            # Not a failure of its settings: they are tried again, by the next command at the latest.
            retry(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
            raise

    def _run(self, trial: optuna.Trial) -> tuple[float, ...]:
        number = trial.user_attrs[CONFIRMS] if self.confirms else trial.number
        training = self.training()
        start = time.perf_counter()
        try:
            values = suggest(trial, self.space)
            recipe = with_values(self.settings.recipe, values)
            line = in_words(values)
            title = f"{'confirm' if self.confirms else 'trial'} {number}"
            self._keep_parent_running()
            with tracking.run(f"{title}: {line}", replace(self.settings, recipe=recipe)) as run_id:
                trial.set_user_attr(RUN_ID, run_id)
                scores, epochs = self._train(trial, training, recipe)
                seconds = time.perf_counter() - start
                is_pruned = epochs < self._epochs
                self._record(trial, scores, seconds, is_pruned)
                if not is_pruned and not self.confirms:
                    self._keep_model(trial, scores.dice, recipe)
                if is_pruned:
                    tracking.rename(f"{title} (pruned): {line}")
                state = f"pruned after epoch {epochs} of {self._epochs}" if is_pruned else "complete"
                tracking.describe(f"{title}, {state}: {line}.\nCross-fitted Dice {scores.dice:.4f}.")
        except ServerUnreachable:
            raise
        except TRIAL_ERRORS as error:
            reason = hide_passwords(str(error).split("\n")[0])[:500]
            trial.set_user_attr(ERROR, reason)
            tqdm.write(f"search: trial {number} failed: {reason}")
            raise TrialFailed from error
        print_row(self.space, title, values, scores, seconds, state)
        if is_pruned:
            raise TrialPruned
        is_single = self.settings.study.has_one_objective
        return (scores.dice,) if is_single else (scores.dice, scores.seconds_per_image)

    def _keep_parent_running(self) -> None:
        if time.monotonic() > self._parent_checked + PARENT_SECONDS:
            tracking.keep_running()
            self._parent_checked = time.monotonic()

    @property
    def _epochs(self) -> int:
        return self.settings.study.search_epochs * self.settings.study.folds_per_trial

    def _train(self, trial: optuna.Trial, training: Training, recipe: Recipe) -> tuple[TrialScores, int]:
        """Scores after the last epoch that ran, and its number."""
        scores, epoch = None, 0
        reports = not self.confirms and self.settings.study.has_one_objective
        is_given = AS_GIVEN in trial.user_attrs  # never pruned: the others are compared with it
        for epoch, scores in enumerate(training.epochs(recipe, self._trials_left(trial)), start=1):
            if reports:
                # A pruner knows no constraints.
                trial.report(scores.dice - excess(self._constraints(scores)), epoch)
                if epoch < self._epochs and not is_given and trial.should_prune():
                    break
        assert scores is not None  # a trial has one epoch at least
        return scores, epoch

    def _constraints(self, scores: TrialScores) -> dict[str, float]:
        """Optuna's constraints, each violated above 0."""
        limit = self.settings.study.max_false_alarms
        empty = {"all_empty": scores.empty_loss}
        return empty if limit is None else empty | {FALSE_ALARMS: scores.false_alarms - limit}

    def _trials_left(self, trial: optuna.Trial) -> int:
        """Trials that this worker has still to run, this one included, if the others run as many."""
        others = trial.study.get_trials(deepcopy=False)
        left = self.total - sum(is_counted(other) for other in others)
        if not self.confirms:
            left += self.settings.study.trained_again
        return -(-left // max(1, sum(other.state is TrialState.RUNNING for other in others)))

    def _record(self, trial: optuna.Trial, scores: TrialScores, seconds: float, is_pruned: bool) -> None:
        names = ("dice", "dice_optimistic", "dice_positive", "false_alarms")
        measured = {name: getattr(scores, name) for name in names}
        state = "pruned" if is_pruned else "complete"
        facts = {"trial_state": state, "is_all_empty": scores.empty_loss > 0}
        tracking.log_metrics({"trial_value": scores.dice, "trial_seconds": seconds})
        for name, value in self._constraints(scores).items():
            trial.set_constraint(name, value)
        tracking.log_params(facts | asdict(scores.thresholds))
        for name, value in (measured | facts | {"seconds": round(seconds, 3)}).items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("thresholds", asdict(scores.thresholds))
        if not is_pruned:
            trial.set_user_attr(PATIENT_DICE, scores.patient_dice.round(5).tolist())

    def _keep_model(self, trial: optuna.Trial, dice: float, recipe: Recipe) -> None:
        """Logs the model if the trial is among the best so far, and deletes the one that it displaces."""
        keep, best = self.settings.study.keep, best_trials(trial.study)
        better = sum(rank(other, first_value(other)) <= rank(trial, dice) for other in best)
        if better >= keep:
            return
        with new_folder() as folder:
            self.training().save_model(folder, recipe)
            trial.set_user_attr("model", tracking.log_model(folder))
        delete_models(best[keep - 1 : keep])


def delete_models(trials: list[FrozenTrial]) -> None:
    """Deletes the logged models of trials."""
    for trial in trials:
        address = str(trial.user_attrs.get("model", ""))
        if address.startswith("models:/"):
            tracking.delete_model(address)


def _refuse_surplus(trial: optuna.Trial, total: int, confirms: bool) -> None:
    """Raises Surplus if earlier trials fill the study, or if an earlier one confirms the same trial."""
    earlier = [
        other
        for other in trial.study.get_trials(deepcopy=False)
        if other.number < trial.number and (is_counted(other) or other.state is TrialState.RUNNING)
    ]
    if confirms:
        number = trial.user_attrs.get(CONFIRMS)  # None: another worker took the queued one
        if number is None:
            raise Surplus
        earlier = [other for other in earlier if other.user_attrs.get(CONFIRMS) == number]
    if len(earlier) >= (1 if confirms else total):
        raise Surplus
