"""What the choice of thresholds costs: the exact search, scoring from pixels, and an Optuna study.

Run in the project's environment: python benchmarks/score.py [--images 2400] [--trials 500]

The counts are synthetic, with the challenge's fraction of positives and its areas. Prints Markdown.

With --folder 3000 it measures `score` itself instead: a folder of so many synthetic radiographs (40 different
ones) and a data set of them, at 384 px, with a network that costs nothing and finds something in the
challenge's fraction of the images. The loop to compare with reads, decodes, resizes, predicts, upsamples,
thresholds and encodes one image after the other.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from measure import machine
from numpy.typing import NDArray

from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.thresholds import (
    HUNDREDTHS,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
    best_on_grid,
)

SIDE = 1024
POSITIVES, MEDIAN_AREA, LOG_DEVIATION = 0.2215, 8630, 1.1  # of the challenge's labels
PIXEL_IMAGES = 16  # scored from pixels
NETWORK_SIDE, DIFFERENT = 384, 40  # of --folder: pixels that the network sees, and different files


def synthetic_counts(images: int, seed: int) -> ThresholdCounts:
    """Counts of n images 1024 x 1024: most positives are found in part, some negatives have false alarms."""
    rng = np.random.default_rng(seed)
    positive = rng.random(images) < POSITIVES
    area = np.exp(rng.normal(np.log(MEDIAN_AREA), LOG_DEVIATION, images)).clip(55, 161_421) * positive
    highest = np.where(positive, rng.beta(3, 1, images), rng.beta(1.5, 1.5, images))  # largest probability
    remaining = (1 - HUNDREDTHS / highest[:, None]).clip(0)  # falls to 0 at the largest probability
    overlap = area[:, None] * remaining ** rng.uniform(0.2, 2, (images, 1))
    stray = np.where(positive, area, np.exp(rng.normal(7.5, 1.5, images)))[:, None] * rng.random((images, 1))
    outside = stray * remaining ** rng.uniform(1, 4, (images, 1))
    counts = np.stack([overlap + outside, overlap], axis=1).astype(np.int32)
    counts[:, 0, 0], counts[:, 1, 0] = SIDE * SIDE, area  # every pixel reaches 0
    presence = 1 / (1 + np.exp(-rng.normal(np.where(positive, 1, -1.5), 1.4)))
    return ThresholdCounts.of(counts, presence.astype(np.float32))


def synthetic_pixels(images: int, seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Probabilities and truth (1024, 1024) of n images."""
    rng = np.random.default_rng(seed)
    pixels: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []
    for _ in range(images):
        truth = np.zeros((SIDE, SIDE), bool)
        truth[200:300, 300:386] = rng.random() < POSITIVES
        pixels.append((np.clip(rng.random((SIDE, SIDE), np.float32) * 0.5 + 0.4 * truth, 0, 1), truth))
    return pixels


def free_detector() -> Any:
    """A detector whose network takes no time: a blob of 1% of the image in POSITIVES of the images."""
    import torch  # these take seconds

    from pneumo_experiments.learning.device import ComputeConfig
    from pneumo_experiments.learning.network import Output
    from pneumo_experiments.learning.predict import Predictor
    from pneumo_experiments.serving import Detector, TrainedNetwork

    class Free(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.training_images = 0
            self.mask = torch.full((NETWORK_SIDE, NETWORK_SIDE), -9.0)
            self.mask[60:100, 60:97] = 9.0

        def forward(self, images: torch.Tensor) -> Output:
            numbers = torch.arange(self.training_images, self.training_images + len(images))
            self.training_images += len(images)
            is_positive = ((numbers + 1) * POSITIVES).floor() > (numbers * POSITIVES).floor()
            mask = self.mask.expand(len(images), -1, -1)
            return Output(mask, mask, torch.where(is_positive, 9.0, -9.0))

    network: Any = Free()
    member = TrainedNetwork(Predictor(network, ComputeConfig(torch.device("cpu"), "fp32")), {})
    return Detector((member,), NETWORK_SIDE, Thresholds(), "")


def write_folder(scratch: Path, files: int) -> tuple[Path, Path]:
    """A folder of so many files, and a data set of the different ones among them."""
    from pneumo_experiments import tracking
    from pneumo_experiments.settings import Preprocess, from_flat
    from pneumo_experiments.stages.preprocess import preprocess
    from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

    write_sample(scratch / "sample", Contents(DIFFERENT, 0, 0))
    source = {"dicom_dir": scratch / "sample/dicom-images-train", "rle_csv": scratch / "sample/train-rle.csv"}
    settings = {"dataset": scratch / "d.h5", "image_size": NETWORK_SIDE}
    with tracking.disabled(), redirect_stdout(None):
        preprocess(from_flat(Preprocess, source | settings))
    folder = scratch / "folder"
    folder.mkdir()
    different = sorted((scratch / "sample").rglob("*.dcm"))
    for number in range(files):
        (folder / f"{number:05}.dcm").hardlink_to(different[number % len(different)])
    return folder, scratch / "d.h5"


class Clock:
    """Seconds, and CPU seconds of this process and its decoders, since its start."""

    def __init__(self) -> None:
        self.cpu_s, self.wall_s = self._cpu_s(), time.perf_counter()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall_s, self._cpu_s() - self.cpu_s

    @staticmethod
    def _cpu_s() -> float:
        own = psutil.Process()
        return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children()))


