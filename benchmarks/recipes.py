"""Recipes side by side: networks, weights, sampling, augmentation and losses, with intervals over images.

    python benchmarks/recipes.py data --radiographs DICOM_IMAGES --masks PREDICTED_RLE_CSV
    python benchmarks/recipes.py run --seeds 2 --weights STATE_DICT
    python benchmarks/recipes.py table
    python benchmarks/recipes.py speed --epochs 3

`data` writes two data sets into --folder: `hard`, synthetic radiographs with difficulty=hard, and, where
radiographs are given, `real`, those with the masks of another model. On the latter Dice is the agreement with
that model, no Dice on truth. `run` trains each recipe with each seed, for the same number of images seen, and
writes one file for each, and a picture of six hold-out images. The same command goes on after an
interruption, and other `--only`, `--seeds` or `--budgets` add to it. With the budget `seconds` a recipe gets
as many epochs as take the time of the first recipe's training, by the speeds measured with the budget
`images`. `table` prints Markdown; an interval is of the images, whose Dice are means over the seeds: the
spread over seeds, a standard deviation, is not in it. Other `--epochs` make another table; other `--weights`
need another folder.
`speed` compares images per second while training with a plain loop around the same network, epoch by epoch.

Two peers train on the same images, in the number format that ours compute in: torchvision's reference loop
for segmentation (cross-entropy, SGD with polynomial decay, flips and crops) and a plain U-Net loop of
segmentation_models_pytorch (Dice and BCE, AdamW, flips). Each predicts the hold-out as it is, at a
probability of 0.5, and with thresholds that our search chose on the validation images, as for every recipe
here. Our recipes keep their best epoch by the validation images, the peers their last, as their scripts do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, machine
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.pictures import draw_overlays
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.figures import contact_sheet
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import Output, build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.comparison import compare
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.settings import Train
from pneumo_experiments.training.fold import Fold
from pneumo_experiments.training.resume import TrainingState, checkpoint_of

# What every recipe has; a recipe changes some of it. Settings that only cost time here are off.
COMMON: dict[str, Any] = {
    "batch_size": 8, "learning_rate": 3e-4, "threshold_trials": 0, "overlays": 0, "best_k": 1, "tta": "none",
    "warmup": 0.1, "augment": "mild", "folds": 5, "patience": 0,
}  # fmt: skip
FIRST, CHEAP = "FCN-ResNet50", "DeepLabV3+, ResNet50"
DEEPLAB = {"network": "deeplabv3+:resnet50"}
RECIPES: dict[str, dict[str, Any]] = {
    FIRST: {"network": "fcn_resnet50"},
    "FCN-ResNet50, stride 4": {"network": "fcn_resnet50_s4"},
    CHEAP: DEEPLAB,
    "U-Net, ResNet50": {"network": "unet:resnet50"},
    "U-Net, ResNet34, random weights": {"network": "unet:resnet34", "weights": "none"},
    "random weights": {**DEEPLAB, "weights": "none"},
    "patients balanced": {**DEEPLAB, "balance": "patient"},
    "strong augmentation": {**DEEPLAB, "augment": "strong"},
    "no augmentation": {**DEEPLAB, "augment": "none"},
    "loss 3:1:4": {**DEEPLAB, "bce_weight": 3.0, "focal_weight": 4.0},
}
PEERS = ("torchvision's reference loop", "smp U-Net, plain loop")
NETWORKS = (*[*RECIPES][:5], *PEERS)  # compared with the first of them
CHANGES = (CHEAP, *[*RECIPES][5:])  # of a fast network that starts from pretrained layers
SHOWN = 6  # images in a picture beside each result
HALF = Thresholds(presence_threshold=0.0, top_score=0.5, min_area_px=1, bottom_score=0.5)


@dataclass(frozen=True)
class Job:
    """One training: on which data, with which recipe, seed and number of epochs."""

    data: Path
    recipe: str
    seed: int
    budget: str
    of: int
    """epochs with the budget of images"""
    epochs: int

    @property
    def key(self) -> str:
        """Of the results that belong together: other epochs are another table."""
        return f"{self.budget} of {self.of} epochs"

    @property
    def file(self) -> Path:
        """Where its result is written."""
        name = "".join(c if c.isalnum() else "-" for c in f"{self.recipe}-{self.key}-{self.seed}")
        return self.data.with_suffix("") / f"{name}.json"


def write_data(chosen: argparse.Namespace) -> None:
    """Writes the data sets that are missing."""
    command = [sys.executable, "-m", "pneumo_experiments"]
    folder: Path = chosen.folder
    size = ["--image_size", str(chosen.size)]
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db", "PYTHONPATH": str(ROOT)}

    def call(*words: object) -> None:
        subprocess.run([*command, *map(str, words)], check=True, env=os.environ | environment)

    folder.mkdir(parents=True, exist_ok=True)
    hard, sample = folder / "hard.h5", folder / "sample"
    if not hard.is_file():
        count = ("--images", chosen.images, "--test_images", 0)
        call("sample", "--output_dir", sample, *count, "--difficulty", "hard")
        labelled = ("--dicom_dir", sample / "dicom-images-train", "--rle_csv", sample / "train-rle.csv")
        call("preprocess", *labelled, "--dataset", hard, *size)
    if chosen.radiographs and not (folder / "real.h5").is_file():
        labelled = ("--dicom_dir", chosen.radiographs, "--rle_csv", chosen.masks)
        call("preprocess", *labelled, "--dataset", folder / "real.h5", *size)


def run(chosen: argparse.Namespace) -> None:
    """Trains what is missing, the budget of images first: it measures the speeds."""
    names = [name for name in (*RECIPES, *PEERS) if not chosen.only or any(o in name for o in chosen.only)]
    for budget in chosen.budgets:
        for seed in range(chosen.seeds):
            for name in names:
                for data in sorted(chosen.folder.glob("*.h5")):
                    job = Job(data, name, seed, budget, chosen.epochs, epochs_of(data, name, budget, chosen))
                    if job.epochs and not job.file.is_file():
                        train(job, chosen)


def epochs_of(data: Path, recipe: str, budget: str, chosen: argparse.Namespace) -> int:
    """As many as were asked for, or as take the first recipe's time; 0 where speeds are not measured yet."""
    if budget == "images":
        return chosen.epochs
    jobs = [
        [Job(data, name, seed, "images", chosen.epochs, 0) for seed in range(chosen.seeds)]
        for name in (FIRST, recipe)
    ]
    files = [[job.file for job in of_recipe if job.file.is_file()] for of_recipe in jobs]
    if not all(files):
        return 0
    first, own = (np.mean([json.loads(file.read_text())["seconds"] for file in group]) for group in files)
    return max(1, round(chosen.epochs * float(first / own)))


