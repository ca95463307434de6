"""Entry point ``train``: fit a network, keep its best weights, log it as a model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.out_of_fold import log_out_of_fold
from pneumo_experiments.experiment.scored_images import digests
from pneumo_experiments.experiment.subset import (
    Subset,
    log_overlays,
    log_split,
    make_split,
)
from pneumo_experiments.experiment.threshold_search import refine_thresholds
from pneumo_experiments.experiment.training_loop import EpochResult, log_first_batch, train_and_validate
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import mean_state
from pneumo_experiments.learning.checkpoint import Checkpoint, lock_checkpoints
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.fit import State
from pneumo_experiments.learning.launch import is_launched, launch
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.scoring.figures import learning_curves
from pneumo_experiments.scoring.scores import Scores
from pneumo_experiments.scoring.thresholds import ThresholdCounts, best_on_grid
from pneumo_experiments.serving import Detector, save
from pneumo_experiments.settings import Train, as_params

# Settings that do not change what is learned: a training goes on under others.
BESIDES = (*("resume", "checkpoints", "device", "cache", "processes", "overlays", "threshold_trials"),)


@dataclass(frozen=True)
class TrainResult:
    """Address of the logged model, its scores on the validation images, and how it answered each of them."""

    model: str
    scores: Scores
    validation: NDArray[np.int64]  # indices
    counts: ThresholdCounts


@dataclass
class Progress:
    """How far a training is: what it logged, and the networks of its best epochs, the best first."""

    run_id: str
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    dices: dict[int, float] = field(default_factory=dict[int, float])  # of the kept epochs
    networks: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])

    def add(self, judged: EpochResult, best_k: int) -> None:
        """Keeps the epoch's network if it is among the best; of equals the later: it has learned longer."""
        number = judged.epoch.number
        self.history.append(judged.metrics)
        self.dices[number] = judged.scores.dice
        best = sorted(self.dices, key=lambda epoch: (self.dices[epoch], epoch), reverse=True)[:best_k]
        if number in best:
            # On the host: there lie those of a training that goes on, too, and the device needs its memory.
            state = judged.epoch.network.state_dict()
            self.networks[number] = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        self.dices = {epoch: self.dices[epoch] for epoch in best}
        self.networks = {epoch: self.networks[epoch] for epoch in best}

    def is_stuck(self, patience: int) -> bool:
        """Whether so many epochs have passed without a better Dice; never for a patience of 0."""
        dices = [told["val_dice"] for told in self.history]
        return bool(dices) and 0 < patience < len(dices) - dices.index(max(dices))


def train(settings: Train, keep: bool = False) -> TrainResult:
    """Trains one network, or one per fold for ``fold=all``, and then returns that with the highest Dice.

    With ``processes``, or started by torchrun, several processes do it together. Waits while another training
    with the same settings works. With ``keep`` the checkpoint stays until ``clear_checkpoints`` removes it.
    """
    if is_launched():
        distributed.init_process_group()
    checkpoints = _checkpoints(settings) if distributed.is_main_process() else []
    with lock_checkpoints(checkpoints, patience=0 if is_launched() else -1):
        if is_launched():
            trained = _member(settings, None)
        elif settings.processes == 1:
            trained = _train_all(settings, None)
        else:
            tracking.open_store()  # says at once if it does not
            tracking.end_with_mlflow_run()  # the processes of the training end with this one
            trained = launch(settings.processes, _member, settings, tracking.active_run())
        # Only now: a fold that has ended is not trained again when a later one is interrupted.
        for checkpoint in [] if keep else checkpoints:
            checkpoint.clear()
    return trained


def clear_checkpoints(settings: Train) -> None:
    """Removes what ``train`` kept, unless another training with the same settings has taken it over."""
    checkpoints = _checkpoints(settings)
    with suppress(UserError), lock_checkpoints(checkpoints, patience=0):
        for checkpoint in checkpoints:
            checkpoint.clear()


