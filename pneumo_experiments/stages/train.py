"""Entry point ``train``: fit a network, keep its best weights, log it as a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import warn
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.pictures import ranked_overlays
from pneumo_experiments.evaluation.subset import describe_split
from pneumo_experiments.evaluation.threshold_search import TRIAL_COLUMNS, ThresholdSearch, counts_file
from pneumo_experiments.figures import contact_sheet, learning_curves
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.checkpoint import lock_checkpoints
from pneumo_experiments.learning.launch import is_launched, launch
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import ThresholdCounts
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.search.winner import best_of_study
from pneumo_experiments.serving import Detector, new_folder, save
from pneumo_experiments.settings import Arg, Train, chosen, flat, is_none, weight_shaping
from pneumo_experiments.training.fold import Fold, FoldResult, doubt_of_start, settings_per_fold
from pneumo_experiments.training.folds import COLUMNS, MUCH_DISAGREEMENT, join_folds, predict_out_of_fold
from pneumo_experiments.training.loop import EpochResult
from pneumo_experiments.training.resume import EPOCH_DICE, TrainingState, checkpoint_of
from pneumo_experiments.training.settings_source import MAX_NAMED, SettingsSource, settings_source
from pneumo_experiments.training.several import FIGURES, group_by_seed, varied_settings
from pneumo_experiments.words import command, rows, some_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Address of the logged model, and its scores on the validation images; of an ensemble out of fold."""

    model: str
    scores: Scores
    dataset: Path
    page: str
    """of its run in the UI"""
    link: str
    """to that page, within the UI"""


def train(settings: Train) -> TrainResult:
    """Trains one network, or for ``fold=all`` one per fold, and then returns their ensemble.

    With ``processes``, or started by torchrun, several processes do it together. Waits while another training
    with the same settings runs. One that was interrupted goes on. In a run of MLflow, as on the command line.
    Raises UserError for a data set without labels or positive images, and for weights that do not fit.

    >>> settings = Train.of(dataset="dataset.h5", epochs=1, weights="none", threshold_trials=0, overlays=0)
    >>> result = train(settings)
    train: ...
    >>> detector = load_model(result.model)
    >>> result.scores.images, 0 <= result.scores.dice <= 1
    (4, True)
    """
    with training(settings) as result:
        pass
    if result.model:  # which the main process of a group has
        following = command("score", model=result.model, dataset=result.dataset)
        print(rows({"model": result.model, "run": result.page, "next": following}))
    return result


def train_each(several: Sequence[Train]) -> list[TrainResult]:
    """Trains with each of these settings, in child runs of one that shows the mean and spread over seeds.

    Stopped and started again, it trains only what is left. One that fails leaves the others alone. Raises
    UserError in the end if one has failed, and before for settings that cannot stand side by side, and within
    a group of processes that torchrun started.
    """
    if is_launched():
        raise UserError("train: torchrun trains one network; give one value for each setting")
    for settings in several:
        if not (is_none(settings.from_study) and is_none(settings.reproduce)):
            raise UserError("from_study and reproduce name settings, as lists of values do; give one of them")
    if len({tuple(weight_shaping(each).items()) for each in several}) < len(several):
        raise UserError("train: two of the trainings would end in the same weights; leave one of them out")
    varied = varied_settings(several)
    lists = {name: list(dict.fromkeys(one[name] for one in varied)) for name in varied[0]}
    texts = [f"{name} {','.join(values)}" for name, values in lists.items()]
    datasets = ",".join(dict.fromkeys(str(one.dataset) for one in several))
    results, failures = dict[int, TrainResult](), list[str]()
    with (
        tracking.run("trainings", _Trainings(datasets, "; ".join(texts)), f"trainings {'; '.join(texts)}"),
        ExitStack() as kept,  # all checkpoints, so that no training that has ended is repeated
    ):
        for number, (settings, values) in enumerate(zip(several, varied, strict=True), start=1):
            line = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"train: training {number} of {len(several)}: {line}")
            try:
                results[number - 1] = kept.enter_context(training(settings))
            except UserError as error:
                failures.append(f"training {number} ({line}): {error}")
                print(f"train: {failures[-1]}")
        if not results:
            raise UserError(failures[0])
        scored = {number: result.scores for number, result in results.items()}
        groups = group_by_seed([varied[number] for number in scored], [*scored.values()])
        columns, table = [*groups[0].settings, *FIGURES], [one.row for one in groups]
        tracking.log_table(columns, table, "trainings")
        for step, group in enumerate(groups):
            tracking.log_metrics(group.metrics, step=step)
        lines = [columns, ["---"] * len(columns), *table]
        tracking.describe("\n".join(f"| {' | '.join(line)} |" for line in lines))
        widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
        for line in [columns, *table]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        models = {f"model {number + 1}": result.model for number, result in results.items()}
        print(rows(models | {"run": tracking.page_of_active_run()}))
        if failures:
            raise UserError(f"{len(failures)} of {len(several)} trainings failed: {failures[0]}")
    return [*results.values()]