def train(job: Job, chosen: argparse.Namespace) -> None:
    """Trains and writes the Dice of each hold-out image, with the time."""
    own = RECIPES.get(job.recipe, {"network": "fcn_resnet50"})
    weights = own.get("weights", str(chosen.weights))
    values = {
        **COMMON,
        **own,
        "weights": weights,
        "epochs": job.epochs,
        "seed": job.seed,
        "device": chosen.device,
    }
    settings = Train.of(dataset=job.data, checkpoints=job.data.parent / "checkpoints", **values)
    print(f"{job.data.stem}: {job.recipe}, seed {job.seed}, {job.epochs} epochs ({job.budget})", flush=True)
    with Dataset.open(job.data) as dataset:
        split, fingerprint = make_split(dataset, settings.split), dataset.fingerprint
        holdout, validation = Subset(dataset, split.holdout), Subset(dataset, split.validation)
        if job.recipe in PEERS:
            make = reference_loop if job.recipe == PEERS[0] else unet_loop
            network, seconds = make(Subset(dataset, split.train), settings)
            predictor = Predictor(network, choose_compute(settings.compute), "none")  # pyright: ignore
            chosen_on = best_of_all(validation.count(predictor)).thresholds
        else:
            predictor, chosen_on, seconds = our_training(settings, dataset)
        job.file.parent.mkdir(exist_ok=True)
        counts = holdout.count(predictor)
        evaluations = {
            "searched": Evaluation(holdout, counts, chosen_on),
            "half": Evaluation(holdout, counts, HALF),
        }
        draw(evaluations["searched"], predictor, job.file.with_suffix(".png"))
        result = {
            "recipe": job.recipe, "budget": job.key, "weights": weights, "seed": job.seed,
            "epochs": job.epochs, "seconds": seconds, "images": len(split.train),
            "patients": holdout.patients.tolist(), "areas": holdout.areas_px.tolist(), "machine": machine(),
            "dices": {name: one.images.dices.tolist() for name, one in evaluations.items()},
        }  # fmt: skip
    job.file.with_suffix(".part").write_text(json.dumps(result))
    job.file.with_suffix(".part").rename(job.file)
    if job.recipe not in PEERS:
        checkpoint_of(settings, fingerprint).clear()
    dice = np.mean(result["dices"]["searched"])
    print(
        f"  Dice {dice:.4f} (all-empty {np.mean(np.array(result['areas']) == 0):.4f}), {seconds:.0f} s",
        flush=True,
    )


