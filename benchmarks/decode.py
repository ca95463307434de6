"""Decoding in processes of their own against decoding in the process that predicts, one file after the other.

python benchmarks/decode.py                                        synthetic radiographs
python benchmarks/decode.py --dicom_dir siim/dicom-images-train    real ones, repeated

Both ways are timed in turn on the same files with the same untrained network: a request of one file, as it is
served, and a folder of many files, as `score` submits it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from measure import machine

from pneumo_experiments.dataset.decoder_pool import MAX_DECODERS, decode_all
from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.metrics.thresholds import Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork
from pneumo_experiments.settings import Device
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

Files = list[tuple[str, bytes]]


def one_by_one(detector: Detector, files: Files) -> None:
    """All in one process: decode, predict, outline, and the next."""
    for image_id, content in files:
        pixels = read_radiograph(content, image_id).pixels
        small = resize_image(pixels, detector.image_size)
        prediction = next(detector.predictor.predict(small[None]))
        mask = to_native(prediction.mask, (pixels.shape[0], pixels.shape[1]))
        encode(apply_thresholds(mask, prediction.presence, detector.thresholds))


def in_batches(detector: Detector, files: Files) -> None:
    """What the detector does."""
    for finding in detector.detect_each(files):
        assert not finding.error


def decode_here(detector: Detector, files: Files) -> None:
    """Decode and shrink alone, in this process."""
    for image_id, content in files:
        resize_image(read_radiograph(content, image_id).pixels, detector.image_size)


def decode_aside(detector: Detector, files: Files) -> None:
    """Decode and shrink alone, in the decoders."""
    for _ in decode_all(files, detector.image_size):
        pass


def seconds(work: Callable[[Detector, Files], None], detector: Detector, files: Files) -> float:
    start = time.perf_counter()
    work(detector, files)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dicom_dir", help="radiographs; without it, synthetic ones")
    parser.add_argument("--images", type=int, default=200, help="files of the folder")
    parser.add_argument("--image_size", type=int, default=64, help="pixels; small, so that decoding shows")
    parser.add_argument("--repeats", type=int, default=5, help="of each, in turn; medians are printed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.dicom_dir is None:
            write_sample(Path(scratch, "sample"), Contents(40, 0, 0))
        folder = Path(arguments.dicom_dir or scratch)
        contents = [path.read_bytes() for path in sorted(folder.rglob("*.dcm"))]
    files = [(str(k), content) for k, content in enumerate(islice(cycle(contents), arguments.images))]
    detector = Detector(
        (TrainedNetwork(Predictor(PneumothoraxNet("fcn_resnet50"), choose_compute(Device())), {}),),
        arguments.image_size,
        Thresholds(presence_threshold=0),
        "",
    )
    start = time.perf_counter()
    decode_aside(detector, files[:1])
    first = time.perf_counter() - start
    in_batches(detector, files)  # all decoders have started, the network is warm
    pairs = {"decode alone": (decode_here, decode_aside), "the whole answer": (one_by_one, in_batches)}
    print(machine())
    print(
        f"{len(files)} files ({len(contents)} different ones) at {arguments.image_size} px,"
        f" {MAX_DECODERS} decoders,"
    )
    print(f"{detector.predictor.device.type}; medians of {arguments.repeats}\n")
    print("| | in one process | decoders and batches |\n|---|---|---|")
    for name, ways in pairs.items():
        single: list[list[float]] = [[], []]
        many: list[list[float]] = [[], []]
        for _ in range(arguments.repeats):
            for way, work in enumerate(ways):
                single[way] += [seconds(work, detector, [file]) for file in files[:20]]
                many[way].append(len(files) / seconds(work, detector, files))
        before, after = (1000 * statistics.median(each) for each in single)
        print(f"| {name}: one file, ms | {before:.1f} | {after:.1f} |")
        before, after = (statistics.median(each) for each in many)
        print(f"| {name}: {len(files)} files, images/s | {before:.1f} | {after:.1f} |")
    print(f"\nThe first file of all, with the start of a decoder: {first:.2f} s")
    sizes = [np.frombuffer(content, np.uint8).size for content in contents]
    print(f"files of {min(sizes) // 1000} to {max(sizes) // 1000} kB")


if __name__ == "__main__":
    main()
