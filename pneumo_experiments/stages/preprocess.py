"""Entry point ``preprocess``: DICOM files and run lengths to one HDF5 data set, with a report on them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.data_report.report import DataReport, sheet_of_positives
from pneumo_experiments.data_report.statistics import Statistics, make_statistics
from pneumo_experiments.dataset.hdf5 import Dataset, DatasetWriter
from pneumo_experiments.dataset.inputs import FILES, STAMP, Inputs, digest, read_inputs
from pneumo_experiments.dataset.patients import (
    SOURCES,
    Grouping,
    count_sources,
    describe_sources,
    warn_about_grouping,
)
from pneumo_experiments.dataset.shards import FileResult, ShardSettings, is_finished, make_jobs, results
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically, writing
from pneumo_experiments.locks import LOCK, work_folder
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.settings import Preprocess
from pneumo_experiments.words import command, plural, rows


def preprocess(settings: Preprocess) -> Path:
    """Writes the data set unless it exists, made from the same files and settings; returns its path.

    Continues an interrupted run. In a run of MLflow, as on the command line. Raises UserError for input that
    cannot be used, and for a file that is there already, made from other files or settings.

    >>> path = preprocess(Preprocess.of(dicom_dir="radiographs", rle_csv="rle.csv", image_size=32))
    preprocess: ...
    >>> with Dataset.open(path) as dataset:
    ...     dataset.images([0, 1]).shape, [entry.area_px > 0 for entry in dataset.entries]
    ((2, 32, 32), [True, False])
    """
    path = settings.dataset
    work = path.with_name(path.name + ".work")
    name = f"preprocess {path.name} {settings.format.image_size}px"
    with tracking.run("preprocess", settings, name):
        if path.is_dir():
            raise UserError(f"dataset={path}: is a folder; name a file, such as {path / 'dataset.h5'}")
        inputs = read_inputs(settings)
        if (_is_up_to_date(settings, inputs) and not work.exists()) or not _write(settings, inputs, work):
            print(f"preprocess: {path} exists already, from the same files and settings")
            _log_report(path)
        _describe(path, inputs.grouping)
        page = tracking.page_of_active_run()
    if tracking.active_run() is None:
        following = command("train", dataset=path)
        if inputs.labels is None:
            following = command("score", dicom_dir=settings.source.dicom_dir)
        print(rows({"run": page, "next": following}))
    return path


def _is_up_to_date(settings: Preprocess, inputs: Inputs) -> bool:
    """Whether the data set exists with these inputs; UserError for another one without ``overwrite``."""
    path = settings.dataset
    if not path.exists():
        return False
    try:
        with Dataset.open(path) as dataset:
            differences = inputs.differences(dataset.settings)
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


def _write(settings: Preprocess, inputs: Inputs, work: Path) -> bool:
    """Writes the data set and its report; False if another process has written them meanwhile.

    Finished shards stay in the work folder until both are written.
    """
    path = settings.dataset
    waiting = f"preprocess: another process writes {path}; waiting until it ends"
    with ExitStack() as stack:
        with writing(str(path)):
            waited = stack.enter_context(work_folder(work, waiting))
            nothing_left = {item.name for item in work.iterdir()} == {LOCK}
            if waited and nothing_left and _is_up_to_date(settings, inputs):
                return False
            for leftover in work.glob("*.part"):
                leftover.unlink(missing_ok=True)
            statistics = _write_dataset(settings, inputs, work)
        with Dataset.open(path) as dataset:
            sheet = sheet_of_positives(dataset) if dataset.labelled else None
        page = _publish(path, DataReport(path.name, statistics, is_written=True, positives=sheet))
        print(f"preprocess: report: {page}")
        shutil.rmtree(work, ignore_errors=True)
    return True


def _write_dataset(settings: Preprocess, inputs: Inputs, work: Path) -> Statistics:
    image_size, pixel_dtype = settings.format.image_size, settings.format.pixel_dtype
    shard_settings = ShardSettings(image_size, pixel_dtype, inputs.max_pixels)
    root, hashes = inputs.archive.root, inputs.grouping.hashes
    jobs = make_jobs(root, shard_settings, inputs.members, inputs.labels, hashes)
    total, finished = len(inputs.members), sum(len(job.members) for job in jobs if is_finished(job, work))
    if finished:
        print(f"preprocess: continuing: {finished} of {total} files are read already")
    processed = list[FileResult]()
    with (
        DatasetWriter.create(
            settings.dataset,
            image_size=image_size,
            pixel_dtype=pixel_dtype,
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
        statistics = make_statistics(inputs.archive, inputs.labels, inputs.grouping, processed)
        _check_rejected(settings, statistics)
        contents = digest(f"{result.image_id} {result.content}" for result in processed)
        sources = describe_sources(statistics.patients.sources)
        writer.finish(inputs.recorded | {STAMP: inputs.stamp, FILES: contents, SOURCES: sources})
    return statistics


def _check_rejected(settings: Preprocess, statistics: Statistics) -> None:
    """Raises UserError if more than max_rejected or all files were rejected; writes the report first."""
    used, rejected = statistics.outcome.used, statistics.outcome.rejected
    if used and rejected <= settings.reading.max_rejected * (used + rejected):
        return
    page = _publish(settings.dataset, DataReport(settings.dataset.name, statistics, is_written=False))
    first = statistics.rejected[0].files[0]
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


def _report_files(dataset: Path) -> tuple[Path, Path]:
    return dataset.with_suffix(".report.json"), dataset.with_suffix(".report.html")


def _publish(dataset: Path, report: DataReport) -> Path:
    """Writes the report beside the data set, logs and prints it; returns the path of its page."""
    if report.positives is not None:
        tracking.log_image(report.positives, "positives.png")
    as_json, as_page = _report_files(dataset)
    for path, text in ((as_json, report.json), (as_page, report.page)):
        with write_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _log_report(dataset)
    for line in report.lines:
        print(f"preprocess: {line}")
    return as_page


def _log_report(dataset: Path) -> None:
    """Logs the report beside the data set, if there is one."""
    for path in _report_files(dataset):
        if path.is_file():
            tracking.log_file(path)


def _describe(path: Path, grouping: Grouping) -> None:
    """Logs and prints the numbers of the data set."""
    with Dataset.open(path) as dataset:
        entries = dataset.entries
        sources = describe_sources(count_sources(entries, grouping))
        patients, positives = len({e.patient for e in entries}), sum(e.area_px > 0 for e in entries)
        counts = {"images": len(entries), "positives": positives, "patients": patients}
        tracking.log_dataset(path, dataset.fingerprint, "preprocessed", dataset.profile)
        tracking.log_params(counts | {"patients_from": sources})
        warn_about_grouping(dataset)
        labels = f"{positives:,} with pneumothorax" if dataset.labelled else "without labels"
        images = f"{plural(len(entries), 'image')} of {plural(patients, 'patient')} ({sources})"
        line = f"{images}, {labels}, at {dataset.image_size} px"
        tracking.describe(f"{line}.\nFile {path}, fingerprint {dataset.fingerprint[:16]}.")
    print(f"preprocess: {line}: {path}")
