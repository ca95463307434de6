"""Training against the usual script, on the same images, in the same run.

python benchmarks/train.py              on a GPU where torch finds one, else on the CPU
python benchmarks/train.py --sizes 256 --batches 8 --images 64 --epochs 5
python benchmarks/train.py --check      measures nothing: 20 steps of each way to train, a line for each
bash benchmarks/gpu.sh > gpu.md         all that needs a GPU, in ten minutes, by --rows and --check

Epochs of both take turns; the first of each is not counted. Synthetic radiographs are repeated until there
are as many as asked for: their number is what costs time, not what they show. On a GPU it also tells which
fraction of the device's bf16 matrix products the training reaches. Needs neither MLflow nor Optuna.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from measure import machine
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.segmentation import fcn_resnet50
from torchvision.transforms import v2

from pneumo_experiments.dataset import hdf5
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.hdf5 import DatasetWriter
from pneumo_experiments.dataset.labels import run_length_labels
from pneumo_experiments.dataset.shards import ShardSettings, make_jobs, results
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import ComputeConfig, choose_compute
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.launch import launch
from pneumo_experiments.learning.loader import InMemoryData, StreamedData, choose_cache
from pneumo_experiments.learning.loss import criterion
from pneumo_experiments.learning.network import PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.threshold_counts import ThresholdCounter
from pneumo_experiments.settings import Batches, Device, Network, Recipe
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

SAMPLE = 48  # synthetic radiographs, before they are repeated
LINEAR_WITHIN = 0.05
# On a GPU so many images that the wait for an epoch's first batch counts as little as in earnest.
DEFAULTS = {
    "cuda": {"sizes": [384], "batches": [32, 64], "images": 5120, "epochs": 4, "linear": [500, 5000]},
    "cpu": {"sizes": [128, 256], "batches": [8], "images": 8, "epochs": 3, "linear": [40, 400]},
}
LINEAR_SIZE = {"cuda": 384, "cpu": 64}
CHECKED_SIZE, CHECKED_BATCH = {"cuda": 384, "cpu": 32}, {"cuda": 8, "cpu": 2}
CHECKED_STEPS = 20
# Of gpu.sh's table.
COLUMNS = (
    *("what", "size, px", "batch", "compile", "cache", "training, images/s", "prediction, images/s"),
    *("fraction of the matrix rate", "training / usual script", "peak memory, GB", "result"),
)
USUAL = "usual script"  # in place of a network; it comes first, and the others are compared with it
ROW_EPOCHS = 3  # the first is not counted


class Plan(NamedTuple):
    """How much gpu.sh does for a row of its table."""

    sizes: tuple[int, ...]  # px
    batch: int
    steps: int  # of an epoch
    matrix: tuple[int, int]  # side, and number of products
    checked_steps: int


FULL, DRY = Plan((384, 512), 32, 10, (8192, 100), CHECKED_STEPS), Plan((32,), 2, 2, (256, 1), 2)


class Radiographs(Dataset):
    """Images repeated to three channels and masks, read, changed and normalised one by one on the CPU."""

    def __init__(self, path: Path, rows: NDArray[np.int64]) -> None:
        self.path, self.rows, self.file = path, rows, None
        affine = v2.RandomAffine(degrees=10, translate=(0.06, 0.06), scale=(0.9, 1.1))
        self.change = v2.Compose([v2.RandomHorizontalFlip(), affine, v2.ColorJitter(brightness=0.1)])
        self.normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.file is None:  # in each worker its own
            self.file = h5py.File(self.path, "r")
        block, row = divmod(int(self.rows[index]), hdf5.BLOCK)
        image = tv_tensors.Image(self.file[f"images_{block}"][row][None])
        mask = tv_tensors.Mask(self.file[f"ann_{block}"][row][None])
        image, mask = self.change(image, mask)
        return self.normalise(image.repeat(3, 1, 1)), mask


def bce_and_dice(logits: Tensor, masks: Tensor) -> Tensor:
    probability = torch.sigmoid(logits)
    dice = (2 * (probability * masks).sum() + 1) / (probability.sum() + masks.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, masks) + 1 - dice


def usual_script(
    path: Path, rows: NDArray[np.int64], batch: int, workers: int, device: torch.device
) -> Iterator[tuple[float, float]]:
    """torchvision's FCN-ResNet50; seconds of each epoch and the fraction of them spent waiting for data."""
    cuda = device.type == "cuda"
    dataset = Radiographs(path, rows)
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, pin_memory=cuda, persistent_workers=workers > 0
    )
    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=1, aux_loss=True).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    model.train()
    while True:
        waited, total = 0.0, 0.0
        start = asked = time.perf_counter()
        for images, masks in loader:
            waited += time.perf_counter() - asked
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16, enabled=cuda):
                output = model(images)
            mask, aux = (bce_and_dice(output[name].float(), masks) for name in ("out", "aux"))
            loss = mask + 0.4 * aux
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.item()  # for the log; waits for the device
            asked = time.perf_counter()
        seconds = time.perf_counter() - start
        yield seconds, waited / seconds


