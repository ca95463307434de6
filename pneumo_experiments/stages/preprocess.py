"""Entry point ``preprocess``: DICOM files and run lengths into one HDF5 data set, and a report on them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.annotations import ANNOTATIONS, read_annotations, read_table
from pneumo_experiments.dataset.hdf5 import Dataset, write_dataset
from pneumo_experiments.dataset.packed import Packed, salted
from pneumo_experiments.dataset.patients import Grouping, count_sources, describe_sources, source_of
from pneumo_experiments.dataset.shards import Recipe, Result, is_made, make_jobs, results
from pneumo_experiments.dicom.archive import Archive, Member, open_archive, read_member
from pneumo_experiments.dicom.workers import available_cores
from pneumo_experiments.errors import Rejected, UserError, reason_of
from pneumo_experiments.experiment.data_report import build_report, log_existing_report, write_report
from pneumo_experiments.experiment.grouping import SOURCES, make_grouping, warn_about_grouping
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.report.statistics import Report
from pneumo_experiments.report.summary import many
from pneumo_experiments.settings import NONE, Preprocess

# What a data set was made from, as its file keeps it, and how a difference is called.
FILES = "files"
MADE_FROM = {
    "image_size": "image_size",
    "pixel_dtype": "pixel_dtype",
    "max_pixels": "max_pixels",
    "rle_csv": "the annotations",
    "patients_csv": "the patients",
    "salt": "PNEUMO_PATIENT_SALT",
}


@dataclass(frozen=True)
class Source:
    """Everything that the data set is made from; the members are those that it should hold."""

    archive: Archive
    annotations: dict[str, list[str]] | None
    patients: Grouping
    members: tuple[Member, ...]
    made_from: dict[str, str]

    @property
    def stamp(self) -> str:
        """Changes when a file's size or time of change does."""
        return _digest(f"{m.image_id} {m.size} {m.stamp}" for m in self.members)


def preprocess(settings: Preprocess) -> Path:
    """Writes the data set, or keeps one made from the same files and settings; returns its path.

    What an interrupted run had finished is kept beside the data set and used.
    """
    with tracking.run("preprocess", settings):
        source = _source(settings)
        if _is_there(settings, source) and not _work_folder(settings).exists():
            print(f"preprocess: {settings.dataset} is there already, from the same files and settings")
            log_existing_report(settings.dataset)
        else:
            _write(settings, source)
        _describe(settings.dataset, source.patients)
    return settings.dataset


def _source(settings: Preprocess) -> Source:
    if settings.source.dicom_dir is None:
        raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
    archive = open_archive(settings.source.dicom_dir)
    annotations, digest = None, NONE
    if settings.source.rle_csv is not None:
        content = read_table(settings.source.rle_csv, ANNOTATIONS)
        annotations, digest = (
            read_annotations(settings.source.rle_csv, content),
            hashlib.sha256(content).hexdigest(),
        )
    if annotations is not None and not archive.image_ids & set(annotations):
        raise UserError(
            f"rle_csv={settings.source.rle_csv}: names none of the {len(archive.image_ids)} files in"
            f" {settings.source.dicom_dir}; name the table and the folder that belong together"
        )
    members = tuple(m for m in archive.members if annotations is None or m.image_id in annotations)
    patients = make_grouping(settings.source.patients_csv, [member.image_id for member in members])
    made_from = {
        "image_size": str(settings.format.image_size),
        "pixel_dtype": settings.format.pixel_dtype,
        "max_pixels": str(settings.reading.max_pixels),
    }
    made_from |= {"rle_csv": digest, "patients_csv": patients.digest, "salt": salted("salt")}
    return Source(archive, annotations, patients, members, made_from)


def _is_there(settings: Preprocess, source: Source) -> bool:
    """Whether the same data set stands already; refuses to replace another one unasked."""
    path = settings.dataset
    if not path.exists():
        return False
    try:
        with Dataset.open(path) as dataset:
            differing = _differing(dataset.settings, settings, source)
            if not differing:
                dataset.verify()
    except UserError as error:
        if settings.overwrite:
            print(f"preprocess: makes it anew: {error}")
            return False
        raise
    if differing and not settings.overwrite:
        raise UserError(
            f"dataset={path}: was made with {', '.join(differing)};"
            " overwrite=true replaces it, another dataset=… keeps it"
        )
    return not differing


def _differing(there: Mapping[str, str], settings: Preprocess, source: Source) -> list[str]:
    """In what the data set that stands there is another one; empty where it is the same."""
    differing = [
        _difference(name, str(there.get(name)), source.made_from[name])
        for name in MADE_FROM
        if there.get(name) != source.made_from[name]
    ]
    # Files that were only copied or touched are still the same, and a look into them tells.
    if (
        not differing
        and there.get("stamp") != source.stamp
        and there.get(FILES) != _contents(source, settings.reading.max_pixels)
    ):
        differing = ["other DICOM files"]
    return differing


