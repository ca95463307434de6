"""Groups of settings that make up a training. A group's first line is its heading in --help."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

from pneumo_experiments.settings.fields import AUTO, NONE, Arg
from pneumo_experiments.settings.networks import DECODERS, NAMES, TORCHVISION, check_network

MAX_SEED = 2**32 - 1
Seed = Annotated[int, Arg("seed of every random choice but the split: same seed, same result", 0, MAX_SEED)]


@dataclass(frozen=True)
class Device:
    """Device."""

    device: Annotated[
        Literal["auto", "cuda", "mps", "cpu"],
        Arg("where the network runs; auto takes the best available", shapes_weights=False),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Arg(
            "number format of the network's arithmetic; auto takes the fastest on the device, or what the"
            " model was trained in"
        ),
    ] = "auto"


@dataclass(frozen=True)
class SplitSettings:
    """Split by patient."""

    holdout: Annotated[
        float,
        Arg(
            "fraction of the patients kept for the final score and for decisions about the champion; 0 keeps"
            " none",
            0,
            1,
        ),
    ] = 0.2
    folds: Annotated[int, Arg("parts into which the other patients are divided", 2, 1000)] = 5
    fold: Annotated[
        str,
        Arg(
            "the part that validates, from 0; the others train. all: train validates on each part in turn",
            pattern=("all|[0-9]{1,4}", "the number of a part, or all"),
        ),
    ] = "0"
    split_seed: Annotated[
        int, Arg("seed of the split: same split_seed, same hold-out, whatever the seed", 0, MAX_SEED)
    ] = 0


@dataclass(frozen=True)
class LossWeights:
    """Loss: weights of its terms."""

    bce_weight: Annotated[float, Arg("pixelwise binary cross-entropy", 0, 1000)] = 1.0
    dice_weight: Annotated[float, Arg("soft Dice loss over the batch", 0, 1000)] = 1.0
    dice_image_weight: Annotated[float, Arg("soft Dice loss of each image", 0, 1000)] = 0.0
    focal_weight: Annotated[float, Arg("focal loss (gamma 2)", 0, 1000)] = 1.0
    lovasz_weight: Annotated[float, Arg("Lovász hinge, a surrogate of the Jaccard index", 0, 1000)] = 0.0
    aux_weight: Annotated[float, Arg("the auxiliary head's mask loss", 0, 1000)] = 0.4
    presence_weight: Annotated[float, Arg("cross-entropy of presence", 0, 1000)] = 0.2


@dataclass(frozen=True)
class Optimizer:
    """Optimiser: AdamW and its learning rate."""

    learning_rate: Annotated[float, Arg("AdamW's highest learning rate", 0, 1e30)] = 3e-4
    pretrained_lr_scale: Annotated[
        float, Arg("factor of the learning rate for layers with pretrained weights", 0, 1)
    ] = 0.3
    schedule: Annotated[
        Literal["cosine", "polynomial"], Arg("how the learning rate falls to zero after the warm-up")
    ] = "cosine"
    warmup: Annotated[float, Arg("fraction of all steps in which the learning rate rises", 0, 0.9)] = 0.2
    weight_decay: Annotated[float, Arg("AdamW's weight decay of kernels", 0, 1000)] = 0.01
    clip_norm: Annotated[float, Arg("largest norm of a step's gradient; 0 sets no limit", 0, 1e6)] = 5.0
    ema: Annotated[
        float,
        Arg(
            "decay of an exponential moving average of the weights, which is validated and kept;"
            " 0 keeps none",
            0,
            1,
        ),
    ] = 0.0


@dataclass(frozen=True)
class Batches:
    """Batches and augmentation."""

    batch_size: Annotated[int, Arg("images per optimiser step", 2, 65_536)] = 16
    micro_batch: Annotated[
        int,
        Arg(
            "images per forward pass, whose gradients add up to a step; 0 takes the whole batch, and fewer"
            " when memory runs out. Batch norm and the batch's Dice see these images alone",
            0,
            65_536,
        ),
    ] = 0
    positive_fraction: Annotated[
        float,
        Arg(
            "fraction of images with pneumothorax in each batch of the first epoch; 0 takes every image once",
            0,
            1,
        ),
    ] = 0.8
    final_positive_fraction: Annotated[
        float, Arg("that fraction in the last epoch; it changes linearly", 0, 1)
    ] = 0.4
    balance: Annotated[
        Literal["image", "patient"],
        Arg(
            "what is drawn without replacement from the positives and from the negatives: images, or patients"
            " and of each an image"
        ),
    ] = "image"
    augment: Annotated[
        Literal["none", "mild", "strong"],
        Arg(
            "flip, shift, scale, rotate and distort the training images, and change their gamma, contrast"
            " and brightness; strong does more of it and adds noise, blur and low resolution",
            earlier=("none", "mild"),
        ),
    ] = "mild"
    augment_strength: Annotated[float, Arg("factor of these random changes, but the flip", 0, 3)] = 1.0
    mask_smoothing: Annotated[
        int,
        Arg("pixels to either side of a mask's border, in the training image, that are softened", 0, 16),
    ] = 0
    crop: Annotated[
        int,
        Arg(
            "side in pixels of a random part of each training image that the network sees, after augment;"
            " predictions are of whole images; 0 takes them whole",
            0,
            65_536,
        ),
    ] = 0
    cache: Annotated[
        Literal["auto", "device", "host", "stream"],
        Arg(
            "where the training images are kept; auto takes the first with enough memory",
            shapes_weights=False,
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if isinstance(cast("object", self.augment), bool):  # in trials of an earlier version
            object.__setattr__(self, "augment", "mild" if self.augment else "none")


@dataclass(frozen=True)
class Network:
    """Network."""

    network: Annotated[
        str,
        Arg(
            f"{', '.join(TORCHVISION)}; or DECODER:ENCODER of segmentation_models_pytorch, such as"
            f" unet:resnet34, with {', '.join(DECODERS)} as decoder",
            check=check_network,
            offered=NAMES,
        ),
    ] = "fcn_resnet50"
    weights: Annotated[
        str,
        Arg(
            "initial weights: imagenet (backbone, downloaded), coco (backbone and heads, downloaded), none"
            " (random), a file with a state dict, a model's address, or auto: imagenet where it can be"
            " downloaded, else none",
            names_file=(AUTO, NONE, "imagenet", "coco"),
            missing="give auto, imagenet, coco, none, a file with a state dict, or a model's address",
            folder_too=True,
        ),
    ] = AUTO
    freeze_epochs: Annotated[
        int,
        Arg("epochs at the start in which the backbone stays as it is and only the heads learn", 0, 100_000),
    ] = 0
    freeze_bn: Annotated[
        bool, Arg("the backbone's batch normalisation keeps the statistics of the initial weights")
    ] = False
    tta: Annotated[
        Literal["none", "flip", "flip+scale"],
        Arg(
            "test-time augmentation: the mean of the predictions of an image and its mirror image, and with"
            " scale of both enlarged by a quarter"
        ),
    ] = "flip"
    compile: Annotated[
        bool, Arg("compile the network with torch.compile; pays in long trainings on a GPU")
    ] = False

    @property
    def starts_from_model(self) -> bool:
        """Whether ``weights`` are an address or a folder, not a file or the name of pretrained ones."""
        is_address = re.match(r"(?i)(?!https?:|ftp:)[\w+.-]{2,}:/", self.weights) is not None
        return is_address or (self.weights != "" and Path(self.weights).is_dir())


@dataclass(frozen=True)
class Recipe:
    """Training recipe."""

    seed: Seed = 0
    network: Network = field(default_factory=Network)
    loss: LossWeights = field(default_factory=LossWeights)
    optimizer: Optimizer = field(default_factory=Optimizer)
    batches: Batches = field(default_factory=Batches)
