"""What the model finds in a folder: the submission, a table of findings, overlays, DICOM objects."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.dataset.decoder_pool import read_files
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.dicom.archive import DIFFERING_FILES, FILE_NAME, Archive, open_archive
from pneumo_experiments.dicom.header import side_of
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.dicom.segmentation import Segment, write_segmentation
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.figures import overlay
from pneumo_experiments.files import SUFFIX, file_name, write_atomically, writing
from pneumo_experiments.findings.submission import check_overwrite, write_submission, write_table
from pneumo_experiments.findings.submission_check import mask_warnings, sample_images
from pneumo_experiments.learning.loader import prefetch
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, Finding
from pneumo_experiments.settings import Score
from pneumo_experiments.words import EXAMPLES, plural

TABLE = "findings.csv"
COLUMNS = ("image_id", "presence", "area_px", "area_mm2", "spacing", "side", "rle", "error")
OVERLAYS, SEGMENTATIONS = "overlays", "segmentations"  # folders below the table's
THREADS = min(4, available_cores())  # that draw and write
MAX_NAME_BYTES = 200  # of an image id in a file name
SIDES = {"right": "right side", "left": "left side", "both": "both sides", "": "side unknown"}
PNG_LEVEL = 1  # a third of the usual time for a fifth more bytes


@dataclass(frozen=True)
class Row:
    """The table's line of one image; an image that could not be read has only an error."""

    image_id: str
    presence: float | None = None
    cells: tuple[str, ...] = ("",) * 4  # area_px to side
    rle: str = ""
    error: str = ""
    written: tuple[str, ...] = ()  # files below the table's folder, the overlay first
    covered: float = 0.0  # fraction of the image

    @property
    def is_rejected(self) -> bool:
        """Whether the image could not be read."""
        return self.presence is None

    def texts(self) -> tuple[str, ...]:
        """The texts of ``COLUMNS``."""
        presence = "" if self.presence is None else f"{self.presence:.6g}"
        return (self.image_id, presence, *self.cells, self.rle, self.error)


@dataclass(frozen=True)
class FolderFindings:
    """What was found in a folder, and written."""

    settings: Score
    folder: Path
    rows: list[Row]
    pictures: dict[str, NDArray[np.uint8]]  # by name: overlays of the highest presence, RGB (h, w, 3)
    notes: list[str]  # about the folder
    warnings: list[str]  # about the masks

    @property
    def files(self) -> tuple[Path, Path]:
        """Submission and table."""
        return self.settings.submission, self.settings.findings / TABLE

    @property
    def counts(self) -> dict[str, int]:
        """The number of images, and of those that could not be read and that have a finding."""
        positives = sum(bool(row.written) for row in self.rows)
        return {"images": len(self.rows), "rejected": len(self._rejected), "masks": positives}

    @property
    def failure(self) -> str:
        """That more than max_rejected of the images could not be read; else empty."""
        if len(self._rejected) <= self.settings.max_rejected * len(self.rows):
            return ""
        of_all = f"{len(self._rejected)} of {plural(len(self.rows), 'image')}"
        return (
            f"dicom_dir={self.folder}: {of_all} could not be read, more than"
            f" max_rejected={self.settings.max_rejected:g}; all files are written;"
            f" the first: {self._rejected[0]}"
        )

    def description(self, model_text: str) -> str:
        """For the run."""
        images, rejected, positives = self.counts.values()
        first = f"{plural(images, 'image')} from {self.folder}, by {model_text}: {positives} with a finding."
        return "\n".join([first, f"{rejected} could not be read.", *(f"{each}." for each in self.warnings)])

    @property
    def lines(self) -> list[str]:
        """For the terminal."""
        images, rejected, positives = self.counts.values()
        submission, table = self.files
        no_object = [row.error for row in self.rows if row.error and not row.is_rejected]
        count = plural(positives - len(no_object), "DICOM Segmentation")
        objects = f" and {count}" if self.settings.dicom_seg else ""
        return [
            *self.notes,
            *(f"submitted as empty: {error}" for error in self._rejected[:EXAMPLES]),
            *no_object[:EXAMPLES],
            f"{plural(images, 'image')} in {submission}, {rejected} could not be read",
            f"{positives} with a finding: {table}, overlays{objects} beside it",
            *self.warnings,
        ]

    @property
    def _rejected(self) -> list[str]:
        return [row.error for row in self.rows if row.is_rejected]


