"""Files that take gigabytes or hours cost their own row, and a command that is at one can be stopped."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
from bombs import deflated_header, many_scans, tiny_precincts
from command_server import CommandServer
from dicom_files import GREYS, jpeg_file
from helpers import children, environment, make, soak, store_address, store_in
from mlflow import MlflowClient
from tiny_network import tiny_member
from tracked import log_model

from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
from pneumo_experiments.dicom import limits
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, ServedModel
from pneumo_experiments.settings import Score, Train
from pneumo_experiments.stages.score import score

GOOD = jpeg_file(GREYS)
PATIENCE_SECONDS = 15  # a bomb takes 20 at least
MOST_BYTES = 3 * 10**9
TOO_LONG = "needs more than 2 s of CPU time to decode"


@dataclass(frozen=True)
class Desk:
    """A store with a model, and a folder of radiographs."""

    uri: str
    model: str
    service: ServedModel
    radiographs: Path


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return {"header": deflated_header(), "precincts": tiny_precincts(), "scans": many_scans()}


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, bombs: dict[str, bytes], tiny: None
) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    radiographs = folder / "radiographs"
    radiographs.mkdir()
    for name, content in {"a": GOOD, "scans": bombs["scans"], "z": GOOD}.items():
        (radiographs / f"{name}.dcm").write_bytes(content)
    with store_in(folder, empty_store):
        detector = Detector((tiny_member(0, tta="none"),), 32, Thresholds(presence_threshold=0), "")
        model = log_model(detector, Train())
        yield Desk(store_address(folder), model, ServedModel(detector), radiographs)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started here decodes two seconds at most: a first decode imports what it needs, too."""
    monkeypatch.setattr(limits, "BASE_SECONDS", 2)
    monkeypatch.setattr(limits, "SECONDS_PER_MEGABYTE", 0)


def peak_of(process: psutil.Process) -> int:
    """Most bytes of memory that a process has had; 0 for one that has ended."""
    with suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM:" in status:
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return 0