@dataclass(frozen=True)
class _Trainings:
    """What a run of several trainings has in common, and what differs."""

    dataset: Annotated[str, Arg("data sets")]
    values: Annotated[str, Arg("settings with several values")]


@contextmanager
def training(settings: Train) -> Generator[TrainResult]:
    """Trains like ``train``, for a caller with more to do: after an error in the block the checkpoints stay.

    So the same command does not train again.
    """
    if is_launched():
        distributed.init_process_group()
    # Read once: a search that still runs could change its mind.
    is_main = distributed.is_main_process()
    source: SettingsSource = distributed.broadcast(_read_source(settings) if is_main else None)
    settings = source.settings
    with Dataset.open(settings.dataset) as dataset:
        if is_main and settings.recipe.network.starts_from_model:
            tracking.open_store()
            if doubt := doubt_of_start(settings, dataset):
                warn(doubt)
        checkpoints = [checkpoint_of(one, dataset.fingerprint) for one in settings_per_fold(settings)]
        with lock_checkpoints(checkpoints if is_main else [], patience=0 if is_launched() else -1):
            if settings.schedule.processes > 1 and not is_launched():
                tracking.open_store()  # a store that does not open is reported once, not by every process
                tracking.end_with_mlflow_run()  # the processes of the training end with this one
                result = launch(settings.schedule.processes, _train_in_group, source, tracking.active_run())
            else:
                with _only_main_process_speaks():
                    result = _train(source, dataset, None)
            yield result
            # Only now: if a later fold is interrupted, those that have ended are not trained again.
            for checkpoint in checkpoints if is_main else []:
                checkpoint.clear()


def _read_source(settings: Train) -> SettingsSource:
    is_searched = not is_none(settings.from_study) and is_none(settings.reproduce)
    best = best_of_study(settings.storage, settings.from_study) if is_searched else None
    source = settings_source(settings, best)
    if source.study:
        line = ", ".join(f"{name} {value}" for name, value in source.best.items())
        print(f"train: best settings of study {source.study}: {line}")
        if source.replaced:
            print(f"train: they stand in place of the given {some_of(source.replaced, MAX_NAMED)}")
    if source.model is not None:
        changed = some_of(source.changed_code, MAX_NAMED)
        code = f"another one: {changed}" if changed else "the same"
        print(f"train: repeats the training of {source.model}, dataset={source.settings.dataset}")
        print(f"train: the code is {code}")
    return source


def _train_in_group(source: SettingsSource, parent: str | None) -> TrainResult:
    """What each process of a group runs."""
    with Dataset.open(source.settings.dataset) as dataset, _only_main_process_speaks():
        return _train(source, dataset, parent)