def measure_folder(files: int, repeats: int) -> None:
    """Prints how long a folder and a data set take with the free network."""
    import torch

    from pneumo_experiments import tracking
    from pneumo_experiments.dataset.decoder_pool import decode_all, read_files
    from pneumo_experiments.dataset.hdf5 import Dataset
    from pneumo_experiments.dataset.resize import resize_image
    from pneumo_experiments.dataset.rle import encode
    from pneumo_experiments.dicom.archive import open_archive
    from pneumo_experiments.dicom.radiograph import read_radiograph
    from pneumo_experiments.evaluation.subset import Subset
    from pneumo_experiments.findings.folder import write_findings
    from pneumo_experiments.learning.predict import to_native
    from pneumo_experiments.settings import Score, from_flat

    torch.set_num_threads(1)
    steps: Counter[str] = Counter()

    def step(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        result = work(*arguments)
        steps[name] += time.thread_time() - start
        return result

    with TemporaryDirectory() as name:
        scratch = Path(name)
        folder, dataset_file = write_folder(scratch, files)
        archive, detector = open_archive(folder), free_detector()
        rules = detector.thresholds
        list(
            decode_all(read_files(archive.root, archive.members[:16]), NETWORK_SIDE)
        )  # decoders have started

        def loop() -> None:
            members = iter(read_files(archive.root, archive.members))
            while file := step("read", next, members, None):
                image_id, content = file
                pixels = step("decode", read_radiograph, content, image_id).pixels
                small = step("resize", resize_image, pixels, NETWORK_SIDE)
                prediction = step("predict", predict_one, small)
                native = step("upsample", to_native, prediction.mask, pixels.shape)
                mask = step("threshold", apply_thresholds, native, prediction.presence, rules)
                step("encode", encode, mask)

        def predict_one(image: NDArray[np.uint8]) -> Any:
            return next(detector.predictor.predict(image[None]))

        def findings_alone() -> None:
            for finding in detector.detect_each(read_files(archive.root, archive.members)):
                encode(finding.mask)

        def whole(**settings: Any) -> None:
            paths = {name: scratch / name for name in ("submission", "findings")}
            chosen = from_flat(Score, {"dicom_dir": folder} | paths | settings)
            with tracking.disabled(), redirect_stdout(None):
                write_findings(chosen, detector, folder, "free")

        def data_set() -> None:
            with Dataset.open(dataset_file) as dataset:
                subset = Subset(dataset, np.arange(files) % len(dataset))
                subset.count(detector.predictor)

        ways: dict[str, Callable[[], None]] = {
            "folder: the loop, one image after the other": loop,
            "folder: masks and run lengths": findings_alone,
            "folder: with table, submission and overlays": whole,
            "folder: with DICOM Segmentations as well": lambda: whole(dicom_seg=True),
            "data set: threshold counts": data_set,
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, work in ways.items():
                clock = Clock()
                work()
                times[name].append(clock.stop())
    print("| | images/s | times the loop | CPU ms an image |\n|---|---|---|---|")
    first = None
    for name, each in times.items():
        wall_s, cpu_s = (statistics.median(values) for values in zip(*each, strict=True))
        first = first or wall_s
        ratio = f"{first / wall_s:.2f}" if name.startswith("folder") else ""
        print(f"| {name} | {files / wall_s:.0f} | {ratio} | {1000 * cpu_s / files:.1f} |")
    each_ms = {name: 1000 * spent_s / files / repeats for name, spent_s in steps.items()}
    print("\nThe loop, ms an image: " + ", ".join(f"{name} {ms:.2f}" for name, ms in each_ms.items()) + ".")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=2400)
    options.add_argument("--trials", type=int, default=500)
    options.add_argument("--folder", type=int, default=0, help="files of a folder to score instead")
    options.add_argument("--repeats", type=int, default=1, help="of the folder, in turn; medians are printed")
    chosen = options.parse_args()
    if chosen.folder:
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        print(f"{machine()}, {chosen.folder} files, network {NETWORK_SIDE} px, load before: {load}.\n")
        measure_folder(chosen.folder, chosen.repeats)
        return
    print(f"{machine()}, NumPy {np.__version__}, {chosen.images} images.\n")

    counts = synthetic_counts(chosen.images, seed=0)
    start = time.perf_counter()
    optimum = best_of_all(counts)
    exact_s = time.perf_counter() - start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    start = time.perf_counter()
    on_grid = best_on_grid(counts)
    grid_s = time.perf_counter() - start

    pixels = synthetic_pixels(PIXEL_IMAGES, seed=0)
    rules = Thresholds()
    start = time.perf_counter()
    for probability, truth in pixels:
        dice(truth, apply_thresholds(probability, 1.0, rules))
    pixels_s = (time.perf_counter() - start) / PIXEL_IMAGES * chosen.images

    from pneumo_experiments.evaluation.threshold_search import search_thresholds  # torch, Optuna

    start = time.perf_counter()
    study = search_thresholds(counts, chosen.trials, seed=0).as_metrics()
    study_s = time.perf_counter() - start - exact_s  # it runs the exact search as well

    each_s = exact_s / optimum.combinations
    print("| | seconds | mean Dice found |\n|---|---|---|")
    print(f"| exact search, {optimum.combinations:.2g} combinations | {exact_s:.2f} | {optimum.dice:.4f} |")
    print(f"| coarse grid | {grid_s:.2f} | {counts.dice(on_grid).mean():.4f} |")
    print(
        f"| Optuna, {chosen.trials} trials | {study_s:.2f} | {study['thresholds/dice_optuna']:.4f} |\n\n"
        f"Peak memory after the exact search, the whole process: {peak_gb:.2f} GB. The exact search takes"
        f" {each_s:.1e} s per combination.\nScoring one combination from pixels takes {pixels_s:.2f} s"
        f" ({pixels_s / chosen.images * 1000:.2f} ms an image), {pixels_s / each_s:.1g} times as long."
    )


if __name__ == "__main__":
    main()
