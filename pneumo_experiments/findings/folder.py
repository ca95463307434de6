"""What ``score`` leaves of a folder: the submission, a table of findings, overlays, DICOM objects."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments import tracking
from pneumo_experiments.dataset.decoder_pool import read_files
from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.dicom.archive import DIFFERING_FILES, FILE_NAME, Archive, open_archive
from pneumo_experiments.dicom.header import side_of
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.dicom.segmentation import Segment, write_segmentation
from pneumo_experiments.errors import Rejected, UserError, reason_of
from pneumo_experiments.evaluation.report import file_name
from pneumo_experiments.figures import overlay
from pneumo_experiments.files import SUFFIX, write_atomically
from pneumo_experiments.findings.submission import refuse_to_replace, write_submission, write_table
from pneumo_experiments.findings.submission_check import expected_images, mask_warnings
from pneumo_experiments.learning.loader import prefetch
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, Finding
from pneumo_experiments.settings import Score

TABLE = "findings.csv"
COLUMNS = ("image_id", "presence", "area_px", "area_mm2", "spacing", "side", "rle", "error")
OVERLAYS, SEGMENTATIONS = "overlays", "segmentations"  # folders below the table's
THREADS = min(4, available_cores())  # that draw and write
MAX_NAME_BYTES = 200  # of an image id in a file name
SIDES = {"right": "right side", "left": "left side", "both": "both sides", "": "side unknown"}
PNG_LEVEL = 1  # a third of the usual time for a fifth more bytes
EXAMPLES = 3


@dataclass(frozen=True)
class Row:
    """The table's line of one image; an image that could not be read has only an error."""

    image_id: str
    presence: float | None = None
    cells: tuple[str, ...] = ("",) * 4  # area_px to side
    rle: str = ""
    error: str = ""
    written: tuple[str, ...] = ()  # files below the table's folder
    covered: float = 0.0  # fraction of the image

    @property
    def is_rejected(self) -> bool:
        """Whether the image could not be read."""
        return self.presence is None

    def texts(self) -> tuple[str, ...]:
        """The texts of ``COLUMNS``."""
        presence = "" if self.presence is None else f"{self.presence:.6g}"
        return (self.image_id, presence, *self.cells, self.rle, self.error)


def write_findings(settings: Score, detector: Detector, folder: Path, model_text: str) -> None:
    """Writes and logs what the detector finds in a folder or zip file.

    Raises UserError, with all files written, if more than ``max_rejected`` of the images cannot be read, and
    without any if none can.
    """
    wanted = expected_images(settings.sample_submission, None)
    archive = open_archive(folder, settings.image_id, wanted or ())
    if archive.identified_by != FILE_NAME:
        print(f"score: the id of an image is {archive.identified_by}")
    order = _order(settings, archive, folder, wanted)
    rows, shown = list[Row](), list[tuple[float, str, NDArray[np.uint8]]]()

    def lines() -> Generator[tuple[str, str]]:
        """The submission's lines, drawn when its file is open; fills ``rows``."""
        place = {image_id: number for number, image_id in enumerate(order)}
        for row, picture in _rows(settings, detector, archive, place, model_text):
            rows.append(row)
            if picture is not None and settings.overlays:
                heapq.heappush(shown, (row.presence or 0.0, row.image_id, picture))
                if len(shown) > settings.overlays:
                    heapq.heappop(shown)
        if all(row.is_rejected for row in rows):
            raise UserError(f"dicom_dir={folder}: no file can be used; the first: {rows[0].error}")
        rows.sort(key=lambda row: place[row.image_id])
        yield from ((row.image_id, row.rle or EMPTY) for row in rows)

    with ExitStack() as stack:
        table = settings.findings / TABLE
        waiting = f"score: another process writes {settings.findings}; waiting until it ends"
        refuse_foreign(settings.findings)
        with _writing(settings.findings):
            stack.enter_context(work_folder(settings.findings, waiting))
        with closing(lines()) as drawn:
            write_submission(settings.submission, drawn)
        write_table(table, COLUMNS, (row.texts() for row in rows))
        _remove_others(settings.findings, {name for row in rows for name in row.written})
        tracking.log_file(settings.submission)
        tracking.log_file(table)
    for place, (_, image_id, picture) in enumerate(sorted(shown, reverse=True), start=1):
        tracking.log_image(picture, f"{OVERLAYS}/{place:02}-{file_name(image_id)}.png")
    _report(settings, rows, folder, model_text, detector.prevalence)