def _contents(source: Source, max_pixels: int) -> str:
    """Digest of what is in the files."""

    def content(member: Member) -> str:
        try:
            return hashlib.sha256(read_member(source.archive.root, member, max_pixels)).hexdigest()
        except Rejected:
            return ""

    bar = tqdm(source.members, desc="compare", unit="file", disable=None, leave=False)
    return _digest(f"{member.image_id} {content(member)}" for member in bar)


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _difference(name: str, there: str, wanted: str) -> str:
    if name == MADE_FROM[name]:
        return f"{name} {there}, not {wanted}"
    if name == "patients_csv" and source_of(there) != source_of(wanted):
        return f"patients by {source_of(there)}, not by {source_of(wanted)}"
    return f"other {MADE_FROM[name].removeprefix('the ')}"


def _write(settings: Preprocess, source: Source) -> None:
    """Makes the data set by way of its work folder, and the report; the folder goes when all is done."""
    path, work = settings.dataset, _work_folder(settings)
    if path.is_dir():
        raise UserError(f"dataset={path}: is a folder; name a file, such as {path / 'dataset.h5'}")
    with ExitStack() as stack:
        try:
            waiting = f"preprocess: another process writes {path}; waiting until it ends"
            waited = stack.enter_context(work_folder(work, waiting))
            if waited and {item.name for item in work.iterdir()} == {LOCK} and _is_there(settings, source):
                print(f"preprocess: {path} is there already, from the same files and settings")
                log_existing_report(path)
                return
            for left in (*work.glob("*.now"), *work.glob("*.part")):
                left.unlink(missing_ok=True)
            report = _make(settings, source, work)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({reason_of(error)}); make room or choose another place"
            ) from error
        with Dataset.open(path) as dataset:
            page = write_report(path, report, dataset)
        print(f"preprocess: report: {page}")
        shutil.rmtree(work, ignore_errors=True)


def _make(settings: Preprocess, source: Source, work: Path) -> Report:
    recipe = Recipe(settings.format.image_size, settings.format.pixel_dtype, settings.reading.max_pixels)
    jobs = make_jobs(source.archive.root, recipe, source.members, source.annotations, source.patients.hashes)
    made_from = source.made_from | {"stamp": source.stamp}
    found, report = list[Result](), list[Report]()

    def packed() -> Iterator[Packed]:
        kept = sum(len(job.members) for job in jobs if is_made(job, work))
        if kept:
            print(f"preprocess: goes on: {kept} of {len(source.members)} files are read already")
        total = len(source.members)
        with tqdm(total=total, initial=kept, desc="preprocess", unit="image", disable=None) as bar:
            for number, result in enumerate(
                results(jobs, work, settings.reading.workers or available_cores())
            ):
                bar.update(number >= kept)
                found.append(result.without_chunks())
                if result.packed is not None:
                    yield result.packed
        made_from[FILES] = _digest(f"{result.image_id} {result.content}" for result in found)
        report.append(build_report(source.archive, source.annotations, source.patients, found))
        made_from[SOURCES] = describe_sources(report[0].patients.sources)
        _refuse_too_many(settings, report[0])

    write_dataset(
        settings.dataset,
        packed(),
        image_size=settings.format.image_size,
        pixel_dtype=settings.format.pixel_dtype,
        settings=made_from,
        labelled=source.annotations is not None,
        work=work,
    )
    return report[0]


def _work_folder(settings: Preprocess) -> Path:
    return settings.dataset.with_name(settings.dataset.name + ".work")


def _refuse_too_many(settings: Preprocess, report: Report) -> None:
    """Fails where more than max_rejected was rejected, or all; leaves the report behind."""
    used, rejected = report.outcome.used, report.outcome.rejected
    if used and rejected <= settings.reading.max_rejected * (used + rejected):
        return
    where = write_report(settings.dataset, report, None)
    first = report.rejected[0].files[0]
    culprit = f"dicom_dir={settings.source.dicom_dir}"
    example = f"for example {first.image_id}: {first.reason}; the report: {where}"
    if not used:
        raise UserError(f"{culprit}: no file can be used, {example}")
    raise UserError(
        f"{culprit}: {rejected} of {used + rejected} files are rejected, more than"
        f" max_rejected={settings.reading.max_rejected:g}; {example};"
        " a higher max_rejected continues without them"
    )


def _describe(path: Path, grouping: Grouping) -> None:
    """The data set's numbers, in the active run and on the terminal."""
    with Dataset.open(path) as dataset:
        entries, fingerprint = dataset.entries, dataset.fingerprint
        positives = sum(entry.area_px > 0 for entry in entries)
        patients = len({entry.patient for entry in entries})
        tracking.log_dataset(path, fingerprint, "preprocessed")
        tracking.log_params({"images": len(entries), "positives": positives, "patients": patients})
        labels = f"{positives:,} with pneumothorax" if dataset.labelled else "without labels"
        size = dataset.image_size
        told = describe_sources(count_sources(entries, grouping))
        tracking.log_params({"patients_from": told})
        warn_about_grouping(dataset)
    line = f"{many(len(entries), 'image')} of {many(patients, 'patient')} ({told}), {labels}, at {size} px"
    tracking.describe(f"{line}.\nFile {path}, fingerprint {fingerprint[:16]}.")
    print(f"preprocess: {line}: {path}")
