from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import jpeg_ls
import numpy as np
import pydicom
import pytest
from helpers import decoders, few_radiographs, soak
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEGLSLossless
from samples import content_of, write_dataset

from pneumo_experiments.dataset import decoder_pool, shards
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.decoder_pool import Crashed, Message, Request
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.labels import Label, run_length_labels
from pneumo_experiments.dataset.packed_image import hash_patient
from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.dataset.shards import Job, ShardSettings, is_finished, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.errors import Rejected, UserError

FILES_PER_SHARD = 4
IMAGES = 2 * FILES_PER_SHARD + 1
SETTINGS = ShardSettings(image_size=64, pixel_dtype="float32", max_pixels=2**20)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FILES_PER_SHARD", FILES_PER_SHARD)


@pytest.fixture(scope="module")
def sample(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return few_radiographs(dataset.with_name("sample"), tmp_path_factory.mktemp("few") / "dicom", IMAGES)


def jobs_of(sample: dict[str, Path]) -> list[Job]:
    archive = open_archive(sample["dicom_dir"])
    labels = run_length_labels(read_annotations(sample["rle_csv"]))
    return make_jobs(archive.root, SETTINGS, archive.members, labels, patients={})


def written(jobs: Sequence[Job], path: Path, workers: int) -> list[Any]:
    """The content of the data set that is written."""
    work = path.with_suffix(".work")
    work.mkdir(exist_ok=True)
    packed = (result.packed for result in results(jobs, work, workers) if result.packed is not None)
    write_dataset(path, packed, image_size=SETTINGS.image_size, pixel_dtype="float32")
    return content_of(path)


@pytest.fixture(scope="module")
def whole(sample: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The content of the data set that one worker makes, in one shard."""
    return written(jobs_of(sample), tmp_path_factory.mktemp("whole") / "one.h5", 1)


def test_the_content_is_the_same_whatever_the_number_of_workers_and_shards(
    sample: dict[str, Path], whole: list[Any], tmp_path: Path
) -> None:
    assert len(jobs_of(sample)) == 3
    assert written(jobs_of(sample), tmp_path / "d.h5", 3) == whole
    # It is what a plain reading gives.
    rows = read_annotations(sample["rle_csv"])
    files = {path.stem: path for path in sample["dicom_dir"].glob("*.dcm")}
    with Dataset.open(tmp_path / "d.h5") as dataset:
        assert [entry.image_id for entry in dataset.entries] == sorted(files)
        for index, entry in enumerate(dataset.entries):
            header = pydicom.dcmread(files[entry.image_id])
            jpeg = get_frame(header.PixelData, 0, number_of_frames=1)
            pixels = np.asarray(Image.open(BytesIO(jpeg))).astype(float)
            cells = pixels.reshape(64, 16, 64, 16).mean(axis=(1, 3))
            assert np.array_equal(dataset.images([index])[0], np.rint(cells))
            mask = np.zeros(pixels.shape, bool)
            for text in rows[entry.image_id]:
                mask |= decode(text, (1024, 1024))
            assert np.array_equal(dataset.mask(index), mask)
            targets = np.rint(mask.reshape(64, 16, 64, 16).mean(axis=(1, 3)) * 255)
            assert np.array_equal(dataset.targets([index])[0], targets)
            assert (entry.area_px, entry.annotations) == (mask.sum(), len(rows[entry.image_id]))
            assert (entry.rows, entry.columns, entry.sex) == (1024, 1024, header.PatientSex)
            assert entry.patient == hash_patient(header.PatientID)


def test_an_interrupted_run_keeps_what_was_finished(
    sample: dict[str, Path], whole: list[Any], tmp_path: Path
) -> None:
    jobs = jobs_of(sample)
    work = tmp_path / "d.work"
    work.mkdir()
    begun = results(jobs, work, 1)
    assert len(list(itertools.islice(begun, FILES_PER_SHARD + 1))) == FILES_PER_SHARD + 1
    begun.close()
    kept = {path: path.stat() for path in work.iterdir() if not path.suffix}
    assert {job.name for job in jobs[:2]} <= {path.name for path in kept}
    assert written(jobs, tmp_path / "d.h5", 2) == whole
    for path, status in kept.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)


def test_a_shard_damaged_by_a_power_cut_is_rewritten(sample: dict[str, Path], tmp_path: Path) -> None:
    jobs = jobs_of(sample)[-1:]
    whole = written(jobs, tmp_path / "d.h5", 1)
    batch = tmp_path / "d.work" / jobs[0].name
    content = batch.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[:-1], flipped):
        batch.write_bytes(damaged)
        assert written(jobs, tmp_path / "d.h5", 1) == whole


def test_a_shard_is_reused_only_for_the_same_files_tables_and_settings(
    sample: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of(sample)[0]
    first = job.members[0]
    assert job.labels is not None
    others = [
        replace(job, settings=replace(SETTINGS, image_size=65)),
        replace(job, settings=replace(SETTINGS, pixel_dtype="uint8")),
        replace(job, settings=replace(SETTINGS, max_pixels=1)),
        replace(job, members=job.members[:-1]),
        replace(job, members=(replace(first, stamp=1), *job.members[1:])),
        replace(job, members=(replace(first, size=1), *job.members[1:])),
        replace(job, labels=(Label(("0 1",)), *job.labels[1:])),
        replace(job, labels=(Label(side=64), *job.labels[1:])),
        replace(job, labels=(Label(file=first), *job.labels[1:])),
        replace(job, labels=None),
        replace(job, patients=("Doe", *job.patients[1:])),
    ]
    names = {job.name, *(other.name for other in others)}
    assert len(names) == 1 + len(others)
    assert replace(job, root=tmp_path).name == job.name
    monkeypatch.setenv("PNEUMO_PATIENT_SALT", "ward 7")
    assert job.name not in names


def test_what_cannot_be_used_is_reported_with_its_reason(sample: dict[str, Path], tmp_path: Path) -> None:
    job = jobs_of(sample)[0]
    folder = linked(sample, tmp_path / "files", [member.name for member in job.members])
    broken, odd, tall, twice = (member.image_id for member in job.members)
    damaged = folder / job.members[0].name
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:5000])
    labels = dict(zip((m.image_id for m in job.members), job.labels or (), strict=True))
    labels |= {odd: Label(("5 6 7",)), tall: Label(("1048570 10",)), twice: Label(("0 10", "5 10"))}
    jobs = make_jobs(folder, SETTINGS, open_archive(folder).members, labels, {})
    found = {result.image_id: result for result in results(jobs, tmp_path, 1)}
    assert [result.packed is None for result in found.values()] == [True, True, True, False]
    assert "truncated" in found[broken].reason
    assert found[odd].reason.startswith("odd number of run lengths (3)")
    assert found[tall].reason.startswith("run lengths reach pixel 1048580 of an image with 1048576")
    assert [found[name].invalid_run_lengths for name in (broken, odd, tall)] == [False, True, True]
    assert [name for name, result in found.items() if result.overlapping] == [twice]
    packed = found[twice].packed
    assert packed is not None
    assert (packed.rle, packed.entry.area_px, packed.entry.annotations) == ("0 15", 15, 2)


def linked(sample: dict[str, Path], folder: Path, names: list[str]) -> Path:
    """A folder with links to these radiographs of the sample."""
    folder.mkdir()
    for name in names:
        (folder / name).hardlink_to(sample["dicom_dir"] / name)
    return folder


CRASHING = """
import os, signal, sys

sys.path.remove(os.path.dirname(__file__))
del sys.modules[__name__]
import imagecodecs

imagecodecs.jpegls_decode = lambda *_, **__: os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_file_that_ends_its_worker_is_rejected_and_the_rest_goes_on(
    sample: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(sample)
    culprit = jobs[1].members[1]
    folder = linked(sample, tmp_path / "files", [member.name for job in jobs for member in job.members])
    header = pydicom.dcmread(folder / culprit.name)
    header.PixelData = encapsulate([jpeg_ls.encode(header.pixel_array).tobytes()])
    header.file_meta.TransferSyntaxUID = JPEGLSLossless
    (folder / culprit.name).unlink()
    header.save_as(folder / culprit.name)
    # A decoder that crashes as a C library does; the workers find it first on their path.
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash" / "imagecodecs.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path / "crash")
    for decoder in decoders():  # an idle one, of an earlier test, has the right module
        decoder.kill()
    jobs = make_jobs(folder, SETTINGS, open_archive(folder).members, None, {})
    found = list(results(jobs, tmp_path, 2))
    assert [result.image_id for result in found] == [m.image_id for job in jobs for m in job.members]
    reasons = [result.reason for result in found if result.packed is None]
    assert reasons == ["its decoder crashed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=soak)])
def test_a_worker_ended_from_outside_is_an_error_and_the_rest_is_kept(
    number: signal.Signals, sample: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(sample)
    called = list[str]()

    def call_and_kill(decoder: Any, request: Request) -> Message | Rejected:
        called.append(request.image_id)
        if len(called) == FILES_PER_SHARD + 3:
            for process in decoders():
                process.send_signal(number)
        return call(decoder, request)

    call = decoder_pool._Decoder.call
    monkeypatch.setattr(decoder_pool._Decoder, "call", call_and_kill)
    with pytest.raises(UserError, match=r"workers: a worker process was killed.*set fewer workers"):
        list(results(jobs, tmp_path, 1))
    assert [is_finished(job, tmp_path) for job in jobs] == [True, False, False]
    assert len(list(results(jobs, tmp_path, 2))) == IMAGES
    assert all(is_finished(job, tmp_path) for job in jobs)


def test_a_file_that_ended_its_worker_and_cannot_be_read_again_is_rejected(
    sample: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> bytes:
        raise Rejected("cannot be read (Input/output error)")

    crashed = Crashed("its decoder crashed", "", -signal.SIGSEGV)
    monkeypatch.setattr(decoder_pool._Decoder, "call", lambda *_: crashed)
    monkeypatch.setattr(shards, "read_file", reject)
    found = list(results(jobs_of(sample)[-1:], tmp_path, 1))
    assert {(result.content, result.reason) for result in found} == {("", "its decoder crashed")}


def test_a_file_that_vanishes_ends_the_work_with_its_name(sample: dict[str, Path], tmp_path: Path) -> None:
    names = [member.name for job in jobs_of(sample)[:2] for member in job.members]
    folder = linked(sample, tmp_path / "files", names)
    members = open_archive(folder).members
    (folder / members[-1].name).unlink()
    jobs = make_jobs(folder, SETTINGS, members, None, {})
    with pytest.raises(UserError, match=rf"{members[-1].image_id}: the file disappeared during the run"):
        list(results(jobs, tmp_path, 1))
    assert [is_finished(job, tmp_path) for job in jobs] == [True, False]
