"""A small data set of synthetic radiographs, for tests of what comes after preprocess."""

from __future__ import annotations

from pathlib import Path

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.hdf5 import write_dataset
from pneumo_experiments.dataset.shards import Recipe, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.synthetic.files import write_sample


def stored_sample(folder: Path, images: int, image_size: int) -> Path:
    """Writes ``d.h5`` into the folder; returns its path."""
    write_sample(folder / "sample", images, 0, seed=1)
    archive = open_archive(folder / "sample" / "dicom-images-train")
    recipe = Recipe(image_size, pixel_dtype="uint8", max_pixels=2**20)
    annotations = read_annotations(folder / "sample" / "train-rle.csv")
    jobs = make_jobs(archive.root, recipe, archive.members, annotations, patients={})
    packed = (result.packed for result in results(jobs, folder, 1) if result.packed is not None)
    path = folder / "d.h5"
    write_dataset(path, packed, image_size=image_size, pixel_dtype="uint8", settings={}, labelled=True)
    return path
