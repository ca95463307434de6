"""Writes a synthetic data set in the layout of the SIIM-ACR task on Kaggle.

dicom-images-train/<study>/<series>/<UID>.dcm    dicom-images-test/ID_xxxxxxxxx.dcm
train-rle.csv                                    sample.json (its settings)
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.decoder_pool import Message, Request, call_all, close_idle
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.files import writing
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.synthetic.anatomy import build
from pneumo_experiments.synthetic.radiographs import draw_radiograph

FORMAT = 1  # increase it when a seed gives different bytes than before
POSITIVE_FRACTION, HARD_POSITIVE_FRACTION = 0.3, 0.22
IMAGES_PER_PATIENT = (0.55, 0.25, 0.12, 0.08)  # fraction of the patients with 1, 2, 3, 4 images
# Of a hard data set. Of the real patients 68% have one image, 15% two, and some 60; a tenth of the ill ones
# have 41% of the positives.
ZIPF, POSITIVE_OF_ILL, MAX_PATIENT_FRACTION = 2.3, 0.6, 0.03
# (annotations, overlapping): every fourth positive takes the next of these
MULTIPLE_ANNOTATIONS = ((2, True), (2, False), (3, True), (3, False))
SERIAL_IMAGES = 20  # up to this number, starting worker processes takes longer than writing
JPEG_QUALITY = 88
OUR_UID = UID("2.25.226184077938124406379519113107846412253")  # of the program that wrote the files

PLAN, PATIENT, IMAGE = 1, 2, 3  # random streams under one seed


class Contents(NamedTuple):
    """What determines a data set."""

    images: int
    test_images: int = 0
    seed: int = 0
    difficulty: Literal["easy", "hard"] = "easy"

    @property
    def settings(self) -> dict[str, int | str]:
        """For ``sample.json``; that of an easy one does not name its difficulty, as it was before."""
        named = {"format": FORMAT, **self._asdict()}
        return {name: value for name, value in named.items() if value != "easy"}


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
    hard: bool


def write_sample(
    folder: Path,
    contents: Contents,
    progress: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> bool:
    """Writes the data set to a new or empty folder, all or nothing; calls ``progress`` once per image.

    The same contents are the same bytes for any number of workers (None: chosen by the number of images).
    Waits for another process that writes the folder; returns False if that one has written the same data set.
    Raises UserError if the folder is not empty, is the working directory or above it, or cannot be written.
    """
    target = folder.resolve()
    _check_overwrite(folder)
    if Path.cwd().is_relative_to(target):
        raise UserError(f"{folder}: is the working directory or above it; name a new folder")
    part = target.with_name(target.name + ".part")
    waiting = f"sample: another process writes {folder}; waiting until it ends"
    with writing(str(folder)), work_folder(part, waiting):
        if is_sample(folder, contents):
            return False
        _check_overwrite(folder)
        try:
            for name in ("dicom-images-train", "dicom-images-test"):
                shutil.rmtree(part / name, ignore_errors=True)  # leftovers of a killed process
                (part / name).mkdir()
            lines = ["ImageId, EncodedPixels"]
            for image_id, texts in _write_images(part, str(folder), contents, workers):
                lines += [f"{image_id}, {text}" for text in texts]
                progress()
            (part / "train-rle.csv").write_bytes(("\n".join(lines) + "\n").encode("ascii"))
            (part / "sample.json").write_bytes(
                (json.dumps(contents.settings, indent=2) + "\n").encode("ascii")
            )
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


def is_sample(folder: Path, contents: Contents) -> bool:
    """Whether the folder contains the complete data set that ``write_sample`` writes."""
    try:
        return json.loads((folder / "sample.json").read_bytes()) == contents.settings
    except (OSError, ValueError):
        return False


def plan(contents: Contents) -> list[Plan]:
    """Content of each file; no patient has both training and test images."""
    rng, hard = np.random.default_rng([contents.seed, PLAN]), contents.difficulty == "hard"
    plans = list[Plan]()
    for test, count in ((False, contents.images), (True, contents.test_images)):
        patient = plans[-1].patient + 1 if plans else 0
        sizes = _patient_sizes(count, rng) if hard else []
        findings = _findings(count, sizes, rng)
        while findings:
            sex, age = str(rng.choice(["F", "M"], p=[0.45, 0.55])), int(np.clip(rng.normal(48, 17), 12, 92))
            size = sizes.pop() if hard else rng.choice(4, p=IMAGES_PER_PATIENT) + 1
            for _ in range(min(len(findings), size)):
                view = str(rng.choice(["PA", "AP"], p=[0.6, 0.4]))
                plans.append(Plan(len(plans), test, patient, sex, age, view, *findings.pop(), hard))
            patient += 1
    return plans


def _patient_sizes(count: int, rng: np.random.Generator) -> list[int]:
    """How many of ``count`` images each patient has in a hard data set."""
    sizes, most = list[int](), max(1, round(MAX_PATIENT_FRACTION * count))
    while left := count - sum(sizes):
        sizes.append(min(left, most, int(rng.zipf(ZIPF))))
    return sizes


def _findings(count: int, sizes: list[int], rng: np.random.Generator) -> list[tuple[int, bool]]:
    """Number of annotations and whether they overlap, for ``count`` images in random order.

    Where patients have these ``sizes``, the positives are those of few patients, rather of large ones.
    """
    fraction = HARD_POSITIVE_FRACTION if sizes else POSITIVE_FRACTION
    positives = [
        MULTIPLE_ANNOTATIONS[k // 4 % len(MULTIPLE_ANNOTATIONS)] if k % 4 == 1 else (1, False)
        for k in range(round(fraction * count))
    ]
    findings = positives + [(0, False)] * (count - len(positives))
    if not sizes:
        return [findings[k] for k in rng.permutation(count)]
    turns = rng.exponential(size=len(sizes)) / np.sqrt(sizes)  # of each patient to be ill
    turn = np.repeat(turns, sizes)
    order = np.lexsort((turn, rng.random(count) > POSITIVE_OF_ILL))
    return [findings[k] for k in np.argsort(order)]


def _write_images(
    folder: Path, place: str, contents: Contents, workers: int | None
) -> Iterator[tuple[str, list[str]]]:
    """Writes the files; image id and run-length texts of each, in order. Errors name the ``place``."""
    plans = plan(contents)
    if workers is None:
        workers = available_cores() if len(plans) >= SERIAL_IMAGES else 1
    if workers == 1:
        for each in plans:
            yield _write_image(folder, contents.seed, each)
        return
    arguments = ((place, folder, contents.seed, each) for each in plans)
    requests = (Request("an image", MAX_PIXELS, 0, _write_in_process, each) for each in arguments)
    try:
        with closing(call_all(requests, workers)) as replies:
            for _, reply in replies:
                if isinstance(reply, Rejected):
                    raise UserError(f"{place}: a process that draws ended; free memory, and run it again")
                yield reply[0]["written"]
    finally:
        close_idle()


def _write_in_process(
    image_id: str, max_pixels: int, place: str, folder: Path, seed: int, plan: Plan
) -> Message:
    with writing(place):
        return {"written": _write_image(folder, seed, plan)}, b""


def _write_image(folder: Path, seed: int, plan: Plan) -> tuple[str, list[str]]:
    """Write one DICOM file; its image id and its rows of the CSV (none for a test image)."""
    rng = np.random.default_rng([seed, IMAGE, plan.number])
    patient_rng = np.random.default_rng([seed, PATIENT, plan.patient])
    patient_id = str(_uuid(patient_rng))
    study, series, uid = (UID(f"2.25.{_uuid(rng).int}") for _ in range(3))
    person, annotations = build(patient_rng, plan.sex), plan.annotations
    radiograph = draw_radiograph(rng, person, plan.view, annotations, plan.overlap, plan.hard)
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
