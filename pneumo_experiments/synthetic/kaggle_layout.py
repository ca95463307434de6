"""Writes a synthetic data set in the layout of the SIIM-ACR task on Kaggle.

dicom-images-train/<study>/<series>/<UID>.dcm    dicom-images-test/ID_xxxxxxxxx.dcm
train-rle.csv                                    sample.json (its settings)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo_experiments.dataset import rle
from pneumo_experiments.dicom.limits import ENVIRONMENT, available_cores
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import writing
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.spawning import without_main
from pneumo_experiments.synthetic.anatomy import build
from pneumo_experiments.synthetic.radiographs import draw_radiograph

FORMAT = 1  # increase it when a seed gives different bytes than before
POSITIVE_FRACTION = 0.3
IMAGES_PER_PATIENT = (0.55, 0.25, 0.12, 0.08)  # fraction of the patients with 1, 2, 3, 4 images
# (annotations, overlapping): every fourth positive takes the next of these
MULTIPLE_ANNOTATIONS = ((2, True), (2, False), (3, True), (3, False))
SERIAL_IMAGES = 20  # up to this number, starting worker processes takes longer than writing
JPEG_QUALITY = 88
OUR_UID = UID("2.25.226184077938124406379519113107846412253")  # of the program that wrote the files

PLAN, PATIENT, IMAGE = 1, 2, 3  # random streams under one seed


@dataclass(frozen=True)
class Plan:
    """Content of one file; ``number`` counts training images first."""

    number: int
    test: bool
    patient: int
    sex: str
    age: int
    view: str
    annotations: int
    overlap: bool


def write_sample(
    folder: Path,
    images: int,
    test_images: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> bool:
    """Writes the data set to a new or empty folder, all or nothing; calls ``progress`` once per image.

    A seed gives the same bytes for any number of workers (None: chosen by the number of images). Waits for
    another process that writes the folder; returns False if that process has written the same data set.
    Raises UserError if the folder is not empty, is the working directory or above it, or cannot be written.
    """
    target, settings = folder.resolve(), _settings(images, test_images, seed)
    _check_overwrite(folder)
    if Path.cwd().is_relative_to(target):
        raise UserError(f"{folder}: is the working directory or above it; name a new folder")
    part = target.with_name(target.name + ".part")
    waiting = f"sample: another process writes {folder}; waiting until it ends"
    with writing(str(folder)), work_folder(part, waiting):
        if is_sample(folder, images, test_images, seed):
            return False
        _check_overwrite(folder)
        try:
            for name in ("dicom-images-train", "dicom-images-test"):
                shutil.rmtree(part / name, ignore_errors=True)  # leftovers of a killed process
                (part / name).mkdir()
            lines = ["ImageId, EncodedPixels"]
            for image_id, texts in _write_images(part, plan(images, test_images, seed), seed, workers):
                lines += [f"{image_id}, {text}" for text in texts]
                progress()
            (part / "train-rle.csv").write_bytes(("\n".join(lines) + "\n").encode("ascii"))
            (part / "sample.json").write_bytes((json.dumps(settings, indent=2) + "\n").encode("ascii"))
            if target.exists():
                target.rmdir()
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        (folder / LOCK).unlink()  # last, since a waiting process would take over an unlocked folder
        return True


def _check_overwrite(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; remove it or name another one")


def is_sample(folder: Path, images: int, test_images: int, seed: int) -> bool:
    """Whether the folder contains the complete data set that ``write_sample`` writes for these settings."""
    try:
        return json.loads((folder / "sample.json").read_bytes()) == _settings(images, test_images, seed)
    except (OSError, ValueError):
        return False


def plan(images: int, test_images: int, seed: int) -> list[Plan]:
    """Content of each file; no patient has both training and test images."""
    rng = np.random.default_rng([seed, PLAN])
    plans = list[Plan]()
    for test, count in ((False, images), (True, test_images)):
        patient = plans[-1].patient + 1 if plans else 0
        findings = _findings(count, rng)
        while findings:
            sex, age = str(rng.choice(["F", "M"], p=[0.45, 0.55])), int(np.clip(rng.normal(48, 17), 12, 92))
            for _ in range(min(len(findings), rng.choice(4, p=IMAGES_PER_PATIENT) + 1)):
                view = str(rng.choice(["PA", "AP"], p=[0.6, 0.4]))
                plans.append(Plan(len(plans), test, patient, sex, age, view, *findings.pop()))
            patient += 1
    return plans


def _findings(count: int, rng: np.random.Generator) -> list[tuple[int, bool]]:
    """Number of annotations and whether they overlap, for ``count`` images in random order."""
    positives = [
        MULTIPLE_ANNOTATIONS[k // 4 % len(MULTIPLE_ANNOTATIONS)] if k % 4 == 1 else (1, False)
        for k in range(round(POSITIVE_FRACTION * count))
    ]
    findings = positives + [(0, False)] * (count - len(positives))
    return [findings[k] for k in rng.permutation(count)]


def _settings(images: int, test_images: int, seed: int) -> dict[str, int]:
    return {"format": FORMAT, "images": images, "test_images": test_images, "seed": seed}


def _write_images(
    folder: Path, plans: list[Plan], seed: int, workers: int | None
) -> Iterator[tuple[str, list[str]]]:
    """Writes the files; image id and run-length texts of each, in order."""
    write = partial(_write_image, folder, seed)
    if workers is None:
        workers = available_cores() if len(plans) >= SERIAL_IMAGES else 1
    if workers == 1:
        yield from map(write, plans)
        return
    with _worker_pool(workers) as pool:
        yield from pool.map(write, plans, chunksize=4)


def _write_image(folder: Path, seed: int, plan: Plan) -> tuple[str, list[str]]:
    """Write one DICOM file; its image id and its rows of the CSV (none for a test image)."""
    rng = np.random.default_rng([seed, IMAGE, plan.number])
    patient_rng = np.random.default_rng([seed, PATIENT, plan.patient])
    patient_id = str(_uuid(patient_rng))
    study, series, uid = (UID(f"2.25.{_uuid(rng).int}") for _ in range(3))
    person, annotations = build(patient_rng, plan.sex), plan.annotations
    radiograph = draw_radiograph(
        rng, person, plan.view, plan.sex, annotations=annotations, overlap=plan.overlap
    )
    if plan.test:
        image_id = f"ID_{rng.integers(16**9):09x}"
        path = folder / "dicom-images-test" / f"{image_id}.dcm"
    else:
        image_id = uid
        path = folder / "dicom-images-train" / study / series / f"{uid}.dcm"
        path.parent.mkdir(parents=True)
    _dicom(plan, patient_id, study, series, uid, radiograph.pixels).save_as(path, enforce_file_format=True)
    if plan.test:
        return image_id, []
    return image_id, [rle.encode(mask) for mask in radiograph.annotations] or [rle.EMPTY]


def _uuid(rng: np.random.Generator) -> uuid.UUID:
    return uuid.UUID(bytes=rng.bytes(16), version=4)


def _dicom(
    plan: Plan, patient_id: str, study: UID, series: UID, uid: UID, pixels: NDArray[np.uint8]
) -> Dataset:
    """The tags of the real files, with a synthetic patient."""
    jpeg = BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    meta.ImplementationClassUID = OUR_UID
    meta.ImplementationVersionName = "PNEUMO_SAMPLE"
    file = Dataset()
    file.file_meta = meta
    file.SpecificCharacterSet = "ISO_IR 100"
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, uid
    file.StudyInstanceUID, file.SeriesInstanceUID = study, series
    file.StudyDate, file.StudyTime, file.AccessionNumber, file.StudyID = "19010101", "000000.00", "", ""
    file.Modality, file.ConversionType, file.BodyPartExamined = "CR", "WSD", "CHEST"
    file.SeriesDescription, file.ViewPosition = f"view: {plan.view}", plan.view
    file.SeriesNumber, file.InstanceNumber, file.PatientOrientation = 1, 1, ""
    file.ReferringPhysicianName = ""
    file.PatientName, file.PatientID, file.PatientBirthDate = patient_id, patient_id, ""
    file.PatientSex = plan.sex
    # SIIM writes 62 where the standard wants 062Y.
    file["PatientAge"] = DataElement("PatientAge", "AS", str(plan.age), validation_mode=config.IGNORE)
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelSpacing = [0.143, 0.143]
    file.LossyImageCompression, file.LossyImageCompressionMethod = "01", "ISO_10918_1"
    file.PixelData = encapsulate([jpeg.getvalue()])
    file["PixelData"].VR = "OB"
    return file


@contextmanager
def _worker_pool(workers: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, even after kill -9; an exception in the block kills them."""
    # Spawned, since fork is not safe when the caller has threads.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _initialise_worker)
    others = set(active_children())
    saved = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # inherited by the workers
    try:
        _start(executor, workers)
        yield executor
    except BaseException:
        # They would finish what they have begun.
        for process in set(active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(executor: ProcessPoolExecutor, workers: int) -> None:
    """Starts the workers with SIGINT ignored: Ctrl-C reaches all processes, only the parent handles it."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        with without_main():
            for _ in range(workers):
                executor.submit(os.getpid)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _initialise_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without this, workers of a parent killed by -9 would wait for work forever.
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
