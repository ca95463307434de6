"""A small data set of synthetic radiographs, for tests of what comes after preprocess."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.hdf5_writer import DatasetWriter
from pneumo_experiments.dataset.packed import Packed
from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.synthetic.kaggle_layout import write_sample


def stored_sample(folder: Path, images: int, image_size: int) -> Path:
    """Writes ``d.h5`` into the folder; returns its path."""
    write_sample(folder / "sample", images, 0, seed=1)
    archive = open_archive(folder / "sample" / "dicom-images-train")
    settings = ShardSettings(image_size, pixel_dtype="uint8", max_pixels=2**20)
    annotations = read_annotations(folder / "sample" / "train-rle.csv")
    jobs = make_jobs(archive.root, settings, archive.members, annotations, patients={})
    packed = (result.packed for result in results(jobs, folder, 1) if result.packed is not None)
    path = folder / "d.h5"
    write_dataset(path, packed, image_size=image_size, pixel_dtype="uint8")
    return path


def write_dataset(
    path: Path,
    images: Iterable[Packed],
    *,
    image_size: int,
    pixel_dtype: str,
    settings: Mapping[str, str] | None = None,
    labelled: bool = True,
) -> str:
    """Writes a data set of these images; returns its fingerprint."""
    with DatasetWriter.create(
        path, image_size=image_size, pixel_dtype=pixel_dtype, labelled=labelled
    ) as writer:
        for image in images:
            writer.append(image)
        return writer.finish(settings or {})
