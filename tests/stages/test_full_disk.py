"""A disk that is full or read-only: one line that names the right place, and nothing half-written.

RLIMIT_FSIZE lets no file grow beyond so many bytes, which needs no rights, unlike a small disk.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_server import CommandServer
from helpers import ROOT, copy_store, environment, soak
from mlflow import MlflowClient
from tiny_network import tiny_member

from pneumo_experiments import cli
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.findings.submission import write_submission
from pneumo_experiments.learning.checkpoint import Checkpoint, lock_checkpoints
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, save
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

TRAINING = ("--epochs", "1", "--threshold_trials", "0", "--weights", "none", "--overlays", "1")
SHORT_MAIN = (
    *("main", "--images", "20", "--test_images", "1", "--image_size", "32", *TRAINING),
    *("--trials", "1", "--search_epochs", "1", "--confirm", "0", "--keep", "0", "--search_images", "8"),
    *("--folds", "5", "--holdout", "0.2"),
)


@contextmanager
def no_file_beyond(max_bytes: int) -> Iterator[None]:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_sample_a_submission_and_a_model_that_find_no_room_name_the_place_and_leave_nothing(
    tiny: None, tmp_path: Path
) -> None:
    path, temporary = tmp_path / "s.csv", tmp_path / "temporary"
    temporary.mkdir()
    write_submission(path, [("a", "1 2")])
    many = ((f"image {number}", "1 2") for number in range(10_000))
    detector = Detector((tiny_member(0),), 32, Thresholds(), "x")
    writes: dict[str, Callable[[], object]] = {
        r"/s: cannot be written \(File too large\)": lambda: write_sample(tmp_path / "s", Contents(1, 0, 0)),
        r"/s\.csv: cannot be written \(File too large\)": lambda: write_submission(path, many),
        rf"^{temporary}: has no room for the model; .* TMPDIR$": lambda: save(temporary, detector),
    }
    for line, write in writes.items():
        with no_file_beyond(4096), pytest.raises(UserError, match=line):
            write()
    assert path.read_text() == "ImageId,EncodedPixels\na,1 2\n"
    assert {file.name for file in tmp_path.iterdir()} == {"s.csv", ".s.csv.sha256", "temporary"}


def test_a_read_error_is_not_reported_as_a_write_error(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        yield "a", "1 2"
        raise OSError(errno.EIO, "Input/output error", "archive.zip")

    with pytest.raises(OSError, match=r"archive\.zip"):
        write_submission(tmp_path / "s.csv", rows())
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_cannot_be_held_do_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with lock_checkpoints([Checkpoint(tmp_path / "file" / "a"), Checkpoint(tmp_path / "b")]):
        assert (tmp_path / "b" / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


Run = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def run(commands: CommandServer, tmp_path: Path) -> Run:
    """What a command says, and its error lines; the exit code is 2 unless given."""

    def ended(*words: str, max_file_bytes: int | None = None, code: int = 2) -> tuple[str, list[str]]:
        options: dict[str, Any] = {"environment": environment(), "tiny": True, "folder": tmp_path}
        ends, said = commands.start(*words, max_file_bytes=max_file_bytes, **options).communicate()
        assert ends == code, said
        assert "Traceback" not in said
        return said, [line for line in said.splitlines() if line.startswith("Error: ")]

    return ended


def assert_store_works(run: Run, folder: Path) -> None:
    """The next command finds no model, and leaves no run that goes on."""
    assert "no model of this experiment was scored" in run("register")[0]
    runs = MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["0"])
    assert runs
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED", "KILLED"}


def test_a_store_on_a_full_disk_is_one_line_and_with_room_the_next_command_opens_it(
    run: Run, tmp_path: Path
) -> None:
    """New, it has no room for its tables; made, none for a run: with either limit no database can change."""
    for max_bytes in (65_536, 4096):
        said, (line,) = run("register", max_file_bytes=max_bytes)
        assert [line] == [line for line in said.splitlines() if " INFO mlflow" not in line]
        assert line.startswith(f"Error: MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db: ")
        assert re.search(r"disk I/O error|is full", line)
        assert_store_works(run, tmp_path)


def test_a_training_whose_store_cannot_grow_ends_well_and_says_what_is_undelivered(
    run: Run, small_dataset: Path, trained_store: Path, tmp_path: Path
) -> None:
    max_bytes = copy_store(trained_store, tmp_path).stat().st_size
    words = ["train", f"--dataset={small_dataset}", *TRAINING]
    said, errors = run(*words, max_file_bytes=max_bytes, code=0)
    assert errors == []
    assert "calls of this run are undelivered" in said
    assert [*tmp_path.glob("output/model-*")]
    assert_store_works(run, tmp_path)


def test_main_on_a_full_disk_is_one_line_and_the_next_command_leaves_no_run_running(
    run: Run, empty_store: Path, tmp_path: Path
) -> None:
    """With no room for a radiograph it ends at once; make soak tries disks that fill later."""
    copy_store(empty_store, tmp_path)
    _, (line,) = run(*SHORT_MAIN, max_file_bytes=20_000)
    assert re.search("File too large|disk I/O error|is full", line)  # SQLite may be the first to need room
    assert_store_works(run, tmp_path)


# A disk of its own, which only these processes see, as root of a user namespace.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} && cd {disk} || exit 100
{main}; echo "exit code $?"
mount -o remount,size=4g {disk}
{main}; echo "exit code $?"
cp mlflow.db ..
"""


@soak
@pytest.mark.parametrize("size", ["300k", "2m", "40m", "200m"])
def test_main_on_a_small_disk_is_one_line_and_with_room_it_ends_well(size: str, tmp_path: Path) -> None:
    trial = [*NAMESPACE, f"mount -t tmpfs tmpfs {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    (tmp_path / "disk").mkdir()
    main = [sys.executable, "-m", "pneumo_experiments", *SHORT_MAIN, "--promote", "always"]
    script = SMALL_DISK.format(size=size, disk=tmp_path / "disk", main=" ".join(main))
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*NAMESPACE, script], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert re.findall("exit code (.*)", done.stdout) == ["2", "0"], done.stdout
    assert "Traceback" not in done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, errors
    assert re.search("No space left on device|disk I/O error|is full", errors[0])
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED", "KILLED"}


def test_a_write_error_that_no_stage_handles_names_the_file_or_the_full_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = OSError(errno.EROFS, os.strerror(errno.EROFS), "/mnt/d.h5")
    assert cli._refused(named) == "/mnt/d.h5: Read-only file system; make room or choose another place"
    monkeypatch.setattr(cli, "FULL_BYTES", 2**62)  # all disks are full
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    nameless = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    places = f"the working directory {Path.cwd()} and TMPDIR {tmp_path}"
    assert cli._refused(nameless).startswith(f"No space left on device (full: {places}); make room")


def test_the_systems_reason_is_found_in_a_librarys_longer_text() -> None:
    text = "With tag (7FE0,0010) got exception: [Errno 28] No space left on device\nTraceback"
    assert reason_of(OSError(text)) == "No space left on device"
    assert reason_of(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert reason_of(OSError()) == "OSError"
