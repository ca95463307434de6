"""Mistakes of users: each is one line and exit code 2, and leaves no file and no run that goes on.

The wording of these lines is asserted here, in one table.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import alembic.command
import h5py
import mlflow
import numpy as np
import optuna
import pytest
import sqlalchemy
from helpers import Call, End, from_here, store_address, store_in
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from samples import SIZE, examples, packed, write, write_dataset
from sqlalchemy import NullPool

from pneumo_experiments import cli
from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.packed_image import ResizedImage, hash_patient
from pneumo_experiments.tracking import servers

pytestmark = pytest.mark.usefixtures("no_charts", "no_code", "no_pictures")

# A row below names only what is wrong; of two values the later counts.
USUAL = {
    "sample": "--images 10 --test_images 0",
    "preprocess": "--dicom_dir dicom --rle_csv labels.csv --dataset new.h5 --image_size 32 --workers 1",
    "train": "--dataset labelled.h5 --weights none --epochs 1 --device cpu",
    "search": "--dataset labelled.h5 --weights none --holdout 0 --folds 2 --storage sqlite:///studies.db"
    " --trials 1 --search_epochs 1 --search_images 4 --confirm 0 --keep 0 --device cpu",
    "score": "--model {model} --dataset labelled.h5",
    "register": "--model {model}",
    "main": "--dicom_dir dicom --rle_csv labels.csv",
}
DELETED = "is deleted; restore it with: mlflow experiments restore --experiment-id"
OTHER_MLFLOW = (
    f"another program, or another version of MLflow than {mlflow.__version__}, made this database; "
)
NO_STORE = "the store cannot be opened"
# What a user types, and the line that follows; {…} are the desk's names, and … any text.
MISTAKES = [
    # Radiographs and their annotations
    ("preprocess --dicom_dir missing", "dicom_dir=missing: no such file or folder…name the"),
    ("preprocess --dicom_dir empty", "dicom_dir=empty: contains no .dcm…name the"),
    ("preprocess --dicom_dir ''", "dicom_dir: none given; name the"),
    ("preprocess --rle_csv missing.csv", "rle_csv=missing.csv: no such file; name the table"),
    ("preprocess --rle_csv empty", "rle_csv=empty: is a folder; name the table"),
    ("preprocess --masks_dir missing", "masks_dir=missing: no such file or folder; name the"),
    ("preprocess --patients_csv missing.csv", "patients_csv=missing.csv: no such file; give auto, none,"),
    ("main --test_dir missing", "test_dir=missing: no such file or folder; name the"),
    ("main --rle_csv none", "rle_csv: none given; the chain trains"),
    ("score --dataset missing.h5", "dataset=missing.h5: no such file; run preprocess"),
    ("score --dicom_dir missing", "dicom_dir=missing: no such file or folder; name the"),
    ("score --check missing.csv", "check=missing.csv: no such file; name a submission"),
    ("score --counts missing.npz", "counts=missing.npz: no such file; name threshold_counts.npz"),
    ("score --dicom_dir dicom --sample_submission no.csv", "sample_submission=no.csv: no such file; name"),
    ("search --space missing.yaml", "space=missing.yaml: no such file; name a YAML file of ranges"),
    ("preprocess --rle_csv empty.csv", "…empty.csv: the table is empty"),
    (
        "preprocess --rle_csv columns.csv",
        "…columns.csv: found the columns a, b, c; expected the columns ImageId and Enc",
    ),
    ("preprocess --rle_csv header.csv", "…header.csv: has a header but no rows"),
    ("preprocess --rle_csv ghost.csv", "rle_csv=ghost.csv: names none of the 4 files"),
    (
        "preprocess --rle_csv odd.csv",
        "…for example {first}: odd number of run lengths (3)…see the report new.",
    ),
    ("preprocess --rle_csv banana.csv", "…for example {first}: run length 'banana'…see the report new."),
    ("preprocess --rle_csv short.csv", "…short.csv, line 2: an image id or value is missing"),
    (
        "preprocess --dicom_dir broken",
        "dicom_dir=broken: no file can be used, for example {first}: …see the report new.report.html",
    ),
    ("score --dicom_dir broken --submission s.csv", "dicom_dir=broken: no file can be used; the first:"),
    ("score --dicom_dir empty --submission s.csv", "…no .dcm, .png or .jpg files"),
    # Files and folders that are there already, or cannot be written
    ("sample --output_dir letter.txt/new", "letter.txt/new: cannot be written"),
    ("sample --output_dir dicom", "…exists and is not an empty folder"),
    ("sample --output_dir thesis", "…thesis.part: exists and was not created by this program"),
    ("preprocess --dataset thesis.h5", "…thesis.h5.work: exists and was not created by this program"),
    ("preprocess --dataset letter.txt/new", "letter.txt/new: cannot be written"),
    ("preprocess --dataset empty --overwrite true", "…is a folder"),
    ("preprocess --dataset letter.txt", "letter.txt: not an HDF5 file"),
    (
        "preprocess --dataset made.h5 --image_size 64",
        "…was made with image_size 32, not 64; overwrite=true replaces it",
    ),
    ("main --output_dir theirs --test_dir dicom", "…theirs/submission.csv: exists"),
    # Data sets
    *(
        (f"{entry_point} --dataset {file}", f"…{file}…run preprocess")
        for entry_point, files in (
            ("train", ("missing.h5", "nothing.h5", "letter.txt", "foreign.h5", "cut.h5", "unlabelled.h5")),
            ("search", ("missing.h5", "cut.h5", "unlabelled.h5")),
        )
        for file in files
    ),
    (
        "train --dataset healthy.h5",
        "dataset: none of the 8 training images has a pneumothorax, so there is nothing to learn;",
    ),
    ("search --dataset healthy.h5", "dataset: none of the …pneumothorax, so there is nothing to learn;"),
    (
        "train --dataset lonely.h5",
        "folds=5…needs 6 patients, the data set has 1…name the patients in patients_csv",
    ),
    (
        "train --dataset lonely.h5 --holdout 0 --folds 2",
        "folds=2…needs 2 patients, the data set has 1…name the patients in patients_csv",
    ),
    # Settings of a training
    ("train --folds 50", "folds=50 and a holdout: needs 51 patients, the data set has"),
    ("train --weights missing.pt", "weights=missing.pt: no such file"),
    ("train --weights letter.txt", "weights=letter.txt: not a state dict"),
    ("train --weights imagenet", "weights=imagenet: cannot download them…weights=none"),
    ("train --precision fp16", "precision=fp16: not on a CPU"),
    (
        "train --bce_weight 0 --dice_weight 0 --focal_weight 0 --presence_weight 0",
        "bce_weight, dice_weight, dice_image_weight, focal_weight, lovasz_weight, presence_weight: all",
    ),
    # Models
    *(
        (f"{entry_point} --model {model}", f"model={model}: cannot be loaded…`train` logs one{remedy}")
        for entry_point, model, remedy in (
            ("score", "models:/nothing@champion", "…or make one: register with promote=always"),
            ("score", "models:/m-123", ""),
            ("score", "models:/", ""),
            ("score", "runs:/abc/model", ""),
            ("register", "banana", ""),
        )
    ),
    ("score --subset all --baseline models:/m-9", "baseline=models:/m-9: cannot be loaded"),
    ("register --model best", "model=best: no model of this experiment was scored"),
    ("register --name a/b", "name=a/b: cannot be"),
    ("score --dataset labelled.h5", "…was trained on another data set"),
    ("score --dataset unlabelled.h5 --subset all", "…has no annotations to score by"),
    ("score --dataset larger.h5 --subset all", "…larger.h5: …24 px…=16"),
    (
        "score --check cut.csv --sample_submission few.csv",
        "check=cut.csv: not a valid submission, 1 problem; the first: b: missing",
    ),
    (
        "score --dicom_dir dicom --submission s.csv --sample_submission other.csv",
        "…1 of 2 images of other.csv have no file, such as ID_other",
    ),
    # Studies
    ("search --storage sqlite:///no/such/x.db", "storage=sqlite:///no/such/x.db: no folder "),
    (
        "search --storage postgresql://me:secret@127.0.0.1:9/study",
        "storage=postgresql://me:***@127.0.0.1:9/study: ",
    ),
    ("train --from_study s --storage sqlite:///typo.db", "storage=sqlite:///typo.db: no such database; name"),
    *(
        (
            f"search --storage {address}",
            f"storage={address}: not the address of a database. Optuna's journals and gRPC proxies have no",
        )
        for address in ("journal.log", "grpc://127.0.0.1:13000")
    ),
    *(
        (f"search --study {study}", f"study={study}: was made with another program; name another")
        for study in ("foreign", "least", "same")
    ),
    # The tracking store
    (
        "MLFLOW_TRACKING_URI=http://127.0.0.1:9 sample",
        "MLFLOW_TRACKING_URI=http://127.0.0.1:9: no server resp",
    ),
    (
        "MLFLOW_TRACKING_URI=postgresql://me:secret@127.0.0.1:9/x sample",
        "MLFLOW_TRACKING_URI=postgresql://me:***@127.0.0.1:9/x: no server responds",
    ),
    *(
        (f"MLFLOW_TRACKING_URI={uri} sample", f"MLFLOW_TRACKING_URI={uri}: {reason}")
        for uri, reason in (
            ("sqlite:///missing/mlflow.db", "no folder"),
            ("sqlite:///empty", NO_STORE),
            ("sqlite:///letter.txt", NO_STORE),
            (
                "sqlite:///begun.db",
                f"{NO_STORE} ((sqlite3.OperationalError) table spans already exists);"
                " its creation was interrupted: delete it, or name another",
            ),
            ("file:empty", "a folder of files"),
            (
                "./mlruns",
                f"a folder of files, which MLflow {mlflow.__version__} opens only with MLFLOW_ALLOW_FI",
            ),
            ("banana://x", NO_STORE),
            *(
                (uri, f"{OTHER_MLFLOW}…back it up, then run: mlflow db upgrade {uri}")
                for uri in ("sqlite:///earlier.db", "sqlite:///later.db")
            ),
        )
    ),
    *(
        (
            f"MLFLOW_TRACKING_URI=sqlite:///gone.db {variable} sample",
            f"{variable}: {line}",
        )
        for variable, line in (
            ("MLFLOW_EXPERIMENT_ID={gone}", f"the experiment gone {DELETED} {{gone}}"),
            ("MLFLOW_EXPERIMENT_NAME=gone", f"the experiment gone {DELETED}"),
            ("MLFLOW_RUN_ID={run_of_gone}", f"the experiment Default {DELETED}"),
            ("MLFLOW_RUN_ID={deleted_run}", "the run is deleted; restore it with"),
        )
    ),
    ("MLFLOW_RUN_ID=nobody sample", "MLFLOW_RUN_ID=nobody: sqlite:"),
    ("MLFLOW_EXPERIMENT_ID=77 sample", "MLFLOW_EXPERIMENT_ID=77: sqlite:"),
]


@dataclass(frozen=True)
class Desk:
    """A folder with all that the table names, a store with one model, and what it calls in braces."""

    folder: Path
    uri: str
    names: dict[str, str]

    def runs(self, since_ms: int = 0) -> list[Run]:
        """The last two, the newest first."""
        since = f"attributes.start_time >= {since_ms}"
        return MlflowClient(self.uri).search_runs(["0"], since, 1, 2, ["attributes.start_time DESC"])

    def words(self, typed: str) -> list[str]:
        """The words of a command, with the usual ones of its entry point."""
        entry_point, *rest = shlex.split(typed)
        usual = f"{entry_point} {USUAL[entry_point]}".split()
        return [word.format(**self.names) for word in (*usual, *rest)]


def healthy(example: ResizedImage) -> ResizedImage:
    assert example.target is not None
    entry = replace(example.entry, annotations=0, area_px=0)
    return replace(example, entry=entry, target=np.zeros_like(example.target), rle=rle.EMPTY)


def larger(example: ResizedImage) -> ResizedImage:
    assert example.target is not None
    return replace(example, image=np.pad(example.image, 4), target=np.pad(example.target, 4))


def lonely(example: ResizedImage) -> ResizedImage:
    return replace(example, entry=replace(example.entry, patient=hash_patient("the same")))


def write_data_sets(folder: Path) -> None:
    """Data set files of all kinds."""
    write(folder / "labelled.h5", 24, 1)
    write(folder / "unlabelled.h5", labelled=False)
    content = (folder / "labelled.h5").read_bytes()
    (folder / "cut.h5").write_bytes(content[: len(content) // 2])
    (folder / "nothing.h5").touch()
    with h5py.File(folder / "foreign.h5", "w") as file:
        file["a"] = 1
    for change, count in ((healthy, 12), (larger, 12), (lonely, 2)):
        path, images = folder / f"{change.__name__}.h5", packed(map(change, examples(count)), "uint8")
        write_dataset(path, images, image_size=24 if change is larger else SIZE, pixel_dtype="uint8")


def write_radiographs(folder: Path, sample: Path) -> str:
    """Radiographs, annotations and submissions, sound and broken; the first image's id."""
    for name in ("dicom", "broken", "empty", "thesis.part", "thesis.h5.work", "theirs", "hub/checkpoints"):
        (folder / name).mkdir(parents=True)
    files = sorted(sample.rglob("*.dcm"), key=lambda path: path.name)[:4]
    for file in files:
        (folder / "dicom" / file.name).hardlink_to(file)
    for file in files[:2]:
        (folder / "broken" / file.name).write_bytes(file.read_bytes()[:3000])
    header, *rows = (sample / "train-rle.csv").read_text().splitlines()
    first, kept = files[0].stem, [row for row in rows if any(file.stem in row for file in files)]
    texts = {
        "labels.csv": "\n".join([header, *kept]),
        "empty.csv": "",
        "columns.csv": "a,b,c\nx,y,z\n",
        "header.csv": f"{header}\n",
        "ghost.csv": f"{header}\nghost, -1\n",
        "odd.csv": f"{header}\n{first}, 1 2 3\n",
        "banana.csv": f"{header}\n{first}, banana\n",
        "short.csv": f"{header}\n{first}\n",
        "few.csv": "ImageId,EncodedPixels\na,-1\nb,-1\n",
        "cut.csv": "ImageId,EncodedPixels\na,-1\n",
        "other.csv": f"ImageId,EncodedPixels\n{first},-1\nID_other,-1\n",
        "letter.txt": "Dear Sir, " * 100,
        "thesis.part/thesis.txt": "years",
        "thesis.h5.work/thesis.txt": "years",
        "theirs/submission.csv": "ImageId,EncodedPixels\na,-1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return first


def write_stores(folder: Path, empty_store: Path) -> dict[str, str]:
    """Databases of MLflow that do not open, or where something is deleted; the ids of that."""
    with closing(sqlite3.connect(folder / "begun.db")) as begun:
        begun.execute("CREATE TABLE spans (x)")  # as a killed `mlflow server` leaves it
    shutil.copy(empty_store, folder / "later.db")
    with closing(sqlite3.connect(folder / "later.db")) as later, later:
        later.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
    engine = sqlalchemy.create_engine(f"sqlite:///{folder / 'earlier.db'}", poolclass=NullPool)
    InitialBase.metadata.create_all(engine)
    migrations = _get_alembic_config("")
    with engine.begin() as connection:  # MLflow itself would migrate it without a word
        migrations.attributes["connection"] = connection
        alembic.command.upgrade(migrations, "+1")
    shutil.copy(empty_store, folder / "gone.db")
    client = MlflowClient(f"sqlite:///{folder / 'gone.db'}")
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    run_of_gone = client.create_run("0").info.run_id
    deleted_run = client.create_run(client.create_experiment("another")).info.run_id
    client.delete_run(deleted_run)
    client.delete_experiment("0")
    return {"gone": gone, "run_of_gone": run_of_gone, "deleted_run": deleted_run}


def write_studies(folder: Path) -> None:
    """Studies of other programs, of which one has the same settings as ours."""
    storage, ranges = f"sqlite:///{folder / 'studies.db'}", optuna.distributions.FloatDistribution(0.001, 10)
    optuna.create_study(study_name="least", storage=storage, direction="minimize")
    for name, params in {
        "foreign": {"x": 1.0},
        "same": {"bce_weight": 5, "dice_weight": 5, "focal_weight": 5},
    }.items():
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        study.add_trial(
            optuna.trial.create_trial(value=0.9, params=params, distributions=dict.fromkeys(params, ranges))
        )


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    trained_store: Path,
    empty_store: Path,
    dataset: Path,
    tiny_default: None,
) -> Iterator[Desk]:
    store = tmp_path_factory.mktemp("mit ümlaut")  # a space and a non-ASCII letter
    folder = store / "desk"
    folder.mkdir()
    with store_in(store, trained_store), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        patch.setenv("https_proxy", "http://127.0.0.1:9")  # no server there
        (model,) = MlflowClient().search_logged_models(["0"])
        names = {"model": model.model_uri, "first": write_radiographs(folder, dataset.with_name("sample"))}
        names |= write_stores(folder, empty_store)
        write_data_sets(folder)
        write_studies(folder)
        yield Desk(folder, store_address(store), names)


