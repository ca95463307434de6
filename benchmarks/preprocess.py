"""Preprocess against the straightforward script, on the same files, in the same run.

python benchmarks/preprocess.py                                      synthetic radiographs
python benchmarks/preprocess.py --dicom_dir siim/dicom-images-train --rle_csv siim/train-rle.csv

The files are linked under new names until there are as many as asked for. Throughput and CPU time are those
of the data path alone (from the list of files to the finished data set, with the start of the workers); the
memory is that of the whole entry point, all processes together.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pydicom
from measure import ROOT, machine, peak_memory
from PIL import Image

SIZE = 384
SAMPLE = 240  # synthetic radiographs, before they are linked
KINDS = ("float32", "float16", "uint8")


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def kaggle_mask(rle: str, width: int, height: int) -> np.ndarray:
    """A loop over runs, as the scripts that go round on Kaggle decode them."""
    mask = np.zeros(width * height, np.uint8)
    numbers = [int(number) for number in rle.split()]
    position = 0
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        position += start
        mask[position : position + length] = 1
        position += length
    return mask.reshape(width, height).T


def straightforward(folder: Path, rows: dict[str, list[str]], target: Path) -> None:
    """One process: read, decode, resize, / 255, append."""
    files = sorted(folder.rglob("*.dcm"))
    with h5py.File(target, "w") as file:
        images, masks = (
            file.create_dataset(
                name, (0, SIZE, SIZE), maxshape=(None, SIZE, SIZE), chunks=(1, SIZE, SIZE), dtype="float32"
            )
            for name in ("images", "ann")
        )
        for number, path in enumerate(files):
            pixels = pydicom.dcmread(path).pixel_array
            mask = np.zeros(pixels.shape, np.uint8)
            for rle in rows[path.stem]:
                mask |= kaggle_mask(rle, pixels.shape[1], pixels.shape[0])
            image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            small = Image.fromarray(mask).resize((SIZE, SIZE), Image.Resampling.NEAREST)
            for stored, picture in ((images, np.asarray(image) / 255), (masks, np.asarray(small))):
                stored.resize(number + 1, axis=0)
                stored[number] = picture


def decode_and_resize(folder: Path, rows: dict[str, list[str]], target: Path) -> None:
    """The floor: read, decode, resize, and nothing else."""
    for path in sorted(folder.rglob("*.dcm")):
        pixels = pydicom.dcmread(path).pixel_array
        Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def ours(folder: Path, rows: dict[str, list[str]], target: Path, pixel_dtype: str = "float32") -> None:
    """The data path of the entry point, on all cores."""
    from pneumo_experiments.dataset.hdf5 import DatasetWriter
    from pneumo_experiments.dataset.labels import run_length_labels
    from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
    from pneumo_experiments.dicom.archive import open_archive
    from pneumo_experiments.dicom.limits import available_cores

    work = target.with_suffix(".work")
    work.mkdir()
    jobs = make_jobs(
        folder,
        ShardSettings(SIZE, pixel_dtype, 10**8),
        open_archive(folder).members,
        run_length_labels(rows),
        patients={},
    )
    with DatasetWriter.create(target, image_size=SIZE, pixel_dtype=pixel_dtype, labelled=True) as writer:
        for result in results(jobs, work, available_cores()):
            if result.packed is not None:
                writer.append(result.packed)
        writer.finish({})
    shutil.rmtree(work)


CHILDREN: dict[str, Callable[..., None]] = {
    "straightforward": straightforward,
    "decode_and_resize": decode_and_resize,
    "ours": ours,
}


def child(arguments: argparse.Namespace) -> None:
    """One measurement, in a process of its own; imports are done before the clock starts."""
    import pneumo_experiments.dataset.hdf5
    import pneumo_experiments.dataset.shards  # noqa: F401

    rows = json.loads(Path(arguments.rows).read_text())
    wall, cpu = time.perf_counter(), cpu_seconds()
    CHILDREN[arguments.child](Path(arguments.dicom_dir), rows, Path(arguments.target))
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}))


def measured(name: str, folder: Path, rows: Path, scratch: Path) -> dict[str, float]:
    target = scratch / "out.h5"
    command = [sys.executable, __file__, "--child", name, "--dicom_dir", str(folder), "--rows", str(rows)]
    done = subprocess.run([*command, "--target", str(target)], check=True, capture_output=True, text=True)
    target.unlink(missing_ok=True)
    return json.loads(done.stdout)


def linked(source: list[Path], rows: dict[str, list[str]], count: int, folder: Path) -> dict[str, list[str]]:
    """Links ``count`` files below the folder, each with an id of its own; their annotations."""
    of: dict[str, list[str]] = {}
    for number in range(count):
        path = source[number % len(source)]
        image_id = f"{number:06}"
        below = folder / image_id[:3]
        below.mkdir(parents=True, exist_ok=True)
        os.link(path, below / f"{image_id}.dcm")
        of[image_id] = rows.get(path.stem, [])
    with folder.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", " EncodedPixels"])
        writer.writerows((image_id, text) for image_id, texts in of.items() for text in texts or ["-1"])
    folder.with_suffix(".json").write_text(json.dumps(of))
    return of


def entry_point(folder: Path, scratch: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of the whole entry point."""
    words = [
        "--dicom_dir",
        folder,
        "--rle_csv",
        folder.with_suffix(".csv"),
        "--dataset",
        scratch / "whole.h5",
    ]
    start = time.perf_counter()
    with (
        subprocess.Popen(
            [sys.executable, "-m", "pneumo_experiments", "preprocess", *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        peak_memory(process.pid) as peak,
    ):
        output, _ = process.communicate()
    if process.returncode:
        sys.exit(output[-3000:])
    (scratch / "whole.h5").unlink()
    return time.perf_counter() - start, peak.gigabytes


def kilobytes(folder: Path, rows: dict[str, list[str]], scratch: Path, count: int) -> dict[str, float]:
    """Size of the file per image, by pixel type."""
    sizes: dict[str, float] = {}
    for kind in KINDS:
        ours(folder, rows, scratch / "size.h5", kind)
        sizes[kind] = (scratch / "size.h5").stat().st_size / count / 1000
        (scratch / "size.h5").unlink()
    return sizes


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dicom_dir", help="real radiographs; without it, synthetic ones")
    parser.add_argument("--rle_csv", help="their annotations")
    parser.add_argument("--images", type=int, default=1000, help="files for throughput and CPU time")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements; medians are printed")
    parser.add_argument("--memory", type=int, nargs="*", default=[400, 4000], help="files for the memory")
    parser.add_argument("--scratch", help="folder for links and results, on the files' own disk")
    for name in ("--child", "--rows", "--target"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        tables(arguments, scratch)


def tables(arguments: argparse.Namespace, scratch: Path) -> None:
    """Measures in pairs and prints."""
    from pneumo_experiments.dataset.annotations import read_annotations
    from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

    if arguments.dicom_dir is None:
        write_sample(scratch / "sample", Contents(SAMPLE, 0, 0))
        dicom_dir, rle_csv = scratch / "sample" / "dicom-images-train", scratch / "sample" / "train-rle.csv"
    else:
        dicom_dir, rle_csv = Path(arguments.dicom_dir), Path(arguments.rle_csv)
        local = scratch / "real"  # copied, since links do not reach across disks
        shutil.copytree(dicom_dir, local, copy_function=shutil.copyfile)
        dicom_dir = local
    source, known = sorted(dicom_dir.rglob("*.dcm")), read_annotations(rle_csv)
    folder, count = scratch / "files", arguments.images
    rows = linked(source, known, count, folder)
    positives = sum(bool(texts) for texts in rows.values())
    print(machine())
    print(f"{count} files ({len(source)} different ones, {positives / count:.0%} positive) at {SIZE} px, ")
    print(f"medians of {arguments.repeats} interleaved measurements\n")

    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in CHILDREN}
    for _ in range(arguments.repeats):
        for kind, times in found.items():
            times.append(measured(kind, folder, folder.with_suffix(".json"), scratch))
    titles = {
        "straightforward": "straightforward script, raw float32",
        "decode_and_resize": "decode + resize alone, nothing written",
        "ours": "preprocess, compressed float32",
    }
    print("| | images/s | CPU ms per image |")
    print("|---|---|---|")
    for kind, title in titles.items():
        wall, cpu = (statistics.median(each[what] for each in found[kind]) for what in ("wall", "cpu"))
        print(f"| {title} | {count / wall:.0f} | {cpu / count * 1000:.2f} |")
    faster = [a["wall"] / b["wall"] for a, b in zip(found["straightforward"], found["ours"], strict=True)]
    dearer = [b["cpu"] / a["cpu"] for a, b in zip(found["decode_and_resize"], found["ours"], strict=True)]
    print(f"\nthroughput: {statistics.median(faster):.2f} times the straightforward script's")
    print(f"CPU time: {statistics.median(dearer):.2f} times that of decode + resize alone\n")

    sizes = kilobytes(folder, rows, scratch, count)
    print("kB per image in the file: " + ", ".join(f"{kind} {size:.0f}" for kind, size in sizes.items()))
    for files in arguments.memory:
        many = scratch / f"files-{files}"
        linked(source, known, files, many)
        seconds, gigabytes = entry_point(many, scratch)
        print(f"entry point, {files} files: {seconds:.1f} s, peak memory {gigabytes:.2f} GB in all processes")
        shutil.rmtree(many)


if __name__ == "__main__":
    main()
