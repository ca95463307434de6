"""Entry point ``search``: loss weights by short trainings."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import optuna
from optuna.study import StudyDirection
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.subset import Subset, make_split
from pneumo_experiments.experiment.training_loop import train_and_validate
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.settings import NONE, LossWeights, Search, weight_shaping

SEARCHED = ("bce_weight", "dice_weight", "focal_weight")
LOWEST, HIGHEST = 0.1, 3.0  # each weight's range, searched on a logarithmic scale
MADE_WITH = "made_with"  # the study's attribute that says so


@dataclass(frozen=True)
class SearchResult:
    """The best loss weights."""

    loss: LossWeights


def search(settings: Search) -> SearchResult:
    """Runs the study: each trial is a short training in a child run, valued by its validation Dice."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial's error is raised, too
    with tracking.run("search", settings), Dataset.open(settings.dataset) as dataset:
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "search")
        study = _study(settings, dataset.fingerprint)
        recipe = settings.recipe
        split = make_split(dataset, settings.split)
        validation = Subset(dataset, split.validation).in_memory(recipe.batches.cache)
        shuffled = np.random.default_rng(recipe.seed).permutation(split.train)
        training_subset = Subset(dataset, np.sort(shuffled[: settings.study.search_images or len(shuffled)]))
        compute = choose_compute(settings.compute)
        training_data = training_subset.training_data(recipe.batches.cache, compute)
        initial = build(recipe.network.network, recipe.network.weights, recipe.seed)

        def objective(trial: optuna.Trial) -> float:
            weights = {name: trial.suggest_float(name, LOWEST, HIGHEST, log=True) for name in SEARCHED}
            line = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
            name, dice = f"trial {trial.number}", 0.0
            tqdm.write(f"search: {name}: {line}")
            trial_recipe = replace(recipe, loss=replace(recipe.loss, **weights))
            predictor = Predictor(copy.deepcopy(initial), compute, recipe.network.tta_flip)
            epochs = settings.study.search_epochs
            with tracking.run(name, replace(settings, recipe=trial_recipe)):
                for result in train_and_validate(
                    name, predictor, training_data, validation, trial_recipe, epochs
                ):
                    dice = result.scores.dice
                    if result.epoch.number == 1:
                        tracking.log_params(result.scores.as_facts("val_"))
                tracking.describe(f"{epochs} epochs with {line}.\nValidation Dice {dice:.3f}.")
            return dice

        study.optimize(objective, n_trials=settings.study.trials)
        best = study.best_trial
        weights = {name: float(best.params[name]) for name in SEARCHED}
        tracking.log_json(weights, "best_settings.json")
        tracking.log_metrics({"val_dice": best.value or 0.0})
        tracking.log_params({"best_trial": best.number})
        line = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
        tracking.describe(
            f"{len(study.trials)} short trainings over the loss weights.\nBest: {line}; validation"
            f" Dice {best.value}."
        )
        print(f"search: best of {len(study.trials)} trials is number {best.number}: {line}")
    return SearchResult(replace(settings.recipe.loss, **weights))


def _study(settings: Search, fingerprint: str) -> optuna.Study:
    storage = None if settings.study.storage in ("", NONE) else settings.study.storage
    tracking.check_server("storage", settings.study.storage)
    try:
        study = optuna.create_study(
            study_name=settings.study.study,
            storage=storage,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=settings.recipe.seed),
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy and its drivers raise errors of many kinds
        reason = tracking.hide_passwords(str(error).split("\n")[0])
        address = tracking.hide_passwords(settings.study.storage)
        raise UserError(
            f"storage={address}: the study's database cannot be opened ({reason});"
            " name another, such as sqlite:///optuna.db, or none"
        ) from error
    _refuse_foreign(study, settings, fingerprint)
    # The weights of the settings are the first trial, so that the search is never worse than they are.
    study.enqueue_trial(
        {name: min(max(getattr(settings.recipe.loss, name), LOWEST), HIGHEST) for name in SEARCHED},
        skip_if_exists=True,
    )
    return study


def _refuse_foreign(study: optuna.Study, settings: Search, fingerprint: str) -> None:
    """Raises UserError for a study of other data or settings: its Dice values cannot be compared with these.

    The first search that finds a study empty records in it what it is made with.
    """
    wanted = {name: text for name, text in weight_shaping(settings).items() if name not in SEARCHED}
    wanted |= {"data": fingerprint[:16], "search_space": f"{', '.join(SEARCHED)} from {LOWEST} to {HIGHEST}"}
    trials = study.get_trials(deepcopy=False)
    stored: object = study.user_attrs.get(MADE_WITH)
    if stored is None and not trials and study.directions == [StudyDirection.MAXIMIZE]:
        study.set_user_attr(MADE_WITH, wanted)
        return
    if isinstance(stored, dict):
        recorded = cast("dict[str, object]", stored)
        names = [name for name in {**wanted, **recorded} if wanted.get(name) != recorded.get(name)]
        differences = [
            f"{name} {recorded.get(name, 'unknown')}, not {wanted.get(name, 'unknown')}" for name in names
        ]
    else:
        missing = [name for name in SEARCHED if any(name not in trial.params for trial in trials)]
        differences = [f"no {', '.join(missing)}" if missing else "another program"]
    if differences:
        raise UserError(
            f"study={settings.study.study}: was made with {'; '.join(differences)}; name another study,"
            " or search with the same data and settings"
        )
