"""The entry point ``preprocess``: again, with other input, with too many rejected files, from a zip file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import pydicom
import pytest
from command_server import CommandServer
from helpers import changed, few_radiographs, make, soak, store_in, words_of
from mlflow import MlflowClient
from samples import content_of
from tracked import last_run

from pneumo_experiments.dataset.hdf5 import Dataset, DatasetWriter
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import Preprocess
from pneumo_experiments.stages.preprocess import preprocess
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

IMAGES = 10
PLANTED = ("Zaphod", "Beeblebrox", "PID-4711-X", "19520311", "Betelgeuse")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "sample"
    write_sample(folder, Contents(IMAGES, 0, 5))
    return folder


@pytest.fixture(scope="module")
def made(sample: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with the data set of the sample, its report, and what was printed and logged."""
    with store_in(tmp_path_factory.mktemp("made"), empty_store) as folder, redirect_stdout(StringIO()) as out:
        preprocess(settings_of(sample))
        logged = {"artifacts": sorted(artifacts()), "positives": last_run().data.params["positives"]}
        (folder / "logged.json").write_text(json.dumps(logged))
    (folder / "stdout.txt").write_text(out.getvalue())
    return folder


def put(made: Path, store: Path) -> None:
    """Puts a copy of that data set into the working directory, as if it had been made there."""
    for path in made.glob("d.*"):
        shutil.copy2(path, store)


def settings_of(sample: Path, **changes: object) -> Preprocess:
    chosen: dict[str, object] = {
        "dicom_dir": sample / "dicom-images-train",
        "rle_csv": sample / "train-rle.csv",
        "dataset": Path("d.h5"),
        "image_size": 64,
        "workers": 1,
    }
    return make(Preprocess, **chosen | changes)  # type: ignore[arg-type]


def copy_of(sample: Path, folder: Path) -> Path:
    shutil.copytree(sample, folder)
    return folder


def artifacts() -> set[str]:
    return {item.path for item in MlflowClient().list_artifacts(last_run().info.run_id)}


def fingerprint(path: Path) -> str:
    with Dataset.open(path) as dataset:
        return dataset.fingerprint


def test_the_report_lies_beside_the_data_set_and_in_the_run(made: Path) -> None:
    logged = json.loads((made / "logged.json").read_text())
    assert logged["artifacts"] == ["config.yaml", "d.report.html", "d.report.json", "positives.png"]
    assert logged["positives"] == "3"
    report = json.loads((made / "d.report.json").read_text())
    assert report["outcome"] == {"used": IMAGES, "rejected": 0, "without_annotation": 0, "not_read": 0}
    assert report["formats"] == {"JPEG Baseline, 8 bit, MONOCHROME2": IMAGES}
    assert report["annotated"]["positives"] == 3
    assert "data:image/jpeg;base64," in (made / "d.report.html").read_text()
    assert f"{IMAGES} files found: {IMAGES} used" in (made / "stdout.txt").read_text()
    assert not (made / "d.h5.work").exists()
    with h5py.File(made / "d.h5") as file:
        assert file["images_0"].shape == (IMAGES, 64, 64)


