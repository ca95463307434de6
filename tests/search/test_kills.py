"""kill -9, lost databases and lost servers under a search of several workers: it loses and repeats nothing.

PNEUMO_KILLS=25 (make soak) kills more often than the few times of the suite, and prints what it did.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from command_server import Command, CommandServer
from database_server import DatabaseServer
from helpers import IS_SOAK, children, copy_store, environment, soak
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from tracking_server import Server, free_port, wait_until

from pneumo_experiments.search.study import confirmations, trials_to_confirm
from pneumo_experiments.search.winner import choose_winner

KILLS = int(os.environ.get("PNEUMO_KILLS") or 2)
TRIALS, WORKERS, EPOCHS = (40, 3, 3) if IS_SOAK else (6, 2, 3)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
CONFIRM = 2
# Short trainings that find something, of settings nearly alike, so that second trainings follow.
LIVELY = {
    **{"weights": "none", "batch_size": 8, "precision": "fp32", "device": "cpu", "learning_rate": 0.05},
    **{"positive_fraction": 0.9, "final_positive_fraction": 0.9, "folds": 3, "confirm": CONFIRM, "keep": 1},
    "search_warmup_epochs": 1,
    **{"searched": "weight_decay", "weight_decay": 0.01, "space": "space.yaml", "study": "study"},
}


class Desk:
    """A folder with a store, where workers of one study start."""

    def __init__(self, commands: CommandServer, folder: Path, dataset: Path, address: str) -> None:
        self.commands, self.folder, self.address = commands, folder, address
        self.uri, self.variables = f"sqlite:///{folder}/mlflow.db", environment()
        self.words = {"dataset": dataset, "storage": address} | LIVELY
        (folder / "space.yaml").write_text("weight_decay: {low: 0.01, high: 0.0101}\n")

    def start(self, **settings: object) -> Command:
        """Starts a worker with the tiny network."""
        words = [word for name, value in (self.words | settings).items() for word in (f"--{name}", value)]
        variables = self.variables | {"MLFLOW_TRACKING_URI": self.uri}
        return self.commands.start("search", *words, folder=self.folder, environment=variables, tiny=True)

    def study(self) -> optuna.Study:
        return optuna.load_study(study_name="study", storage=self.address)

    def has_begun(self) -> bool:
        """Whether a trial of the study runs."""
        try:
            return bool(self.study().get_trials(deepcopy=False, states=(TrialState.RUNNING, *FINISHED)))
        except Exception:  # not yet created
            return False

    def runs(self) -> list[Run]:
        client = MlflowClient(self.uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        return list(client.search_runs(experiments, max_results=1000))

    def check(self, trials: int) -> optuna.Study:
        """Asserts what holds for a study that has ended, whatever happened to it."""
        study = self.study()
        states = Counter(trial.state for trial in study.trials)
        assert sum(states[state] for state in FINISHED) == trials, states
        assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0, states
        firsts = [t for t in study.trials if t.params and "retry_history" not in t.system_attrs]
        assert len(set(map(settings_of, firsts))) == len(firsts)  # no two workers drew the same
        finished = [trial for trial in study.trials if trial.state in FINISHED]
        assert len(set(map(settings_of, finished))) == trials
        assert trials_to_confirm(study, CONFIRM) == []
        self.check_runs(finished, len(confirmations(study)))
        winner = choose_winner(study)  # that it is logged; its rule is in tests/metrics/test_comparison.py
        (parent,) = [run for run in self.runs() if run.data.tags["pneumo.stage"] == "search"]
        assert winner and parent.data.metrics["search/best_trial"] == winner.trial.number
        return study

    def check_runs(self, finished: list[FrozenTrial], confirmed: int) -> None:
        """Asserts one finished run for each finished trial, all under one parent, and none RUNNING."""
        runs = self.runs()
        (parent,) = [run for run in runs if run.data.tags["pneumo.stage"] == "search"]
        assert parent.info.status == "FINISHED"
        below = {run.info.run_id: run for run in runs if run is not parent}
        assert {run.data.tags.get("mlflow.parentRunId") for run in below.values()} == {parent.info.run_id}
        # A worker that was killed between the end of its run and that of its trial leaves one run more.
        ended = {run_id for run_id, run in below.items() if run.info.status == "FINISHED"}
        assert {trial.user_attrs["run_id"] for trial in finished} <= ended
        again = {" ".join(str(run.info.run_name).split()[:2]) for run in below.values()}
        assert len([name for name in again if name.startswith("confirm")]) >= confirmed
        assert {run.info.status for run in below.values()} <= {"FINISHED", "KILLED"}


def settings_of(trial: FrozenTrial) -> str:
    return json.dumps(trial.params, sort_keys=True)


def ended(worker: Command) -> str:
    """Waits for a worker, and asserts that it ended well; what it said."""
    code, said = worker.communicate()
    assert code == 0, said
    return said


def assert_hidden(password: str, said: str, folder: Path) -> None:
    """It is neither shown nor in any file of the store."""
    assert password not in said and "***" in said
    for path in [folder / "mlflow.db", *(folder / "mlruns").rglob("*")]:
        assert path.is_dir() or password.encode() not in path.read_bytes(), path


def test_killed_workers_lose_no_trial_and_repeat_none(
    tmp_path: Path, small_dataset: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    """The one that owns the study among them: another takes over. No password appears."""
    copy_store(empty_store, tmp_path)
    desk = Desk(commands, tmp_path, small_dataset, database.create("kills", password="hush123"))
    words = {"trials": TRIALS, "search_epochs": EPOCHS}
    chance, struck = random.Random(0), Counter[str]()
    workers = [desk.start(**words) for _ in range(WORKERS)]
    begin = time.monotonic()
    wait_until(desk.has_begun)
    study = desk.study()
    for kill in range(KILLS):
        number = chance.randrange(WORKERS)
        if kill % 3 or not IS_SOAK:  # at work; else at any moment, also while it starts
            wait_until(lambda n=number: place(study, workers[n]) != "between trials")
        time.sleep(chance.uniform(0, 0.5))
        struck[place(study, workers[number])] += 1
        workers[number].send_signal(signal.SIGKILL)
        workers[number].communicate()
        workers[number] = desk.start(**words)
    said = "".join(ended(worker) for worker in (*workers, desk.start(**words)))
    assert_hidden("hush123", said, tmp_path)
    assert len(confirmations(desk.check(TRIALS))) >= 2  # the settings as given, and another
    states = Counter(trial.state.name.lower() for trial in study.trials)
    print(f"\n{KILLS} kills of {WORKERS} workers, {TRIALS} trials, {time.monotonic() - begin:.0f} s")
    print(f"  killed in {dict(struck)}; trials {dict(states)}")
    print(f"  runs {dict(Counter(run.info.status for run in desk.runs()))}")
    assert sum(struck.values()) - struck["ended"] >= KILLS // 2


def place(study: optuna.Study, worker: Command) -> str:
    """What a worker is at, by the trials and claims that name it."""
    if worker.poll() is not None:
        return "ended"
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    attributes = study.user_attrs
    claims = [value for name, value in attributes.items() if name.startswith("claim.confirm")]
    for name, processes in (
        ("trial", [t.user_attrs.get("process", {}) for t in running]),
        ("confirm", claims),
    ):
        if any(each.get("pneumo.process", "").startswith(f"{worker.pid}:") for each in processes):
            return name
    return "between trials"


@soak
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_workers_that_start_at_once_on_empty_stores_share_one_study_and_one_parent(
    kind: str, tmp_path: Path, small_dataset: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    desk = Desk(commands, tmp_path, small_dataset, f"sqlite:///{tmp_path}/optuna.db")
    if kind == "postgresql":
        desk = Desk(commands, tmp_path, small_dataset, database.create("empty_study"))
        desk.uri = database.create("empty_store")
    for worker in [desk.start(trials=3, search_epochs=EPOCHS, pruner="none") for _ in range(2)]:
        ended(worker)
    desk.check(trials=3)


@soak
def test_a_database_that_restarts_costs_no_trial(
    tmp_path: Path, small_dataset: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    desk = Desk(commands, tmp_path, small_dataset, database.create("restarted"))
    worker = desk.start(trials=2, search_epochs=20)
    wait_until(desk.has_begun)
    database.stop()
    time.sleep(20)
    database.start()
    ended(worker)
    desk.check(trials=2)


# Of the workers that a command starts, the first dies at once, without the imports that take seconds. The
# other one has the tiny network as well, and waits in its first trial.
SITE = """
import os, sys, time
from pathlib import Path