def draw(evaluation: Evaluation, predictor: Predictor, path: Path) -> None:
    """Overlays of the same positives for every recipe, from the smallest to the largest area."""
    areas = evaluation.counts.truth_area
    positives = [place for place in np.argsort(areas, kind="stable").tolist() if areas[place]]
    shown = [positives[i] for i in np.linspace(0, len(positives) - 1, SHOWN).round().astype(int)]
    texts = evaluation.captions()
    drawn = [*draw_overlays(evaluation, predictor, {place: texts[place] for place in shown})]
    Image.fromarray(contact_sheet(drawn, columns=3)).save(path)


def our_training(settings: Train, dataset: Dataset) -> tuple[Predictor, Thresholds, float]:
    """Trains as `train` does, from the last whole epoch; seconds of its epochs without validation."""
    checkpoint = checkpoint_of(settings, dataset.fingerprint)
    state = TrainingState.load(checkpoint) or TrainingState()
    fold = Fold.prepare(settings, dataset)
    for result in fold.epochs(state):
        state.save(checkpoint)
        print(f"  epoch {result.epoch.number}: validation Dice {result.scores.dice:.4f}", flush=True)
    finished = fold.finish(state)
    seconds = sum(epoch["speed/seconds_per_epoch"] for epoch in finished.history)
    (predictor,) = finished.detector.predictor.members
    return predictor, finished.detector.thresholds, seconds


