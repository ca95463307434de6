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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import CommandServer
from helpers import ROOT, copy_store, environment, soak
from mlflow import MlflowClient

from pneumo_experiments import cli
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.findings.submission import write_submission
from pneumo_experiments.learning.checkpoint import Checkpoint, lock_checkpoints
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, save
from pneumo_experiments.settings import Train, as_config
from pneumo_experiments.synthetic.kaggle_layout import write_sample

SHORT_MAIN = (
    *("main", "--images", "20", "--test_images", "1", "--image_size", "32", "--epochs", "1"),
    *("--trials", "1", "--search_epochs", "1", "--confirm", "0", "--keep", "0", "--search_images", "8"),
    *("--threshold_trials", "0", "--weights", "none", "--overlays", "1", "--folds", "5", "--holdout", "0.2"),
)


@contextmanager
def no_file_beyond(max_bytes: int) -> Iterator[None]:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_sample_names_its_folder_and_the_systems_reason(tmp_path: Path) -> None:
    with (
        no_file_beyond(4096),
        pytest.raises(
            UserError, match=r"/s: cannot be written \(File too large\); make room or choose another place$"
        ),
    ):
        write_sample(tmp_path / "s", 1, 0, 0)
    assert not list(tmp_path.iterdir())


def test_a_submission_names_its_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    write_submission(path, [("a", "1 2")])
    with (
        no_file_beyond(4096),
        pytest.raises(UserError, match=r"/s\.csv: cannot be written \(File too large\); make room or choose"),
    ):
        write_submission(path, ((f"image {number}", "1 2") for number in range(10_000)))
    assert path.read_text() == "ImageId,EncodedPixels\na,1 2\n"
    assert {file.name for file in tmp_path.iterdir()} == {"s.csv", ".s.csv.sha256"}


def test_a_read_error_is_not_reported_as_a_write_error(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        yield "a", "1 2"
        raise OSError(errno.EIO, "Input/output error", "archive.zip")

    with pytest.raises(OSError, match=r"archive\.zip"):
        write_submission(tmp_path / "s.csv", rows())
    assert not list(tmp_path.iterdir())


def test_a_model_names_the_folder_without_room(tmp_path: Path) -> None:
    predictor = Predictor(
        PneumothoraxNet("fcn_resnet50"), ComputeConfig(torch.device("cpu"), "fp32"), tta="none"
    )
    detector = Detector((TrainedNetwork(predictor, as_config(Train())),), 32, Thresholds(), "x")
    with (
        no_file_beyond(2**20),
        pytest.raises(UserError, match=rf"^{tmp_path}: has no room for the model; .* TMPDIR$"),
    ):
        save(tmp_path, detector)


def test_checkpoints_that_cannot_be_held_do_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with lock_checkpoints([Checkpoint(tmp_path / "file" / "a"), Checkpoint(tmp_path / "b")]):
        assert (tmp_path / "b" / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_store_on_a_full_disk_is_one_line_and_with_room_the_same_command_ends_well(
    commands: CommandServer, tmp_path: Path
) -> None:
    """New, it has no room for its tables; made, none for a run: with either limit no database can change."""
    sample = ["sample", "--output_dir", "s", "--images", "10", "--test_images", "0"]

    def ended(words: list[str], max_bytes: int | None = None) -> tuple[int, str]:
        options: dict[str, Any] = {"environment": environment(), "max_file_bytes": max_bytes}
        return commands.start(*words, folder=tmp_path, **options).communicate()

    for words, max_bytes in ((sample, 65_536), (sample, 4096), (["register"], 4096)):
        code, output = ended(words, max_bytes)
        (line,) = [line for line in output.splitlines() if " INFO mlflow" not in line]
        assert code == 2
        assert line.startswith(f"Error: MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db: ")
        assert re.search(r"disk I/O error|is full", line)
        if words == sample:
            assert ended(sample)[0] == 0
    code, output = ended(["register"])
    assert (code, "no model of this experiment was scored" in output) == (2, True)
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}


@pytest.mark.parametrize("max_bytes", [20_000, 1_000_000])
def test_main_on_a_full_disk_is_one_line_and_the_next_command_leaves_no_run_running(
    max_bytes: int, commands: CommandServer, empty_store: Path, tmp_path: Path
) -> None:
    """The first limit has no room for a radiograph or a run; the second ends the chain after some runs."""
    copy_store(empty_store, tmp_path)
    options: dict[str, Any] = {"environment": environment(), "tiny": True}
    full = commands.start(*SHORT_MAIN, folder=tmp_path, max_file_bytes=max_bytes, **options)
    code, output = full.communicate()
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert (code, len(errors)) == (2, 1), output
    assert "Traceback" not in output
    assert re.search("File too large|disk I/O error|is full", errors[0])
    code, output = commands.start("register", folder=tmp_path, **options).communicate()
    assert (code, "no model of this experiment was scored" in output) == (2, True), output
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert runs
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED", "KILLED"}


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
