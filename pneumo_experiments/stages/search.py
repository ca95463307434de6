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
    """Runs the study: each trial is a short training in a child run, judged by its validation Dice."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial's error is raised, once is enough
    with tracking.run("search", settings), Dataset.open(settings.dataset) as dataset:
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "search")
        study = _study(settings, dataset.fingerprint)
        parts = make_split(dataset, settings.split)
        validation = Subset(dataset, parts.validation).in_memory(settings.recipe.batches.cache)
        drawn = np.random.default_rng(settings.recipe.seed).permutation(parts.train)
        compute = choose_compute(settings.compute)
        chosen = Subset(dataset, np.sort(drawn[: settings.study.search_images or len(drawn)]))
        examples = chosen.training_data(settings.recipe.batches.cache, compute)
        start = build(
            settings.recipe.network.network, settings.recipe.network.weights, settings.recipe.seed
        )  # every trial trains a copy

        def objective(trial: optuna.Trial) -> float:
            weights = {name: trial.suggest_float(name, LOWEST, HIGHEST, log=True) for name in SEARCHED}
            line = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
            tqdm.write(f"search: trial {trial.number}: {line}")
            loss = replace(settings.recipe.loss, **weights)
            tried, name = (
                replace(settings, recipe=replace(settings.recipe, loss=loss)),
                f"trial {trial.number}",
            )
            predictor, dice = Predictor(copy.deepcopy(start), compute, settings.recipe.network.tta_flip), 0.0
            with tracking.run(name, tried):
                for judged in train_and_validate(
                    name, predictor, examples, validation, tried.recipe, settings.study.search_epochs
                ):
                    dice = judged.scores.dice
                    if judged.epoch.number == 1:
                        tracking.log_params(judged.scores.as_facts("val_"))
                tracking.describe(
                    f"{settings.study.search_epochs} epochs with {line}.\nValidation Dice {dice:.3f}."
                )
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
            f"storage={address}: the study's database does not open ({reason});"
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
    """Raises UserError for a study of other data or settings: its Dice values do not compare with ours.

    What a study is made with is noted in it by the first search that finds it empty.
    """
    ours = {name: text for name, text in weight_shaping(settings).items() if name not in SEARCHED}
    ours |= {"data": fingerprint[:16], "search_space": f"{', '.join(SEARCHED)} from {LOWEST} to {HIGHEST}"}
    trials = study.get_trials(deepcopy=False)
    noted: object = study.user_attrs.get(MADE_WITH)
    if noted is None and not trials and study.directions == [StudyDirection.MAXIMIZE]:
        study.set_user_attr(MADE_WITH, ours)
        return
    if isinstance(noted, dict):
        theirs = cast("dict[str, object]", noted)
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        differing = [
            f"{name} {theirs.get(name, 'unknown')}, not {ours.get(name, 'unknown')}" for name in names
        ]
    else:
        lacking = [name for name in SEARCHED if any(name not in trial.params for trial in trials)]
        differing = [f"no {', '.join(lacking)}" if lacking else "another program"]
    if differing:
        raise UserError(
            f"study={settings.study.study}: was made with {'; '.join(differing)}; name another study,"
            " or search with the same data and settings"
        )
