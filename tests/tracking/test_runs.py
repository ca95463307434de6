"""Runs and model versions in MLflow, also of processes that are interrupted or killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from command_server import Command, CommandServer
from helpers import copy_store, environment, make, store_address, working_in
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from tracked import artifact, last_run, log_empty_model
from tracking_server import TIMEOUT_SECONDS, wait_until

from pneumo_experiments import interrupts, tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.registry.scores import best_model
from pneumo_experiments.settings import (
    Preprocess,
    Register,
    Sample,
    Score,
    Search,
    Train,
    as_config,
    as_params,
)
from pneumo_experiments.tracking.buffered_client import BufferedClient
from pneumo_experiments.tracking.log import active_runs
from pneumo_experiments.tracking.processes import is_dead, process_tags
from pneumo_experiments.tracking.runs import end_given_run


def runs(store: Path) -> dict[str, Run]:
    """The runs of the store in a folder, by name."""
    return {run.info.run_name: run for run in MlflowClient(store_address(store)).search_runs(["0"])}


def statuses(store: Path) -> dict[str, str]:
    return {name: run.info.status for name, run in runs(store).items()}


# Runs


def test_a_run_hides_passwords_in_its_params_its_config_file_and_its_error(store: Path) -> None:
    address = "postgresql://u:Se/cr3t@h/db?user=u&password=cr3t"
    hidden = "postgresql://u:***@h/db?user=u&password=***"
    settings = make(Search, storage=address, learning_rate=1e-5, augment=False)
    with pytest.raises(UserError), tracking.run("search", settings):
        raise UserError(f"storage: {address} does not open")
    run = last_run("search")
    config = artifact(run, "config.yaml").read_text()
    assert yaml.safe_load(config) == as_config(settings) | {"storage": hidden}
    assert run.data.params["storage"] == hidden
    assert run.data.tags["error"] == f"storage: {hidden} does not open"
    assert "cr3t" not in f"{run.to_dictionary()}{config}"


def test_a_run_that_the_store_does_not_have_cannot_be_joined(store: Path) -> None:
    words = rf"^MLFLOW_TRACKING_URI=.*: has no run {32 * '0'}, .* the same tracking server"
    with pytest.raises(UserError, match=words), tracking.joined_run(32 * "0"):
        pass


def test_a_setting_that_differs_from_what_mlflow_run_logged_is_a_param_of_its_own(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    logged = {"dataset": "output/dataset.h5", "epochs": "3e0", "compile": "False", "best_k": "3"}
    for name, text in logged.items():
        client.log_param(run_id, name, text)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.run("train", make(Train, dataset=Path("mine.h5"), epochs=3)):
        pass
    params = client.get_run(run_id).data.params
    used = {name: text for name, text in params.items() if name.endswith("_used")}
    assert used == {"dataset_used": "mine.h5"}
    assert params | logged == params


@pytest.mark.parametrize("given", ["siim baseline", "fold-three-2", "able-ant", None])
def test_a_name_that_somebody_gave_to_the_run_stays(
    given: str | None, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MlflowClient().create_run("0", run_name=given)  # as `mlflow run` does, with --run-name or without
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    with tracking.run("train", make(Train)), tracking.run("fold", make(Train), "fold 0"):
        pass
    assert set(runs(store)) == {given or "train", "fold 0"}


def test_a_name_is_cut_to_what_every_database_takes_and_shows_no_password(store: Path) -> None:
    with tracking.run("train", Train(), f"train https://me:secret@host/x {'long ' * 100}"):
        pass
    (name,) = runs(store)
    assert len(name) == 250
    assert name.startswith("train https://me:***@host/x long ")


def test_a_run_that_goes_on_after_an_error_no_longer_has_it(store: Path) -> None:
    with suppress(UserError), tracking.run("train", Train()) as run_id:
        raise UserError("no room")
    assert MlflowClient().get_run(run_id).data.tags["mlflow.note.content"] == "Failed: no room"
    with tracking.run("train", Train(), continues=run_id) as again:
        tags = MlflowClient().get_run(run_id).data.tags
    assert (again, tags["error"], tags["mlflow.note.content"]) == (run_id, "", "")


def test_scores_of_a_model_whose_training_is_purged_are_not_its_runs(store: Path) -> None:
    model = log_empty_model()
    (run,) = runs(store).values()
    SqlAlchemyStore(store_address(store), "mlruns")._hard_delete_run(run.info.run_id)
    evaluated(model, 0.5)
    assert statuses(store) == {"score": "FINISHED"}


@pytest.mark.parametrize(
    ("tags", "name", "expected"),
    [
        ({"mlflow.project.entryPoint": "score"}, "able-ant-7", ("score", "KILLED", "why")),
        ({"mlflow.project.entryPoint": "score"}, "mine", ("mine", "KILLED", "why")),
        ({}, "able-ant-7", ("able-ant-7", "RUNNING", None)),  # not of `mlflow run`
    ],
)
def test_a_run_of_mlflow_run_in_which_nothing_began_ends_with_name_and_reason(
    tags: dict[str, str], name: str, expected: tuple[str, str, str | None], store: Path
) -> None:
    given = MlflowClient().create_run("0", run_name=name, tags=tags).info.run_id
    end_given_run(given, "KILLED", "why")
    run = MlflowClient().get_run(given)
    assert (run.info.run_name, run.info.status, run.data.tags.get("mlflow.note.content")) == expected
    end_given_run(given, "FAILED", "another")  # what has ended stays as it is
    assert MlflowClient().get_run(given).data.tags.get("mlflow.note.content") in ("why", None)


def test_runs_nest_under_their_step_and_hold_the_settings_that_matter(store: Path) -> None:
    with tracking.run("search", make(Search, study="mine")):
        tracking.describe("Two\nlines.")
        with tracking.run("trial", make(Train, epochs=3), "trial 0"):
            tracking.log_metrics({"dice": 0.25}, step=1)
            tracking.log_metrics({"dice": 0.5}, step=2)
        tracking.log_params({"best": 0, "path": None})
    search, trial = runs(store)["search"], runs(store)["trial 0"]
    assert statuses(store) == {"search": "FINISHED", "trial 0": "FINISHED"}
    assert trial.data.tags["mlflow.parentRunId"] == search.info.run_id
    assert "mlflow.parentRunId" not in search.data.tags
    assert search.data.tags["mlflow.note.content"] == "Two\nlines."
    chosen, params = {"study": "mine"}, search.data.params
    usual = as_params(Search())
    assert {"network", "learning_rate", "dice_weight", "trials", "fold"} <= usual.keys()
    assert {"sampler", "workers", "augment", "study", "warmup"}.isdisjoint(usual)
    assert params == usual | chosen | {"best": "0", "path": "none"}
    config = yaml.safe_load(artifact(search, "config.yaml").read_text())
    assert config == as_config(make(Search, study="mine"))  # has all
    assert [run.data.tags["pneumo.stage"] for run in (search, trial)] == ["search", "trial"]
    assert trial.data.params["epochs"] == "3"
    history = MlflowClient().get_metric_history(trial.info.run_id, "dice")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5)]


def test_a_run_ends_as_its_step_does_and_its_parent_may_live_on(store: Path) -> None:
    ends: dict[BaseException, tuple[str, str | None]] = {
        UserError("a: is wrong; fix it"): ("FAILED", "a: is wrong; fix it"),
        RuntimeError("a bug"): ("FAILED", "RuntimeError: a bug"),
        KeyboardInterrupt(): ("KILLED", None),
        interrupts.Terminated(): ("KILLED", None),
        SystemExit(3): ("FAILED", None),
    }
    with tracking.run("parent", Sample()):
        for error, (status, reason) in ends.items():
            with pytest.raises(type(error)), tracking.run("main", Sample()), tracking.run("sample", Sample()):
                raise error
            for name in ("main", "sample"):
                run = last_run(name)
                assert (run.info.status, run.data.tags.get("error")) == (status, reason)
                assert run.data.tags.get("mlflow.note.content") == (reason and f"Failed: {reason}")
        assert last_run("parent").info.status == "RUNNING"
    assert last_run("parent").info.status == "FINISHED"
    assert active_runs == []


def test_a_disabled_process_logs_nothing(store: Path) -> None:
    with tracking.disabled(), tracking.run("train", Train()) as run_id:
        tracking.log_metrics({"dice": 0.5})
        tracking.log_json({"a": 1}, "a.json")
        tracking.describe("Nothing.")
        assert (run_id, tracking.active_run()) == ("", None)
    assert runs(store) == {}
    with tracking.run("train", Train()):
        tracking.log_metrics({"dice": 0.5})
    assert runs(store)["train"].data.metrics == {"dice": 0.5}


def test_a_data_set_that_another_process_logs_at_the_same_time_is_logged(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_inputs, attempts = MlflowClient.log_inputs, list[str]()

    def lose_the_race(self: MlflowClient, run_id: str, datasets: list[DatasetInput]) -> None:
        attempts.append(run_id)
        if len(attempts) == 1:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.digest")
        log_inputs(self, run_id, datasets)

    monkeypatch.setattr(MlflowClient, "log_inputs", lose_the_race)
    with tracking.run("train", Train()):
        tracking.log_dataset(Path("siim.h5"), "0123456789abcdef", "training", {"images": 3})
    assert len(attempts) == 2
    (data,) = last_run("train").inputs.dataset_inputs
    assert json.loads(data.dataset.profile) == {"images": 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_kills_every_nested_run_and_a_second_signal_is_ignored(
    store: Path, number: signal.Signals
) -> None:
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupts.handle_signals()
        with (
            pytest.raises(KeyboardInterrupt) as stop,
            tracking.run("main", Sample()),
            tracking.run("sample", Sample()),
        ):
            try:
                os.kill(os.getpid(), number)
                time.sleep(TIMEOUT_SECONDS)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(stop.value, interrupts.Terminated) == (number == signal.SIGTERM)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert statuses(store) == {"main": "KILLED", "sample": "KILLED"}


def test_only_orphans_of_this_machine_are_marked_killed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, tags = MlflowClient(), process_tags()
    gone = tags | {"pneumo.process": f"{os.getpid()}:1.0"}
    machine, boot, namespace = tags["pneumo.machine"].split("/")
    left = {
        "gone": gone,
        "alive": tags,
        "elsewhere": gone | {"pneumo.host": "another machine"},
        # Such a process may be alive, whatever process has its pid here.
        "in a container": gone | {"pneumo.machine": f"{machine}/{boot}/pid:[4026532999]"},
        "of the same name": gone | {"pneumo.machine": f"{machine[:-1]}?/{boot[:-1]}?/{namespace}"},
        "another's": {},
    }
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # with another's run in it, it keeps its name
    for name, its in left.items():
        client.create_run("0", run_name=name, tags=its)
    assert tracking.open_store() == tracking.open_store() == "0"
    assert set(statuses(store).values()) == {"RUNNING"}  # opening the store changes no run
    with tracking.run("train", Train()):
        pass
    others = dict.fromkeys(left, "RUNNING")
    assert statuses(store) == others | {"gone": "KILLED", "train": "FINISHED"}


@pytest.mark.parametrize(
    ("machine", "this_machine", "is_certain"),
    [
        ("m/boot 1/pid:[4026531836]", "m/boot 2/pid:[4026531836]", True),  # after a power cut
        ("m/boot 1/pid:[7]", "m/boot 1/pid:[8]", False),  # two containers, or one that was started again
        ("m/boot 1/pid:[7]", "m/boot 2/pid:[7]", False),  # two machines from one image number alike
        ("m/boot 1/pid:[4026531836]", "m/boot 1/pid:[7]", False),
        ("/boot 1/pid:[4026531836]", "/boot 2/pid:[4026531836]", False),  # two machines without an id
        ("", "m/boot 1/pid:[4026531836]", False),
        ("//", "//", True),  # a system without /proc: the pid decides
    ],
)
def test_a_process_is_dead_only_if_that_is_certain(machine: str, this_machine: str, is_certain: bool) -> None:
    assert is_dead(machine, f"{os.getpid()}:1.0", this_machine) == is_certain


def test_calls_left_by_a_killed_process_that_had_joined_the_run_are_named(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(KeyboardInterrupt), tracking.run("search", Search()) as run_id:
        raise KeyboardInterrupt
    dead, alive = 2**30, os.getppid()
    for pid in (dead, alive):
        left = BufferedClient(store / "output" / f"undelivered-{run_id}-{pid}")
        left.buffer("tags", run_id=run_id, values={})
    for again in (tracking.run("search", Search(), continues=run_id), tracking.joined_run(run_id)):
        caplog.clear()
        with again:
            pass
        assert f"1 calls of this run are undelivered, buffered in {store}" in caplog.text
        assert f"-{dead}/calls.jsonl" in caplog.text
        assert f"-{alive}/calls.jsonl" not in caplog.text


def test_the_first_experiment_takes_our_name_where_all_its_runs_are_ours(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tags, names in (
        ({}, {"Default", "pneumothorax"}),
        (process_tags(), {"pneumothorax"}),
        (None, {"pneumothorax"}),
    ):
        folder = tmp_path / f"{tags is None} {bool(tags)}"
        folder.mkdir()
        copy_store(empty_store, folder)
        with working_in(folder, store_address(folder)):
            client = MlflowClient()
            if tags is not None:
                client.create_run("0", tags=tags)
            experiment = tracking.open_store()
            assert {each.name for each in client.search_experiments()} == names
            assert client.get_experiment(experiment).name == "pneumothorax"
            monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run("0").info.run_id)
            assert tracking.open_store() == "0"  # as `mlflow run` chose, with a name or without
            monkeypatch.delenv("MLFLOW_RUN_ID")


def test_artifacts_of_a_new_experiment_lie_beside_the_database(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "lungs")
    (store / "elsewhere").mkdir()
    monkeypatch.chdir(store / "elsewhere")
    with tracking.run("sample", Sample()) as run_id:
        tracking.log_json({"a": 1}, "a.json")
    client = MlflowClient()
    assert client.get_experiment(client.get_run(run_id).info.experiment_id).name == "lungs"
    assert len(list((store / "mlruns").rglob("a.json"))) == 1


# Models and their scores


HOLDOUT, EXTERNAL = "a" * 32, "b" * 32


def evaluated(model: str, dice: float, identity: str = HOLDOUT, subset: str = "holdout") -> None:
    """Scores a model as `score` does."""
    facts = {"subset": subset, "images": 48, "dice_baseline": 0.75}
    with tracking.run("score", Score(model=model)):
        tracking.log_scores({"dice": dice}, model, Path("siim.h5"), identity, facts)


def test_scores_and_their_table_outlast_an_outage_and_arrive_once_though_they_are_sent_twice(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = log_empty_model(), [("a", 0.5), ("b", 1.0)]
    with tracking.run("score", Score()) as run_id:
        client = active_runs[-1].client
        with monkeypatch.context() as patch:
            patch.setattr(client, "_next_attempt", float("inf"))  # as after a failed attempt
            facts = {"subset": "holdout", "images": 2, "dice_baseline": 0.5}
            tracking.log_scores({"dice": 0.75}, model, Path("siim.h5"), HOLDOUT, facts)
            tracking.log_table(("image_id", "dice"), rows, "scores")
        assert MlflowClient().get_run(run_id).data.metrics == {}
        for line in client.file.read_text().splitlines():  # the response to the first attempt was lost
            client.buffer(**json.loads(line))
        assert client.flush()
    found = MlflowClient().get_logged_model(model.removeprefix("models:/"))
    metrics = [(m.key, m.value, m.dataset_name, m.dataset_digest) for m in found.metrics or []]
    assert metrics == [("dice", 0.75, "siim holdout", HOLDOUT)]
    assert json.loads(found.tags[f"score.{HOLDOUT}"])["subset"] == "holdout"
    assert len(MlflowClient().get_metric_history(run_id, "dice")) == 1
    training = MlflowClient().get_run(found.source_run_id).data
    assert (training.metrics, training.params["dice_baseline"]) == ({"dice": 0.75}, "0.5")
    table = mlflow.load_table("scores.json", run_ids=[run_id])
    assert list(table.itertuples(index=False, name=None)) == rows


def test_a_model_whose_upload_fails_is_not_left_pending(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    with pytest.raises(OSError, match="disk full"):
        log_empty_model()
    (model,) = MlflowClient().search_logged_models(["0"])
    assert str(model.status) == "FAILED"


def test_the_best_model_is_the_one_with_the_highest_dice_on_one_set_of_images(store: Path) -> None:
    lower, highest, other = (log_empty_model() for _ in range(3))
    with tracking.run("register", Register()):
        with pytest.raises(UserError, match="model=best: no model"):
            best_model(None)
        evaluated(other, 0.99, HOLDOUT, "train")
        with pytest.raises(UserError, match="model=best: no model"):
            best_model(None)
        evaluated(lower, 0.8)
        evaluated(highest, 0.9)
        images = "48 holdout images (aaaaaaaa)"
        last = (highest, f"best of 2 models scored on {images}, the images scored last", 2)
        assert best_model(None) == last
        evaluated(other, 0.95, EXTERNAL, "external")
        assert best_model(None) == last
        evaluated(other, 0.95, "c" * 32, "holdout")
        address, line, models = best_model(None)
        assert (address, models) == (other, 1)
        assert "best of 1 model scored on 48 holdout images (cccccccc)" in line
        assert best_model("d" * 32).address == other
        champions = f"best of 2 models scored on {images}, the champion's images"
        assert best_model(HOLDOUT) == (highest, champions, 2)


# Real processes


@dataclass(frozen=True)
class Stopped:
    """A `sample` command that was stopped while it worked, and its leftovers."""

    store: Path
    code: int
    output: str
    workers: list[psutil.Process]

    @property
    def status(self) -> str:
        return statuses(self.store)["sample"]


STOPS = ("ctrl-c", "sigterm", "kill", "kill the starter")


def start(store: Path, by_mlflow_run: bool, commands: CommandServer) -> Command:
    variables = environment() | {"MLFLOW_TRACKING_URI": store_address(store)}
    if by_mlflow_run:
        client = MlflowClient(store_address(store))
        run = client.create_run("0", run_name="able-ant-7")  # such as it chooses
        client.log_param(run.info.run_id, "images", "2e3")
        variables["MLFLOW_RUN_ID"] = run.info.run_id
    return commands.start("sample", "--images", "2000", folder=store, environment=variables)


@pytest.fixture(scope="module")
def stopped(
    empty_store: Path, tmp_path_factory: pytest.TempPathFactory, commands: CommandServer
) -> dict[str, Stopped]:
    stores = {how: tmp_path_factory.mktemp("stopped") for how in STOPS}
    for folder in stores.values():
        copy_store(empty_store, folder)
    started = {how: start(store, how == "kill the starter", commands) for how, store in stores.items()}
    processes = {how: psutil.Process(command.pid) for how, command in started.items()}
    workers: dict[str, list[psutil.Process]] = {}

    def stop(how: str) -> None:
        workers[how] = processes[how].children(recursive=True)
        if how == "ctrl-c":
            os.killpg(started[how].pid, signal.SIGINT)  # as in a terminal: it reaches the whole group
        elif how == "kill the starter":
            starter = processes[how].parent()
            assert starter is not None
            starter.kill()
        else:
            started[how].send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGKILL)

    def all_stopped() -> bool:
        for how in STOPS:
            if how not in workers and any(stores[how].rglob("*.dcm")):
                stop(how)
        return len(workers) == len(STOPS)

    try:
        wait_until(all_stopped)
        ends: dict[str, Stopped] = {}
        for how, command in started.items():
            processes[how].wait(TIMEOUT_SECONDS)
            ends[how] = Stopped(stores[how], *command.communicate(), workers[how])
        return ends
    finally:
        for process in processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "code", "line"), [("ctrl-c", 130, "Stopped;"), ("sigterm", 143, "Stopped by SIGTERM;")]
)
def test_a_stopped_command_says_so_and_leaves_a_killed_run_and_no_files(
    how: str, code: int, line: str, stopped: dict[str, Stopped]
) -> None:
    end = stopped[how]
    assert (end.code, end.status) == (code, "KILLED")
    *progress, last = end.output.strip().splitlines()
    assert last.startswith(line)
    assert all(re.fullmatch("sample: about .* left", told) for told in progress)
    assert list((end.store / "output").iterdir()) == []


def test_the_next_command_marks_runs_of_killed_processes(stopped: dict[str, Stopped]) -> None:
    end = stopped["kill"]
    assert (end.code, end.status) == (-signal.SIGKILL, "RUNNING")
    with working_in(end.store, store_address(end.store)), tracking.run("preprocess", Preprocess()):
        pass
    assert statuses(end.store) == {"sample": "KILLED", "preprocess": "FINISHED"}


def test_a_command_uses_the_run_that_mlflow_run_created_and_ends_with_it(
    stopped: dict[str, Stopped],
) -> None:
    end = stopped["kill the starter"]
    wait_until(lambda: end.status == "KILLED")
    wait_until(lambda: not list((end.store / "output").iterdir()))
    ((name, run),) = runs(end.store).items()
    assert name == "sample"
    assert run.data.params == {"images": "2e3", "seed": "0"}


@pytest.mark.parametrize("how", STOPS)
def test_no_worker_outlives_its_command(how: str, stopped: dict[str, Stopped]) -> None:
    workers = stopped[how].workers
    assert workers
    assert psutil.wait_procs(workers, timeout=TIMEOUT_SECONDS)[1] == []