def test_the_same_again_says_so_and_writes_nothing(
    sample: Path, made: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(made, store)
    before = (store / "d.h5").stat()
    preprocess(settings_of(sample, workers=2, max_rejected=0.5))
    assert "d.h5 exists already, from the same files and settings" in capsys.readouterr().out
    after = (store / "d.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "d.report.html" in artifacts()


def test_a_touched_copy_is_the_same_input_though_one_of_its_files_is_empty(
    sample: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, copy = copy_of(sample, store / "own"), store / "copy"
    sorted(first.rglob("*.dcm"))[1].write_bytes(b"")
    preprocess(settings_of(first, max_rejected=0.5))
    assert f"{IMAGES} files found: {IMAGES - 1} used, 1 rejected" in capsys.readouterr().out
    shutil.copytree(first, copy)
    for path in copy.rglob("*.dcm"):
        os.utime(path, ns=(1, 1))
    preprocess(settings_of(copy, max_rejected=0.5))
    assert "d.h5 exists already, from the same files and settings" in capsys.readouterr().out


def test_other_input_or_settings_are_named_and_refused_until_overwrite(
    sample: Path, made: Path, store: Path
) -> None:
    own = copy_of(sample, store / "own")
    put(made, store)
    first = (store / "d.h5").read_bytes()

    def refusal(**changes: object) -> str:
        with pytest.raises(UserError, match="overwrite=true replaces it") as caught:
            preprocess(settings_of(own, **changes))
        assert (store / "d.h5").read_bytes() == first
        return str(caught.value)

    assert "was made with image_size 64, not 32, pixel_dtype float32, not uint8;" in refusal(
        image_size=32, pixel_dtype="uint8"
    )
    assert "was made with other annotations;" in refusal(rle_csv=None)
    ids = [path.stem for path in own.rglob("*.dcm")]
    (store / "patients.csv").write_text("id,patient\n" + "".join(f"{image_id},b\n" for image_id in ids))
    assert "was made with patients by PatientID, not by patients_csv;" in refusal(patients_csv="patients.csv")
    path = sorted(own.rglob("*.dcm"))[0]
    content = bytearray(path.read_bytes())
    content[-400] ^= 1  # within the picture, and the size stays
    path.write_bytes(content)
    assert "was made with other DICOM files;" in refusal()
    path.unlink()
    assert "was made with other DICOM files;" in refusal()
    preprocess(settings_of(own, overwrite=True))
    with Dataset.open(store / "d.h5") as dataset:
        assert len(dataset) == IMAGES - 1


def test_a_damaged_image_is_named_and_rewritten_on_overwrite(
    sample: Path, made: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(made, store)
    whole, content = content_of(store / "d.h5"), (store / "d.h5").read_bytes()
    with h5py.File(store / "d.h5") as file:
        chunk = file["ann_0"].id.get_chunk_info(2)
    damaged = bytearray(content)
    damaged[chunk.byte_offset + chunk.size // 2] ^= 1
    (store / "d.h5").write_bytes(damaged)
    with pytest.raises(
        UserError, match=r"d\.h5: damaged at ann_0, row 2; delete it and run preprocess again"
    ):
        preprocess(settings_of(sample))
    assert (store / "d.h5").read_bytes() == damaged
    capsys.readouterr()
    preprocess(settings_of(sample, overwrite=True))
    assert "preprocess: overwriting: d.h5: damaged at ann_0, row 2" in capsys.readouterr().out
    assert content_of(store / "d.h5") == whole


@contextmanager
def piped(content: bytes) -> Generator[Path]:
    """What ``<(cat table)`` is to a program: the content can be read once, then the pipe is empty."""
    source, sink = os.pipe()
    os.write(sink, content)
    os.close(sink)
    yield Path(f"/dev/fd/{source}")
    os.close(source)


def test_tables_from_pipes_are_read_once_and_others_from_them_are_noticed(
    sample: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (sample / "train-rle.csv").read_bytes()
    ids = sorted(path.stem for path in sample.rglob("*.dcm"))
    who = ("id,patient\n" + "".join(f"{image_id},{n // 2}\n" for n, image_id in enumerate(ids))).encode()

    def again(annotations: bytes, patients: bytes) -> None:
        with piped(annotations) as rle_csv, piped(patients) as patients_csv:
            preprocess(settings_of(sample, rle_csv=rle_csv, patients_csv=str(patients_csv)))

    again(table, who)
    with Dataset.open(store / "d.h5") as dataset:
        assert dataset.settings["rle_csv"] == hashlib.sha256(table).hexdigest()
        assert dataset.settings["patients_csv"] == hashlib.sha256(who).hexdigest()
    capsys.readouterr()
    again(table, who)
    assert "d.h5 exists already, from the same files and settings" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with other annotations; overwrite"):
        again(table + b"another,-1\n", who)
    with pytest.raises(UserError, match="was made with other patients; overwrite"):
        again(table, who.replace(b",0\n", b",-1\n", 1))


def test_a_table_of_patients_that_names_no_image_is_an_error_and_one_that_names_few_a_warning(
    sample: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "other.csv").write_text("id,patient\nelsewhere,Zaphod\n")
    with pytest.raises(UserError) as caught:
        preprocess(settings_of(sample, patients_csv="other.csv"))
    assert str(caught.value).startswith("patients_csv=other.csv: names none of the 10 images; name the table")
    assert last_run().info.status == "FAILED"
    assert not list(store.glob("d.h5*"))
    ids = [path.stem for path in sample.rglob("*.dcm")][:4]
    (store / "few.csv").write_text("id,patient\n" + "".join(f"{image_id},Zaphod\n" for image_id in ids))
    preprocess(settings_of(sample, patients_csv="few.csv"))
    (told,) = (r.getMessage() for r in caplog.records if r.name.startswith("pneumo_experiments.dataset"))
    assert "patients_csv=few.csv: names only 4 of the 10 images; the others are grouped by PatientID" in told
    with Dataset.open(store / "d.h5") as dataset:
        assert dataset.settings["patient_sources"] == "patients_csv: 4, PatientID: 6"


def test_too_many_rejects_fail_with_a_report_and_what_was_read_is_kept(
    sample: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copy_of(sample, store / "own")
    bad = sorted(own.rglob("*.dcm"))[3]
    bad.write_bytes(bad.read_bytes()[:4000])
    with pytest.raises(
        UserError, match=r"1 of 10 files are rejected, more than max_rejected=0\.01"
    ) as caught:
        preprocess(settings_of(own))
    assert f"for example {bad.stem}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (store / "d.h5").exists()
    assert artifacts() == {"config.yaml", "d.report.json", "d.report.html"}
    assert "was not written" in (store / "d.report.html").read_text()
    report = json.loads((store / "d.report.json").read_text())
    assert report["outcome"]["rejected"] == 1
    capsys.readouterr()
    preprocess(settings_of(own, max_rejected=0.1))
    assert "continuing: 10 of 10 files are read already" in capsys.readouterr().out
    with Dataset.open(store / "d.h5") as dataset:
        assert len(dataset) == IMAGES - 1
        assert bad.stem not in {entry.image_id for entry in dataset.entries}
    preprocess(settings_of(own))  # the limit is no part of what the data set is made from
    assert "exists already" in capsys.readouterr().out


def test_a_report_that_an_interruption_left_out_is_made_by_the_next_run(
    sample: Path, made: Path, store: Path
) -> None:
    put(made, store)
    (store / "d.report.html").unlink()
    (store / "d.h5.work").mkdir()  # as a kill between the data set and its report leaves it
    before = fingerprint(store / "d.h5")
    preprocess(settings_of(sample))
    assert (store / "d.report.html").is_file()
    assert not (store / "d.h5.work").exists()
    assert fingerprint(store / "d.h5") == before


def test_nothing_of_a_patient_is_written_anywhere(
    sample: Path, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given, family, number, birth, place = PLANTED
    own = copy_of(sample, store.parent / f"{store.name}-own")
    files = sorted(own.rglob("*.dcm"))
    for path in files[:6]:
        header = pydicom.dcmread(path)
        header.PatientName, header.PatientID, header.PatientBirthDate = f"{family}^{given}", number, birth
        header.OtherPatientIDs, header.ReferringPhysicianName = [number], f"Dr^{family}"
        header.InstitutionName, header.PatientComments = place, f"{given} {family}, born {birth}"
        header.ViewPosition = given.upper()
        header.add_new("PatientSex", "CS", family.upper())
        header.SeriesDescription = f"{given} {number}"
        header.save_as(path)
    odd = pydicom.dcmread(files[0])  # a reject whose header is full of names
    odd.PhotometricInterpretation, odd.NumberOfFrames = family.upper(), 1
    odd.save_as(files[0])
    named = files[1].parent.parent / f"{family}_{given}" / "scan"  # folders are called after patients
    named.mkdir(parents=True)
    shutil.move(files[1], named / files[1].name)
    table = "Kaggle_ID,NIH_ID\n" + "".join(f"{path.stem},{family} {number} {birth}\n" for path in files[:8])
    (store.parent / "patients.csv").write_text(table)
    settings = settings_of(own, patients_csv=str(store.parent / "patients.csv"))
    with pytest.raises(UserError) as caught:
        preprocess(settings)  # leaves the work folder and a report
    preprocess(changed(settings, dataset=Path("e.h5"), max_rejected=1))
    out, err = capfd.readouterr()
    written = {str(path): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert len([name for name in written if "d.h5.work" in name]) >= 2
    assert any(name.endswith("mlflow.db") for name in written)
    told = {"output": f"{out}{err}{caught.value}".encode()}
    for name, content in (written | told).items():
        lower = content.lower()
        for planted in PLANTED:
            assert planted.lower().encode() not in lower, f"{planted} in {name}"
    with Dataset.open(store / "e.h5") as dataset:
        of = {entry.image_id: entry for entry in dataset.entries}
        assert {of[path.stem].view for path in files[1:6]} == {"other"}
        assert {of[path.stem].sex for path in files[1:6]} == {""}
        assert len({of[path.stem].patient for path in files[1:8]}) == 1


@pytest.mark.parametrize(
    ("max_bytes", "whole_batches"), [pytest.param(1_300_000, 0, marks=soak), (3_000_000, 2)]
)
def test_a_full_disk_is_a_clear_end_and_the_old_data_set_stays(
    max_bytes: int, whole_batches: int, sample: Path, made: Path, store: Path, commands: CommandServer
) -> None:
    """The first limit stops the worker at its first batch, the second the file of all batches."""
    put(made, store)
    old = (store / "d.h5").read_bytes()
    source = few_radiographs(sample, store / "more than a batch", IMAGES, copies=4)
    settings = settings_of(sample, **source, image_size=256, overwrite=True)
    options: dict[str, Any] = {"environment": dict(os.environ), "max_file_bytes": max_bytes}
    command = commands.start("preprocess", *words_of(settings), folder=store, **options)
    code, said = command.communicate()
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if not line.startswith("preprocess: ")]
    assert "d.h5: cannot be written (File too large); make room or choose another place" in line
    assert (store / "d.h5").read_bytes() == old
    assert not list(store.glob("*.part"))
    batches = [path for path in store.glob("d.h5.work/*") if len(path.name) == 32]
    assert len(batches) == whole_batches
    preprocess(settings)
    with Dataset.open(store / "d.h5") as dataset:
        assert (dataset.image_size, len(dataset)) == (256, 4 * IMAGES)


def test_a_report_that_finds_no_temporary_folder_does_not_blame_the_data_set(
    sample: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "file").touch()
    finish = DatasetWriter.finish

    def finish_and_lose_the_folder(self: DatasetWriter, settings: Mapping[str, str]) -> str:
        patch.setattr("tempfile.tempdir", f"{store}/file")
        return finish(self, settings)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{store}/file/tmp"):
        patch.setattr(DatasetWriter, "finish", finish_and_lose_the_folder)
        preprocess(settings_of(sample))
    preprocess(settings_of(sample))
    assert "continuing: 10 of 10 files are read already" in capsys.readouterr().out
    assert (store / "d.report.html").exists()
