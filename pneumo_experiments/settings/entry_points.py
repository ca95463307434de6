"""The settings of each entry point: one dataclass each, made of fields and groups."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings.fields import (
    AUTO,
    NONE,
    Arg,
    absolute,
    checked,
    from_flat,
    leaves,
    no_setting,
    renamed,
)
from pneumo_experiments.settings.groups import (
    DATASET,
    STORAGE,
    Evaluation,
    GivenThresholds,
    ImageFormat,
    ImageIds,
    MaxRejected,
    Overlays,
    PatientsCsv,
    Reading,
    Registry,
    RleSize,
    SampleSize,
    Schedule,
    SourceFiles,
    StudySettings,
    StudyStorage,
    ThresholdTrials,
)
from pneumo_experiments.settings.recipe import Device, Recipe, Seed, SplitSettings

BEST = "best"  # in place of a model: the experiment's best one
KAGGLE_SOURCE = r"(datasets/[\w-]+|competitions)/[\w-]+"


class EntryPointSettings:
    """What the settings of all entry points have in common."""

    @classmethod
    def of(cls, **settings: object) -> Self:
        """The settings of a command, by the names, values and defaults of the command line.

        A value is a text or has the setting's type; None stands for none. Paths are relative to the working
        folder. Raises UserError for a name or a value that the command line would refuse.

        >>> settings = Train.of(dataset="dataset.h5", epochs=3, network="fcn_resnet101")
        >>> settings.schedule.epochs, settings.recipe.network.network, settings.dataset.is_absolute()
        (3, 'fcn_resnet101', True)
        >>> Train.of(epoch=3)
        Traceback (most recent call last):
        pneumo_experiments.errors.UserError: train: no setting is called 'epoch'; did you mean epochs?
        """
        own = {leaf.name: leaf for leaf in leaves(cls)}
        values = {name: leaf.default for name, leaf in own.items()}
        for name, value in renamed(settings).items():
            if name not in own:
                command = next(each for each, kind in ENTRY_POINTS.items() if kind is cls)
                raise UserError(f"{command}: {no_setting(name, own)}")
            try:
                values[name] = checked(own[name], value)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        return from_flat(cls, {name: absolute(own[name], value) for name, value in values.items()})


# The docstring is the command's help; --help shows the fields in this order.


@dataclass(frozen=True)
class Sample(EntryPointSettings):
    """Write a synthetic data set in the layout of the SIIM-ACR pneumothorax task."""

    output_dir: Annotated[Path, Arg("folder to write", declared=True)] = Path("output/sample")
    size: SampleSize = field(default_factory=SampleSize)
    difficulty: Annotated[
        Literal["easy", "hard"],
        Arg(
            "hard: findings as small as real ones and faint, folds of skin and tubes that resemble them,"
            " worse exposures, 22% positives, patients with many images"
        ),
    ] = "easy"
    seed: Seed = 0


@dataclass(frozen=True)
class GetData(EntryPointSettings):
    """Download the challenge's files from Kaggle, check and unpack them."""

    output_dir: Annotated[Path, Arg("folder to write", declared=True)] = Path("siim")
    source: Annotated[
        str,
        Arg(
            "what to download from Kaggle: datasets/OWNER/NAME or competitions/NAME; several with commas"
            " between",
            pattern=(f"{KAGGLE_SOURCE}(,{KAGGLE_SOURCE})*", "datasets/OWNER/NAME or competitions/NAME"),
            declared=True,
        ),
    ] = "competitions/siim-acr-pneumothorax-segmentation,datasets/seesee/siim-train-test"


@dataclass(frozen=True)
class Preprocess(EntryPointSettings):
    """Read DICOM files and run-length annotations into one HDF5 data set."""

    source: SourceFiles = field(default_factory=SourceFiles)
    dataset: Annotated[Path, Arg("data set file (HDF5) to write", shapes_weights=False, declared=True)] = (
        Path("output/dataset.h5")
    )
    format: ImageFormat = field(default_factory=ImageFormat)
    reading: Reading = field(default_factory=Reading)
    overwrite: Annotated[
        bool, Arg("replace a file that is no data set, or one made from other files or settings")
    ] = False


