"""Groups of settings that several entry points share. A group's first line is its heading in --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pneumo_experiments.settings.fields import AUTO, NONE, Arg

DATASET = Arg(
    "data set file (HDF5) that preprocess wrote",
    shapes_weights=False,
    declared=True,
    missing="run preprocess to write it",
)
Overlays = Annotated[
    int, Arg("overlays of radiograph, truth and prediction to log", 0, 1000, shapes_weights=False)
]
MaxRejected = Annotated[
    float,
    Arg(
        "fraction of the files (of the annotated ones, if there are any) that may be unusable; above it"
        " preprocess writes no data set, and score fails after all is written",
        0,
        1,
    ),
]

ThresholdTrials = Annotated[
    int,
    Arg("Optuna trials over the four thresholds, next to the exact search", 0, 100_000, shapes_weights=False),
]


@dataclass(frozen=True)
class GivenThresholds:
    """Thresholds in place of the model's own; none leaves that."""

    presence_threshold: Annotated[
        float | None, Arg("an image is empty below this probability of presence", 0, 1)
    ] = None
    top_score: Annotated[
        float | None, Arg("probability that defines the core of a finding, in hundredths", 0, 1)
    ] = None
    min_area_px: Annotated[
        int | None, Arg("an image is empty if fewer pixels, scaled to 1024 x 1024, reach top_score", 0, 10**9)
    ] = None
    bottom_score: Annotated[
        float | None, Arg("probability from which a pixel is in the mask, in hundredths", 0, 1)
    ] = None


ImageIds = Annotated[
    Literal["auto", "stem", "path", "sop_instance_uid"],
    Arg(
        "what identifies an image of dicom_dir: its file's name (stem), its path below dicom_dir, or its SOP"
        " Instance UID; auto takes what the table of ids has, without one the name, or the path for files of"
        " one name that differ"
    ),
]


RleSize = Annotated[
    int,
    Arg(
        "side in pixels of the square images that run lengths belong to, where the images are copies of"
        " another size; 0 takes 1024 for the challenge's ids, and each image's own size for others",
        0,
        2**16,
    ),
]
PatientsCsv = Annotated[
    str,
    Arg(
        "table of image id and patient, for grouping; auto takes the table that ships with the package"
        " for SIIM-ACR's images and PatientID for others, none takes PatientID for all",
        declared=True,
        names_file=(AUTO, NONE),
        missing="give auto, none, or a table of image id and patient",
    ),
]


@dataclass(frozen=True)
class SourceFiles:
    """Radiographs and annotations."""

    dicom_dir: Annotated[
        Path | None,
        Arg(
            "folder with the DICOM files, searched with all its subfolders, a zip or tar file of them, or one"
            " file; without DICOM files PNG and JPEG copies are read",
            declared=True,
            missing="name the folder that holds the DICOM files",
            folder_too=True,
        ),
    ] = None
    rle_csv: Annotated[
        Path | None,
        Arg(
            "run-length annotations (train-rle.csv); none for a set without labels",
            declared=True,
            missing="name the table of annotations",
        ),
    ] = None
    masks_dir: Annotated[
        Path | None,
        Arg(
            "folder of masks as PNG or JPEG (or a zip or tar file), named like the images, instead of run"
            " lengths; rle_csv is then none, or the table of new_filename, ImageId and has_pneumo that comes"
            " with such copies",
            declared=True,
            missing="name the folder that holds the masks",
            folder_too=True,
        ),
    ] = None
    rle_size: RleSize = 0
    patients_csv: PatientsCsv = AUTO
    image_id: ImageIds = "auto"


@dataclass(frozen=True)
class ImageFormat:
    """Stored images."""

    image_size: Annotated[int, Arg("side of the stored square images, in pixels", 32, 4096)] = 384
    pixel_dtype: Annotated[
        Literal["float32", "float16", "uint8"], Arg("how pixels are stored; all three keep the same greys")
    ] = "float32"


@dataclass(frozen=True)
class Reading:
    """Reading DICOM files."""

    workers: Annotated[int, Arg("processes that read DICOM files; 0 takes one per core", 0, 1024)] = 0
    max_rejected: MaxRejected = 0.01
    max_pixels: Annotated[
        int, Arg("rows × columns of the largest image to decode; larger ones are rejected", 1, 10**9)
    ] = 100_000_000


@dataclass(frozen=True)
class SampleSize:
    """Synthetic sample."""

    images: Annotated[int, Arg("labelled synthetic radiographs to write", 10, 10**6)] = 240
    test_images: Annotated[int, Arg("unlabelled synthetic radiographs to write", 0, 10**6)] = 16


@dataclass(frozen=True)
class Schedule:
    """Epochs."""

    epochs: Annotated[int, Arg("passes over the training images", 1, 100_000)] = 12
    best_k: Annotated[
        int,
        Arg("average the weights of so many best epochs where that scores better than the best one", 1, 1000),
    ] = 3
    patience: Annotated[
        int,
        Arg(
            "stop after so many epochs without a better validation Dice, counted from the first epoch that"
            " finds something; 0 never stops early",
            0,
            100_000,
        ),
    ] = 0
    processes: Annotated[
        int,
        Arg(
            "processes that train together on this machine, each on its own GPU (or all on the CPU)",
            1,
            64,
            shapes_weights=False,
        ),
    ] = 1
    resume: Annotated[
        bool,
        Arg(
            "continue an interrupted training with the same settings; false starts over", shapes_weights=False
        ),
    ] = True
    checkpoints: Annotated[
        Path, Arg("folder of the checkpoints of interrupted trainings", shapes_weights=False)
    ] = Path("output/checkpoints")