def refuse_foreign(folder: Path) -> None:
    """Raises UserError when ``folder`` holds anything that ``write_findings`` did not write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"findings={folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise UserError(f"findings={folder}: exists and was not created by score; name another folder")
    refuse_to_replace(folder / TABLE)


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"findings={folder}: cannot be written ({reason_of(error)}); make room, or name another folder"
        ) from error


def _order(settings: Score, archive: Archive, folder: Path, wanted: list[str] | None) -> list[str]:
    """The ids of the images to predict, in the order of the submission: those wanted, or all."""
    order = sorted(archive.image_ids) if wanted is None else wanted
    if missing := [image_id for image_id in order if image_id not in archive.image_ids]:
        raise UserError(
            f"dicom_dir={folder}: {len(missing)} of {len(order)} images of {settings.sample_submission} have"
            f" no file, such as {missing[0]}; name the folder with all test images"
        )
    if others := len(archive.image_ids) - len(order):
        print(f"score: {others} images of {folder} are not in {settings.sample_submission}: left out")
    return order


def _rows(
    settings: Score, detector: Detector, archive: Archive, wanted: Mapping[str, int], model_text: str
) -> Generator[tuple[Row, NDArray[np.uint8] | None]]:
    """The row of each image in the order of reading, with its overlay if it has a finding."""
    for image_id in archive.differing:
        if image_id in wanted:
            yield Row(image_id, error=f"{image_id}: {DIFFERING_FILES}"), None
    members = [member for member in archive.members if member.image_id in wanted]
    parameters = {"model": hide_passwords(model_text)}
    parameters |= {name: f"{value:g}" for name, value in asdict(detector.thresholds).items()}

    def describe(finding: Finding) -> tuple[Row, NDArray[np.uint8] | None]:
        with _writing(settings.findings):
            return _describe(finding, settings.findings, parameters if settings.dicom_seg else None)

    files = read_files(archive.root, members)
    bar = ProgressBar("score", len(members), is_kept=True)
    with bar, closing(detector.detect(files, with_source=settings.dicom_seg)) as findings:
        for described in prefetch(describe, findings, THREADS):
            bar.update()
            yield described


def _describe(
    finding: Finding, folder: Path, parameters: Mapping[str, str] | None
) -> tuple[Row, NDArray[np.uint8] | None]:
    """The row of an image, and the overlay; writes that and, with ``parameters``, the DICOM object."""
    mask, geometry = finding.mask, finding.geometry
    if mask is None or geometry is None or finding.pixels is None:
        return Row(finding.image_id, error=finding.error), None
    area_px, rle = int(np.count_nonzero(mask)), encode(mask)
    area_mm2, side = geometry.area_mm2(area_px), side_of(mask, geometry.left_edge)
    cells = (str(area_px), "" if area_mm2 is None else f"{area_mm2:.1f}", geometry.spacing, side)
    if not area_px:
        return Row(finding.image_id, finding.presence, cells, rle), None
    words = [SIDES[side], f"presence {finding.presence:.2f}", f"{area_px:,} px"]
    # The id last: one too long for the picture is cut, and the file's name has it as well.
    picture = overlay(finding.pixels, None, mask, f"{', '.join(words)}: {finding.image_id}")
    name, error = _disk_name(finding.image_id), ""
    written = [f"{OVERLAYS}/{name}.png"]
    for subfolder in (OVERLAYS, SEGMENTATIONS)[: 1 if parameters is None else 2]:
        (folder / subfolder).mkdir(exist_ok=True)
    with write_atomically(folder / written[0]) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", compress_level=PNG_LEVEL)
    if parameters is not None:
        path = f"{SEGMENTATIONS}/{name}.dcm"
        try:
            segment = Segment(finding.image_id, mask, finding.source or {})
            write_segmentation(folder / path, segment, parameters)
            written.append(path)
        except Rejected as reason:
            error = str(reason)
    row = Row(finding.image_id, finding.presence, cells, rle, error, tuple(written), area_px / mask.size)
    return row, picture


def _disk_name(image_id: str) -> str:
    """The image id; if that is a path or too long for a file name, its start and a digest."""
    if len(image_id.encode()) <= MAX_NAME_BYTES and "/" not in image_id:
        return image_id
    digest = hashlib.sha256(image_id.encode()).hexdigest()[:16]
    return f"{image_id[: MAX_NAME_BYTES // 4].replace('/', '_')}-{digest}"


def _remove_others(folder: Path, written: set[str]) -> None:
    """Removes overlays and DICOM objects of earlier runs, and what a killed one left half-written."""
    for name, suffix in ((OVERLAYS, ".png"), (SEGMENTATIONS, ".dcm")):
        for path in [*(folder / name).glob(f"*{suffix}"), *(folder / name).glob(f"*{suffix}.*{SUFFIX}")]:
            if f"{name}/{path.name}" not in written:
                path.unlink(missing_ok=True)


def _report(
    settings: Score, rows: list[Row], folder: Path, model_text: str, prevalence: float | None
) -> None:
    """Tells what was written, and raises UserError if too many images could not be read."""
    rejected = [row.error for row in rows if row.is_rejected]
    left_out = [row.error for row in rows if row.error and not row.is_rejected]
    positives = sum(bool(row.written) for row in rows)
    tracking.log_params({"images": len(rows), "rejected": len(rejected), "positives": positives})
    covered = [row.covered for row in rows if not row.is_rejected]
    warnings = mask_warnings(covered, {"in training": prevalence})
    tracking.describe(
        f"{len(rows)} images from {folder}, by {model_text}: {positives} with a finding.\n"
        f"{len(rejected)} could not be read." + "".join(f"\n{each}." for each in warnings)
    )
    for error in rejected[:EXAMPLES]:
        print(f"score: submitted as empty: {error}")
    for error in left_out[:EXAMPLES]:
        print(f"score: {error}")
    print(f"score: {len(rows)} images in {settings.submission}, {len(rejected)} could not be read")
    objects = f" and {positives - len(left_out)} DICOM Segmentations" if settings.dicom_seg else ""
    print(f"score: {positives} with a finding: {settings.findings / TABLE}, overlays{objects} beside it")
    for warning in warnings:
        print(f"score: {warning}")
    if len(rejected) > settings.max_rejected * len(rows):
        raise UserError(
            f"dicom_dir={folder}: {len(rejected)} of {len(rows)} images could not be read, more than"
            f" max_rejected={settings.max_rejected:g}; all files are written; the first: {rejected[0]}"
        )