@dataclass(frozen=True)
class Train(EntryPointSettings):
    """Train a network on a data set and log it as a model."""

    dataset: Annotated[Path, replace(DATASET, unless=("reproduce",))] = Path("output/dataset.h5")
    schedule: Schedule = field(default_factory=Schedule)
    recipe: Recipe = field(default_factory=Recipe)
    split: SplitSettings = field(default_factory=SplitSettings)
    compute: Device = field(default_factory=Device)
    evaluation: Evaluation = field(default_factory=Evaluation)
    from_study: Annotated[
        str, Arg("train with the best settings of this study of the storage; none", shapes_weights=False)
    ] = NONE
    storage: StudyStorage = STORAGE
    reproduce: Annotated[
        str,
        Arg(
            "repeat the training of a model, a models:/ address: with its settings, and its data set unless"
            " dataset names another; says what differs; none",
            shapes_weights=False,
            declared=True,
        ),
    ] = NONE


@dataclass(frozen=True)
class Search(EntryPointSettings):
    """Search loss weights and other settings with Optuna by short trainings."""

    dataset: Annotated[Path, DATASET] = Path("output/dataset.h5")
    study: StudySettings = field(default_factory=StudySettings)
    recipe: Recipe = field(default_factory=Recipe)
    split: SplitSettings = field(default_factory=SplitSettings)
    compute: Device = field(default_factory=Device)
    workers: Annotated[
        int,
        Arg(
            "processes of this machine that share the trials; 0 takes one per GPU, or one",
            0,
            1024,
            shapes_weights=False,
        ),
    ] = 1


@dataclass(frozen=True)
class Score(EntryPointSettings):
    """Score a model or a submission, write findings in a folder, check a submission, or search thresholds."""

    model: Annotated[
        str,
        Arg(
            "model to score: a models:/ or runs:/ address; the mean of several with commas between",
            declared=True,
        ),
    ] = "models:/pneumothorax@champion"
    dataset: Annotated[
        Path,
        replace(DATASET, unless=("dicom_dir", "check", "counts", "rle_csv")),
    ] = Path("output/dataset.h5")
    subset: Annotated[
        Literal["holdout", "validation", "train", "all"],
        Arg(
            "patients to score, in the model's own split; with predictions in that of the model in baseline,"
            " or else in train's default split"
        ),
    ] = "holdout"
    baseline: Annotated[
        str,
        Arg(
            "model to compare with on the same images, a models:/ address, or a file as predictions; none",
            declared=True,
            names_file=(NONE,),
            missing="give a models:/ address, a submission, or none",
            folder_too=True,
        ),
    ] = NONE
    predictions: Annotated[
        Path | None,
        Arg(
            "submission (ids and run lengths), whoever made it, to score in place of a model, against the"
            " labels of dataset or rle_csv",
            declared=True,
            missing="name a submission",
        ),
    ] = None
    unseen: Annotated[
        bool,
        Arg(
            "you know that the scored images neither trained the model behind predictions nor chose anything"
            " about it: its scores get the names of scores on unseen images"
        ),
    ] = False
    rle_csv: Annotated[
        Path | None,
        Arg(
            "run-length annotations (train-rle.csv) as the labels of predictions, all images of it, in place"
            " of dataset; of images of 1024 x 1024 pixels unless rle_size is given",
            declared=True,
            missing="name the table of annotations",
        ),
    ] = None
    rle_size: RleSize = 0
    patients_csv: PatientsCsv = AUTO
    dicom_dir: Annotated[
        Path | None,
        Arg(
            "folder of DICOM files without labels (or PNG or JPEG copies), a zip or tar file of them, or one"
            " file: writes findings and the submission instead",
            declared=True,
            missing="name the folder that holds the files",
            folder_too=True,
            unless=("counts",),
        ),
    ] = None
    image_id: ImageIds = "auto"
    submission: Annotated[Path, Arg("submission file to write", declared=True)] = Path(
        "output/submission.csv"
    )
    findings: Annotated[
        Path, Arg("folder to write for dicom_dir: findings.csv, overlays, DICOM Segmentations", declared=True)
    ] = Path("output/findings")
    dicom_seg: Annotated[
        bool, Arg("write a DICOM Segmentation object for each image of dicom_dir with a finding")
    ] = False
    # Nobody shall lose a submission for some damaged files, nor a chain of commands end: they are printed.
    max_rejected: MaxRejected = 1.0
    sample_submission: Annotated[
        Path | None,
        Arg(
            "the challenge's table of test images: gives the submission its order",
            declared=True,
            missing="name the challenge's sample submission",
        ),
    ] = None
    check: Annotated[
        Path | None,
        Arg(
            "submission to check, by sample_submission and dicom_dir if given; nothing else is done",
            declared=True,
            missing="name a submission",
        ),
    ] = None
    counts: Annotated[
        Path | None,
        Arg(
            "threshold_counts.npz of train or score: thresholds are searched in it; nothing else is done",
            declared=True,
            missing="name threshold_counts.npz, an artifact of train and score",
        ),
    ] = None
    threshold_trials: ThresholdTrials = 200
    tta: Annotated[
        Literal["auto", "none", "flip", "flip+scale"],
        Arg("test-time augmentation; auto takes the model's own"),
    ] = "auto"
    thresholds: GivenThresholds = field(default_factory=GivenThresholds)
    prevalence: Annotated[
        float | None,
        Arg("fraction of positives where the model is used; none: as in training", 0.0001, 0.9999),
    ] = None
    compute: Device = field(default_factory=Device)
    overlays: Overlays = 8


