"""Entry point ``preprocess``: DICOM files and run lengths to one HDF5 data set, with a report on them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.dataset.annotations import ANNOTATIONS, read_annotations, read_table
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.hdf5_writer import DatasetWriter
from pneumo_experiments.dataset.packed import salted
from pneumo_experiments.dataset.patients import Grouping, count_sources, describe_sources, source_of
from pneumo_experiments.dataset.shards import FileResult, ShardSettings, is_finished, make_jobs, results
from pneumo_experiments.dicom.archive import Archive, Member, open_archive, read_member
from pneumo_experiments.dicom.workers import available_cores
from pneumo_experiments.errors import Rejected, UserError, reason_of
from pneumo_experiments.experiment.data_report import build_report, log_existing_report, write_report
from pneumo_experiments.experiment.grouping import SOURCES, make_grouping, warn_about_grouping
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.report.statistics import Report
from pneumo_experiments.report.summary import plural
from pneumo_experiments.settings import NONE, Preprocess

# The inputs that a data set records in its settings, and their names in messages.
FILES = "files"
RECORDED_INPUTS = {
    "image_size": "image_size",
    "pixel_dtype": "pixel_dtype",
    "max_pixels": "max_pixels",
    "rle_csv": "annotations",
    "patients_csv": "patients",
    "salt": "PNEUMO_PATIENT_SALT",
}


@dataclass(frozen=True)
class PreprocessInputs:
    """Everything that determines the data set; ``members`` are the files to read."""

    archive: Archive
    annotations: dict[str, list[str]] | None
    patients: Grouping
    members: tuple[Member, ...]
    recorded: dict[str, str]

    @property
    def stamp(self) -> str:
        """Digest that changes with the size or modification time of a file."""
        return _digest(f"{m.image_id} {m.size} {m.stamp}" for m in self.members)


def preprocess(settings: Preprocess) -> Path:
    """Writes the data set unless it exists, made from the same files and settings; returns its path.

    Continues an interrupted run.
    """
    with tracking.run("preprocess", settings):
        inputs = _read_inputs(settings)
        if _is_up_to_date(settings, inputs) and not _work_folder(settings).exists():
            print(f"preprocess: {settings.dataset} exists already, from the same files and settings")
            log_existing_report(settings.dataset)
        else:
            _write(settings, inputs)
        _describe(settings.dataset, inputs.patients)
    return settings.dataset


def _read_inputs(settings: Preprocess) -> PreprocessInputs:
    if settings.source.dicom_dir is None:
        raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
    annotations, digest = None, NONE
    if settings.source.rle_csv is not None:
        content = read_table(settings.source.rle_csv, ANNOTATIONS)
        annotations, digest = (
            read_annotations(settings.source.rle_csv, content),
            hashlib.sha256(content).hexdigest(),
        )
    try:
        archive = open_archive(settings.source.dicom_dir, settings.source.image_id, annotations or ())
    except UserError as error:
        raise UserError(f"dicom_dir={error}") from None
    if annotations is not None and not archive.image_ids & set(annotations):
        raise UserError(
            f"rle_csv={settings.source.rle_csv}: names none of the {len(archive.image_ids)} files in"
            f" {settings.source.dicom_dir}; name a table and a folder that belong together"
        )
    members = tuple(m for m in archive.members if annotations is None or m.image_id in annotations)
    patients = make_grouping(settings.source.patients_csv, [member.image_id for member in members])
    recorded = {
        "image_size": str(settings.format.image_size),
        "pixel_dtype": settings.format.pixel_dtype,
        "max_pixels": str(settings.reading.max_pixels),
        "rle_csv": digest,
        "patients_csv": patients.digest,
        "salt": salted("salt"),
    }
    return PreprocessInputs(archive, annotations, patients, members, recorded)


def _is_up_to_date(settings: Preprocess, inputs: PreprocessInputs) -> bool:
    """Whether the data set exists with these inputs; UserError for another one without ``overwrite``."""
    path = settings.dataset
    if not path.exists():
        return False
    try:
        with Dataset.open(path) as dataset:
            differences = _differences(dataset.settings, settings, inputs)
            if not differences:
                dataset.verify()
    except UserError as error:
        if settings.overwrite:
            print(f"preprocess: overwriting: {error}")
            return False
        raise
    if differences and not settings.overwrite:
        raise UserError(
            f"dataset={path}: was made with {', '.join(differences)};"
            " overwrite=true replaces it, another dataset=… keeps it"
        )
    return not differences


def _differences(recorded: Mapping[str, str], settings: Preprocess, inputs: PreprocessInputs) -> list[str]:
    """How the inputs recorded in an existing data set differ from these; empty if they are the same."""
    differences = [
        _describe_difference(name, str(recorded.get(name)), inputs.recorded[name])
        for name in RECORDED_INPUTS
        if recorded.get(name) != inputs.recorded[name]
    ]
    # Copied or touched files have other stamps; only their content decides.
    if (
        not differences
        and recorded.get("stamp") != inputs.stamp
        and recorded.get(FILES) != _hash_contents(inputs, settings.reading.max_pixels)
    ):
        differences = ["other DICOM files"]
    return differences


def _hash_contents(inputs: PreprocessInputs, max_pixels: int) -> str:
    """Digest of the contents of all files."""

    def file_sha256(member: Member) -> str:
        try:
            return hashlib.sha256(read_member(inputs.archive.root, member, max_pixels)).hexdigest()
        except Rejected:
            return ""

    def lines() -> Iterator[str]:
        with ProgressBar("compare", len(inputs.members), "file") as bar:
            for member in inputs.members:
                yield f"{member.image_id} {file_sha256(member)}"
                bar.update()

    return _digest(lines())


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _describe_difference(name: str, recorded: str, current: str) -> str:
    if name == RECORDED_INPUTS[name]:
        return f"{name} {recorded}, not {current}"
    if name == "patients_csv" and source_of(recorded) != source_of(current):
        return f"patients by {source_of(recorded)}, not by {source_of(current)}"
    return f"other {RECORDED_INPUTS[name]}"


def _write(settings: Preprocess, inputs: PreprocessInputs) -> None:
    """Writes the data set and the report; finished shards stay in the work folder until both are written."""
    path, work = settings.dataset, _work_folder(settings)
    if path.is_dir():
        raise UserError(f"dataset={path}: is a folder; name a file, such as {path / 'dataset.h5'}")
    with ExitStack() as stack:
        try:
            waiting = f"preprocess: another process writes {path}; waiting until it ends"
            waited = stack.enter_context(work_folder(work, waiting))
            nothing_left = {item.name for item in work.iterdir()} == {LOCK}
            if waited and nothing_left and _is_up_to_date(settings, inputs):
                print(f"preprocess: {path} exists already, from the same files and settings")
                log_existing_report(path)
                return
            for leftover in (*work.glob("*.now"), *work.glob("*.part")):
                leftover.unlink(missing_ok=True)
            report = _write_dataset(settings, inputs, work)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({reason_of(error)}); make room or choose another place"
            ) from error
        with Dataset.open(path) as dataset:
            page = write_report(path, report, dataset)
        print(f"preprocess: report: {page}")
        shutil.rmtree(work, ignore_errors=True)


def _write_dataset(settings: Preprocess, inputs: PreprocessInputs, work: Path) -> Report:
    shard_settings = ShardSettings(
        settings.format.image_size, settings.format.pixel_dtype, settings.reading.max_pixels
    )
    jobs = make_jobs(
        inputs.archive.root, shard_settings, inputs.members, inputs.annotations, inputs.patients.hashes
    )
    total, finished = len(inputs.members), sum(len(job.members) for job in jobs if is_finished(job, work))
    if finished:
        print(f"preprocess: continuing: {finished} of {total} files are read already")
    processed = list[FileResult]()
    with (
        DatasetWriter.create(
            settings.dataset,
            image_size=settings.format.image_size,
            pixel_dtype=settings.format.pixel_dtype,
            labelled=inputs.annotations is not None,
            work=work,
        ) as writer,
        ProgressBar("preprocess", total, finished=finished, is_kept=True) as bar,
    ):
        for result in results(jobs, work, settings.reading.workers or available_cores()):
            processed.append(result.without_chunks())
            bar.update(len(processed) > finished)
            if result.packed is not None:
                writer.append(result.packed)
        report = build_report(inputs.archive, inputs.annotations, inputs.patients, processed)
        _refuse_too_many_rejected(settings, report)
        contents = _digest(f"{result.image_id} {result.content}" for result in processed)
        sources = describe_sources(report.patients.sources)
        writer.finish(inputs.recorded | {"stamp": inputs.stamp, FILES: contents, SOURCES: sources})
    return report


def _work_folder(settings: Preprocess) -> Path:
    return settings.dataset.with_name(settings.dataset.name + ".work")


def _refuse_too_many_rejected(settings: Preprocess, report: Report) -> None:
    """Raises UserError if more than max_rejected or all files were rejected; writes the report first."""
    used, rejected = report.outcome.used, report.outcome.rejected
    if used and rejected <= settings.reading.max_rejected * (used + rejected):
        return
    page = write_report(settings.dataset, report, None)
    first = report.rejected[0].files[0]
    culprit = f"dicom_dir={settings.source.dicom_dir}"
    example = f"for example {first.image_id}: {first.reason}; see the report {page}"
    if not used:
        raise UserError(f"{culprit}: no file can be used, {example}")
    raise UserError(
        f"{culprit}: {rejected} of {used + rejected} files are rejected, more than"
        f" max_rejected={settings.reading.max_rejected:g}; {example};"
        " a higher max_rejected continues without them"
    )


def _describe(path: Path, grouping: Grouping) -> None:
    """Logs and prints the numbers of the data set."""
    with Dataset.open(path) as dataset:
        entries, fingerprint = dataset.entries, dataset.fingerprint
        positives = sum(entry.area_px > 0 for entry in entries)
        patients = len({entry.patient for entry in entries})
        tracking.log_dataset(path, fingerprint, "preprocessed")
        tracking.log_params({"images": len(entries), "positives": positives, "patients": patients})
        labels = f"{positives:,} with pneumothorax" if dataset.labelled else "without labels"
        size = dataset.image_size
        sources = describe_sources(count_sources(entries, grouping))
        tracking.log_params({"patients_from": sources})
        warn_about_grouping(dataset)
    images = f"{plural(len(entries), 'image')} of {plural(patients, 'patient')} ({sources})"
    line = f"{images}, {labels}, at {size} px"
    tracking.describe(f"{line}.\nFile {path}, fingerprint {fingerprint[:16]}.")
    print(f"preprocess: {line}: {path}")
