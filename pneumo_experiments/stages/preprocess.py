"""Entry point ``preprocess``: DICOM files and run lengths into one HDF5 data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.data.annotations import read_annotations, read_patients, union_mask
from pneumo_experiments.data.dicom import find_dicom, read_radiograph
from pneumo_experiments.data.resample import shrink, shrink_image
from pneumo_experiments.data.rle import encode
from pneumo_experiments.data.store import Dataset, Entry, Example, hash_patient, write_dataset
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.settings import Preprocess, as_params


def preprocess(settings: Preprocess) -> Path:
    """Writes the data set, or keeps one made from the same files and settings; returns its path."""
    with tracking.run("preprocess", settings):
        if settings.dicom_dir is None:
            raise UserError("dicom_dir: none given; name the folder that holds the DICOM files")
        files = find_dicom(settings.dicom_dir)
        annotations = None if settings.rle_csv is None else read_annotations(settings.rle_csv)
        patients = {} if settings.patients_csv is None else read_patients(settings.patients_csv)
        made_from = _recipe(settings, files)
        if not _is_there(settings, made_from):
            _write(settings, files, annotations, patients, made_from)
        _report(settings.dataset)
    return settings.dataset


def _recipe(settings: Preprocess, files: Sequence[Path]) -> dict[str, str]:
    """The settings that shape the result, and a digest of the files' names and sizes and of the tables."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for table in (settings.rle_csv, settings.patients_csv):
        digest.update(table.read_bytes() if table else b"none")
    shaping = {
        name: text for name, text in as_params(settings).items() if name in ("image_size", "pixel_dtype")
    }
    return shaping | {"input": digest.hexdigest()}


def _is_there(settings: Preprocess, made_from: dict[str, str]) -> bool:
    """Whether the same data set stands already; refuses to replace another one unasked."""
    path = settings.dataset
    if not path.exists():
        return False
    try:
        with Dataset.open(path) as dataset:
            there = dataset.settings
    except UserError:
        if settings.overwrite:
            return False
        raise
    differing = [name for name, text in made_from.items() if there.get(name) != text]
    if not differing:
        print(f"preprocess: {path} is there already, from the same files and settings")
        return True
    if not settings.overwrite:
        changes = [f"{name} {there.get(name, '?')[:12]}, not {made_from[name][:12]}" for name in differing]
        raise UserError(
            f"dataset={path}: was made with {', '.join(changes)};"
            " overwrite=true replaces it, another dataset=… keeps it"
        )
    return False


def _write(
    settings: Preprocess,
    files: Sequence[Path],
    annotations: dict[str, list[str]] | None,
    patients: dict[str, str],
    made_from: dict[str, str],
) -> None:
    known = [path for path in files if annotations is None or path.stem in annotations]
    if not known:
        raise UserError(
            f"rle_csv={settings.rle_csv}: names none of the {len(files)} files in {settings.dicom_dir};"
            " name the table and the folder that belong together"
        )
    rejected: list[str] = []

    def examples() -> Iterator[Example]:
        for path in tqdm(known, desc="preprocess", unit="image", disable=None):
            try:
                texts = None if annotations is None else annotations[path.stem]
                yield _example(path, texts, patients, settings.image_size)
            except Rejected as reason:
                rejected.append(str(reason))
        if len(rejected) == len(known):
            raise UserError(f"dicom_dir={settings.dicom_dir}: no file can be used; the first: {rejected[0]}")

    write_dataset(
        settings.dataset,
        examples(),
        image_size=settings.image_size,
        pixel_dtype=settings.pixel_dtype,
        settings=made_from,
        labelled=annotations is not None,
    )
    stems = {path.stem for path in files}
    left_out = {
        "rejected": sorted(rejected),
        "files_without_annotation": sorted(stems - set(annotations)) if annotations is not None else [],
        "annotations_without_file": sorted(set(annotations or {}) - stems),
    }
    tracking.log_json(left_out, "left_out.json")
    for name, ids in left_out.items():
        if ids:
            print(f"preprocess: {len(ids)} {name.replace('_', ' ')}, for example {ids[0]}")


def _example(path: Path, texts: Sequence[str] | None, patients: dict[str, str], size: int) -> Example:
    radiograph = read_radiograph(path, path.stem)
    rows, columns = radiograph.pixels.shape
    mask = union_mask(texts or (), (rows, columns), path.stem)
    entry = Entry(
        image_id=path.stem,
        patient=hash_patient(patients.get(path.stem) or radiograph.patient, path.stem),
        view=radiograph.view,
        sex=radiograph.sex,
        age=radiograph.age,
        rows=rows,
        columns=columns,
        annotations=len(texts or ()),
        area_px=int(np.count_nonzero(mask)),
    )
    return Example(entry, shrink_image(radiograph.pixels, size), shrink(mask, size), encode(mask))


def _report(path: Path) -> None:
    with Dataset.open(path) as dataset:
        entries, fingerprint = dataset.entries, dataset.fingerprint
        positives = sum(entry.area_px > 0 for entry in entries)
        patients = len({entry.patient for entry in entries})
        tracking.log_dataset(path, fingerprint, "preprocessed")
        tracking.log_metrics({"images": len(entries), "positives": positives, "patients": patients})
        size = dataset.image_size
        line = f"{len(entries)} images of {patients} patients, {positives} with pneumothorax, at {size} px"
    tracking.describe(f"{line}.\nFile {path}, fingerprint {fingerprint[:16]}.")
    print(f"preprocess: {line}: {path}")