if "spawn_main" in " ".join(sys.orig_argv):
    try:
        Path("dead").touch(exist_ok=False)
        os._exit(3)
    except FileExistsError:
        pass
    import tiny_network
    from pneumo_experiments.search.trial_training import TrialTraining

    tiny_network.replace_default_network()
    make = TrialTraining.__init__

    def make_later(self, *given):
        Path("begun").touch()
        while not Path("go").exists():
            time.sleep(0.1)
        make(self, *given)

    TrialTraining.__init__ = make_later
"""


def below(parent: int) -> list[psutil.Process]:
    """The processes that this one started, and theirs."""
    found = children(parent)
    return found + [each for child in found for each in below(child.pid)]


def test_workers_of_two_commands_never_exceed_the_trials_and_no_password_appears(
    tmp_path: Path, small_dataset: Path, empty_store: Path, database: DatabaseServer, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    desk = Desk(commands, tmp_path, small_dataset, database.create("workers", password="hush123"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    desk.variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), desk.variables["PYTHONPATH"]])
    words = {"trials": 3, "search_epochs": 2, "confirm": 0}
    first = desk.start(workers=2, **words)
    wait_until((tmp_path / "begun").exists)
    lines = [Path(f"/proc/{process.pid}/cmdline").read_text() for process in below(first.pid)]
    second = desk.start(**words)
    wait_until(lambda: len(desk.study().get_trials(deepcopy=False)) > 1)
    (tmp_path / "go").touch()
    said = ended(first) + ended(second)
    assert re.search(r"search: search worker [01] ended with exit code 3\n", said)
    trials = desk.study().trials
    assert sum(trial.state in FINISHED for trial in trials) == 3
    processes = [trial.user_attrs["process"] for trial in trials if "run_id" in trial.user_attrs]
    assert len({process["pneumo.process"] for process in processes}) == 2
    assert any("spawn_main" in line for line in lines) and not any("hush123" in line for line in lines)
    assert_hidden("hush123", said, tmp_path)


@soak
def test_a_tracking_server_that_is_down_for_a_while_costs_no_trial(
    tmp_path: Path, small_dataset: Path, empty_store: Path, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    (tmp_path / "mlflow.db").rename(tmp_path / "server.db")
    server = Server(tmp_path, free_port(), commands)
    desk = Desk(commands, tmp_path, small_dataset, f"sqlite:///{tmp_path}/optuna.db")
    desk.uri = server.uri
    server.start()
    try:
        worker = desk.start(trials=3, search_epochs=30)
        wait_until(desk.has_begun)
        study = desk.study()
        wait_until(lambda: bool(study.get_trials(deepcopy=False, states=FINISHED)))
        server.kill()
        time.sleep(20)
        server.start()
        ended(worker)
        desk.check(trials=3)
    finally:
        server.kill()
