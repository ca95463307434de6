"""Entry point ``search``: a study over the settings of short trainings, shared by any number of workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.dataset.patients import warn
from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.claims import claim, holder
from pneumo_experiments.search.dashboard import save_note
from pneumo_experiments.search.report import make_report
from pneumo_experiments.search.space import in_words, unsearched_ranges, with_values
from pneumo_experiments.search.study import PARENT, PARENT_PROCESS, REPORTED, best_trials, count_trials
from pneumo_experiments.search.trial import Trials, delete_models
from pneumo_experiments.search.trial_training import (
    TrialTraining,
    doubt_of_start,
    second_settings,
    warmup_checkpoint,
    warmup_weights,
)
from pneumo_experiments.search.winner import Winner, choose_winner
from pneumo_experiments.search.workers import open_search, work
from pneumo_experiments.settings import Recipe, Search, chosen
from pneumo_experiments.words import command, plural, rows

OWNER = "owner"  # the task of the process whose run is the parent of the trials, and which reports


@dataclass(frozen=True)
class SearchResult:
    """The recipe with the best settings, and the best trial's number."""

    recipe: Recipe
    trial: int
    searched: Sequence[str]
    """the names of these settings"""
    page: str
    """of the run in the UI"""
    best: Path
    """best.yaml of the run, if the store is on this machine"""
    start: Path | None = None
    """state dict of the network that the trials started from, if it is kept"""


def search(settings: Search, keep_start: bool = False) -> SearchResult:
    """Runs the study's trials, together with other workers: each a short training in a child run.

    The process that creates the study owns it: the trials of all are child runs of its run, and it writes the
    report. With ``keep_start`` the file of the network after the warm-up epochs stays, for the training that
    follows. In a run of MLflow, as on the command line. Raises UserError if the study belongs to other data
    or settings, and if no trial completes.

    >>> settings = Search.of(dataset="dataset.h5", trials=2, search_epochs=1, weights="none", confirm=0)
    >>> result = search(settings)
    search: ...
    >>> result.trial in (0, 1), result.recipe.loss.dice_weight > 0
    (True, True)
    """
    if not settings.study.trials:
        raise UserError("trials=0: leaves nothing to search; main trains without a search then")
    with open_search(settings) as trials:
        if settings.recipe.network.starts_from_model and (doubt := doubt_of_start(settings, trials.dataset)):
            warn(doubt)
        print(hide_passwords(f"search: study {trials.study.study_name} in {settings.study.storage}"))
        if (count := count_trials(trials.study)) >= settings.study.trials:
            print(f"search: the study has {plural(count, 'trial')} already; increase trials to continue")
        if others := unsearched_ranges(settings.study):
            print(f"search: space has ranges of {', '.join(others)}, too; searched names what is searched")
        owners_run = _run_of_owner(trials)
        if owners_run is None or tracking.active_run():  # a search in a chain has a run of its own
            result = _search_in_run(trials, owners_run is None, keep_start)
        else:
            with tracking.joined_run(owners_run):
                work(replace(trials, parent=owners_run))
            is_reported = trials.study.user_attrs.get(REPORTED) == count_trials(trials.study)
            has_died = not is_reported and claim(trials.study, OWNER)
            result = _search_in_run(trials) if has_died else _result(trials, choose_winner(trials.study))
        fingerprint = trials.dataset.fingerprint
        warmup_checkpoint(second_settings(settings), fingerprint).clear()
        start = warmup_weights(settings, fingerprint)
        if keep_start and start.is_file():
            return replace(result, start=start)
        warmup_checkpoint(settings, fingerprint).clear()
        given: dict[str, object] = {"dataset": settings.dataset, "from_study": trials.study.study_name}
        if "storage" in chosen(settings):
            given["storage"] = hide_passwords(settings.study.storage)
    if tracking.active_run() is None:
        following = command("train", **given)
        if result.best.is_file():  # with all settings of the search, not only those that were searched
            following = command("train", config=result.best)
        print(rows({"run": result.page, "next": following}))
    return result


def _run_of_owner(trials: Trials) -> str | None:
    """The run of the process that owns the study; None if this process does, from now on."""
    while not claim(trials.study, OWNER):
        attributes = trials.study.user_attrs
        if attributes.get(PARENT_PROCESS) == holder(trials.study, OWNER):
            return attributes[PARENT]
        time.sleep(0.5)  # it is starting its run; an earlier owner's may still be there
    return None


def _search_in_run(trials: Trials, is_owner: bool = True, keep_start: bool = False) -> SearchResult:
    """Works in a run of its own, and reports."""
    study, settings = trials.study, trials.settings
    earlier = study.user_attrs.get(PARENT)
    name = f"search {plural(settings.study.trials, 'trial')} {settings.recipe.network.network}"
    name += f" {trials.dataset.image_size}px"
    with tracking.run("search", settings, name, continues=earlier) as run_id:
        if is_owner:
            study.set_user_attr(PARENT, run_id)
            study.set_user_attr(PARENT_PROCESS, tracking.process_tags())
        tracking.log_params({"study_used": study.study_name})
        data = trials.dataset
        tracking.log_dataset(settings.dataset, data.fingerprint, "search", data.profile)
        work(replace(trials, parent=run_id))
        has_start = warmup_weights(settings, trials.dataset.fingerprint).is_file()
        if keep_start and settings.study.search_warmup_epochs > 0 and not has_start:
            TrialTraining(trials.dataset, settings)  # the study had ended before this command
        winner = choose_winner(study)
        report = make_report(trials, winner)
        tracking.log_table(report.columns, report.rows, "trials")
        if winner is not None:
            tracking.log_yaml(report.best, "best.yaml")
            tracking.log_metrics(
                {"search/value": winner.value, "search/best_trial": float(winner.trial.number)}
            )
            tracking.describe(report.description)
            tracking.rename(f"{name} · {winner.value:.4f}")
            save_note(study, report.description)
            logged = tracking.logged_steps("trial/value")  # by an earlier command
            for number, values in report.curves:
                if number not in logged:
                    tracking.log_metrics(values, step=number)
            for name, picture in report.pictures.items():
                tracking.log_image(picture, f"study/{name}.png")
        delete_models(best_trials(study)[settings.study.keep :])
        study.set_user_attr(REPORTED, count_trials(study))
        return _result(trials, winner, report.notes)


def _result(trials: Trials, winner: Winner | None, notes: Sequence[str] = ()) -> SearchResult:
    if winner is None:
        raise UserError("search: no trial has completed; give it more trials, or more time")
    print(f"search: best is trial {winner.line}: {in_words(winner.trial.params)}")
    for note in notes:
        print(f"search: {note}")
    values = winner.trial.params
    page = tracking.page_of_active_run() if tracking.active_run() else "see the process that owns the study"
    recipe = with_values(trials.settings.recipe, values)
    best = Path(tracking.artifacts_of_active_run() if tracking.active_run() else "", "best.yaml")
    return SearchResult(recipe, winner.trial.number, [*values], page, best)
