"""Every setting of the project, typed once.

A field of a dataclass below is the click option ``--name``, the MLflow project parameter
``-P name=…`` and the logged param ``name``; its default and meaning stand nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

NONE = "none"  # how an absent value is written on the command line, in MLproject and in params
AUTO = "auto"  # how the choice of what suits best is written

Settings = TypeVar("Settings")


def setting(
    default: Any,
    meaning: str,
    *,
    sample: Any = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    form: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field with its meaning.

    ``sample`` is the value that ``main`` takes instead of the default when it runs on the small
    synthetic data set; ``choices``, ``least`` and ``most`` limit what is accepted, and so does ``form``: a
    regular expression for a text, and its meaning in words.
    """
    notes = {
        "meaning": meaning,
        "sample": sample,
        "choices": choices,
        "least": least,
        "most": most,
        "form": form,
    }
    return field(default=default, metadata=notes)


# Groups: settings that several entry points share.


@dataclass(frozen=True)
class Source:
    dicom_dir: Path | None = setting(
        None, "folder with the DICOM files, searched with all its subfolders, or a zip file of them"
    )
    rle_csv: Path | None = setting(
        None, "run-length annotations (train-rle.csv); none for a set without labels"
    )
    patients_csv: str = setting(
        AUTO,
        "table of image id and patient, for grouping; auto takes the table that ships with the package for"
        " SIIM-ACR's images and PatientID for others, none takes PatientID for all",
    )


@dataclass(frozen=True)
class Pixels:
    image_size: int = setting(
        384, "side of the stored square images, in pixels", sample=96, least=32, most=4096
    )
    pixel_dtype: str = setting(
        "float32",
        "how pixels are stored; all three keep the same greys",
        choices=("float32", "float16", "uint8"),
    )


@dataclass(frozen=True)
class Reading:
    workers: int = setting(0, "processes that read DICOM files; 0 takes one per core", least=0, most=1024)
    max_rejected: float = setting(
        0.01, "share of the annotated files that may be unusable before preprocess fails", least=0, most=1
    )
    max_pixels: int = setting(
        100_000_000,
        "rows × columns of the largest picture to decode; larger ones are rejected",
        least=1,
        most=1_000_000_000,
    )


@dataclass(frozen=True)
class SampleSize:
    images: int = setting(240, "labelled synthetic radiographs to write", least=10, most=1_000_000)
    test_images: int = setting(16, "unlabelled synthetic radiographs to write", least=0, most=1_000_000)


@dataclass(frozen=True)
class Stored:
    dataset: Path = setting(Path("output/dataset.h5"), "data set file (HDF5) that preprocess wrote")


@dataclass(frozen=True)
class Seed:
    seed: int = setting(
        0, "start of every random choice but the split: same seed, same result", least=0, most=2**32 - 1
    )


