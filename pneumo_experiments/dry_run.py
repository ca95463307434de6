"""What a command would do, as lines for the terminal, without a run and without a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pneumo_experiments.dataset.hdf5 import Dataset, Entry
from pneumo_experiments.dataset.inputs import read_inputs
from pneumo_experiments.dataset.splits import split
from pneumo_experiments.dicom.archive import ImageId, open_archive
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import (
    BEST,
    GetData,
    Main,
    Preprocess,
    Register,
    Sample,
    Score,
    Search,
    SplitSettings,
    StudySettings,
    Train,
    as_texts,
    chosen,
    input_paths,
    is_none,
)
from pneumo_experiments.words import plural

ROW = "{:<12}{:>10}{:>12}{:>11}"
HEADER = ROW.format("", "images", "positives", "patients")


@dataclass(frozen=True)
class _Plan:
    """What the inputs hold, what is written besides the run, and the work."""

    inputs: Sequence[str] = ()
    outputs: Sequence[object] = ()
    work: Sequence[str] = ()


def lines(name: str, settings: object) -> Iterator[str]:
    """Settings, inputs, outputs and work of a command. Raises UserError for inputs that cannot be used."""
    plan, given = _plan(settings), chosen(settings)
    yield f"{name}: settings, * where they are not the defaults"
    for setting, text in as_texts(settings).items():
        yield f"{'*' if setting in given else ' '} {setting:<26}{hide_passwords(text)}"
    yield f"{name}: would read"
    for leaf, path in input_paths(settings):
        yield f"  {leaf.name}={path}" + (f", {_size(path.stat().st_size)}" if path.is_file() else "")
    yield from (f"  {line}" for line in plan.inputs)
    yield f"{name}: would write"
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd()}/mlflow.db"
    for place in (*plan.outputs, f"a run in {store}"):
        is_there = isinstance(place, Path) and place.exists()
        yield f"  {hide_passwords(str(place))}{' (exists)' if is_there else ''}"
    yield from (f"{name}: {line}" for line in plan.work)
    yield f"{name}: a dry run: nothing is done"


def _plan(settings: object) -> _Plan:
    match settings:
        case Sample():
            count = settings.size.images + settings.size.test_images
            return _Plan(outputs=[settings.output_dir], work=[plural(count, "synthetic radiograph")])
        case GetData():
            return _Plan(outputs=[settings.output_dir], work=[f"download of {settings.source} from Kaggle"])
        case Preprocess():
            return _Plan(_radiographs(settings), [settings.dataset])
        case Train():
            return _training(settings)
        case Search():
            parts = _Split(settings.dataset, settings.split)
            work = [_trials(settings.study, parts.train), *_doubts(settings)]
            return _Plan(parts.table, [settings.study.storage], work)
        case Score():
            is_search = settings.check is not None or settings.counts is not None
            needs_model = not is_search and settings.predictions is None
            inputs, outputs = [_model(settings.model)] if needs_model else [], list[Path]()
            if settings.dicom_dir is not None:
                inputs.append(_files(settings.dicom_dir, settings.image_id))
                outputs = [] if settings.check else [settings.submission, settings.findings]
            elif not is_search and settings.rle_csv is None:
                with Dataset.open(settings.dataset) as dataset:
                    inputs += [HEADER, _row("all", dataset.entries)]
                inputs.append(f"of these {settings.subset}, by the split that the model holds")
            return _Plan(inputs, outputs)
        case Register():
            outputs = [settings.onnx_file] * (settings.export == "onnx")
            if settings.history or settings.version is not None:
                return _Plan()
            return _Plan([_model(settings.model)], [*outputs, f"a version of {settings.registry.name}"])
        case Main():
            return _chain(settings)
        case _:
            raise TypeError(type(settings).__name__)


def _model(setting: str) -> str:
    """What a model or an ensemble is; it is loaded, so that a dry run finds one that cannot be."""
    if setting == BEST:
        return "the best model of the experiment, which is known when it runs"
    from pneumo_experiments.evaluation.load_models import addresses_of, load_model  # torch takes its time

    models = [load_model(address) for address in addresses_of(setting)]
    return f"model {setting}: " + ", ".join(f"{one.networks} at {one.image_size} px" for one in models)


def _radiographs(settings: Preprocess) -> list[str]:
    """The files that have a label, and how much room the data set takes at most."""
    inputs, images = read_inputs(settings), settings.format
    count, labels = len(inputs.members), (inputs.labels or {}).values()
    positive = sum(any(text.strip() != "-1" for text in label.texts) for label in labels)
    room = 2 * count * images.image_size**2 * np.dtype(images.pixel_dtype).itemsize
    return [
        plural(count, "image") + (f", {positive:,} with run lengths" if positive else ""),
        f"at {images.image_size} px less than {_size(room)}, since it is compressed",
    ]


def _training(settings: Train) -> _Plan:
    parts, epochs = _Split(settings.dataset, settings.split), plural(settings.schedule.epochs, "epoch")
    folds = f"{settings.split.folds} folds of " if settings.split.fold == "all" else ""
    more = [] if is_none(settings.from_study) else [f"the best settings of study {settings.from_study} win"]
    room = _size((2 * parts.train + parts.validation) * parts.image_size**2)
    return _Plan(
        parts.table,
        [settings.schedule.checkpoints],
        [
            f"{folds}{epochs} of {parts.train:,} images, and {parts.validation:,} to validate after each; how"
            " long that takes is known after its first seconds",
            f"{room} of memory for images and masks (cache=stream needs less), and what the network needs",
            *more,
            *_doubts(settings),
        ],
    )


def _doubts(settings: Train | Search) -> list[str]:
    """Whether the model to start from has seen images that are to judge it."""
    if not settings.recipe.network.starts_from_model:
        return []
    from pneumo_experiments.search import trial_training  # torch takes its time
    from pneumo_experiments.training import fold

    with Dataset.open(settings.dataset) as dataset:
        if isinstance(settings, Train):
            doubt = fold.doubt_of_start(settings, dataset)
        else:
            doubt = trial_training.doubt_of_start(settings, dataset)
    return [doubt] if doubt else []


def _trials(study: StudySettings, training: int) -> str:
    count = min(study.search_images or training, training)
    again = f", and {study.trained_again} of them again" if study.trained_again else ""
    return (
        f"{plural(study.trials, 'trial')}{again}: each {plural(study.search_epochs, 'epoch')} of {count:,}"
        " images; how long that takes is known after the first seconds"
    )


def _chain(settings: Main) -> _Plan:
    inputs, outputs = list[str](), [settings.output_dir, settings.study.storage]
    if settings.source.dicom_dir is None:
        inputs.append(f"nothing: it draws {plural(settings.sample.images, 'synthetic radiograph')} first")
    else:
        inputs += _radiographs(Preprocess(settings.source, format=settings.format, reading=settings.reading))
    if settings.test_dir is not None:
        inputs.append(_files(settings.test_dir, settings.source.image_id))
    work = f"train {plural(settings.schedule.epochs, 'epoch')}"
    if settings.study.trials:
        epochs = plural(settings.study.search_epochs, "epoch")
        work = f"search {plural(settings.study.trials, 'trial')} of {epochs}, then {work}"
    return _Plan(inputs, outputs, [work])


def _files(folder: Path, image_id: ImageId) -> str:
    return f"{plural(len(open_archive(folder, image_id).members), 'image')} in {folder}"


def _row(name: str, entries: Sequence[Entry]) -> str:
    positives, patients = sum(each.area_px > 0 for each in entries), len({each.patient for each in entries})
    return ROW.format(name, *(f"{count:,}" for count in (len(entries), positives, patients)))


class _Split:
    """The sizes of a data set's subsets; for all folds, of the first."""

    def __init__(self, path: Path, settings: SplitSettings) -> None:
        with Dataset.open(path) as dataset:
            dataset.require_labels()
            entries, self.image_size = dataset.entries, dataset.image_size
        parts = split(
            [entry.patient for entry in entries],
            np.array([entry.area_px for entry in entries]),
            holdout=settings.holdout,
            folds=settings.folds,
            fold=0 if settings.fold == "all" else int(settings.fold),
            seed=settings.split_seed,
        )
        self.train, self.validation = len(parts.train), len(parts.validation)
        subsets = {"train": parts.train, "validation": parts.validation, "holdout": parts.holdout}
        rows = [_row(name, list(map(entries.__getitem__, part.tolist()))) for name, part in subsets.items()]
        self.table = [HEADER, *rows]


def _size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
