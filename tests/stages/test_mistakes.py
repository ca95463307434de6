"""Mistakes of users: each is one line and exit code 2, and leaves no files behind."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic.command
import h5py
import mlflow
import optuna
import pytest
import sqlalchemy
import torch
from helpers import End, ended, from_here, make, store_address, store_in
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import Engine, NullPool

from pneumo_experiments import cli, tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, save
from pneumo_experiments.settings import Train, as_config
from pneumo_experiments.synthetic.kaggle_layout import write_sample
from pneumo_experiments.tracking import servers

pytestmark = pytest.mark.usefixtures("no_layout", "no_code")

SMALL = ["--image_size", "32"]
TWO_FOLDS = ["--weights", "none", "--holdout", "0", "--folds", "2"]  # else a fold has one patient
UNTRAINED = ["--weights", "none", "--epochs", "1"]


@dataclass(frozen=True)
class Desk:
    """A sample of 10 radiographs, its data set files, and a model without scores."""

    radiographs: Path
    table: Path
    labelled: Path
    unlabelled: Path
    model: str
    uri: str

    @property
    def source(self) -> list[str]:
        return [*SMALL, "--dicom_dir", str(self.radiographs), "--rle_csv", str(self.table)]

    @property
    def files(self) -> list[Path]:
        return sorted(self.radiographs.rglob("*.dcm"))

    def runs(self) -> list[Run]:
        """The newest first."""
        return MlflowClient(self.uri).search_runs(["0"], order_by=["attributes.start_time DESC"])


Command = Callable[..., End]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, tiny_default: None) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("mit ümlaut")  # a space and a non-ASCII letter
    sample = folder / "sample"
    write_sample(sample, images=10, test_images=1, seed=0)
    with store_in(folder, empty_store), pytest.MonkeyPatch.context() as patch:
        with tracking.run("train", Train()):
            network, machine = PneumothoraxNet("tiny"), ComputeConfig(torch.device("cpu"), "fp32")
            predictor = Predictor(network, machine, tta="none")
            weights = folder / "weights"
            weights.mkdir()
            save(
                weights,
                Detector(
                    (TrainedNetwork(predictor, as_config(make(Train, network="tiny"))),),
                    32,
                    Thresholds(),
                    "another",
                ),
            )
            model = tracking.log_model(weights)
        made = Desk(
            sample / "dicom-images-train",
            sample / "train-rle.csv",
            folder / "labelled.h5",
            folder / "unlabelled.h5",
            model,
            store_address(folder),
        )
        for words in (made.source, made.source[:-2]):
            dataset = made.labelled if "--rle_csv" in words else made.unlabelled
            patch.setattr("sys.argv", ["", "preprocess", *words, "--dataset", str(dataset)])
            with pytest.raises(SystemExit, match="0"):
                cli.main()
        yield made


@pytest.fixture
def command(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", desk.uri)

    def run(*words: object) -> End:
        return ended([str(word) for word in words], monkeypatch, capsys)

    return run


@pytest.fixture
def error_of(command: Command, desk: Desk, tmp_path: Path) -> Callable[..., str]:
    """The error line of a command with exit code 2, FAILED runs, if any, and no new files but ``leaves``."""

    def fail(*words: object, leaves: frozenset[str] = frozenset()) -> str:
        files, runs = set(tmp_path.rglob("*")), len(desk.runs())
        end = command(*words)
        assert end.code == 2
        (line,) = end.err.splitlines()
        written = set(tmp_path.rglob("*")) - files
        assert {path.relative_to(tmp_path).parts[0] for path in written} == leaves
        for run in desk.runs()[: len(desk.runs()) - runs]:
            assert run.info.status == "FAILED"
            assert " ".join(from_here(run.data.tags["error"]).split()) in from_here(line)
        return line.removeprefix("Error: ")

    return fail


# preprocess: folders, tables, files

REPORT = frozenset(("d.report.html", "d.report.json", "d.h5.work"))


@pytest.mark.parametrize("folder", ["missing", "empty", ""])
def test_a_missing_or_empty_folder_is_named(
    folder: str, error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    line = error_of("preprocess", "--dicom_dir", folder, "--rle_csv", desk.table, "--dataset", "d.h5")
    culprits = {
        "missing": "dicom_dir=missing: no such file or folder",
        "empty": "dicom_dir=empty: contains no .dcm",
        "": "dicom_dir: none",
    }
    assert line.startswith(culprits[folder])
    assert "name the" in line


@pytest.mark.parametrize(
    ("table", "culprit"),
    [
        (None, "table.csv: no such file"),
        ("", "table.csv: the table is empty"),
        ("a,b,c\nx,y,z\n", "table.csv: found the columns a, b, c; expected the columns ImageId and Enc"),
        ("ImageId, EncodedPixels\n", "table.csv: has a header but no rows"),
        ("ImageId, EncodedPixels\nghost, -1\n", "rle_csv=table.csv: names none of the 10 files"),
        ("ImageId, EncodedPixels\n{id}, 1 2 3\n", "rejected {id}: odd number of run lengths (3)"),
        ("ImageId, EncodedPixels\n{id}, banana\n", "rejected {id}: run length 'banana'"),
        ("ImageId, EncodedPixels\n{id}\n", "table.csv, line 2: an image id or value is missing"),
    ],
)
def test_an_invalid_annotation_table_is_named(
    table: str | None, culprit: str, error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    image_id = desk.files[0].stem
    if table is not None:
        (tmp_path / "table.csv").write_text(table.replace("{id}", image_id), encoding="utf-8")
    leaves = REPORT if "rejected" in culprit else frozenset[str]()
    line = error_of("preprocess", *desk.source[:-1], "table.csv", "--dataset", "d.h5", leaves=leaves)
    assert culprit.replace("rejected", "for example").replace("{id}", image_id) in line


def test_unmatched_ids_and_files_and_broken_files_are_left_out_and_reported(
    command: Command, desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "some").mkdir()
    for number, file in enumerate(desk.files[:4]):
        content = file.read_bytes()
        half = content[: len(content) // 2]
        (tmp_path / "some" / file.name).write_bytes(half if number == 1 else content)
    unknown, broken = desk.files[0].stem, desk.files[1].stem
    rows = [row for row in desk.table.read_text().splitlines() if unknown not in row]
    (tmp_path / "table.csv").write_text("\n".join([*rows, "ghost, -1"]))
    end = command(
        "preprocess",
        *SMALL,
        "--dicom_dir",
        "some",
        "--rle_csv",
        "table.csv",
        "--dataset",
        "d.h5",
        "--max_rejected",
        "0.5",
    )
    assert end.code == 0
    assert "4 files found: 2 used, 1 rejected, 1 without annotation" in end.out
    assert f"(1): …{broken[-23:]}" in end.out
    assert f"file found, but not in the annotation table (1): …{unknown[-23:]}" in end.out
    assert "annotated, but no file found (7): " in end.out
    with h5py.File(tmp_path / "d.h5") as file:
        assert len(file["index"]) == 2  # type: ignore[arg-type]
    run = desk.runs()[0]
    assert (run.info.status, run.data.params["images"]) == ("FINISHED", "2")
    report = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/d.report.json")
    assert "ghost" in report["annotated_without_file"]
    assert report["rejected"][0]["files"][0]["image_id"] == broken


def test_a_folder_of_broken_files_only_writes_nothing(
    error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    for file in desk.files[:2]:
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:3000])
    words = ["preprocess", *desk.source, "--dicom_dir", "broken", "--dataset", "d.h5"]
    line = error_of(*words, leaves=REPORT)
    assert line.startswith(f"dicom_dir=broken: no file can be used, for example {desk.files[0].stem}: ")
    assert "see the report d.report.html" in line
    line = error_of("score", "--model", desk.model, "--dicom_dir", "broken", "--submission", "s.csv")
    assert line.startswith("dicom_dir=broken: no file can be used; the first:")


def test_a_submission_that_would_be_refused_is_an_error_and_a_valid_one_is_not(
    command: Command, error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    ids = [path.stem for path in desk.files][::-1]
    (tmp_path / "sample.csv").write_text("ImageId,EncodedPixels\n" + "".join(f"{each},-1\n" for each in ids))
    folder = ["--dicom_dir", desk.radiographs, "--sample_submission", "sample.csv"]
    end = command("score", "--model", desk.model, *folder, "--submission", "s.csv")
    assert end.code == 0, end.err
    rows = (tmp_path / "s.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["ImageId", *ids]

    end = command("score", "--check", "s.csv", *folder, "--dataset", desk.labelled)
    assert (end.code, end.err) == (0, "")
    assert "of 10 images have a mask" in end.out
    assert "of the training images 30.0%" in end.out
    assert end.out.splitlines()[-1] == "score: s.csv is a valid submission; all ids are right"

    (tmp_path / "cut.csv").write_text("\n".join(rows[:-1]) + "\n")
    line = error_of("score", "--check", "cut.csv", "--sample_submission", "sample.csv")
    assert line == f"check=cut.csv: not a valid submission, 1 problem; the first: {ids[-1]}: missing"
    end = command("score", "--check", "cut.csv")
    assert end.code == 0
    assert end.out.splitlines()[-1].endswith("its ids were not checked: give sample_submission or dicom_dir")


def test_a_sample_submission_chooses_images_and_none_of_them_may_be_missing(
    command: Command, error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    first, last = desk.files[0].stem, desk.files[-1].stem
    (tmp_path / "two.csv").write_text(f"ImageId,EncodedPixels\n{last},-1\n{first},-1\n")
    words = ["score", "--model", desk.model, "--dicom_dir", desk.radiographs, "--submission", "s.csv"]
    end = command(*words, "--sample_submission", "two.csv")
    assert "8 images of" in end.out
    rows = (tmp_path / "s.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["ImageId", last, first]
    (tmp_path / "more.csv").write_text(f"ImageId,EncodedPixels\n{last},-1\nID_other,-1\n")
    line = error_of(*words, "--sample_submission", "more.csv")
    assert "1 of 2 images of more.csv have no file, such as ID_other" in line


def test_names_that_are_not_utf_8_are_written_in_ascii(command: Command, desk: Desk, tmp_path: Path) -> None:
    odd = os.fsdecode(b"x\xff")
    (tmp_path / odd).mkdir()
    shutil.copy(desk.files[0], tmp_path / odd / f"{odd}.dcm")
    end = command("preprocess", *SMALL, "--dicom_dir", odd, "--dataset", f"{odd}.h5")
    assert (end.code, end.err) == (0, "")
    assert "without labels, at 32 px: x\\udcff.h5" in end.out
    with h5py.File(tmp_path / f"{odd}.h5") as file:
        assert [row["image_id"] for row in file["index"]] == [b"x\\udcff"]  # type: ignore[index]
    end = command("score", "--model", desk.model, "--dicom_dir", odd, "--submission", f"{odd}.csv")
    assert end.code == 0, end.err
    assert "score: 1 images in x\\udcff.csv" in end.out
    assert (tmp_path / f"{odd}.csv").read_text().splitlines()[1].startswith("x\\udcff,")
    score, preprocess = desk.runs()[:2]
    assert score.data.params["submission"] == f"{tmp_path}/x\\udcff.csv"
    assert preprocess.data.params["dicom_dir"] == f"{tmp_path}/x\\udcff"


@pytest.mark.parametrize("words", [("sample", "--output_dir"), ("preprocess", "--dataset")])
def test_a_path_that_cannot_be_written_is_named(
    words: tuple[str, str], error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("here first")
    source = desk.source if words[0] == "preprocess" else []
    line = error_of(words[0], *source, words[1], "file/new")
    assert line.startswith("file/new: cannot be written")
    assert (tmp_path / "file").read_text() == "here first"


def test_existing_files_are_not_replaced_without_overwrite(
    error_of: Callable[..., str], command: Command, desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "folder" / "old").mkdir(parents=True)
    assert "exists and is not an empty folder" in error_of("sample", "--output_dir", "folder")
    assert "is a folder" in error_of("preprocess", *desk.source, "--dataset", "folder", "--overwrite", "true")
    (tmp_path / "letter.h5").write_text("Dear Sir")
    line = error_of("preprocess", *desk.source, "--dataset", "letter.h5")
    assert line.startswith("letter.h5: not an HDF5 file")
    line = error_of("preprocess", *desk.source, "--image_size", "64", "--dataset", desk.labelled)
    assert "was made with image_size 32, not 64; overwrite=true replaces it" in line
    end = command("preprocess", *desk.source, "--dataset", "letter.h5", "--overwrite", "true")
    assert end.code == 0
    assert h5py.is_hdf5(tmp_path / "letter.h5")


# train, search, score, register


@pytest.mark.parametrize("entry_point", ["train", "search"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "foreign", "cut", "unlabelled"])
def test_a_data_set_file_that_cannot_be_used_is_named(
    kind: str, entry_point: str, error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    path, content = tmp_path / "d.h5", desk.labelled.read_bytes()
    if kind == "foreign":
        with h5py.File(path, "w") as file:
            file["a"] = 1
    elif kind == "unlabelled":
        path.write_bytes(desk.unlabelled.read_bytes())
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"Dear Sir", "cut": content[: len(content) // 2]}[kind])
    line = error_of(entry_point, "--weights", "none", "--dataset", path)
    assert str(path) in line
    assert "run preprocess" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--folds", "50"], "folds=50 and a holdout: needs 51 patients, the data set has"),
        (["--fold", "5"], "fold=5: does not exist; set fold from 0 to 4"),
        (["--holdout", "1"], "holdout=1: out of range"),
        (["--weights", "missing.pt"], "weights=missing.pt: no such file"),
        (["--weights", "rubbish.pt"], "weights=rubbish.pt: not a state dict"),
        (["--precision", "fp16", "--device", "cpu"], "precision=fp16: not on a CPU"),
        (
            ["--bce_weight", "0", "--dice_weight", "0", "--focal_weight", "0", "--presence_weight", "0"],
            "bce_weight, dice_weight, dice_image_weight, focal_weight, lovasz_weight, presence_weight: all",
        ),
        (["--learning_rate", "1e30"], ("learning_rate=1e+30", "network output is NaN")),
    ],
)
def test_an_impossible_setting_is_named(
    words: list[str], line: str | tuple[str, ...], error_of: Callable[..., str], desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish" * 100)
    assert error_of("train", "--dataset", desk.labelled, *UNTRAINED, *words).startswith(line)


def test_weights_that_cannot_be_downloaded_are_named(
    error_of: Callable[..., str], desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server there
    line = error_of("train", "--dataset", desk.labelled, "--weights", "imagenet")
    assert line.startswith("weights=imagenet: cannot download them")
    assert "weights=none" in line


@pytest.mark.parametrize("entry_point", ["score", "register"])
@pytest.mark.parametrize(
    "model", ["models:/nothing@champion", "models:/m-123", "models:/", "runs:/abc/model", "banana"]
)
def test_a_missing_model_is_named(model: str, entry_point: str, error_of: Callable[..., str]) -> None:
    line = error_of(entry_point, "--model", model)
    assert line.startswith(f"model={model}: cannot be loaded")
    assert "`train` logs one" in line
    assert ("or make one: register with promote=always" in line) == model.endswith("@champion")


def test_a_model_is_not_scored_on_unsuitable_data(error_of: Callable[..., str], desk: Desk) -> None:
    def scoring(*words: object) -> str:
        return error_of("score", "--model", desk.model, *words)

    assert "has no annotations to score by" in scoring("--dataset", desk.unlabelled, "--subset", "all")
    assert "was trained on another data set" in scoring("--dataset", desk.labelled)
    assert "no .dcm, .png or .jpg files" in scoring("--dicom_dir", desk.labelled.parent / "weights")


def test_the_best_model_cannot_be_registered_before_any_is_scored(error_of: Callable[..., str]) -> None:
    assert error_of("register").startswith("model=best: no model of this experiment was scored")


def test_a_name_that_the_registry_refuses_is_named(error_of: Callable[..., str], desk: Desk) -> None:
    assert error_of("register", "--model", desk.model, "--name", "a/b").startswith("name=a/b: cannot be")


def test_a_study_whose_database_does_not_open_is_named_without_its_password(
    error_of: Callable[..., str], desk: Desk
) -> None:
    address = "postgresql://me:secret@127.0.0.1:9/study"
    line = error_of("search", "--dataset", desk.labelled, *TWO_FOLDS, "--storage", address)
    assert line.startswith("storage=postgresql://me:***@127.0.0.1:9/study: ")
    for address, reason in {
        "sqlite:///no/such/x.db": "no folder ",
        "journal.log": "not the address of a database. Optuna's journals and gRPC proxies have no heartbeat",
        "grpc://127.0.0.1:13000": "not the address of a database. Optuna's journals and gRPC",
    }.items():
        line = error_of("search", "--dataset", desk.labelled, *TWO_FOLDS, "--storage", address)
        assert line.startswith(f"storage={address}: {reason}")


def test_a_study_of_other_data_or_settings_or_of_another_program_is_named(
    command: Command,
    error_of: Callable[..., str],
    desk: Desk,
    tmp_path: Path,
    no_pictures: None,
) -> None:
    def search(run: Callable[..., str] | Command, *words: object) -> str | End:
        found = ["search", "--dataset", desk.labelled, "--storage", "sqlite:///s.db", *TWO_FOLDS]
        found += ["--study", "mine", "--confirm", "0"]
        return run(*found, "--trials", "1", "--search_epochs", "1", "--search_images", "4", *words)

    def trial(value: float, **params: float) -> optuna.trial.FrozenTrial:
        ranges = dict.fromkeys(params, optuna.distributions.FloatDistribution(0.001, 10))
        return optuna.trial.create_trial(value=value, params=params, distributions=ranges)

    storage = f"sqlite:///{tmp_path / 's.db'}"
    foreign = optuna.create_study(study_name="foreign", storage=storage, direction="maximize")
    foreign.add_trial(trial(0.9, x=1.0))
    optuna.create_study(study_name="least", storage=storage, direction="minimize")
    same = optuna.create_study(study_name="same", storage=storage, direction="maximize")
    same.add_trial(trial(0.99, bce_weight=5, dice_weight=5, focal_weight=5))
    assert search(command).code == 0
    assert search(command, "--batch_size", "16", "--storage", "none").code == 0
    studies = {name: optuna.load_study(study_name=name, storage=storage) for name in ("foreign", "same")}
    line = search(error_of, "--study", "foreign")
    assert line.startswith("study=foreign: was made with another program; name another")
    assert search(error_of, "--study", "same").startswith("study=same: was made with another program; name")
    assert search(error_of, "--study", "least").startswith("study=least: was made with another program; name")
    line = search(error_of, "--batch_size", "4", "--holdout", "0.25")
    assert line.startswith("study=mine: was made with batch_size 16, not 4; holdout 0.0, not 0.25; name")
    assert command("preprocess", *desk.source, "--pixel_dtype", "float16", "--dataset", "other.h5").code == 0
    with Dataset.open(desk.labelled) as one, Dataset.open(tmp_path / "other.h5") as other:
        line = f"data {one.fingerprint[:16]}, not {other.fingerprint[:16]}; name another study"
    assert line in search(error_of, "--dataset", "other.h5")
    for name, study in studies.items():
        assert len(optuna.load_study(study_name=name, storage=storage).trials) == 1, study
    assert search(command, "--trials", "2", "--sampler", "random").code == 0  # continues the study


# The tracking store


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "no server responds"),
        ("postgresql://me:secret@127.0.0.1:9/x", "no server responds"),
        ("sqlite:///missing/mlflow.db", "no folder"),
        ("sqlite:///folder", "the store cannot be opened"),
        ("sqlite:///letter.db", "the store cannot be opened"),
        (
            "sqlite:///begun.db",
            "the store cannot be opened ((sqlite3.OperationalError) table spans already exists);"
            " its creation was interrupted: delete it, or name another",
        ),
        ("file:folder", "a folder of files"),
        (
            "./mlruns",
            f"a folder of files, which MLflow {mlflow.__version__} opens only with MLFLOW_ALLOW_FILE",
        ),
        ("banana://x", "the store cannot be opened"),
    ],
)
def test_a_store_that_does_not_open_is_named_within_seconds(
    uri: str, reason: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "letter.db").write_text("Dear Sir, " * 100)
    with closing(sqlite3.connect(tmp_path / "begun.db")) as begun:
        begun.execute("CREATE TABLE spans (x)")  # as a killed `mlflow server` leaves it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    end = command("sample")
    assert end.code == 2
    (line,) = end.err.splitlines()
    assert line.startswith(f"Error: MLFLOW_TRACKING_URI={uri.replace('secret', '***')}: {reason}")
    assert not (tmp_path / "output").exists()


def test_an_experiment_or_run_that_is_gone_is_named_with_the_remedy(
    command: Command, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    client = MlflowClient()
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    run_of_gone = client.create_run("0").info.run_id
    deleted_run = client.create_run(client.create_experiment("other")).info.run_id
    client.delete_run(deleted_run)
    client.delete_experiment("0")
    restore = "is deleted; restore it with: mlflow experiments restore --experiment-id"
    for variables, line in (
        ({}, f"MLFLOW_EXPERIMENT_ID=0: the experiment Default {restore} 0, or name"),
        (
            {"MLFLOW_EXPERIMENT_ID": gone},
            f"MLFLOW_EXPERIMENT_ID={gone}: the experiment gone {restore} {gone}",
        ),
        ({"MLFLOW_EXPERIMENT_NAME": "gone"}, f"MLFLOW_EXPERIMENT_NAME=gone: the experiment gone {restore}"),
        ({"MLFLOW_RUN_ID": run_of_gone}, f"MLFLOW_RUN_ID={run_of_gone}: the experiment Default {restore}"),
        ({"MLFLOW_RUN_ID": deleted_run}, f"MLFLOW_RUN_ID={deleted_run}: the run is deleted; restore it with"),
    ):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            end = command("sample")
        assert end.code == 2
        (text,) = end.err.splitlines()
        assert text.startswith(f"Error: {line}"), text


@pytest.mark.parametrize("version", ["earlier", "later"])
def test_a_store_of_another_mlflow_is_neither_opened_nor_migrated(
    version: str, command: Command, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, uri = tmp_path / "runs.db", "sqlite:///runs.db"
    if version == "later":
        shutil.copy(empty_store, store)
        with closing(sqlite3.connect(store)) as database, database:
            database.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
    else:  # MLflow itself would migrate it without a word
        engine = sqlalchemy.create_engine(f"sqlite:///{store}", poolclass=NullPool)
        InitialBase.metadata.create_all(engine)
        migrations = _get_alembic_config("")
        with engine.begin() as connection:
            migrations.attributes["connection"] = connection
            alembic.command.upgrade(migrations, "+1")
    before = store.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    end = command("sample")
    assert end.code == 2
    (line,) = end.err.splitlines()
    reason = f"another program, or another version of MLflow than {mlflow.__version__}, made this database"
    assert line.startswith(f"Error: MLFLOW_TRACKING_URI={uri}: {reason}; ")
    assert line.endswith(f"back it up, then run: mlflow db upgrade {uri}")
    assert store.read_bytes() == before


def hang_up(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            server.accept()[0].close()


def test_a_database_that_closes_the_connection_is_refused_at_once(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:secret@127.0.0.1:{port}/x")
        end = command("sample")  # MLflow itself would retry for minutes
    assert end.code == 2
    (line,) = end.err.splitlines()
    assert f"MLFLOW_TRACKING_URI=postgresql://me:***@127.0.0.1:{port}/x: " in line


@pytest.mark.parametrize("is_driver_installed", [False, True])
def test_a_database_that_never_responds_ends_a_training_and_a_search(
    is_driver_installed: bool,
    command: Command,
    error_of: Callable[..., str],
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = threading.Event()

    def create_engine(address: str, **options: Any) -> Engine:
        if address.startswith("sqlite"):
            return sqlalchemy.create_engine(address, **options)
        if not is_driver_installed:
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        never.wait()  # as a driver without a timeout
        raise OSError

    monkeypatch.setattr(servers, "create_engine", create_engine)
    monkeypatch.setattr(servers, "CONNECT_SECONDS", 0.1)
    reason = "no server responds" if is_driver_installed else "pip install 'pneumo-experiments[postgres]'"
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts connections for it
        address = f"postgresql://me:secret@127.0.0.1:{server.getsockname()[1]}/x"
        shown = address.replace("secret", "***")
        line = error_of("search", "--dataset", desk.labelled, *TWO_FOLDS, "--storage", address)
        assert line.startswith(f"storage={shown}: ")
        assert reason in line
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        end = command("train", "--dataset", desk.labelled)
    never.set()
    assert end.code == 2
    (line,) = end.err.splitlines()
    assert f"MLFLOW_TRACKING_URI={shown}: " in line
    assert reason in line


@pytest.mark.parametrize(("name", "value"), [("MLFLOW_RUN_ID", "nobody"), ("MLFLOW_EXPERIMENT_ID", "77")])
def test_a_run_or_experiment_that_the_store_does_not_have_is_named(
    name: str, value: str, command: Command, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    end = command("sample")
    assert end.code == 2
    (line,) = end.err.splitlines()
    assert line.startswith(f"Error: {name}={value}: sqlite:")
    assert not (tmp_path / "output").exists()
