"""A disk that is full or read-only: one line that names the right place, and nothing half-written.

RLIMIT_FSIZE lets no file grow beyond so many bytes, which needs no rights, unlike a small disk.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mlflow import MlflowClient

from pneumo_experiments import cli
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.learning.checkpoint import Checkpoint, lock_checkpoints
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.scoring.submission import write_submission
from pneumo_experiments.scoring.thresholds import Thresholds
from pneumo_experiments.serving import Detector, Member, save
from pneumo_experiments.settings import Train, as_config
from pneumo_experiments.synthetic.kaggle_layout import write_sample


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
        pytest.raises(UserError, match=r"/s: cannot be written \(File too large\); name another folder$"),
    ):
        write_sample(tmp_path / "s", 1, 0, 0)
    assert not list(tmp_path.iterdir())


def test_a_submission_names_its_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    write_submission(path, [("a", "1 2")])
    with (
        no_file_beyond(4096),
        pytest.raises(UserError, match=r"/s\.csv: cannot be written \(File too large\); make room, or name"),
    ):
        write_submission(path, ((f"image {number}", "1 2") for number in range(10_000)))
    assert path.read_text() == "ImageId,EncodedPixels\na,1 2\n"
    assert {file.name for file in tmp_path.iterdir()} == {"s.csv", ".s.csv.sha256"}


def test_an_error_of_reading_is_not_told_as_one_of_writing(tmp_path: Path) -> None:
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
    detector = Detector((Member(predictor, as_config(Train())),), 32, Thresholds(), "x")
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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """New, it has no room for its tables; made, none for a run: with either limit no database can change."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "pneumo_experiments"]
    sample = [*command, "sample", "--output_dir", "s", "--images", "10", "--test_images", "0"]
    register = [*command, "register"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(ROOT)

    def ended(words: list[str], most_bytes: int | None = None) -> tuple[int, str]:
        with nullcontext() if most_bytes is None else no_file_beyond(most_bytes):
            code = subprocess.call(words, env=environment)
        return code, capfd.readouterr().err

    for words, most_bytes in ((sample, 65_536), (sample, 4096), (register, 4096)):
        code, said = ended(words, most_bytes)
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith(f"Error: MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db: ")
        assert re.search(r"disk I/O error|is full", said)
        if words == sample:
            assert ended(sample)[0] == 0
    code, said = ended(register)
    assert (code, "no model of this experiment was scored" in said) == (2, True)
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}


def test_what_no_stage_put_into_words_names_the_file_or_the_full_disk(
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
