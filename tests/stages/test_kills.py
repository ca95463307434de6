"""kill -9 at random moments, then the same command again: the end is an undisturbed run's.

PNEUMO_KILLS=25 (make soak) kills more often than the once of the suite, and prints where it struck.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_server import Command, CommandServer
from helpers import copy_store, decoders, environment, few_radiographs, soak
from mlflow import MlflowClient
from samples import content_of

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError

KILLS = int(os.environ.get("PNEUMO_KILLS") or 1)
SHARDS = 2  # of 32 images
COPIES = 16  # of each of four radiographs, under other names
IMAGE_SIZE = 128
PATIENCE_SECONDS = 120
# What lies on the disk tells how far the work is.
STAGES = ("reading", "assembling", "reporting", "starting")


def stage(dataset: Path) -> str:
    work = dataset.with_name(f"{dataset.name}.work")
    if not work.exists():
        return "starting"
    if dataset.exists():
        return "reporting"
    return "assembling" if [*work.glob(f"{dataset.name}.*.part")] and all_made(work) else "reading"


def all_made(work: Path) -> bool:
    return sum(not path.suffix and not path.name.startswith(".") for path in work.iterdir()) == SHARDS


@dataclass(frozen=True)
class Desk:
    """A folder with radiographs, annotations and a store, and what starts preprocess on them."""

    folder: Path
    commands: CommandServer

    def start(self, folder: Path) -> Command:
        words = ["--dicom_dir", self.folder / "dicom", "--rle_csv", self.folder / "dicom" / "train-rle.csv"]
        uri = f"sqlite:///{self.folder}/mlflow.db"
        return self.commands.start(
            *("preprocess", *words, "--dataset", "d.h5", "--image_size", IMAGE_SIZE, "--workers", 2),
            folder=folder,
            environment=environment() | {"MLFLOW_TRACKING_URI": uri},
        )

    def finish(self, folder: Path) -> list[Any]:
        """Runs the command to its end; the data set's content."""
        code, output = self.start(folder).communicate()
        assert code == 0, output
        assert {path.name for path in folder.glob("d.*")} == {"d.h5", "d.report.html", "d.report.json"}
        return content_of(folder / "d.h5")

    def kill_in(self, wanted: str, folder: Path, chance: random.Random) -> str:
        """Starts the command, kills it a little after it reached the stage; where it was when it died."""
        dataset = folder / "d.h5"
        process = self.start(folder)
        workers = list[psutil.Process]()
        while process.poll() is None and stage(dataset) != wanted:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, {"starting": 0.5, "reading": 0.1}.get(wanted, 0.02)))
        if process.poll() is None:
            workers = psutil.Process(process.pid).children(recursive=True)
            struck = stage(dataset)
            process.send_signal(signal.SIGKILL)
        else:
            struck = "ended"
        process.communicate()
        assert psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)[1] == []  # no worker outlives its parent
        return struck


@pytest.fixture(scope="module")
def desk(
    commands: CommandServer, empty_store: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Desk:
    folder = tmp_path_factory.mktemp("kills")
    copy_store(empty_store, folder)
    few_radiographs(dataset.with_name("sample"), folder / "dicom", 32 * SHARDS // COPIES, COPIES)
    return Desk(folder, commands)


@pytest.fixture(scope="module")
def whole(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The content of the data set of a command that nothing disturbed."""
    return desk.finish(tmp_path_factory.mktemp("whole"))


def test_killed_at_any_moment_the_same_command_ends_in_the_same_data_set(
    desk: Desk, whole: list[Any], tmp_path: Path
) -> None:
    chance, struck = random.Random(0), Counter[str]()
    for number in range(KILLS):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        # Sometimes more than once before it may end.
        for wanted in [
            STAGES[number % len(STAGES)],
            *chance.choices(("starting", "reading"), k=number % 3 // 2),
        ]:
            struck[desk.kill_in(wanted, folder, chance)] += 1
            try:
                Dataset.open(folder / "d.h5").close()  # under the final name lies a whole file or none
            except UserError as error:
                assert "no such data set" in str(error)
        assert desk.finish(folder) == whole
    print(f"\n{sum(struck.values())} kills, {KILLS} reruns, all equal: {dict(struck)}")
    assert len(set(struck) - {"ended"}) >= min(3, KILLS)


@soak
def test_a_killed_worker_is_an_error_and_the_same_command_ends_the_work(
    desk: Desk, whole: list[Any], tmp_path: Path
) -> None:
    process, workers = desk.start(tmp_path), list[psutil.Process]()
    # At work: what it has written is its first replies.
    while not (busy := [each for each in workers if each.io_counters().write_chars > 1000]):
        assert process.poll() is None, process.communicate()
        workers = decoders(process.pid)
        time.sleep(0.001)
    busy[0].send_signal(signal.SIGKILL)
    code, output = process.communicate()
    assert code == 2, output
    assert "workers: a worker process was killed" in output
    assert desk.finish(tmp_path) == whole


def test_a_store_whose_creation_is_killed_is_created_by_the_next_command(
    tmp_path: Path, commands: CommandServer
) -> None:
    """MLflow could never open a database that was killed in its creation."""
    variables = environment() | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    first = commands.start("register", folder=tmp_path, environment=variables)
    # More than the header: tables are there, and most are still to come.
    while first.poll() is None and not any(path.stat().st_size for path in tmp_path.glob("mlflow.db.*.part")):
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.communicate()[0] == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    code, output = commands.start("register", folder=tmp_path, environment=variables).communicate()
    assert code == 2, output
    assert "no model of this experiment was scored" in output
    assert MlflowClient(variables["MLFLOW_TRACKING_URI"]).get_experiment("0").name == "pneumothorax"