@dataclass(frozen=True)
class Evaluation:
    """Thresholds and pictures."""

    threshold_trials: ThresholdTrials = 200
    overlays: Overlays = 8


StudyStorage = Annotated[
    str,
    Arg(
        "database of the study: sqlite:///FILE for one machine, the address of a PostgreSQL database for"
        " several; none keeps it in memory, where nothing survives",
        shapes_weights=False,
        declared=True,
        is_database=True,
    ),
]
STORAGE = "sqlite:///optuna.db"


@dataclass(frozen=True)
class StudySettings:
    """Search with Optuna."""

    trials: Annotated[
        int,
        Arg(
            "trials of the study in all, short trainings each; with 0 main trains with the settings as given",
            0,
            100_000,
            shapes_weights=False,
        ),
    ] = 8
    searched: Annotated[
        str,
        Arg("settings to search, with commas between; docs/search.md has their ranges", shapes_weights=False),
    ] = "dice_weight,focal_weight,presence_weight,learning_rate"
    space: Annotated[
        Path | None,
        Arg(
            "YAML file of other ranges, such as `dice_weight: {low: 0.1, high: 3, log: true}`",
            declared=True,
            missing="name a YAML file of ranges",
        ),
    ] = None
    search_epochs: Annotated[int, Arg("epochs of each trial", 1, 100_000)] = 3
    search_images: Annotated[
        int, Arg("training images of each trial, drawn at random; 0 takes all", 0, 10**7)
    ] = 2000
    search_validation_images: Annotated[
        int,
        Arg(
            "validation images of each trial, about so many: a part of the fold, by patient and stratified by"
            " area; 0 takes all",
            0,
            10**7,
        ),
    ] = 0
    search_warmup_epochs: Annotated[
        int,
        Arg(
            "epochs of one training with the settings as given, on the images that train in every fold of a"
            " trial, from whose weights the trials start; 0: from the initial weights",
            0,
            100_000,
        ),
    ] = 0
    folds_per_trial: Annotated[
        int, Arg("folds that each trial trains and validates on; their mean counts", 1, 1000)
    ] = 1
    confirm: Annotated[
        int,
        Arg(
            "so many of the best trials, and the settings as given, are trained again with another seed on"
            " another fold; one that is better beyond noise wins, else the settings as given",
            0,
            1000,
            shapes_weights=False,
        ),
    ] = 2
    keep: Annotated[int, Arg("models to keep: those of the best trials", 0, 1000, shapes_weights=False)] = 3
    sampler: Annotated[
        Literal["tpe", "gp", "cmaes", "random"],
        Arg("Optuna sampler that chooses the settings of each trial", shapes_weights=False),
    ] = "tpe"
    pruner: Annotated[
        Literal["hyperband", "median", "none"],
        Arg("Optuna pruner that stops hopeless trials after each epoch", shapes_weights=False),
    ] = "hyperband"
    objectives: Annotated[
        Literal["dice", "dice,seconds"],
        Arg("what to optimise: Dice, or Dice and the seconds per image of a prediction, without pruning"),
    ] = "dice"
    max_false_alarms: Annotated[
        float | None,
        Arg("a trial does not win if a greater fraction of all images has a mask but no finding; none", 0, 1),
    ] = None
    timeout: Annotated[
        float,
        Arg(
            "start no trial after so many seconds, but still the confirm ones; 0: no limit",
            0,
            1e9,
            shapes_weights=False,
        ),
    ] = 0.0
    target: Annotated[
        float,
        Arg(
            "start no trial once a Dice reaches this, but still the confirm ones; 0: no target",
            0,
            1,
            shapes_weights=False,
        ),
    ] = 0.0
    warm_start: Annotated[
        str,
        Arg(
            "try the best settings of another study of the storage first, or of a config file; none",
            shapes_weights=False,
        ),
    ] = NONE
    study: Annotated[
        str,
        Arg(
            "name of the Optuna study; auto: one for each data set, search space and fixed settings",
            shapes_weights=False,
            declared=True,
        ),
    ] = AUTO
    storage: StudyStorage = STORAGE

    @property
    def trained_again(self) -> int:
        """At most so many second trainings: of the best trials, and of the settings as given."""
        return min(self.confirm + 1, self.trials) if self.confirm and self.trials > 1 else 0

    @property
    def has_one_objective(self) -> bool:
        """Whether Dice alone is searched; Optuna prunes no others."""
        return self.objectives == "dice"


@dataclass(frozen=True)
class Registry:
    """Model registry."""

    name: Annotated[str, Arg("name of the registered model", declared=True)] = "pneumothorax"
    promote: Annotated[
        Literal["auto", "always", "never"],
        Arg(
            "alias champion: auto moves it if the comparison favours the new version, always moves it anyway,"
            " never leaves all aliases as they are"
        ),
    ] = "auto"
    min_probability: Annotated[
        float,
        Arg(
            "probability that the new version is better than the champion (the first one: than all-empty"
            " masks), paired by patients, from which the first decision on a set of images favours it; the"
            " k-th requires 1 - (1 - min_probability) / k², the best of m models 1 - (1 - min_probability) /"
            " (k² m)",
            0.5,
            1,
        ),
    ] = 0.97
    min_gain: Annotated[
        float, Arg("a new version replaces the champion only if its Dice is higher by more than this", 0, 1)
    ] = 0.0