Command = Callable[[str], End]


@pytest.fixture
def command(desk: Desk, call: Call, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line on what a user types, in the working directory."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", desk.uri)
    return lambda typed: call(desk.words(typed))


@pytest.fixture
def at_the_desk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)


@pytest.fixture(scope="module")
def made(desk: Desk) -> None:
    """The data set that a command of ours has made, for those that would change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk.folder)
        patch.setenv("MLFLOW_TRACKING_URI", desk.uri)
        patch.setattr("sys.argv", ["", *desk.words("preprocess --dataset made.h5")])
        with pytest.raises(SystemExit, match="0"):
            cli.main()


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files in a folder but locks, which stay beside a database."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.suffix != ".lock"}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in paths.items()}


@pytest.mark.usefixtures("at_the_desk", "made")
@pytest.mark.parametrize(("typed", "expected"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    typed: str, expected: str, command: Command, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, start_ms = contents(desk.folder), time.time_ns() // 10**6
    has_run = not typed.startswith(("search", "train")) and "=" not in typed.split()[0]
    while "=" in typed.split()[0]:
        variable, _, typed = typed.partition(" ")
        name, _, value = variable.format(**desk.names).partition("=")
        monkeypatch.setenv(name, value)
    line = command(typed).mistake
    pattern = ".*".join(re.escape(part) for part in expected.format(**desk.names).split("…"))
    assert re.match(pattern, line), line
    assert "secret" not in line
    after = contents(desk.folder) | {"begun.db": before["begun.db"]}  # which MLflow goes on to fill
    written = after.keys() - before.keys()
    assert ("see the report" in line) == any(name.startswith("new.report.") for name in written)
    for name in written:
        assert name.startswith(("new.report.", "new.h5.work"))
        path = desk.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert before.items() <= after.items()
    new, is_known_before = (
        desk.runs(start_ms),
        re.search("no such file|none given|is a folder; name the", line),
    )
    assert (
        not new if is_known_before else len(new) == 1 if has_run else len(new) <= 1
    )  # no stage of main began
    for run in new:
        assert run.info.status == "FAILED"
        assert " ".join(from_here(run.data.tags["error"]).split()) in from_here(line)
        assert "secret" not in str(run.to_dictionary())


def test_a_mistake_that_shows_only_in_training_ends_its_run_with_the_line(
    at_the_desk: None, command: Command, desk: Desk
) -> None:
    line = command("train --learning_rate 1e30").mistake
    assert re.match(r"(learning_rate=1e\+30|network output is NaN)", line), line
    run = desk.runs()[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] in line
    assert not [*desk.folder.glob("output/**/*.pt")]


def test_of_findings_alone_a_training_warns(
    at_the_desk: None, command: Command, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    images = (example for example in examples(24) if example.entry.area_px)
    write_dataset(desk.folder / "sick.h5", packed(images, "uint8"), image_size=SIZE, pixel_dtype="uint8")
    for file, is_warned in (("labelled.h5", False), ("sick.h5", True)):
        assert command(f"train --learning_rate 1e30 --dataset {file}").code == 2
        assert ("every training image has a pneumothorax" in caplog.text) == is_warned


# What is no mistake, or only in part


def test_unmatched_ids_and_files_and_broken_files_are_left_out_and_reported(
    command: Command, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(desk.folder / "dicom", "some")
    unknown, broken, gone, _ = sorted(path.stem for path in Path("some").iterdir())
    Path("some", f"{broken}.dcm").write_bytes((desk.folder / "broken" / f"{broken}.dcm").read_bytes())
    Path("some", f"{gone}.dcm").unlink()
    rows = [row for row in (desk.folder / "labels.csv").read_text().splitlines() if unknown not in row]
    Path("table.csv").write_text("\n".join([*rows, "ghost, -1"]))
    words = "preprocess --dicom_dir some --rle_csv table.csv --max_rejected 0.5"
    end = command(words)
    assert end.code == 0
    assert "3 files found: 1 used, 1 rejected, 1 without annotation" in end.out
    assert f"(1): …{broken[-23:]}" in end.out
    assert f"file found, but not in the annotation table (1): …{unknown[-23:]}" in end.out
    assert "annotated, but no file found (2): " in end.out
    with h5py.File("new.h5") as file:
        assert len(file["index"]) == 1  # type: ignore[arg-type]
    run = desk.runs()[0]
    assert (run.info.status, run.data.params["images"]) == ("FINISHED", "1")
    report = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/new.report.json")
    assert {"ghost", gone} == set(report["annotated_without_file"])
    assert report["rejected"][0]["files"][0]["image_id"] == broken
    Path("new.h5").write_text("Dear Sir")
    assert command(f"{words} --overwrite true").code == 0
    assert h5py.is_hdf5("new.h5")


def test_a_sample_submission_orders_and_chooses_the_images_and_the_result_is_a_valid_submission(
    command: Command, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = sorted((path.stem for path in (desk.folder / "dicom").iterdir()), reverse=True)[:3]
    Path("sample.csv").write_text("ImageId,EncodedPixels\n" + "".join(f"{each},-1\n" for each in ids))
    folder = f"--dicom_dir {shlex.quote(str(desk.folder / 'dicom'))} --sample_submission sample.csv"
    end = command(f"score {folder} --submission s.csv")
    assert end.code == 0, end.err
    assert "left out: 1 image of" in end.out
    rows = Path("s.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["ImageId", *ids]

    end = command(f"score --check s.csv {folder} --dataset {shlex.quote(str(desk.folder / 'labelled.h5'))}")
    assert (end.code, end.err) == (0, "")
    assert "of 3 images have a mask" in end.out
    assert "of the training images 50.0%" in end.out
    assert "\nscore: s.csv is a valid submission; all ids are right\n" in end.out

    end = command("score --check s.csv")
    assert end.code == 0
    assert "its ids were not checked: give sample_submission or dicom_dir\n" in end.out


def test_names_that_are_not_utf_8_are_written_in_ascii(
    command: Command, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"x\xff")
    Path(odd).mkdir()
    shutil.copy(next((desk.folder / "dicom").iterdir()), Path(odd, f"{odd}.dcm"))
    end = command(f"preprocess --dicom_dir {odd} --rle_csv none --dataset {odd}.h5")
    assert (end.code, end.err) == (0, "")
    assert "without labels, at 32 px: x\\udcff.h5" in end.out
    with h5py.File(f"{odd}.h5") as file:
        assert [row["image_id"] for row in file["index"]] == [b"x\\udcff"]  # type: ignore[index]
    end = command(f"score --dicom_dir {odd} --submission {odd}.csv")
    assert end.code == 0, end.err
    assert "score: 1 image in x\\udcff.csv" in end.out
    assert Path(f"{odd}.csv").read_text().splitlines()[1].startswith("x\\udcff,")
    score, preprocess = desk.runs()[:2]
    assert score.data.params["submission"] == f"{tmp_path}/x\\udcff.csv"
    assert preprocess.data.params["dicom_dir"] == f"{tmp_path}/x\\udcff"


# Databases that do not respond


def hang_up(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            server.accept()[0].close()


@pytest.mark.parametrize("kind", ["hangs up", "never responds", "has no driver"])
def test_a_database_that_does_not_respond_ends_a_training_and_a_search_within_seconds(
    kind: str, at_the_desk: None, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow itself would retry for minutes."""
    monkeypatch.setattr(servers, "CONNECT_SECONDS", 0.5)
    if kind == "has no driver":
        monkeypatch.setitem(sys.modules, "psycopg", None)
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts connections for it
        if kind == "hangs up":
            threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        address = f"postgresql://me:secret@127.0.0.1:{server.getsockname()[1]}/x"
        searched = command(f"search --storage {address}").mistake
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        trained = command("train").mistake
    for setting, line in (("storage", searched), ("MLFLOW_TRACKING_URI", trained)):
        assert line.startswith(f"{setting}={address.replace('secret', '***')}: ")
        reasons = {
            "hangs up": "; ",  # before or after it is asked for a database
            "never responds": "no server responds",
            "has no driver": "pip install 'pneumo-experiments[postgres]'",
        }
        assert reasons[kind] in line