def _member(settings: Train, parent: str | None) -> TrainResult:
    """What each of the processes does; the first one speaks for all."""
    if distributed.is_main_process():
        return _train_all(settings, parent)
    with tracking.disabled(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return _train_all(settings, parent)


def _train_all(settings: Train, parent: str | None) -> TrainResult:
    if settings.fold != "all":
        return _train("train", settings, parent)[0]
    alone = _alone(settings)
    with tracking.run("train", settings, parent=parent), Dataset.open(settings.dataset) as dataset:
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training")
        folds = [_train(f"fold {one.fold}", one, None) for one in alone]
        if not distributed.is_main_process():
            return folds[0][0]
        judges = [(Subset(dataset, fold.validation), fold.counts, predictor) for fold, predictor in folds]
        scores = log_out_of_fold(judges, settings)
        tracking.describe(
            f"{settings.network} at {dataset.image_size} px, one for each of {settings.folds} folds.\n"
            f"Out-of-fold Dice {scores.dice:.3f} (all-empty {scores.dice_baseline:.3f}),"
            f" on positives {scores.on_positives}."
        )
        print(f"train: {settings.folds} folds, out-of-fold Dice {scores.dice:.4f}")
    return max((fold for fold, _ in folds), key=lambda fold: fold.scores.dice)


def _train(name: str, settings: Train, parent: str | None) -> tuple[TrainResult, Predictor]:
    """Trains, keeps the weights with the best Dice on the validation images, and logs them as a model.

    An interrupted training with the same settings goes on after its last whole epoch, in the same run.
    """
    checkpoint = _checkpoint(settings)
    last = distributed.broadcast(
        read_checkpoint(checkpoint)
        if checkpoint and settings.resume and distributed.is_main_process()
        else None
    )
    with (
        tracking.run(
            name, settings, continues=last["run_id"] if last else None, parent=parent, system_metrics=True
        ) as run_id,
        Dataset.open(settings.dataset) as dataset,
    ):
        assert checkpoint is not None  # the data set opens
        tracking.log_dataset(settings.dataset, dataset.fingerprint, "training")
        parts = make_split(dataset, settings)
        log_split(dataset, parts)
        validation = Subset(dataset, parts.validation).in_memory(settings.cache)
        compute = choose_compute(settings)
        examples = Subset(dataset, parts.train).examples(settings.cache, compute)
        tracking.log_params({"device_used": str(compute.device), "precision_used": compute.precision})
        network = build(settings.network, settings.weights, settings.seed)
        tracking.log_params({"weights_used": network.source, "weights_sha256": network.source_sha256})
        predictor = Predictor(network, compute, settings.tta_flip)
        print(
            f"train: {settings.network} at {dataset.image_size} px, {compute.device}, {compute.precision};"
            f" {len(examples)} images, {examples.present.sum()} positive; {len(validation)} to validate"
        )

        progress = Progress(run_id)
        state = None
        if last is not None:
            progress, state = _progress(last, run_id), last["state"]
            print(f"train: goes on after epoch {len(progress.history)} of {settings.epochs}")
        else:
            if distributed.is_main_process():
                checkpoint.clear()
            log_first_batch(examples, settings, settings.epochs, compute)
        epochs = train_and_validate(name, predictor, examples, validation, settings, settings.epochs, state)
        while not progress.is_stuck(settings.patience) and (judged := next(epochs, None)):
            progress.add(judged, settings.best_k)
            if distributed.is_main_process():
                written = asdict(progress)
                networks = written.pop("networks")
                checkpoint.save(written | {"state": judged.epoch.state()}, networks)
        if len(progress.history) < settings.epochs:
            print(f"train: no better Dice in {settings.patience} epochs: stopped early")
        counts, kept = _best(progress, predictor, validation)

        thresholds = refine_thresholds(counts, settings.threshold_trials, settings.seed)
        scores = validation.score(counts, thresholds)
        if not distributed.is_main_process():
            return TrainResult("", scores, parts.validation, counts), predictor
        # Beside the curves, not on them: the weights that were kept, at their own thresholds.
        final = {f"{name}_final": value for name, value in scores.as_metrics("val_").items()}
        tracking.log_metrics(final, step=len(progress.history))
        chosen_by = {"best_epoch": next(iter(progress.dices)), "averaged_epochs": len(kept)}
        tracking.log_params(chosen_by | asdict(thresholds) | scores.as_facts("val_"))
        curves = learning_curves(progress.history, scores.dice_baseline)
        tracking.log_image(curves, "learning_curves.png")
        log_overlays(validation, counts, predictor, thresholds, settings.overlays)
        seen = digests(validation) | digests(Subset(dataset, parts.train))
        detector = Detector(
            predictor, dataset.image_size, thresholds, as_params(settings), dataset.fingerprint, seen
        )
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), detector)
            model = tracking.log_model(Path(folder))
        chosen = f"epoch{'s' * (len(kept) > 1)} {', '.join(map(str, sorted(kept)))}"
        print(f"train: kept {chosen} of {len(progress.history)}, logged as {model}")
        tracking.describe(
            f"{settings.network} at {dataset.image_size} px, {len(examples)} images;"
            f" kept {chosen} of {len(progress.history)}.\n"
            f"Validation Dice {scores.dice:.3f} (all-empty {scores.dice_baseline:.3f}),"
            f" on positives {scores.on_positives}."
        )
    return TrainResult(model, scores, parts.validation, counts), predictor