@dataclass(frozen=True)
class Register(EntryPointSettings):
    """Register a model, and make it the champion if it earned that; or move or list the champions."""

    model: Annotated[
        str,
        Arg(
            "model to register: a models:/ address, the mean of several with commas between, or best: the"
            " experiment's highest Dice on one set of images",
            declared=True,
        ),
    ] = BEST
    dataset: Annotated[
        Path,
        Arg(
            "data set on which the new version and the champion are scored if they have no score on the same"
            " images; that of the training also gives an ensemble its thresholds",
            declared=True,
        ),
    ] = Path("output/dataset.h5")
    registry: Registry = field(default_factory=Registry)
    version: Annotated[
        int | None, Arg("existing version that gets the alias champion; nothing else is done", 1, 10**9)
    ] = None
    history: Annotated[bool, Arg("print who was champion when, and why; nothing else is done")] = False
    export: Annotated[
        Literal["none", "onnx"],
        Arg("also write the model for other runtimes: onnx (needs the extra of that name)"),
    ] = "none"
    onnx_file: Annotated[Path, Arg("file that export=onnx writes", declared=True)] = Path(
        "output/pneumothorax.onnx"
    )


@dataclass(frozen=True)
class Main(EntryPointSettings):
    """Run the whole chain: preprocess, search, train, score, register.

    Without dicom_dir it uses a synthetic data set, and without config as well the values of config=demo.
    """

    source: SourceFiles = field(default_factory=SourceFiles)
    test_dir: Annotated[
        Path | None,
        Arg(
            "folder of files without labels, as dicom_dir, for the submission",
            declared=True,
            missing="name the folder that holds the files",
            folder_too=True,
        ),
    ] = None
    output_dir: Annotated[Path, Arg("folder for data sets and the submission", declared=True)] = Path(
        "output"
    )
    sample: SampleSize = field(default_factory=SampleSize)
    format: ImageFormat = field(default_factory=ImageFormat)
    reading: Reading = field(default_factory=Reading)
    study: StudySettings = field(default_factory=StudySettings)
    schedule: Schedule = field(default_factory=Schedule)
    recipe: Recipe = field(default_factory=Recipe)
    split: SplitSettings = field(default_factory=SplitSettings)
    compute: Device = field(default_factory=Device)
    evaluation: Evaluation = field(default_factory=Evaluation)
    registry: Registry = field(default_factory=Registry)


ENTRY_POINTS: dict[str, type] = {
    "main": Main,
    "sample": Sample,
    "get_data": GetData,
    "preprocess": Preprocess,
    "train": Train,
    "search": Search,
    "score": Score,
    "register": Register,
}