def ours(
    path: Path,
    rows: NDArray[np.int64],
    batch: int,
    epochs: int,
    compute: ComputeConfig,
    progress: Callable[[int], None] = lambda images: None,
) -> Iterator[Epoch]:
    """The project's training by its defaults, from random weights; images lie where ``train`` puts them."""
    with hdf5.Dataset.open(path) as dataset:
        present = np.array([dataset.entries[row].area_px > 0 for row in rows.tolist()])
        cache = choose_cache("auto", 2 * len(rows) * dataset.image_size**2, compute.device)
        where = str(compute.device) if cache == "device" else "cpu"
        data = StreamedData(dataset, rows, present).load(where)
    recipe = Recipe(batches=Batches(batch_size=batch))
    return fit(fresh(recipe, compute), data, recipe, epochs, progress)


def fresh(recipe: Recipe, compute: ComputeConfig) -> Predictor:
    """The recipe's network with random weights."""
    return Predictor(build_network(recipe.network.network, "none", recipe.seed), compute)


def dataset_of(size: int, folder: Path) -> Path:
    """The synthetic radiographs at that image size, as ``preprocess`` writes them; made when first asked."""
    sample, path, work = (folder / name for name in ("sample", f"{size}.h5", f"{size}.work"))
    if not sample.exists():
        write_sample(sample, Contents(SAMPLE, 0, 0))
    if not path.exists():
        work.mkdir(exist_ok=True)
        dicom_dir, rows = sample / "dicom-images-train", read_annotations(sample / "train-rle.csv")
        members = open_archive(dicom_dir).members
        jobs = make_jobs(
            dicom_dir, ShardSettings(size, "float32", 10**8), members, run_length_labels(rows), patients={}
        )
        with DatasetWriter.create(path, image_size=size, pixel_dtype="float32", labelled=True) as writer:
            for result in results(jobs, work, available_cores()):
                if result.packed is not None:
                    writer.append(result.packed)
            writer.finish({})
    return path


