"""Reading a data set: by plain h5py, one picture after the other, against the project's own way.

python benchmarks/reading.py                                      synthetic radiographs
python benchmarks/reading.py --dataset output/siim.h5
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from measure import machine
from numpy.typing import NDArray

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.hdf5 import BLOCK, Dataset, DatasetWriter
from pneumo_experiments.dataset.labels import run_length_labels
from pneumo_experiments.dataset.packed_image import to_uint8
from pneumo_experiments.dataset.rle import EMPTY
from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

REPEATS, IMAGES, SIZE = 9, 200, 384


def written(folder: Path, pixel_dtype: str) -> Path:
    """A data set of synthetic radiographs."""
    if not (folder / "sample").exists():
        write_sample(folder / "sample", Contents(IMAGES, 0, 0))
    rows = read_annotations(folder / "sample" / "train-rle.csv")
    archive = open_archive(folder / "sample" / "dicom-images-train")
    jobs = make_jobs(
        archive.root,
        ShardSettings(SIZE, pixel_dtype, 10**8),
        archive.members,
        run_length_labels(rows),
        patients={},
    )
    path, work = folder / f"{pixel_dtype}.h5", folder / f"{pixel_dtype}.work"
    work.mkdir()
    with DatasetWriter.create(path, image_size=SIZE, pixel_dtype=pixel_dtype, labelled=True) as writer:
        for result in results(jobs, work, available_cores()):
            if result.packed is not None:
                writer.append(result.packed)
        writer.finish({})
    return path


def by_h5py(file: h5py.File, kind: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """As the project did it before: each picture through HDF5's filter."""
    return np.stack([to_uint8(file[f"{kind}_{row // BLOCK}"][row % BLOCK]) for row in rows.tolist()])


def milliseconds(read: Callable[[], object], count: int) -> float:
    """Median time per picture."""
    times = list[float]()
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        read()
        times.append((time.perf_counter() - start) / count * 1000)
    return statistics.median(times[1:])


def table(path: Path) -> None:
    """Prints one row per kind of picture, and the time of masks."""
    cores = sorted(os.sched_getaffinity(0))
    sets = dict[int, Dataset]()
    for threads in (1, 2):
        os.sched_setaffinity(0, cores[:threads])
        sets[threads] = Dataset.open(path)
    os.sched_setaffinity(0, cores)
    rows = np.random.default_rng(0).permutation(len(sets[1]))[:IMAGES]
    with h5py.File(path) as file:
        print(f"\n{path.name}: {len(rows)} pictures, ms each, medians of {REPEATS}\n")
        print("| | h5py | 1 thread | 2 threads | h5py / 2 threads |")
        print("|---|---|---|---|---|")
        for kind, name in (("images", "images"), ("ann", "targets")):
            old = by_h5py(file, kind, rows)
            assert all(np.array_equal(old, getattr(one, name)(rows)) for one in sets.values())
            ours = {
                threads: milliseconds(partial(getattr(one, name), rows), len(rows))
                for threads, one in sets.items()
            }
            before = milliseconds(partial(by_h5py, file, kind, rows), len(rows))
            print(f"| {name} | {before:.2f} | {ours[1]:.2f} | {ours[2]:.2f} | {before / ours[2]:.1f} |")
    opened = milliseconds(lambda: Dataset.open(path).close(), 1)
    print(f"\nopening: {opened:.1f} ms for {len(sets[1])} images")
    for what, empty in (("empty", True), ("other", False)):
        masks = [i for i in range(len(sets[1])) if (sets[1].rle(i) == EMPTY) == empty]
        taken = milliseconds(lambda some=masks: [sets[1].mask(i) for i in some], len(masks))
        print(f"{what} mask: {taken:.4f} ms")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a data set; without it, synthetic radiographs")
    given = parser.parse_args().dataset
    print(machine())
    if given:
        table(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        for pixel_dtype in ("float32", "uint8"):
            table(written(Path(folder), pixel_dtype))


if __name__ == "__main__":
    main()