def _alone(settings: Train) -> list[Train]:
    """The settings of each network that is trained."""
    if settings.fold != "all":
        return [settings]
    return [replace(settings, fold=str(fold)) for fold in range(settings.folds)]


def _checkpoints(settings: Train) -> list[Checkpoint]:
    found = [_checkpoint(one) for one in _alone(settings)]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _checkpoint(settings: Train) -> Checkpoint | None:
    """Where a training with these settings on this data leaves what it did; None without data."""
    try:
        with Dataset.open(settings.dataset) as dataset:
            fingerprint = dataset.fingerprint
    except UserError:
        return None  # told by the run, when it opens the data set
    shaping = {name: text for name, text in as_params(settings).items() if name not in BESIDES}
    key = json.dumps([fingerprint, shaping], sort_keys=True)
    return Checkpoint(settings.checkpoints / hashlib.sha256(key.encode()).hexdigest()[:16])


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What an interrupted training left; None where there is nothing, or nothing that this version saves."""
    last = checkpoint.last()
    if last is None:
        return None
    state, names = last.get("state"), {f.name for f in fields(Progress)} | {"state"}
    if last.keys() != names or not isinstance(state, dict) or state.keys() != State.__annotations__.keys():
        warnings.warn(f"{checkpoint.folder}: of another version; the training starts anew", stacklevel=2)
        return None
    networks: list[Any] = [last["state"]["network"], *last["networks"].values()]
    if any(_shapes(network) != _shapes(networks[0]) for network in networks):
        warnings.warn(f"{checkpoint.folder}: of several networks; the training starts anew", stacklevel=2)
        return None
    return last


def _shapes(network: Any) -> dict[str, Any]:
    tensors = cast("dict[str, Any]", network) if isinstance(network, dict) else {}
    return {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}


def _progress(last: dict[str, Any], run_id: str) -> Progress:
    """What an interrupted training had reached, told again in a run of its own where this is another."""
    if last["run_id"] != run_id:
        for epoch, metrics in enumerate(last["history"], start=1):
            tracking.log_metrics(metrics, step=epoch)
    return Progress(run_id, last["history"], last["dices"], last["networks"])


def _best(progress: Progress, predictor: Predictor, validation: Subset) -> tuple[ThresholdCounts, list[int]]:
    """Loads the best epoch's weights, or the mean of the kept ones where that scores better.

    Returns the validation images' tally, and the epochs that were taken.
    """
    epochs = list(progress.networks)
    candidates = [epochs[:1], epochs] if len(epochs) > 1 else [epochs]
    found: list[tuple[float, ThresholdCounts]] = []
    for chosen in candidates:
        predictor.network.load_state_dict(mean_state([progress.networks[epoch] for epoch in chosen]))
        counts = validation.count(predictor)
        found.append((validation.score(counts, best_on_grid(counts)).dice, counts))
    best = max(range(len(found)), key=lambda place: found[place][0])  # of equals the single one
    predictor.network.load_state_dict(mean_state([progress.networks[epoch] for epoch in candidates[best]]))
    return found[best][1], candidates[best]