@contextmanager
def _only_main_process_speaks() -> Generator[None]:
    if distributed.is_main_process():
        yield
        return
    with tracking.disabled(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _train(source: SettingsSource, dataset: Dataset, parent: str | None) -> TrainResult:
    settings = source.settings
    if settings.split.fold != "all":
        return _train_fold("train", source, dataset, parent)[1]
    with tracking.run("train", settings, _run_name(settings, dataset, "train"), parent=parent):
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training", dataset.profile)
        folds = list[FoldResult]()
        for number, one in enumerate(settings_per_fold(settings)):
            left = settings.split.folds - number
            folds.append(_train_fold("fold", replace(source, settings=one), dataset, folds_left=left)[0])
        if not distributed.is_main_process():
            return TrainResult("", folds[0].evaluation.scores, settings.dataset, "", "")
        return _finish_folds(settings, folds)


def _train_fold(
    stage: str, source: SettingsSource, dataset: Dataset, parent: str | None = None, folds_left: int = 1
) -> tuple[FoldResult, TrainResult]:
    """Trains one fold in a run of its own; returns also its model, whose address the main process has.

    An interrupted training with the same settings continues after its last whole epoch, in the same run.
    With this one, ``folds_left`` are to be trained.
    """
    settings, is_main = source.settings, distributed.is_main_process()
    checkpoint, epochs = checkpoint_of(settings, dataset.fingerprint), settings.schedule.epochs
    can_resume = is_main and settings.schedule.resume
    state = distributed.broadcast(TrainingState.load(checkpoint) if can_resume else None)
    is_new, state = state is None, state or TrainingState()
    earlier = state.run_id or None
    with tracking.run(
        *(stage, settings, _run_name(settings, dataset, stage)),
        continues=earlier,
        parent=parent,
        system_metrics=True,
    ) as run_id:
        _log_source(source, dataset)
        fold = Fold.prepare(settings, dataset)
        _log_fold(fold, dataset)
        if is_new:
            tracking.log_image(fold.first_batch(), "first_batch.png")
            if is_main:
                checkpoint.clear()
        else:
            _log_resumed(state, epochs)
        state.run_id = run_id
        work = fold.images.work(fold.predictor)
        name = f"fold {settings.split.fold}" if stage == "fold" else stage
        with ProgressBar(
            *(name, epochs * work),
            finished=len(state.history) * work,
            pieces=folds_left,
            is_shown=is_main,
        ) as bar:
            for result in fold.epochs(state, bar.update):
                pictures = fold.follow(state, result.evaluation, result.epoch.network) if is_main else {}
                if is_main:
                    state.save(checkpoint)  # before it is logged: an interruption would log it twice
                _log_epoch(result, epochs, pictures)
        state.trainer = result = None  # the optimizer leaves the device, and the wrapper of a group
        if len(state.history) < epochs:
            print(f"train: no better Dice in {settings.schedule.patience} epochs: stopped early")
        if not state.learned:
            print(
                "train: it has learned little: after every epoch an empty mask for every image was the best"
                " answer; try more epochs, another learning_rate, or pretrained weights"
            )
        result = fold.finish(state)
        model = _log_result(source, fold, result) if is_main else ""
        places = (tracking.page_of_active_run(), tracking.link_to_active_run()) if is_main else ("", "")
        return result, TrainResult(model, result.evaluation.scores, settings.dataset, *places)


def _log_source(source: SettingsSource, dataset: Dataset) -> None:
    """The data set, and where the settings come from."""
    tracking.log_dataset(source.settings.dataset, dataset.fingerprint, "training", dataset.profile)
    if source.study:
        tracking.log_params({"study_used": source.study} | dict(source.best))
    if source.model is not None:
        same_data = dataset.fingerprint == source.data_fingerprint
        tracking.log_params({"same_code": not source.changed_code, "same_data": same_data})
        print(f"train: the data set is {'the same' if same_data else 'another one'}")


def _log_fold(fold: Fold, dataset: Dataset) -> None:
    """What is trained, on what, and where."""
    predictor, images = fold.predictor, fold.images
    network, compute = predictor.network, predictor.compute
    tracking.log_json(describe_split(dataset, fold.split), "split.json")
    tracking.log_params({"image_size": dataset.image_size})
    used = {"cache": fold.cache, "device": str(compute.device), "precision": compute.precision}
    tracking.log_params({f"{name}_used": value for name, value in used.items()})
    tracking.log_params({"weights_source": network.source, "weights_sha256": network.source_sha256})
    if compute.device.type == "cuda":
        tracking.warn_without_gpu_metrics()
    print(
        f"train: {fold.settings.recipe.network.network} at {dataset.image_size} px, {compute.device},"
        f" {compute.precision}; {len(images.training)} images, {images.training.present.sum()} positive;"
        f" {len(images.validation)} to validate"
    )


def _log_resumed(state: TrainingState, epochs: int) -> None:
    """The metrics of an interrupted training that this run does not have."""
    logged = tracking.logged_steps(EPOCH_DICE)
    for epoch, metrics in enumerate(state.history, start=1):
        if epoch not in logged:
            tracking.log_metrics(metrics, step=epoch)
    print(f"train: continues after epoch {len(state.history)} of {epochs}")


def _log_epoch(result: EpochResult, epochs: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
    epoch, scores = result.epoch, result.scores
    tracking.log_metrics(result.metrics, step=epoch.number)
    for key, picture in pictures.items():
        tracking.log_image_step(picture, key, epoch.number - 1)  # the UI's slider begins at 0
    tqdm.write(
        f"  epoch {epoch.number}/{epochs}  loss {epoch.losses['total']:.4f}  validation Dice"
        f" {scores.dice:.4f} (all-empty {scores.dice_baseline:.4f})  on positives {scores.on_positives}"
        f"  {epoch.images_per_second:.1f} images/s"
    )


def _log_result(source: SettingsSource, fold: Fold, result: FoldResult) -> str:
    """Scores, counts, pictures and the model; returns its address."""
    evaluation, detector, number = result.evaluation, result.detector, len(result.history)
    scores, settings = evaluation.scores, source.settings
    (predictor,) = detector.predictor.members
    if source.model is not None:
        largest, which = source.compare_weights(predictor.network)
        tracking.log_params({"same_weights": largest == 0, "weights_difference": f"{largest:.3g}"})
        differ = f"differ by up to {largest:.3g} from" if largest else "are"
        print(f"train: the weights {differ} {which}")
    # Of the weights that were kept, at their own thresholds; without a step they are the model's, too.
    tracking.log_metrics(result.as_metrics())
    tracking.log_params(result.as_facts())
    log_threshold_search(result.search, evaluation.counts)
    tracking.log_image(learning_curves(result.history, scores.dice_baseline), "learning_curves.png")
    overlays = ranked_overlays(evaluation, predictor, settings.evaluation.overlays)
    for place, picture in enumerate(overlays, start=1):
        tracking.log_image(picture, f"overlays/{place:02}.png")
    if overlays:
        tracking.log_image(contact_sheet(overlays, columns=2), "overlays.png")
    model, averaged = log_model(detector, f"fold{settings.split.fold}"), result.averaged_epochs
    kept = f"kept epoch{'s' * (len(averaged) > 1)} {', '.join(map(str, averaged))} of {number}"
    line = f"Validation {scores.line}"
    tracking.describe(
        f"{settings.recipe.network.network} at {detector.image_size} px, {len(fold.images.training)} images;"
        f" {kept}.\n{line}.\nModel {model}."
    )
    print(f"train: {kept}. {line}")
    return model


def _finish_folds(settings: Train, folds: Sequence[FoldResult]) -> TrainResult:
    """Logs the out-of-fold scores, and the networks of all folds as one model."""
    predicted = predict_out_of_fold(folds)
    joined = join_folds(folds, settings.evaluation.threshold_trials, settings.recipe.seed)
    scores, image_size = predicted.scores, joined.detector.image_size
    tracking.log_csv(COLUMNS, predicted.rows, "out_of_fold")
    tracking.log_metrics(scores.as_metrics("oof/") | joined.as_metrics())
    tracking.log_params(scores.as_facts("oof_"))
    log_threshold_search(joined.search, joined.counts)
    if joined.disagreement > MUCH_DISAGREEMENT:
        log.warning(
            "the networks' probabilities of presence differ by %.2f (standard deviation): their mean, and"
            " common thresholds, suit none of them; look at the folds' own scores",
            joined.disagreement,
        )
    model, line = log_model(joined.detector, f"{len(folds)}folds"), f"Out-of-fold {scores.line}"
    tracking.describe(
        f"{settings.recipe.network.network} at {image_size} px, one for each of {len(folds)} folds.\n"
        f"{line}.\nModel {model}, all of them together."
    )
    print(f"train: {len(folds)} folds. {line}")
    places = tracking.page_of_active_run(), tracking.link_to_active_run()
    return TrainResult(model, scores, settings.dataset, *places)


def log_threshold_search(search: ThresholdSearch, counts: ThresholdCounts | None = None) -> None:
    """Logs the thresholds, the study, and the counts if given."""
    tracking.log_thresholds(asdict(search.thresholds))
    if counts is not None:
        with counts_file(counts) as path:
            tracking.log_file(path)
    if trials := search.trials():
        tracking.log_table(TRIAL_COLUMNS, trials, "threshold_trials")
    for file_name, picture in search.pictures().items():
        tracking.log_image(picture, file_name)


def log_model(detector: Detector, end: str) -> str:
    """Logs a model of the active run, whose name ends so; returns its address."""
    with new_folder() as folder:
        save(folder, detector)
        return tracking.log_model(folder, f"{detector.networks}-{detector.image_size}px-{end}")


def _run_name(settings: Train, dataset: Dataset, stage: str) -> str:
    """What is special about a training: network, size, fold, and the settings that are not the usual ones."""
    split, recipe = settings.split, settings.recipe
    if stage == "fold":
        return f"fold {split.fold}"
    fold = f"fold {split.fold}" if split.fold != "all" else f"{split.folds} folds"
    # The most telling first: the end of a long name is cut.
    groups = (recipe.loss, recipe.optimizer, recipe.batches, recipe.network, settings.schedule, split)
    given, shaping = chosen(settings), weight_shaping(settings).keys() - {"network", "fold", "folds"}
    names = ["seed", *(name for group in groups for name in flat(group))]
    texts = {name: Path(text).name if Path(text).is_absolute() else text for name, text in given.items()}
    special = [f"{name} {texts[name]}" for name in names if name in texts and name in shaping]
    start = f"train {recipe.network.network} {dataset.image_size}px {fold}"
    return " · ".join([start, some_of(special, 4)] if special else [start])
