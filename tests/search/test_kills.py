"""kill -9, lost databases and lost servers under a search of several workers: it loses and repeats nothing.

PNEUMO_KILLS=25 (make soak) kills more often than the few times of the suite, and prints what it did.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist

import optuna
import psutil
import pytest
from command_server import Command, CommandServer
from database_server import DatabaseServer
from helpers import IS_SOAK, children, copy_store, soak
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from sleeping_workers import ended, start_worker
from tracking_server import Server, free_port, wait_until

KILLS = int(os.environ.get("PNEUMO_KILLS") or 3)
TRIALS, WORKERS, EPOCH_SECONDS = (40, 3, 0.3) if IS_SOAK else (6, 2, 0.15)
CONFIRMED = 2  # and the settings as given
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def study_of(address: str, name: str = "study") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=address)


def runs_of(uri: str) -> list[Run]:
    return list(MlflowClient(uri).search_runs(["0"], max_results=1000))


def name_of(run: Run) -> str:
    return str(run.info.run_name).partition(":")[0]


def parent_of(run: Run) -> str | None:
    return run.data.tags.get("mlflow.parentRunId")


def best_in_database(study: optuna.Study, confirmations: optuna.Study) -> int:
    """The number of the best trial in the second trainings, from what the database holds.

    Another takes the place of the settings as given if it is better beyond the noise of two seeds: in a
    sleeping trial all patients have the same Dice.
    """
    second = {t.user_attrs["confirms"]: t.values[0] for t in confirmations.trials if t.values}
    (given,) = [t.number for t in study.trials if t.values and "as_given" in t.user_attrs]
    needed = NormalDist(0, 0.0022 * 2**0.5).inv_cdf(1 - 0.03 / (len(second) - 1))
    return max(second, key=lambda number: second[number] - (needed if number != given else 0))


def is_in_training(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.RUNNING and bool(trial.intermediate_values)


def without_retries(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials but those that repeat one whose worker died."""
    return [trial for trial in trials if "retry_history" not in trial.system_attrs]


def check_study(uri: str, address: str, trials: int) -> optuna.Study:
    """Asserts what holds for a study that has ended, whatever happened to it."""
    study, confirmations = study_of(address), study_of(address, "study-confirm")
    states = Counter(trial.state for trial in study.trials)
    assert sum(states[state] for state in FINISHED) == trials, states
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0, states
    tried = [
        json.dumps(trial.params, sort_keys=True) for trial in without_retries(study.trials) if trial.params
    ]
    assert len(set(tried)) == len(tried)  # no two workers drew the same
    finished = [trial for trial in study.trials if trial.state in FINISHED]
    assert len({json.dumps(trial.params, sort_keys=True) for trial in finished}) == trials
    confirmed = [t.user_attrs["confirms"] for t in confirmations.trials if t.state is TrialState.COMPLETE]
    assert len(set(confirmed)) == len(confirmed) >= CONFIRMED
    check_runs(uri, [*study.trials, *confirmations.trials])
    parent = next(run for run in runs_of(uri) if name_of(run) == "search")
    assert parent.data.metrics["best_trial"] == best_in_database(study, confirmations)
    return study


def check_runs(uri: str, trials: list[FrozenTrial]) -> None:
    """Asserts one finished run for each finished trial, all under one parent, and none RUNNING."""
    runs = runs_of(uri)
    assert Counter(run.info.status for run in runs)["RUNNING"] == 0
    (parent,) = [run for run in runs if name_of(run) == "search"]
    assert parent.info.status == "FINISHED"
    children = {run.info.run_id: run for run in runs if run is not parent}
    assert {parent_of(run) for run in children.values()} == {parent.info.run_id}
    finished = {trial.user_attrs["run_id"] for trial in trials if trial.state in FINISHED}
    # A worker that was killed between the end of its run and that of its trial leaves one run more.
    ended_runs = {run_id for run_id, run in children.items() if run.info.status == "FINISHED"}
    assert finished <= ended_runs
    assert {children[run_id].info.status for run_id in children.keys() - ended_runs} <= {"KILLED"}


