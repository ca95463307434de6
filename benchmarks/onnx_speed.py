"""Predictions by torch and by onnxruntime from an exported file, on the CPU.

Run in the project's environment: python benchmarks/onnx_speed.py [--network fcn_resnet50] [--image_size 384]

Untrained weights, which take the same time as trained ones. The ways are timed in turn, after two images that
are not counted; medians are printed. On a machine with other work, --clock cpu --threads 1 counts the time of
the processor. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from measure import machine
from numpy.typing import NDArray

from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.onnx_export import difference, open_session, write_onnx
from pneumo_experiments.learning.predict import VIEWS, Ensemble, Predictor
from pneumo_experiments.settings import Device

Way = Callable[[NDArray[np.uint8]], object]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(way: Way, pixels: NDArray[np.uint8], clock: Callable[[], float]) -> float:
    start = clock()
    way(pixels)
    return clock() - start


def by_torch(network: PneumothoraxNet, precision: str, tta: str) -> Predictor:
    return Predictor(network, choose_compute(Device(device="cpu", precision=precision)), tta)  # pyright: ignore


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="fcn_resnet50")
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--tta", default="flip", choices=tuple(VIEWS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images per batch")
    parser.add_argument("--repeats", type=int, default=5, help="of each, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    network = PneumothoraxNet(options.network)
    chosen = by_torch(network, "auto", options.tta)
    reference = by_torch(network, "fp32", options.tta)
    shape = (options.image_size, options.image_size)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.perf_counter()
        write_onnx(path, Ensemble((reference,)), options.image_size, {})
        written_s, size_mb = time.perf_counter() - start, path.stat().st_size / 1e6
        gap = difference(path, reference, [rng.integers(0, 256, (2, *shape), np.uint8)])
        session = open_session(path, options.threads)
        ways: dict[str, Way] = {
            "torch fp32": lambda pixels: list(reference.predict(pixels, len(pixels))),
            f"torch, precision=auto: {chosen.compute.precision}": lambda pixels: list(
                chosen.predict(pixels, len(pixels))
            ),
            "onnxruntime fp32": lambda pixels: session.run(None, {"pixels": pixels}),
        }
        times = {}
        for count in options.batches:
            pixels = rng.integers(0, 256, (count, *shape), np.uint8)
            for way in ways.values():
                way(pixels[:2])
            rounds = [
                [seconds(way, pixels, CLOCKS[options.clock]) for way in ways.values()]
                for _ in range(options.repeats)
            ]
            times[count] = [statistics.median(column) for column in zip(*rounds, strict=True)]

    print(
        f"{options.network} at {options.image_size} px, tta={options.tta}; {machine()},"
        f" torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, threads: {options.threads}."
        f" Medians of {options.repeats} measurements of {options.clock} time, in turn.\n"
    )
    print("| ms per image | " + " | ".join(f"batch of {count}" for count in times) + " |")
    print("|---|" + "---|" * len(times))
    for place, name in enumerate(ways):
        cells = [f"{times[count][place] / count * 1000:.0f}" for count in times]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for place, name in list(enumerate(ways))[:2]:
        cells = [f"**{times[count][place] / times[count][2]:.2f}**" for count in times]
        print(f"| {name.split(':')[0]} / onnxruntime | " + " | ".join(cells) + " |")
    print(
        f"\nThe file has {size_mb:.0f} MB and takes {written_s:.0f} s to write. Largest differences: {gap}."
    )


if __name__ == "__main__":
    main()
