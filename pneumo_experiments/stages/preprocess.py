"""Entry point ``preprocess``: DICOM files and run lengths to one HDF5 data set, with a report on them."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pneumo_experiments import tracking
from pneumo_experiments.data_report.report import build_report, log_existing_report, write_report
from pneumo_experiments.data_report.statistics import Report
from pneumo_experiments.data_report.summary import plural
from pneumo_experiments.dataset.annotations import (
    ANNOTATIONS,
    FILE_NAMES,
    match_ids,
    read_annotations,
    read_file_names,
    read_table,
)
from pneumo_experiments.dataset.hdf5 import Dataset, DatasetWriter
from pneumo_experiments.dataset.labels import Label, run_length_labels
from pneumo_experiments.dataset.packed import salted
from pneumo_experiments.dataset.patients import (
    SOURCES,
    Grouping,
    count_sources,
    describe_sources,
    make_grouping,
    source_of,
    warn,
    warn_about_grouping,
)
from pneumo_experiments.dataset.shards import FileResult, ShardSettings, is_finished, make_jobs, results
from pneumo_experiments.dicom.archive import Archive, open_archive
from pneumo_experiments.dicom.containers import DicomFile, read_file
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.errors import Rejected, UserError, reason_of
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.progress_bar import ProgressBar
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
    "rle_size": "rle_size",
    "masks": "masks",
}


@dataclass(frozen=True)
class PreprocessInputs:
    """Everything that determines the data set; ``members`` are the files to read."""

    archive: Archive
    labels: dict[str, Label] | None
    patients: Grouping
    members: tuple[DicomFile, ...]
    recorded: dict[str, str]

    @property
    def stamp(self) -> str:
        """Digest that changes with the size or modification time of a file, and the place of a mask."""
        labels = self.labels or {}
        masks = {image_id: f" {label.key}" for image_id, label in labels.items() if label.file}
        return _digest(f"{m.image_id} {m.size} {m.stamp}{masks.get(m.image_id, '')}" for m in self.members)


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
    source = settings.source
    if source.dicom_dir is None:
        raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
    texts, names, digest = None, dict[str, tuple[str, bool]](), NONE
    if source.rle_csv is not None:
        content = read_table(source.rle_csv, ANNOTATIONS if source.masks_dir is None else FILE_NAMES)
        digest = hashlib.sha256(content).hexdigest()
        if source.masks_dir is None:
            texts = read_annotations(source.rle_csv, content)
        else:
            names = read_file_names(source.rle_csv, content)
    if source.masks_dir is not None and source.masks_dir.resolve() == source.dicom_dir.resolve():
        raise UserError("masks_dir: is dicom_dir; name the folder that holds the masks alone")
    new_names = {name: image_id for name, (image_id, _) in names.items()}
    try:
        archive = open_archive(
            source.dicom_dir, source.image_id, texts or names, other=source.masks_dir, names=new_names
        )
    except UserError as error:
        raise UserError(f"dicom_dir={error}") from None
    labels = None
    if source.masks_dir is not None:
        labels = _mask_labels(archive, source.masks_dir, names)
    elif texts is not None:
        labels = run_length_labels(match_ids(texts, archive.image_ids), source.rle_size)
        if not archive.image_ids & set(labels):
            raise UserError(
                f"rle_csv={source.rle_csv}: names none of the {len(archive.image_ids)} files in"
                f" {source.dicom_dir}; name a table and a folder that belong together"
            )
    members = tuple(m for m in archive.members if labels is None or m.image_id in labels)
    patients = make_grouping(source.patients_csv, [member.image_id for member in members])
    recorded = {
        "image_size": str(settings.format.image_size),
        "pixel_dtype": settings.format.pixel_dtype,
        "max_pixels": str(settings.reading.max_pixels),
        "rle_csv": digest,
        "patients_csv": patients.digest,
        "salt": salted("salt"),
    }
    if source.rle_size:
        recorded["rle_size"] = str(source.rle_size)
    if source.masks_dir is not None:
        recorded["masks"] = "files"
    return PreprocessInputs(archive, labels, patients, members, recorded)


def _mask_labels(
    archive: Archive, masks_dir: Path, names: Mapping[str, tuple[str, bool]]
) -> dict[str, Label]:
    """The labels of the images that have a mask file, or that a table says to have no pneumothorax.

    A mask has its image's id as its path below the folder, or else as its name, whatever the folder.
    """
    if not masks_dir.exists():
        raise UserError(
            f"masks_dir={masks_dir}: no such file or folder; name the folder that holds the masks"
        )
    try:
        masks = open_archive(masks_dir, "path")
    except UserError as error:
        raise UserError(f"masks_dir={error}") from None
    presences, by_name = dict(names.values()), defaultdict[str, list[DicomFile | None]](list)
    by_path: dict[str, DicomFile | None] = {member.image_id: member for member in masks.members}
    by_path |= dict.fromkeys(masks.differing)
    for path, member in by_path.items():
        stem = PurePosixPath(path).name
        by_name[names[stem][0] if stem in names else stem].append(member)
    labels, left_out = dict[str, Label](), list[str]()
    for image_id in (member.image_id for member in archive.members):
        found = [by_path[image_id]] if image_id in by_path else by_name[image_id]
        presence = presences.get(image_id)
        if len(found) == 1 and found[0] is not None:
            labels[image_id] = Label(root=masks.root, file=found[0], presence=presence)
        elif not found and presence is False:
            labels[image_id] = Label(presence=False)
        elif found or presence:
            left_out.append(image_id)
    with_mask = sum(label.file is not None for label in labels.values())
    if not with_mask or with_mask < len(left_out):
        raise UserError(
            f"masks_dir={masks_dir}: holds the mask of {with_mask} of {len(archive.members)} images; masks"
            " are named like their images, one for each"
        )
    if left_out:
        warn(
            f"masks_dir={masks_dir}: left out because has_pneumo is 1 and there is no mask, or because there"
            f" are several: {plural(len(left_out), 'image')}, such as {left_out[0]}"
        )
    return labels


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
        _describe_difference(name, str(recorded.get(name)), str(inputs.recorded.get(name)))
        for name in RECORDED_INPUTS
        if recorded.get(name) != inputs.recorded.get(name)
    ]
    # Copied or touched files have other stamps; only their content decides.
    if (
        not differences
        and recorded.get("stamp") != inputs.stamp
        and recorded.get(FILES) != _hash_contents(inputs, settings.reading.max_pixels)
    ):
        differences = ["other DICOM files" if settings.source.masks_dir is None else "other images or masks"]
    return differences


def _hash_contents(inputs: PreprocessInputs, max_pixels: int) -> str:
    """Digest of the contents of all files."""

    def file_sha256(root: Path | None, member: DicomFile | None) -> str:
        try:
            if root is None or member is None:
                return ""
            return hashlib.sha256(read_file(root, member, max_pixels)).hexdigest()
        except Rejected:
            return ""

    def lines() -> Iterator[str]:
        with ProgressBar("compare", len(inputs.members), "file") as bar:
            for member in inputs.members:
                label = (inputs.labels or {}).get(member.image_id) or Label()
                content = file_sha256(inputs.archive.root, member) + file_sha256(label.root, label.file)
                yield f"{member.image_id} {content}"
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
            for leftover in work.glob("*.part"):
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
        inputs.archive.root, shard_settings, inputs.members, inputs.labels, inputs.patients.hashes
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
            labelled=inputs.labels is not None,
            work=work,
        ) as writer,
        ProgressBar("preprocess", total, finished=finished, is_kept=True) as bar,
    ):
        for result in results(jobs, work, settings.reading.workers or available_cores()):
            processed.append(result.without_chunks())
            bar.update(len(processed) > finished)
            if result.packed is not None:
                writer.append(result.packed)
        report = build_report(inputs.archive, inputs.labels, inputs.patients, processed)
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
    masks = settings.source.masks_dir
    culprit = f"dicom_dir={settings.source.dicom_dir}" + (f", masks_dir={masks}" if masks else "")
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
