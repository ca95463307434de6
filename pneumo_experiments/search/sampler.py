"""Which settings a trial tries, and when it is stopped: Optuna's samplers and pruners."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments.errors import UserError
from pneumo_experiments.search.storage import allow_experimental
from pneumo_experiments.settings import StudySettings

MAX_STARTUP_TRIALS = 10  # Optuna's default


def make_sampler(settings: StudySettings, seed: int) -> BaseSampler:
    """The sampler that the settings name; each trial has a seed of its own."""
    # A third of the trials at random, so that a short study does more than draw at random.
    n = max(1, min(MAX_STARTUP_TRIALS, settings.trials // 3))
    samplers: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=n),
        "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=n),
        "cmaes": lambda seed: CmaEsSampler(seed=seed, n_startup_trials=n, warn_independent_sampling=False),
        "random": lambda seed: RandomSampler(seed=seed),
    }
    if settings.sampler == "cmaes" and not settings.has_one_objective:
        raise UserError(f"sampler=cmaes: searches Dice alone, not objectives={settings.objectives}; take tpe")
    return _SeededPerTrial(samplers[settings.sampler], seed)


def make_pruner(settings: StudySettings) -> BasePruner:
    """The pruner that the settings name; none for several objectives, which Optuna cannot prune."""
    if not settings.has_one_objective or settings.pruner == "none":
        return NopPruner()
    if settings.pruner == "median":
        return _MedianOfLast(n_startup_trials=max(1, min(5, settings.trials // 3)))
    epochs = settings.search_epochs * settings.folds_per_trial
    return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)


class _MedianOfLast(MedianPruner):
    """Stops a trial whose last value is below the median of the others' at that step.

    Optuna takes a trial's best value. It may be that of an easier fold, while the others' are means with
    later ones.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        last = copy.copy(trial)
        values = trial.intermediate_values
        last.intermediate_values = {step: values[step] for step in values if step == trial.last_step}
        return super().prune(study, last)


class _SeededPerTrial(BaseSampler):
    """A new sampler for each trial, seeded by the study's seed and the trial's number.

    Workers that share a study never have the same trial, so no two draw the same.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        with allow_experimental():
            self._sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
        with allow_experimental():
            self._sampler = self._make(seed)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, *args: Any, **kwargs: Any) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(*args, **kwargs)

    def sample_relative(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(*args, **kwargs)

    def sample_independent(self, *args: Any, **kwargs: Any) -> Any:
        return self._sampler.sample_independent(*args, **kwargs)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        with warnings.catch_warnings():  # see docs/search.md
            warnings.filterwarnings("ignore", "Constraints have been set, but CmaEsSampler")
            self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing: every trial has its own seed."""