@pytest.fixture
def peak_bytes() -> Iterator[Callable[[], int]]:
    """Most memory that the test added to this process and used in children; earlier tests do not count."""
    own, ended, sums = psutil.Process(), threading.Event(), [0]
    for process in (own, *own.children()):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    before = own.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.05):
            sums.append(peak_of(own) - before + sum(map(peak_of, children(own.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield lambda: max(sums)
    ended.set()
    watcher.join()


def at_work(parent: int) -> list[psutil.Process]:
    """Processes that decode, and have used more CPU time than their start takes."""
    found = list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):  # one has just ended
        for child in children(parent):
            if "dataset.decoder" in " ".join(child.cmdline()) and sum(child.cpu_times()[:2]) > 1.5:
                found.append(child)
    return found


def test_a_model_answers_all_rows_of_a_batch_with_bombs_in_it(
    desk: Desk, bombs: dict[str, bytes], impatient: None, peak_bytes: Callable[[], int]
) -> None:
    files = {"a": GOOD, **bombs, "z": GOOD}
    frame = pd.DataFrame({"image_id": list(files), "dicom": list(files.values())})
    rows = {row["image_id"]: row for row in desk.service.predict(frame).to_dict("records")}
    assert list(rows) == list(files)
    assert [rows[name]["error"] for name in ("a", "z")] == ["", ""]
    assert rows["a"]["presence"] == pytest.approx(rows["z"]["presence"])
    assert rows["header"]["error"] == f"header: {TOO_LONG}"
    assert rows["scans"]["error"] == f"scans: {TOO_LONG}"
    assert rows["precincts"]["error"]  # which limit it reaches first depends on the machine
    assert {rows[name]["rle"] for name in bombs} == {None}
    assert 0 < peak_bytes() < MOST_BYTES


def test_a_submission_has_a_row_for_a_bomb(
    desk: Desk,
    tmp_path: Path,
    impatient: None,
    peak_bytes: Callable[[], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = {"submission": tmp_path / "sub.csv", "findings": tmp_path / "findings", "max_rejected": 0.5}
    score(make(Score, model=desk.model, dicom_dir=desk.radiographs, **written))
    with (tmp_path / "sub.csv").open(newline="") as file:
        rows = {row["ImageId"]: row["EncodedPixels"] for row in csv.DictReader(file)}
    assert (set(rows), rows["scans"]) == ({"a", "scans", "z"}, "-1")
    said = capsys.readouterr().out
    assert f"submitted as empty: scans: {TOO_LONG}" in said
    assert "3 images" in said
    assert "1 could not be read" in said
    (run,) = MlflowClient().search_runs(["0"], "tags.`pneumo.stage` = 'score'")
    assert run.info.status == "FINISHED"
    assert 0 < peak_bytes() < MOST_BYTES


def test_a_data_set_is_made_without_the_bombs(
    bombs: dict[str, bytes], tmp_path: Path, impatient: None, peak_bytes: Callable[[], int]
) -> None:
    folder, work = tmp_path / "files", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    files = {"a": GOOD, "header": deflated_header(), "precincts": tiny_precincts(2000)}
    for name, content in (files | {"scans": bombs["scans"], "z": GOOD}).items():
        (folder / f"{name}.dcm").write_bytes(content)

    jobs = make_jobs(folder, ShardSettings(32, "uint8", 2**22), open_archive(folder).members, None, {})
    found = {result.image_id: result for result in results(jobs, work, workers=2)}
    reasons = {image_id: result.reason for image_id, result in found.items()}
    assert [image_id for image_id, result in found.items() if result.packed] == ["a", "z"], reasons
    for name in ("header", "precincts"):
        assert found[name].reason in ("needs more than 0.3 GB of memory to decode", TOO_LONG)
    assert found["scans"].reason == TOO_LONG
    assert all(len(result.content) == 64 for result in found.values())
    assert 0 < peak_bytes() < MOST_BYTES


@pytest.mark.parametrize(
    ("stage", "number", "code", "status"),
    [
        ("score", signal.SIGINT, 130, "KILLED"),
        pytest.param("score", signal.SIGKILL, -signal.SIGKILL, "RUNNING", marks=soak),
        pytest.param("score", signal.SIGTERM, 143, "KILLED", marks=soak),
        pytest.param("preprocess", signal.SIGINT, 130, "KILLED", marks=soak),
        pytest.param("preprocess", signal.SIGTERM, 143, "KILLED", marks=soak),
        ("preprocess", signal.SIGKILL, -signal.SIGKILL, "RUNNING"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_command_can_be_stopped_while_it_decodes_a_bomb(
    stage: str,
    number: signal.Signals,
    code: int,
    status: str,
    desk: Desk,
    commands: CommandServer,
    tmp_path: Path,
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "scans.dcm").write_bytes((desk.radiographs / "scans.dcm").read_bytes())
    words = ["--dicom_dir", "files"]
    words += ["--model", desk.model, "--submission", "sub.csv"] if stage == "score" else ["--dataset", "d.h5"]
    process = commands.start(
        *(stage, *words),
        folder=tmp_path,
        environment=environment() | {"MLFLOW_TRACKING_URI": desk.uri},
        tiny=True,
    )
    while not at_work(process.pid):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    command = psutil.Process(process.pid)
    below = command.children(recursive=True)
    # As a terminal sends Ctrl-C: to the whole group.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert psutil.wait_procs([command, *below], timeout=PATIENCE_SECONDS)[1] == []
    ended, said = process.communicate()
    assert ended == code, said
    assert "Traceback" not in said
    run = MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])[0]
    assert (run.data.tags["pneumo.stage"], run.info.status) == (stage, status)
    if number != signal.SIGKILL:
        assert not [*tmp_path.glob("*.csv*"), *tmp_path.glob("*.h5"), *tmp_path.glob("*.part")]