def write_findings(settings: Score, detector: Detector, folder: Path, model_text: str) -> FolderFindings:
    """Writes what the detector finds in a folder or zip file; UserError, and no file, if none can be read."""
    wanted = sample_images(settings.sample_submission)
    archive = open_archive(folder, settings.image_id, wanted or ())
    order = sorted(archive.image_ids) if wanted is None else wanted
    if missing := [image_id for image_id in order if image_id not in archive.image_ids]:
        raise UserError(
            f"dicom_dir={folder}: {len(missing):,} of {plural(len(order), 'image')} of"
            f" {settings.sample_submission} have no file, such as {missing[0]}; name the folder with all test"
            " images"
        )
    rows = list[Row]()

    def submitted() -> Iterator[tuple[str, str]]:
        """The submission's lines, predicted when its file is open; fills ``rows``."""
        predicted = {row.image_id: row for row in _rows(settings, detector, archive, {*order}, model_text)}
        rows.extend(predicted[image_id] for image_id in order)
        if all(row.is_rejected for row in rows):
            raise UserError(f"dicom_dir={folder}: no file can be used; the first: {rows[0].error}")
        yield from ((row.image_id, row.rle) for row in rows)

    notes = [] if archive.identified_by == FILE_NAME else [f"the id of an image is {archive.identified_by}"]
    if others := len(archive.image_ids) - len(order):
        notes.append(f"not in {settings.sample_submission}, left out: {plural(others, 'image')} of {folder}")
    findings = settings.findings
    check_findings_folder(findings)
    with ExitStack() as stack:
        with writing(f"findings={findings}"):
            waiting = f"score: another process writes {findings}; waiting until it ends"
            stack.enter_context(work_folder(findings, waiting))
        write_submission(settings.submission, submitted())
        write_table(findings / TABLE, COLUMNS, (row.texts() for row in rows))
        _remove_others(findings, {name for row in rows for name in row.written})
        pictures = _pictures(findings, rows, settings.overlays)
    covered = [row.covered for row in rows if not row.is_rejected]
    warnings = mask_warnings(covered, {"in training": detector.prevalence})
    return FolderFindings(settings, folder, rows, pictures, notes, warnings)


def check_findings_folder(folder: Path) -> None:
    """Raises UserError when ``folder`` holds anything that ``write_findings`` did not write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"findings={folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise UserError(f"findings={folder}: exists and was not created by score; name another folder")
    check_overwrite(folder / TABLE)


def _rows(
    settings: Score, detector: Detector, archive: Archive, wanted: Collection[str], model_text: str
) -> Generator[Row]:
    """The row of each image in the order of reading; writes overlays and DICOM objects."""
    for image_id in archive.differing:
        if image_id in wanted:
            yield Row(image_id, error=f"{image_id}: {DIFFERING_FILES}")
    members = [member for member in archive.members if member.image_id in wanted]
    parameters = {"model": hide_passwords(model_text)}
    parameters |= {name: f"{value:g}" for name, value in asdict(detector.thresholds).items()}

    def describe(finding: Finding) -> Row:
        with writing(f"findings={settings.findings}"):
            return _describe(finding, settings.findings, parameters if settings.dicom_seg else None)

    files = read_files(archive.root, members)
    bar = ProgressBar("score", len(members), is_kept=True)
    with bar, closing(detector.detect_each(files, with_source=settings.dicom_seg)) as findings:
        for row in prefetch(describe, findings, THREADS):
            bar.update()
            yield row


def _describe(finding: Finding, folder: Path, parameters: Mapping[str, str] | None) -> Row:
    """The row of an image; writes its overlay and, with ``parameters``, the DICOM object."""
    mask, geometry = finding.mask, finding.geometry
    if mask is None or geometry is None or finding.pixels is None:
        return Row(finding.image_id, error=finding.error)
    area_px, rle = int(np.count_nonzero(mask)), encode(mask)
    area_mm2, side = geometry.area_mm2(area_px), side_of(mask, geometry.left_edge)
    cells = (str(area_px), "" if area_mm2 is None else f"{area_mm2:.1f}", geometry.spacing, side)
    if not area_px:
        return Row(finding.image_id, finding.presence, cells, rle)
    # The id last: one too long for the picture is cut, and the file's name has it as well.
    caption = f"{SIDES[side]}, presence {finding.presence:.2f}, {area_px:,} px: {finding.image_id}"
    picture = Image.fromarray(overlay(finding.pixels, None, mask, caption))
    name, error = _disk_name(finding.image_id), ""
    written = [f"{OVERLAYS}/{name}.png"]
    (folder / OVERLAYS).mkdir(exist_ok=True)
    with write_atomically(folder / written[0]) as temporary:
        picture.save(temporary, "PNG", compress_level=PNG_LEVEL)
    if parameters is not None:
        path = f"{SEGMENTATIONS}/{name}.dcm"
        (folder / SEGMENTATIONS).mkdir(exist_ok=True)
        try:
            segment = Segment(finding.image_id, mask, finding.source or {})
            write_segmentation(folder / path, segment, parameters)
            written.append(path)
        except Rejected as reason:
            error = str(reason)
    covered = area_px / mask.size
    return Row(finding.image_id, finding.presence, cells, rle, error, tuple(written), covered)


def _pictures(folder: Path, rows: list[Row], count: int) -> dict[str, NDArray[np.uint8]]:
    """The overlays with the highest presence, by name, the highest first."""
    ranked = sorted((row for row in rows if row.written), key=lambda row: (row.presence, row.image_id))
    chosen = enumerate(ranked[::-1][:count], start=1)
    names = {f"{OVERLAYS}/{place:02}-{file_name(row.image_id)}.png": row.written[0] for place, row in chosen}
    return {name: np.asarray(Image.open(folder / file)) for name, file in names.items()}


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