def test_killed_workers_lose_no_trial_and_repeat_none(
    tmp_path: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    uri, address = f"sqlite:///{tmp_path}/mlflow.db", database.create("kills")
    words = [f"trials={TRIALS}", "search_epochs=3", f"sleep={EPOCH_SECONDS}", f"confirm={CONFIRMED}"]
    words += ["study=study", f"storage={address}"]
    chance, struck = random.Random(0), Counter[str]()
    workers = [start_worker(commands, tmp_path, uri, *words) for _ in range(WORKERS)]
    start = time.monotonic()
    wait_until(lambda: has_begun(tmp_path))
    studies = {"trial": study_of(address), "confirmation": study_of(address, "study-confirm")}
    for kill in range(KILLS):
        number = chance.randrange(WORKERS)
        if kill % 3 or not IS_SOAK:  # at work; else at any moment, also while it starts
            wait_until(lambda n=number: place(studies, workers[n]) in ("trial", "confirmation", "ended"))
        time.sleep(chance.uniform(0, 2 * EPOCH_SECONDS))
        struck[place(studies, workers[number])] += 1
        workers[number].send_signal(signal.SIGKILL)
        workers[number].communicate()
        workers[number] = start_worker(commands, tmp_path, uri, *words)
    assert [ended(worker) for worker in workers] == [0] * WORKERS, (tmp_path / "log").read_text()
    last = start_worker(commands, tmp_path, uri, *words)
    assert ended(last) == 0
    study = check_study(uri, address, TRIALS)
    table(struck, study, uri, time.monotonic() - start)
    assert sum(struck.values()) - struck["ended"] >= KILLS // 2


def has_begun(folder: Path) -> bool:
    """Whether a worker has said which studies it works for, after it made them."""
    log = folder / "log"
    return log.exists() and "search: study study in " in log.read_text()


def place(studies: dict[str, optuna.Study], worker: Command) -> str:
    """What a worker is at, by the trials that name it."""
    if worker.poll() is not None:
        return "ended"
    for name, study in studies.items():
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("process", {}).get("pneumo.process", "").startswith(f"{worker.pid}:"):
                return name
    return "between trials"


def table(struck: Counter[str], study: optuna.Study, uri: str, seconds: float) -> None:
    states = Counter(trial.state.name.lower() for trial in study.trials)
    retried = sum("retry_history" in trial.system_attrs for trial in study.trials)
    statuses = Counter(run.info.status for run in runs_of(uri))
    print(f"\n{sum(struck.values())} kills of {WORKERS} workers, {TRIALS} trials, {seconds:.0f} s")
    for title, counts in (("killed in", struck), ("trials", states), ("runs", statuses)):
        print(f"  {title:<12}" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"  {'retried':<12}{retried}")


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=soak)])
def test_two_workers_that_start_at_once_on_empty_stores_share_one_study_and_one_parent(
    kind: str, tmp_path: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    uri, address = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/optuna.db"
    if kind == "postgresql":
        uri, address = database.create("empty_store"), database.create("empty_study")
    words = ["trials=3", "search_epochs=1", "sleep=0.2", "confirm=2", "study=study", f"storage={address}"]
    words += ["pruner=none"]
    workers = [start_worker(commands, tmp_path, uri, *words) for _ in range(2)]
    assert [ended(worker) for worker in workers] == [0, 0], (tmp_path / "log").read_text()
    check_study(uri, address, trials=3)


def test_a_database_that_restarts_costs_no_trial(
    tmp_path: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    uri, address = f"sqlite:///{tmp_path}/mlflow.db", database.create("restarted")
    words = ["trials=2", "search_epochs=2", "sleep=1.5", "confirm=2", "study=study", f"storage={address}"]
    worker = start_worker(commands, tmp_path, uri, *words)
    # Between two epochs: what is lost in the midst of a statement fails its trial.
    wait_until(lambda: has_begun(tmp_path))
    study = study_of(address)
    wait_until(lambda: any(map(is_in_training, study.get_trials(deepcopy=False))))
    database.stop()
    time.sleep(20 if IS_SOAK else 1)
    database.start()
    assert ended(worker) == 0, (tmp_path / "log").read_text()
    check_study(uri, address, trials=2)


def below(parent: int) -> list[psutil.Process]:
    """The processes that this one started, and theirs."""
    found = children(parent)
    return found + [each for child in found for each in below(child.pid)]


def test_two_workers_never_exceed_the_trials_and_no_password_appears(
    tmp_path: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    address = database.create("workers", password="hush123")
    words = ["trials=3", "workers=2", "search_epochs=1", "sleep=2", "confirm=1", "study=study"]
    worker = start_worker(commands, tmp_path, f"sqlite:///{tmp_path}/mlflow.db", *words, f"storage={address}")
    commands = set[str]()
    while worker.poll() is None:
        for process in below(worker.pid):
            with suppress(psutil.NoSuchProcess):
                commands.add(" ".join(process.cmdline()))
        time.sleep(0.2)
    output = (tmp_path / "log").read_text()
    assert ended(worker) == 0, output
    trials = study_of(address).trials
    assert sum(trial.state in FINISHED for trial in trials) == 3
    workers = {
        trial.user_attrs["process"]["pneumo.process"] for trial in trials if "run_id" in trial.user_attrs
    }
    assert len(workers) == 2
    assert len([command for command in commands if "spawn_main" in command]) >= 2
    assert not [command for command in commands if "hush123" in command]
    assert "hush123" not in output and "***" in output
    for path in [tmp_path / "mlflow.db", *(tmp_path / "mlruns").rglob("*")]:
        assert path.is_dir() or b"hush123" not in path.read_bytes(), path


@soak
def test_a_tracking_server_that_is_down_for_a_while_costs_no_trial(
    tmp_path: Path, empty_store: Path, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    (tmp_path / "mlflow.db").rename(tmp_path / "server.db")
    server, address = Server(tmp_path, free_port(), commands), f"sqlite:///{tmp_path}/optuna.db"
    server.start()
    try:
        words = ["trials=3", "search_epochs=3", "sleep=0.3", "confirm=2", "study=study", f"storage={address}"]
        worker = start_worker(commands, tmp_path, server.uri, *words)
        wait_until(lambda: has_begun(tmp_path))
        study = study_of(address)
        wait_until(lambda: bool(study.get_trials(deepcopy=False, states=FINISHED)))
        server.kill()
        time.sleep(20)
        server.start()
        assert ended(worker) == 0, (tmp_path / "log").read_text()
        check_study(server.uri, address, trials=3)
    finally:
        server.kill()
