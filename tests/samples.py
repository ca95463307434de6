"""A small data set of synthetic radiographs, for tests of what comes after preprocess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.hdf5 import Dataset, DatasetWriter
from pneumo_experiments.dataset.labels import run_length_labels
from pneumo_experiments.dataset.packed_image import Entry, Packed, ResizedImage, hash_patient, pack
from pneumo_experiments.dataset.resize import area_resize
from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

SIZE = 16  # rows and columns of the images of ``write``


def stored_sample(folder: Path, images: int, image_size: int) -> Path:
    """Writes ``d.h5`` into the folder; returns its path."""
    write_sample(folder / "sample", Contents(images, 0, 1))
    archive = open_archive(folder / "sample" / "dicom-images-train")
    settings = ShardSettings(image_size, pixel_dtype="uint8", max_pixels=2**20)
    labels = run_length_labels(read_annotations(folder / "sample" / "train-rle.csv"))
    jobs = make_jobs(archive.root, settings, archive.members, labels, patients={})
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


def content_of(path: Path) -> list[Any]:
    """Everything that a data set holds; its bytes may differ, because ISA-L's do: see packed.py."""
    with Dataset.open(path) as dataset:
        rows = range(len(dataset))
        return [
            *(dataset.image_size, dataset.labelled, dataset.settings, dataset.fingerprint, dataset.entries),
            dataset.images(rows).tobytes(),
            dataset.targets(rows).tobytes(),
            [dataset.rle(row) for row in rows],
        ]


def examples(count: int, seed: int = 0) -> Iterator[ResizedImage]:
    """Random greys; every other image is annotated."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = np.zeros((40, 30), bool)
        mask[3 : 3 + number % 30, 5:17] = number % 2
        entry = Entry(
            image_id=f"image-{number}",
            patient=hash_patient(str(number // 2)),
            view="PA",
            sex="F",
            age=number - 1,
            rows=40,
            columns=30,
            annotations=number % 2,
            area_px=int(mask.sum()),
        )
        image = rng.integers(0, 256, (SIZE, SIZE), np.uint8)
        yield ResizedImage(entry, image, area_resize(mask, SIZE), rle.encode(mask))


def packed(examples: Iterable[ResizedImage], pixel_dtype: str, labelled: bool = True) -> Iterator[Packed]:
    for example in examples:
        yield pack(example if labelled else replace(example, target=None, rle=None), pixel_dtype)


def write(
    path: Path, count: int = 5, seed: int = 0, pixel_dtype: str = "float32", labelled: bool = True
) -> str:
    settings = {"rle_csv": "train-rle.csv"}
    return write_dataset(
        path,
        packed(examples(count, seed), pixel_dtype, labelled),
        image_size=SIZE,
        pixel_dtype=pixel_dtype,
        settings=settings,
        labelled=labelled,
    )