def flops_per_image(size: int, network: str = Recipe().network.network) -> float:
    """Operations of convolutions and matrix products alone, forward and backward, two per product.

    Counted in one step on torch's meta device, whose tensors have shapes but no values.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = PneumothoraxNet(network)(torch.empty(2, 1, size, size))
        criterion(output, torch.empty(2, size, size), torch.empty(2), Recipe())["total"].backward()
    return counter.get_total_flops() / 2


def measured_matrix_rate(device: torch.device, side: int = 8192, products: int = 100) -> float:
    """Operations per second of bf16 matrix products; the first rounds warm the device up."""
    a, b = torch.randn(2, side, side).to(device, torch.bfloat16)
    rates: list[float] = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        wait_for(device)
        rates.append(2 * side**3 * products / (time.perf_counter() - start))
    return statistics.median(rates[3:])


def compare(
    path: Path, batch: int, arguments: argparse.Namespace, compute: ComputeConfig
) -> tuple[list[str], float]:
    """Cells of the table, and our images per second."""
    rows = np.arange(arguments.images) % SAMPLE
    mine = ours(path, rows, batch, arguments.epochs, compute)
    usual = usual_script(path, rows, batch, arguments.workers, compute.device)
    # The usual script begins: its workers are forks of this process, and what a process has written before a
    # fork is copied when it is next written to. Ours would pay for that in an epoch that counts.
    turns = [(theirs, next(mine)) for theirs in islice(usual, arguments.epochs)][1:]
    median = statistics.median
    our_rate = median(epoch.images_per_second for _, epoch in turns)
    pieces = min(epoch.micro_batch for _, epoch in turns)  # smaller than the batch when the memory ran out
    return [
        f"{batch}" if pieces >= batch else f"{batch} in pieces of {pieces}",
        f"{median(len(rows) / seconds for (seconds, _), _ in turns):.3g}",
        f"{our_rate:.3g}",
        f"{median(seconds / epoch.seconds for (seconds, _), epoch in turns):.2f}",
        f"{median(waited for (_, waited), _ in turns):.2%}",
        f"{median(epoch.wait_fraction for _, epoch in turns):.2%}",
    ], our_rate


def linear(path: Path, size: int, arguments: argparse.Namespace, compute: ComputeConfig) -> str:
    """Images per second of few and of many images.

    Within the epoch of many, an epoch of few follows each as many images: a machine whose speed changes over
    minutes treats both alike.
    """
    (few, many), batch, epochs = arguments.linear, arguments.batches[0], arguments.epochs - 1
    seconds, seen = {few: 0.0, many: 0.0}, {few: 0, many: 0}
    small = ours(path, np.arange(few) % SAMPLE, batch, many // few * epochs + 1, compute)
    next(small)  # warms the device up
    start = time.perf_counter()

    def after(images: int) -> None:
        nonlocal start
        seen[many] += images
        if seen[many] >= seen[few] + few:
            if compute.device.type == "cuda":
                torch.cuda.synchronize()  # what it still has to do is of the many
            seconds[many] += time.perf_counter() - start
            seconds[few] += next(small).seconds
            seen[few] += few
            start = time.perf_counter()

    large = ours(path, np.arange(many) % SAMPLE, batch, epochs, compute, after)
    start = time.perf_counter()
    for _ in large:
        seconds[many] += time.perf_counter() - start
        start = time.perf_counter()
    of_few, of_many = (seen[images] / seconds[images] for images in (few, many))
    ratio = of_many / of_few
    verdict = "within" if abs(ratio - 1) <= LINEAR_WITHIN else "NOT within"
    return (
        f"{size} px, batch {batch}: {of_few:.3g} images/s of {few} images, {of_many:.3g} of {many};"
        f" ratio {ratio:.3f}, {verdict} {LINEAR_WITHIN:.0%}"
    )


def check(path: Path, compute: ComputeConfig, recipe: Recipe, count: int = CHECKED_STEPS) -> bool:
    """Trains so many steps in each way that the device has, a line for each; whether all went well."""
    cuda = compute.device.type == "cuda"
    caches = ("device", "host", "stream") if cuda else ("host", "stream")
    precisions = ("bf16", "fp16", "fp32") if cuda else ("bf16", "fp32")
    ways: dict[str, Callable[[], object]] = {}
    for cache in caches:
        for precision in precisions:
            where = ComputeConfig(compute.device, precision)
            ways[f"cache={cache} precision={precision}"] = partial(steps, path, cache, recipe, where, count)
    best = ComputeConfig(compute.device, compute.precision)
    averaged = replace(
        recipe,
        optimizer=replace(recipe.optimizer, ema=0.9),
        batches=replace(recipe.batches, micro_batch=recipe.batches.batch_size // 2),
    )
    ways["ema=0.9 micro_batch"] = partial(steps, path, caches[0], averaged, best, count)
    ways["interrupted and resumed"] = partial(resumed, path, caches[0], recipe, best, count // 2)
    ways["validation"] = partial(validated, path, recipe.network.network, best)
    processes = min(2, torch.cuda.device_count()) if cuda else 2
    ways["processes=2"] = partial(launch, processes, worker, path, recipe, compute.precision, count)
    compiled = replace(recipe, network=replace(recipe.network, compile=True))
    ways["compile=true"] = partial(steps, path, caches[0], compiled, best, count)  # last: it takes minutes
    if processes < 2:
        del ways["processes=2"]
        print("processes=2: not checked, it needs two GPUs")
    well = True
    for name, way in ways.items():
        start = time.perf_counter()
        try:
            result = f"ok, {way()}"
        except Exception as error:  # whatever a device may raise: the other ways are still checked
            well, result = False, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{name}: {result}, {time.perf_counter() - start:.1f} s", flush=True)
    return well


def training_data(
    dataset: hdf5.Dataset, cache: str, compute: ComputeConfig, count: int
) -> InMemoryData | StreamedData:
    """Some images of the data set, repeated, where ``cache`` says."""
    rows = np.arange(count) % SAMPLE
    present = np.array([dataset.entries[row].area_px > 0 for row in rows.tolist()])
    data = StreamedData(dataset, rows, present)
    return data if cache == "stream" else data.load(str(compute.device) if cache == "device" else "cpu")


def steps(path: Path, cache: str, recipe: Recipe, compute: ComputeConfig, count: int) -> str:
    """An epoch of so many steps."""
    with hdf5.Dataset.open(path) as dataset:
        data = training_data(dataset, cache, compute, count * recipe.batches.batch_size)
        (epoch,) = fit(fresh(recipe, compute), data, recipe, 1)
    return f"loss {epoch.losses['total']:.3f}, {epoch.skipped_steps} steps skipped"


def resumed(path: Path, cache: str, recipe: Recipe, compute: ComputeConfig, count: int) -> str:
    """So many steps, and from what they left as many by a new network."""
    with hdf5.Dataset.open(path) as dataset, tempfile.TemporaryDirectory() as folder:
        data = training_data(dataset, cache, compute, count * recipe.batches.batch_size)
        checkpoint = Checkpoint(Path(folder))
        first = next(fit(fresh(recipe, compute), data, recipe, 2))
        checkpoint.save({"state": first.state()}, {})
        last = checkpoint.last()
        assert last is not None
        second = build_network(recipe.network.network, "none", 1)
        (epoch,) = fit(Predictor(second, compute), data, recipe, 2, state=last["state"])
    return f"loss {first.losses['total']:.3f}, then {epoch.losses['total']:.3f}"


def validated(path: Path, network: str, compute: ComputeConfig) -> str:
    """Predictions of all images, and their counts of pixels."""
    with hdf5.Dataset.open(path) as dataset:
        counter = ThresholdCounter(Predictor(build_network(network, "none", 0), compute, tta="flip"))
        counter.add(dataset.images(range(SAMPLE)), map(dataset.mask, range(SAMPLE)))
        counts = counter.read()
        areas = [entry.area_px for entry in dataset.entries]
    assert counts.truth_area.tolist() == areas, "the truth's pixels are miscounted"
    return f"{len(counts)} images"


def worker(path: Path, recipe: Recipe, precision: str, count: int) -> str:
    """What each of two processes does in a check."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    compute = ComputeConfig(distributed.local_device(kind), precision)
    return steps(path, "device" if kind == "cuda" else "host", recipe, compute, count)