@dataclass(frozen=True)
class Device:
    device: str = setting(
        "auto",
        "where the network runs; auto takes the best that is there",
        choices=("auto", "cuda", "mps", "cpu"),
    )
    precision: str = setting(
        "auto",
        "number format of the network's arithmetic; auto takes what is fastest on the device, or what the"
        " model was trained in",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class SplitSettings:
    holdout: float = setting(
        0.2, "share of the patients kept for the final score alone; 0 keeps none", least=0, most=1
    )
    folds: int = setting(5, "parts into which the other patients are divided", least=2, most=1000)
    fold: str = setting(
        "0",
        "the part that validates, from 0; the others train. all: train validates each part in turn",
        form=("all|[0-9]{1,4}", "the number of a part, or all"),
    )
    split_seed: int = setting(
        0,
        "start of the division into parts: same split_seed, same hold-out, whatever the seed",
        least=0,
        most=2**32 - 1,
    )


@dataclass(frozen=True)
class Recipe(Seed, Device, SplitSettings):
    network: str = setting(
        "fcn_resnet50",
        "torchvision segmentation network",
        choices=("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    )
    weights: str = setting(
        "auto",
        "start of the network: imagenet (backbone, downloaded), coco (backbone and heads, downloaded), none"
        " (random), a file with a state dict, or auto: imagenet where it can be had, else none",
        sample="none",
    )
    cache: str = setting(
        "auto",
        "where the images lie while a network trains; auto takes the first that has room",
        choices=("auto", "device", "host", "stream"),
    )
    positive_share: float = setting(
        0.8,
        "share of images with pneumothorax in each batch of the first epoch; 0 takes every image once",
        sample=0.6,
        least=0,
        most=1,
    )
    final_positive_share: float = setting(
        0.4, "that share in the last epoch; it goes there evenly", sample=0.6, least=0, most=1
    )
    batch_size: int = setting(16, "images per optimiser step", sample=8, least=2, most=65_536)
    micro_batch: int = setting(
        0,
        "images that pass the network at once, whose gradients add up to a step; 0 takes the whole batch,"
        " and less when the memory runs out. Batch norm and the batch's Dice see these images alone",
        least=0,
        most=65_536,
    )
    learning_rate: float = setting(3e-4, "AdamW's highest learning rate", sample=1e-3, least=0, most=1e30)
    pretrained_lr_scale: float = setting(
        0.3, "the share of it for layers that start from pretrained weights", least=0, most=1
    )
    schedule: str = setting(
        "cosine", "how the learning rate falls to zero after its rise", choices=("cosine", "polynomial")
    )
    warmup: float = setting(0.2, "share of all steps in which the learning rate rises", least=0, most=0.9)
    weight_decay: float = setting(0.01, "AdamW's weight decay", least=0, most=1000)
    clip_norm: float = setting(5.0, "largest norm of a step's gradient; 0 sets no limit", least=0, most=1e6)
    ema: float = setting(
        0.0,
        "decay of a moving average of the weights, which is judged and kept; 0 keeps none",
        least=0,
        most=1,
    )
    compile: bool = setting(False, "compile the network with torch.compile; pays in long trainings on a GPU")
    bce_weight: float = setting(
        1.0, "weight of the pixels' binary cross-entropy in the loss", least=0, most=1000
    )
    dice_weight: float = setting(1.0, "weight of the soft Dice loss", least=0, most=1000)
    focal_weight: float = setting(1.0, "weight of the focal loss (gamma 2)", least=0, most=1000)
    dice_image_weight: float = setting(
        0.0,
        "weight of the soft Dice loss of each image, where dice_weight's is of the batch",
        least=0,
        most=1000,
    )
    lovasz_weight: float = setting(
        0.0, "weight of the Lovász hinge, a surrogate of the Jaccard index", least=0, most=1000
    )
    aux_weight: float = setting(0.4, "weight of the auxiliary head's mask loss", least=0, most=1000)
    presence_weight: float = setting(0.2, "weight of the cross-entropy of presence", least=0, most=1000)
    augment: bool = setting(
        True,
        "flip, shift, scale, rotate and distort the training images, and change their gamma, contrast and"
        " brightness",
        sample=False,
    )
    tta_flip: bool = setting(True, "predict each image and its mirror image, and take the mean of both")


@dataclass(frozen=True)
class Refine:
    threshold_trials: int = setting(
        200, "Optuna trials over the four thresholds on the validation images", least=0, most=100_000
    )


@dataclass(frozen=True)
class Schedule:
    processes: int = setting(
        1,
        "processes that train together on this machine, each on a GPU of its own (or all on the CPU)",
        least=1,
        most=64,
    )
    epochs: int = setting(12, "passes over the training images", sample=4, least=1, most=100_000)
    best_k: int = setting(
        3,
        "take the mean weights of so many best epochs where it scores better than the best one",
        least=1,
        most=1000,
    )
    patience: int = setting(
        0,
        "stop after so many epochs without a better validation Dice; 0 never stops early",
        least=0,
        most=100_000,
    )
    resume: bool = setting(
        True, "go on where an interrupted training with the same settings stopped; false starts anew"
    )
    checkpoints: Path = setting(Path("output/checkpoints"), "folder for what an interrupted training left")


@dataclass(frozen=True)
class Trials:
    trials: int = setting(8, "short trainings that the search runs", sample=2, least=1, most=100_000)
    search_epochs: int = setting(
        3, "passes over the training images in each of them", sample=1, least=1, most=100_000
    )
    search_images: int = setting(
        0,
        "training images in each of them, drawn at random; 0 takes all",
        sample=24,
        least=0,
        most=10_000_000,
    )
    study: str = setting("loss-weights", "name of the Optuna study")
    storage: str = setting(NONE, "database of the study, e.g. sqlite:///optuna.db; none keeps it in memory")


@dataclass(frozen=True)
class Pictures:
    overlays: int = setting(8, "pictures of radiograph, truth and prediction to log", least=0, most=1000)


@dataclass(frozen=True)
class Unlabelled:
    test_dir: Path | None = setting(None, "folder of DICOM files without labels, for the submission")


@dataclass(frozen=True)
class Outputs:
    output_dir: Path = setting(Path("output"), "folder for data sets and the submission")


@dataclass(frozen=True)
class Registry:
    name: str = setting("pneumothorax", "name of the registered model")
    promote: str = setting(
        "auto",
        "alias champion: auto gives it for a higher Dice than the champion's on the same hold-out or external"
        " images, and than all-empty masks",
        choices=("auto", "always", "never"),
    )


# Entry points: one class each; its docstring is the command's help. A dataclass takes the fields of
# its last base first, so the groups stand in reverse.


@dataclass(frozen=True)
class Sample(Seed, SampleSize):
    """Write a synthetic data set in the layout of the SIIM-ACR pneumothorax task."""

    output_dir: Path = setting(Path("output/sample"), "folder to write")


@dataclass(frozen=True)
class Preprocess(Reading, Pixels, Stored, Source):
    """Read DICOM files and run-length annotations into one HDF5 data set."""

    overwrite: bool = setting(
        False, "replace a file that is no data set, or one made from other files or settings"
    )


@dataclass(frozen=True)
class Train(Pictures, Refine, Recipe, Schedule, Stored):
    """Train a network on a data set and log it as a model."""


@dataclass(frozen=True)
class Search(Recipe, Trials, Stored):
    """Search loss weights with Optuna by short trainings."""


@dataclass(frozen=True)
class Score(Pictures, Device, Stored):
    """Score a model on a data set, or write the submission for a folder of DICOM files."""

    model: str = setting("models:/pneumothorax@champion", "model to score: a models:/ or runs:/ address")
    subset: str = setting(
        "holdout",
        "patients to score, in the model's own split",
        choices=("holdout", "validation", "train", "all"),
    )
    dicom_dir: Path | None = setting(
        None, "folder of DICOM files without labels: writes the submission instead"
    )
    submission: Path = setting(Path("output/submission.csv"), "submission file to write")


@dataclass(frozen=True)
class Register(Registry):
    """Register a model, and make it the champion if it earned that."""

    model: str = setting(
        "best",
        "model to register: a models:/ address, or best: the experiment's highest Dice on one set of images",
    )


@dataclass(frozen=True)
class Main(
    Registry,
    Pictures,
    Refine,
    Trials,
    Recipe,
    Schedule,
    SampleSize,
    Reading,
    Pixels,
    Outputs,
    Unlabelled,
    Source,
):
    """Run the whole chain: preprocess, search, train, score, register.

    Without dicom_dir it writes and takes a small synthetic data set.
    """


ENTRY_POINTS: dict[str, type] = {
    "main": Main,
    "sample": Sample,
    "preprocess": Preprocess,
    "train": Train,
    "search": Search,
    "score": Score,
    "register": Register,
}


def as_text(value: object) -> str:
    """How a setting's value is written: on the command line, in MLproject and as an MLflow param."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def as_params(settings: object) -> dict[str, str]:
    """All settings of an entry point by name, as text."""
    return {f.name: as_text(getattr(settings, f.name)) for f in fields(cast("Any", settings))}


def derive(kind: type[Settings], source: object, **changes: Any) -> Settings:
    """Settings of ``kind`` that take every field of the same name from ``source``, then ``changes``."""
    shared = {f.name for f in fields(cast("Any", kind))} & {f.name for f in fields(cast("Any", source))}
    return kind(**{name: getattr(source, name) for name in shared} | changes)


def from_names(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from the given values; what is missing takes its default, or on ``main`` without
    ``dicom_dir`` the value for the synthetic sample.
    """
    on_sample = kind is Main and values.get("dicom_dir") is None
    chosen: dict[str, Any] = {}
    for f in fields(cast("Any", kind)):
        if f.name in values:
            chosen[f.name] = values[f.name]
        elif on_sample and f.metadata["sample"] is not None:
            chosen[f.name] = f.metadata["sample"]
    return kind(**chosen)
