"""Samplers and pruners: by name, and what they draw in several workers and after an interruption."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from helpers import make
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from pneumo_experiments.errors import UserError
from pneumo_experiments.search.sampler import make_pruner, make_sampler
from pneumo_experiments.settings import StudySettings

NAMES = ("dice_weight", "focal_weight", "presence_weight")
SAMPLERS = {"tpe": TPESampler, "gp": GPSampler, "cmaes": CmaEsSampler, "random": RandomSampler}


def settings_of(sampler: str = "tpe", **values: Any) -> StudySettings:
    return make(StudySettings, sampler=sampler, **({"trials": 9} | values))


def objective(trial: optuna.Trial) -> float:
    trial.set_constraint("all_empty", 0.9 * (trial.number % 3 == 0))
    return sum(trial.suggest_float(name, 0.1, 10, log=True) for name in NAMES)


def worker(storage: InMemoryStorage, settings: StudySettings, seed: int = 0) -> optuna.Study:
    """A study as one of several processes opens it."""
    return optuna.create_study(
        study_name="s", storage=storage, load_if_exists=True, sampler=make_sampler(settings, seed)
    )


def drawn(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_is_the_named_one_and_a_resumed_study_continues_the_same_way(name: str) -> None:
    settings = settings_of(name, trials=6)
    whole = worker(InMemoryStorage(), settings)
    whole.optimize(objective, n_trials=6)
    assert isinstance(whole.sampler._sampler, SAMPLERS[name])  # type: ignore[attr-defined]
    storage = InMemoryStorage()
    for _ in range(3):
        worker(storage, settings).optimize(objective, n_trials=2)
    assert len({str(params) for params in drawn(whole)}) == 6
    if name != "cmaes":  # its state is that of the process
        assert drawn(worker(storage, settings)) == drawn(whole)
    assert drawn(worker(storage, settings))[0] == drawn(whole)[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_workers_at_once_never_draw_the_same(name: str) -> None:
    storage, settings = InMemoryStorage(), settings_of(name, trials=8)
    one, other = worker(storage, settings), worker(storage, settings)
    for _ in range(4):  # both draw before either has a value
        trials = [study.ask() for study in (one, other)]
        for study, trial in zip((one, other), trials, strict=True):
            study.tell(trial, objective(trial))
    assert len({str(params) for params in drawn(one)}) == 8


def test_another_seed_draws_others() -> None:
    studies = [worker(InMemoryStorage(), settings_of("random"), seed) for seed in (0, 0, 1)]
    for study in studies:
        study.optimize(objective, n_trials=2)
    assert drawn(studies[0]) == drawn(studies[1])
    assert drawn(studies[0])[0] != drawn(studies[2])[0]


@pytest.mark.parametrize(
    ("name", "kind"), [("hyperband", HyperbandPruner), ("median", MedianPruner), ("none", NopPruner)]
)
def test_the_pruner_is_the_named_one_and_none_with_two_objectives(name: str, kind: type) -> None:
    assert isinstance(make_pruner(settings_of(pruner=name)), kind)
    assert type(make_pruner(settings_of(pruner=name, objectives="dice,seconds"))) is NopPruner


@pytest.mark.parametrize("name", ["hyperband", "median"])
def test_a_hopeless_trial_is_pruned_and_the_best_is_not(name: str) -> None:
    settings = settings_of(pruner=name, search_epochs=9, trials=12)
    study = optuna.create_study(direction="maximize", pruner=make_pruner(settings))

    def worse_and_worse(trial: optuna.Trial) -> float:
        value = 1 / (1 + trial.number)
        for epoch in range(1, 10):
            trial.report(value * epoch, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study.optimize(worse_and_worse, n_trials=12)
    states = [trial.state for trial in study.trials]
    assert states[0] is TrialState.COMPLETE
    assert states.count(TrialState.PRUNED) >= 4


@pytest.mark.parametrize(("second_fold", "is_pruned"), [(0.5, True), (0.68, False)])
def test_the_median_compares_like_with_like_when_a_later_fold_is_harder(
    second_fold: float, is_pruned: bool
) -> None:
    """Two folds of two epochs: after the third step all values are means of an easy and of a hard fold."""
    pruner = make_pruner(settings_of(pruner="median", folds_per_trial=2, search_epochs=2))
    study = optuna.create_study(direction="maximize", pruner=pruner)
    distribution = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for shift in (0, 0.01, 0.02):
        steps = {1: 0.7 + shift, 2: 0.8 + shift, 3: 0.72 + shift, 4: 0.75 + shift}
        study.add_trial(
            optuna.trial.create_trial(
                value=steps[4], params={"x": 0.5}, distributions=distribution, intermediate_values=steps
            )
        )
    trial, first = study.ask(distribution), (0.71, 0.82)
    for step, value in enumerate((*first, (first[1] + second_fold) / 2), start=1):
        trial.report(value, step)
        assert trial.should_prune() == (is_pruned and step == 3)


def test_cmaes_refuses_two_objectives_with_what_to_take() -> None:
    with pytest.raises(UserError, match=r"^sampler=cmaes: .*objectives=dice,seconds; take tpe$"):
        make_sampler(settings_of("cmaes", objectives="dice,seconds"), 0)