class Peer(nn.Module):
    """A network of others with one logit per pixel, as our predictor wants one."""

    def __init__(self, network: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.logits = network, logits

    def forward(self, images: Tensor) -> Output:
        """Logits of images (n, 1, S, S) in [0, 1]; presence is that of the surest pixel."""
        mask = self.logits(self.network(normalised(images))).float()
        return Output(mask, None, mask.flatten(1).amax(1))


def normalised(images: Tensor) -> Tensor:
    """ImageNet's mean and standard deviation, three channels."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(1, 3, 1, 1).to(images)) / std.view(1, 3, 1, 1).to(images)


def reference_loop(subset: Subset, settings: Train) -> tuple[Peer, float]:
    """references/segmentation/train.py of torchvision 0.29: its loss, optimiser, schedule and transforms.

    Two classes; lr 0.01 is its default for a batch of 8 times 4; random resize to half to twice, flip, crop.
    """
    from torchvision.models.segmentation import fcn_resnet50

    network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=2, aux_loss=True)
    load_backbone(network.backbone, settings)
    parameters = [
        {"params": [*network.backbone.parameters(), *network.classifier.parameters()]},
        {"params": network.aux_classifier.parameters(), "lr": 0.1},  # pyright: ignore
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def change(images: Tensor, masks: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        side = images.shape[-1]
        larger = int(generator.uniform(0.5, 2.0) * side)
        images = functional.interpolate(images, size=(larger, larger), mode="bilinear", antialias=True)
        masks = functional.interpolate(masks[:, None], size=(larger, larger), mode="nearest")[:, 0]
        if generator.random() < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
        missing = max(0, side - larger)
        images, masks = (
            functional.pad(images, (0, missing, 0, missing)),
            functional.pad(masks, (0, missing, 0, missing)),
        )
        top, left = generator.integers(0, images.shape[-1] - side + 1, 2)
        return images[..., top : top + side, left : left + side], masks[
            ..., top : top + side, left : left + side
        ]

    def loss(output: Any, masks: Tensor) -> Tensor:
        classes = (masks > 0.5).long()
        main, aux = (functional.cross_entropy(output[name].float(), classes) for name in ("out", "aux"))
        return main + 0.5 * aux

    seconds = loop(network, optimizer, subset, settings, change, loss, power=0.9)
    return Peer(network, lambda output: output["out"][:, 1] - output["out"][:, 0]), seconds


def unet_loop(subset: Subset, settings: Train) -> tuple[Peer, float]:
    """A U-Net with ResNet34 of segmentation_models_pytorch, from random weights as our recipe."""
    network = unet()
    return Peer(network, lambda output: output[:, 0]), plain_loop(network, subset, settings)


def unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, classes=1)


def deeplab() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=1)


def fcn() -> nn.Module:
    from torchvision.models.segmentation import fcn_resnet50

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)["out"]

    return Logits()


# A network of ours, and the same in a plain loop.
PLAIN = {"fcn_resnet50": fcn, "unet:resnet34": unet, "deeplabv3+:resnet50": deeplab}


def plain_loop(network: nn.Module, subset: Subset, settings: Train) -> float:
    """The loop of the library's examples: Dice and binary cross-entropy, AdamW, flips. The seconds."""
    import segmentation_models_pytorch as smp

    dice, bce = smp.losses.DiceLoss("binary"), nn.BCEWithLogitsLoss()

    def change(images: Tensor, masks: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        return (images.flip(-1), masks.flip(-1)) if generator.random() < 0.5 else (images, masks)

    def loss(output: Any, masks: Tensor) -> Tensor:
        output = output.float()
        return dice(output, masks[:, None]) + bce(output, masks[:, None])

    return loop(network, torch.optim.AdamW(network.parameters(), lr=3e-4), subset, settings, change, loss)


def measure_speed(chosen: argparse.Namespace) -> None:
    """Images per second while training, ours and the plain loop's, one after the other each round."""
    data = min(chosen.folder.glob("*.h5"))
    print(f"{machine()}; medians of {chosen.epochs} epochs each, {chosen.size} px, batches of 8\n")
    print(
        "| network | plain loop, images/s | ours, images/s | ours / plain (each round) |\n|---|---|---|---|"
    )
    for name, make in PLAIN.items():
        values = {**COMMON, "network": name, "weights": "none", "aux_weight": 0.0, "device": chosen.device}
        settings = Train.of(dataset=data, epochs=chosen.epochs + 1, **values)
        once = replace(settings, schedule=replace(settings.schedule, epochs=1))
        with Dataset.open(data) as dataset:
            fold, network = Fold.prepare(settings, dataset), make()
            images = Subset(dataset, fold.split.train)
            rounds = [
                (result.epoch.seconds, plain_loop(network, images, once))
                for result in fold.epochs(TrainingState())
            ][1:]
        own, plain = (len(images.indices) / np.array(seconds) for seconds in zip(*rounds, strict=True))
        ratios = ", ".join(f"{ratio:.2f}" for ratio in own / plain)
        print(f"| {name} | {np.median(plain):.2f} | {np.median(own):.2f}"
              f" | **{np.median(own / plain):.2f}** ({ratios}) |", flush=True)  # fmt: skip


def loop(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    subset: Subset,
    settings: Train,
    change: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]],
    loss: Callable[[Any, Tensor], Tensor],
    power: float | None = None,
) -> float:
    """A plain training loop over images in memory; ``power`` is that of a polynomial decay. The seconds."""
    compute = choose_compute(settings.compute)
    torch.manual_seed(settings.recipe.seed)
    generator = np.random.default_rng(settings.recipe.seed)
    dataset, rows = subset.dataset, subset.indices
    size, epochs = settings.recipe.batches.batch_size, settings.schedule.epochs
    steps = epochs * -(-len(rows) // size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** (power or 0))
    network.to(compute.device).train()
    pixels, targets = torch.from_numpy(dataset.images(rows)), torch.from_numpy(dataset.targets(rows))
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in batches(generator.permutation(len(rows)), size):
            images, masks = (each[batch].to(compute.device).float() / 255 for each in (pixels, targets))
            images, masks = change(images[:, None], masks, generator)
            optimizer.zero_grad()
            with compute.autocast():
                output = network(normalised(images))
            loss(output, masks).backward()
            optimizer.step()
            decay.step()
    return time.perf_counter() - start


def batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Rows in batches of two images or more, which batch norm needs."""
    for batch in np.array_split(rows, -(-len(rows) // size)):
        if len(batch) > 1:
            yield batch


def load_backbone(backbone: nn.Module, settings: Train) -> None:
    """Starts a backbone of torchvision's as that of our FCN-ResNet50 starts."""
    ours = build_network("fcn_resnet50", settings.recipe.network.weights, settings.recipe.seed)
    backbone.load_state_dict(ours.backbone.state_dict())


def table(chosen: argparse.Namespace) -> None:
    """Dice of each recipe on the hold-out, and the paired difference to the first, over images and seeds."""
    for folder in sorted(path.with_suffix("") for path in chosen.folder.glob("*.h5")):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        for budget in dict.fromkeys(result["budget"] for result in results):
            of_budget = [result for result in results if result["budget"] == budget]
            for names in (NETWORKS, CHANGES):
                print_table(folder.name, budget, [one for one in of_budget if one["recipe"] in names], names)


def print_table(data: str, budget: str, results: list[dict[str, Any]], names: Sequence[str]) -> None:
    """A row for each recipe, of all its seeds that the first recipe of these has, too."""
    if not results:
        return
    reference = next(name for name in names if any(one["recipe"] == name for one in results))
    first = {result["seed"]: result for result in results if result["recipe"] == reference}
    one = next(iter(first.values()))
    areas = np.array(one["areas"])
    positive = f"{np.count_nonzero(areas)} of them positive, all-empty {np.mean(areas == 0):.4f}"
    scored = f"{one['images']} images train, {len(areas)} are scored, {positive}"
    print(f"\n**{data}**, equal {budget}: {scored}; {one['machine']}\n")
    print(
        "| recipe | Dice of each seed | spread | epochs | seconds | Dice | on positives"
        " | difference to the first (95%) | at 0.5 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        own = [result for result in results if result["recipe"] == name and result["seed"] in first]
        if not own:
            continue
        searched = np.array([result["dices"]["searched"] for result in own])
        of_seed, dices = searched.mean(axis=1), searched.mean(axis=0)
        spread = f"{of_seed.std(ddof=1):.3f}" if len(own) > 1 else "–"
        each = ", ".join(f"{dice:.4f}" for dice in of_seed)
        half = np.mean([result["dices"]["half"] for result in own])
        other = np.mean([first[result["seed"]]["dices"]["searched"] for result in own], axis=0)
        paired = compare(dices, other, one["patients"])
        difference = (
            "–"
            if name == reference
            else f"{paired.difference:+.4f} ({paired.low:+.4f} to {paired.high:+.4f})"
        )
        seconds = np.mean([result["seconds"] for result in own])
        epochs = np.mean([result["epochs"] for result in own])
        print(f"| {name} | {each} | {spread} | {epochs:.0f} | {seconds:.0f} | {dices.mean():.4f}"
              f" | {dices[areas > 0].mean():.4f} | {difference} | {half:.4f} |")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("step", choices=["data", "run", "table", "speed"])
    options.add_argument("--folder", type=Path, default=Path("recipes"), help="of data sets and results")
    options.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    options.add_argument("--images", type=int, default=600, help="synthetic radiographs of the hard sample")
    options.add_argument("--radiographs", type=Path, help="folder of DICOM files")
    options.add_argument("--masks", type=Path, help="their run lengths, predicted by another model")
    options.add_argument("--weights", default="auto", help="none, auto or a state dict of a ResNet-50")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--budgets", nargs="+", choices=["images", "seconds"], default=["images", "seconds"])
    options.add_argument("--only", nargs="+", default=[], help="recipes whose name has one of these texts")
    options.add_argument("--device", default="auto")
    chosen = options.parse_args()
    {"data": write_data, "run": run, "table": table, "speed": measure_speed}[chosen.step](chosen)


if __name__ == "__main__":
    main()