@dataclass(frozen=True)
class Speed:
    """Of one way to train, and of prediction by the same network."""

    training: float  # images per second, over all processes
    prediction: float | None
    memory_bytes: int  # at most, of one device; 0 where unknown
    result: str = "ok"


def our_speed(path: Path, cache: str, recipe: Recipe, precision: str, steps: int) -> Speed:
    """By epochs of so many steps; each process of a group calls it."""
    device = distributed.local_device("cuda" if torch.cuda.is_available() else "cpu")
    compute, batch = ComputeConfig(device, precision), recipe.batches.batch_size
    with hdf5.Dataset.open(path) as dataset:
        data = training_data(dataset, cache, compute, steps * batch)
        images = np.tile(dataset.images(range(SAMPLE)), (max(1, steps // 2), 1, 1))
    predictor = fresh(recipe, compute)
    epochs = [*fit(predictor, data, recipe, ROW_EPOCHS)][1:]
    seconds = list[float]()
    for _ in range(ROW_EPOCHS):
        start = time.perf_counter()
        for _ in predictor.predict_batches(images, batch):
            pass
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    pieces = min(epoch.micro_batch for epoch in epochs)
    return Speed(
        statistics.median(epoch.images_per_second for epoch in epochs),
        len(images) / statistics.median(seconds[1:]),
        torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "ok" if pieces * distributed.world_size() >= batch else f"ok, in pieces of {pieces}",
    )


def usual_speed(path: Path, plan: Plan, workers: int, device: torch.device) -> Speed:
    """The same of the usual script, which does not predict."""
    rows = np.arange(plan.steps * plan.batch) % SAMPLE
    epochs = islice(usual_script(path, rows, plan.batch, workers, device), ROW_EPOCHS)
    seconds = statistics.median([seconds for seconds, _ in epochs][1:])
    return Speed(len(rows) / seconds, None, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_rows(network: str, path: Path, arguments: argparse.Namespace, compute: ComputeConfig) -> None:
    """The rows of one network, or of the usual script, at one size; what fails costs its row."""
    size, found, plan = int(path.stem), path.with_name("rates.json"), DRY if arguments.dry_run else FULL
    rates = json.loads(found.read_text()) if found.exists() else {}  # what the networks are compared with
    count, compiled = arguments.processes, arguments.compile
    recipe, caches = Recipe(batches=Batches(batch_size=plan.batch)), ["file"]
    if network != USUAL:
        recipe = replace(recipe, network=Network(network=network, compile=compiled))
        cuda = compute.device.type == "cuda"
        caches = ["device"] * cuda + ["host"] * (not cuda or (not compiled and count == 1))
    what = network + f", {count} processes" * (count > 1)
    row = {"what": what, "size, px": size, "batch": plan.batch, "compile": "yes" if compiled else "no"}
    try:
        flops = flops_per_image(size, recipe.network.network)
    except Exception as error:  # no such network, or a package that is not installed
        print_row(row | {"result": f"not available: {one_line(error)}"})
        return
    for cache in caches:
        try:
            if network == USUAL:
                rates["matrix"] = measured_matrix_rate(compute.device, *plan.matrix)
                speed = usual_speed(path, plan, arguments.workers, compute.device)
                rates[path.stem] = speed.training
                found.write_text(json.dumps(rates))
            else:
                given = (path, cache, recipe, compute.precision, plan.steps)
                speed = launch(count, our_speed, *given) if count > 1 else our_speed(*given)
        except Exception as error:  # whatever a device may raise
            print_row(row | {"cache": cache, "result": f"failed: {one_line(error)}"})
            continue
        matrix, usual = (rates.get(name) for name in ("matrix", path.stem))
        values = {
            "training, images/s": f"{speed.training:.3g}",
            "prediction, images/s": speed.prediction and f"{speed.prediction:.3g}",
            "fraction of the matrix rate": matrix and f"{speed.training * flops / matrix / count:.1%}",
            "training / usual script": usual and f"{speed.training / usual:.2f}",
            "peak memory, GB": speed.memory_bytes and f"{speed.memory_bytes / 1e9:.1f}",
        }
        print_row(row | {"cache": cache, "result": speed.result} | values)


def print_row(cells: Mapping[str, object]) -> None:
    print(f"| {' | '.join(str(cells.get(name) or '–') for name in COLUMNS)} |", flush=True)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")


def device_line(device: torch.device) -> str:
    """The device, its driver and torch."""
    if device.type != "cuda":
        return f"{machine()}, torch {torch.__version__}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, driver"
        f" {(driver.splitlines() or ['unknown'])[0]}, torch {torch.__version__}; {machine()}"
    )


def main() -> None:
    """Reads the options; on CPU and GPU they have defaults that take some minutes."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the images, in pixels")
    parser.add_argument("--batches", type=int, nargs="+", help="images per step")
    parser.add_argument("--images", type=int, help="images per epoch")
    parser.add_argument("--epochs", type=int, help="epochs of each training, 2 or more")
    parser.add_argument("--workers", type=int, help="processes of the usual script's loader")
    parser.add_argument("--linear", type=int, nargs=2, help="few images, and a multiple of them")
    parser.add_argument(
        "--check", action="store_true", help="20 steps of each way to train, nothing measured"
    )
    parser.add_argument("--rows", nargs="+", help=f"networks, or {USUAL!r}: their rows of gpu.sh's table")
    parser.add_argument("--head", action="store_true", help="the device, and the head of that table")
    parser.add_argument("--compile", action="store_true", help="with --rows: by torch.compile")
    parser.add_argument("--processes", type=int, default=1, help="with --rows")
    parser.add_argument("--dry_run", action="store_true", help="few small images, to see whether it runs")
    parser.add_argument("--folder", type=Path, help="where the images are kept for the next call")
    parser.set_defaults(workers=min(available_cores(), 8), **DEFAULTS[kind])
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: the first epoch is not counted, so take 2 or more")
    with tempfile.TemporaryDirectory() as temporary:
        folder, compute = arguments.folder or Path(temporary), choose_compute(Device(kind))
        if arguments.head:
            print(f"{device_line(compute.device)}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        plan = DRY if arguments.dry_run else FULL
        if arguments.check:
            size, batch = (
                (plan.sizes[0], plan.batch) if plan is DRY else (CHECKED_SIZE[kind], CHECKED_BATCH[kind])
            )
            print(device_line(compute.device))
            recipe = Recipe(batches=Batches(batch_size=batch))
            sys.exit(not check(dataset_of(size, folder), compute, recipe, plan.checked_steps))
        for size in plan.sizes if arguments.head or arguments.rows else ():
            path = dataset_of(size, folder)
            for network in arguments.rows or ():
                print_rows(network, path, arguments, compute)
        if not (arguments.head or arguments.rows):
            measure(folder, arguments, compute)


def measure(folder: Path, arguments: argparse.Namespace, compute: ComputeConfig) -> None:
    """Measures and prints."""
    kind = compute.device.type
    gpu = f"{torch.cuda.get_device_name()}; " if kind == "cuda" else ""
    print(f"{gpu}{machine()}, torch {torch.__version__}")
    print(f"{arguments.images} images per epoch; medians of {arguments.epochs - 1} epochs of each, in turn")
    usual = "fp16" if kind == "cuda" else "fp32"
    print(f"usual script: {usual}, {arguments.workers} loading processes; ours: {compute.precision}\n")
    matrix_rate = measured_matrix_rate(compute.device) if kind == "cuda" else None
    titles = ["size, px", "batch", "usual script, images/s", "ours, images/s", "ours / usual"]
    titles += ["usual script waits for data", "ours waits for data", "GFLOP per image"]
    titles += ["ours, fraction of the matrix rate"] if matrix_rate else []
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for size in arguments.sizes:
        path, flops = dataset_of(size, folder), flops_per_image(size)
        for batch in arguments.batches:
            cells, rate = compare(path, batch, arguments, compute)
            cells.append(f"{flops / 1e9:.0f}")
            cells += [f"{rate * flops / matrix_rate:.1%}"] if matrix_rate else []
            print(f"| {size} | {' | '.join(cells)} |", flush=True)
    if matrix_rate:
        print(f"\nmatrix rate: {matrix_rate / 1e12:.0f} TFLOP/s, bf16 products of 8192 x 8192 matrices")
    size = LINEAR_SIZE[kind]
    print(f"\n{linear(dataset_of(size, folder), size, arguments, compute)}")


if __name__ == "__main__":
    import train  # processes are given functions of a module: they do not import the main program

    train.main()
