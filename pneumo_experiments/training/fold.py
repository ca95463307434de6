"""The training of one fold: prepare, epochs, finish."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import warn
from pneumo_experiments.dataset.splits import Split
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.load_models import load_model
from pneumo_experiments.evaluation.pictures import draw_overlays
from pneumo_experiments.evaluation.subset import Subset, describe_seen, hash_image_ids, make_split
from pneumo_experiments.evaluation.threshold_search import ThresholdSearch, search_thresholds
from pneumo_experiments.figures import contact_sheet, outlines, overlay
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import STATISTICS_IMAGES, mean_state, update_batch_norm
from pneumo_experiments.learning.calibration import fit_calibration
from pneumo_experiments.learning.device import choose_compute, from_numpy
from pneumo_experiments.learning.loader import batches, require_crop
from pneumo_experiments.learning.network import PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.dice import calibration_error
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, TrainedNetwork, load
from pneumo_experiments.serving.model_folder import WEIGHTS
from pneumo_experiments.settings import NONE, Network, Search, SplitSettings, Train, as_config
from pneumo_experiments.training.loop import EpochResult, FoldImages, train_and_validate
from pneumo_experiments.training.resume import TrainingState

MAX_SHOWN = 12  # images of the first batch
MAX_FOLLOWED, FOLLOWED_PX = 6, 512  # images that are drawn after each epoch, and their side


@dataclass(frozen=True)
class Fold:
    """A fold that is ready to be trained: its images, and the network in its first state."""

    settings: Train
    split: Split
    images: FoldImages
    predictor: Predictor
    cache: str
    """where the training images are held"""

    @classmethod
    def prepare(cls, settings: Train, dataset: Dataset) -> Fold:
        """Reads the images and builds the network. Raises UserError for settings that cannot work."""
        recipe = settings.recipe
        require_crop(recipe, dataset.image_size)
        split = make_split(dataset, settings.split)
        validation = Subset(dataset, split.validation).in_memory(recipe.batches.cache)
        training, compute = Subset(dataset, split.train), choose_compute(settings.compute)
        cache = training.choose_cache(recipe.batches.cache, compute)
        images = FoldImages(training.training_data(cache, compute), validation)
        network = initial_network(recipe.network, recipe.seed)
        if network.source == NONE and (recipe.network.freeze_epochs or recipe.network.freeze_bn):
            warn("freeze_epochs and freeze_bn keep random values: the backbone has no pretrained weights")
        return cls(settings, split, images, Predictor(network, compute, recipe.network.tta), cache)

    def first_batch(self) -> NDArray[np.uint8]:
        """Picture of the first images of the first batch, as the network sees them, with their masks."""
        data, settings, device = self.images.training, self.settings, self.predictor.device
        batch = next(batches(data, settings.recipe, 1, settings.schedule.epochs, device))
        images = (batch.images[:MAX_SHOWN, 0] * 255).round().byte().cpu().numpy()
        truths = (batch.targets[:MAX_SHOWN] >= 0.5).cpu().numpy()
        pairs = zip(images, truths, strict=True)
        drawn = [overlay(image, truth, None, f"annotated {truth.mean():.1%}", 256) for image, truth in pairs]
        return contact_sheet(drawn, columns=3)

    def epochs(
        self, state: TrainingState, advance: Callable[[float], None] = lambda work: None
    ) -> Iterator[EpochResult]:
        """Trains the epochs that are left after ``state``, and adds each to it; ends early when stuck."""
        recipe, schedule = self.settings.recipe, self.settings.schedule
        results = train_and_validate(
            self.predictor, self.images, recipe, schedule.epochs, state.trainer, advance
        )
        while not state.is_stuck(schedule.patience) and (result := next(results, None)):
            state.add(result, schedule.best_k)
            yield result

    def follow(
        self, state: TrainingState, evaluation: Evaluation, network: PneumothoraxNet
    ) -> dict[str, NDArray[np.uint8]]:
        """Overlays of the same few validation images after each epoch, by name; the first epoch chooses."""
        if not state.followed:
            count = min(MAX_FOLLOWED, self.settings.evaluation.overlays)
            state.followed = dict([*_typical_images(evaluation).items()][:count])
        dices, predictor = evaluation.images.dices, replace(self.predictor, network=network)
        epoch = len(state.history)
        captions = {
            place: f"epoch {epoch}, {name}: Dice {dices[place]:.2f}" for name, place in state.followed.items()
        }
        drawn = draw_overlays(evaluation, predictor, captions, FOLLOWED_PX, outlines)
        return dict(zip(state.followed, drawn, strict=True)) if captions else {}

    def finish(self, state: TrainingState) -> FoldResult:
        """Chooses weights, calibration and thresholds by the validation images."""
        settings, validation = self.settings, self.images.validation
        raw, averaged, has_own = self._choose_weights(state)
        line = fit_calibration(raw.presence, raw.truth_area > 0, prevalence(validation.dataset, self.split))
        predictor = replace(self.predictor, calibration=line)
        presence = predictor.calibrated(from_numpy(raw.presence).to(predictor.device)).cpu().numpy()
        counts = replace(raw, presence=presence)
        trials = settings.evaluation.threshold_trials if distributed.is_main_process() else 0
        search = search_thresholds(counts, trials, settings.recipe.seed)
        (error,) = calibration_error(raw.truth_area > 0, raw.presence, np.ones((1, len(raw))))
        return FoldResult(
            make_detector(predictor, settings, search.thresholds, validation.dataset, self.split),
            Evaluation(validation, counts, search.thresholds),
            search,
            history=state.history,
            best_epoch=next(iter(state.dices)),
            averaged_epochs=sorted(averaged),
            own_batch_statistics=has_own,
            raw_calibration_error=float(error),
        )

    def _choose_weights(self, state: TrainingState) -> tuple[ThresholdCounts, list[int], bool]:
        """Loads the best epoch's weights, or the mean of the best ones' where that scores better.

        Averaged weights, those of ``ema`` too, are also tried with batch statistics of their own, unless
        those of the backbone are frozen. Returns the counts of the validation images, the epochs that were
        averaged, and whether the statistics are own.
        """
        predictor, validation, best = self.predictor, self.images.validation, list(state.networks)
        network, candidates = predictor.network, [(state.networks[best[0]], best[:1], False)]
        recipe, data = self.settings.recipe, self.images.training
        if len(best) > 1:
            candidates.append((mean_state(list(state.networks.values())), best, False))
        frozen = recipe.network.freeze_bn or recipe.network.freeze_epochs >= self.settings.schedule.epochs
        if (len(best) > 1 or recipe.optimizer.ema > 0) and not frozen:
            network.load_state_dict(candidates[-1][0])
            shown, is_shown = min(STATISTICS_IMAGES, len(data)), distributed.is_main_process()
            with ProgressBar("batch statistics", shown, is_shown=is_shown) as bar:
                update_batch_norm(network, data, recipe, predictor.compute, bar.update)
            candidates.append((copy.deepcopy(network.state_dict()), best, True))
        results = list[tuple[float, ThresholdCounts]]()
        for weights, _, _ in candidates:
            counts = None if results else state.counts.get(best[0])
            if counts is None:
                network.load_state_dict(weights)
                counts = validation.count(predictor)
            results.append((Evaluation(validation, counts, best_on_grid(counts)).scores.dice, counts))
        chosen = max(range(len(results)), key=lambda place: results[place][0])  # of equal ones the first
        weights, epochs, has_own = candidates[chosen]
        network.load_state_dict(weights)
        return results[chosen][1], epochs, has_own


@dataclass(frozen=True, eq=False)
class FoldResult:
    """A trained network with its thresholds, and its evaluation on the validation images."""

    detector: Detector
    evaluation: Evaluation
    search: ThresholdSearch
    history: list[dict[str, float]]
    """metrics of each epoch"""
    best_epoch: int
    averaged_epochs: list[int]
    own_batch_statistics: bool
    """whether batch norm got the statistics of the averaged weights"""
    raw_calibration_error: float
    """of presence before its calibration"""

    def as_metrics(self) -> dict[str, float]:
        """The scores of the weights that were kept, at their own thresholds, and how those were found."""
        error = {"val/calibration_error_raw": self.raw_calibration_error}
        return self.evaluation.scores.as_metrics("val/") | error | self.search.as_metrics()

    def as_facts(self) -> dict[str, object]:
        """What was chosen: epochs, weights and calibration; and the images' constants."""
        (predictor,) = self.detector.predictor.members
        return {
            "best_epoch": self.best_epoch,
            "averaged_epochs": len(self.averaged_epochs),
            "own_batch_statistics": self.own_batch_statistics,
            **{f"presence_{name}": value for name, value in asdict(predictor.calibration).items()},
            **self.evaluation.scores.as_facts("val_"),
        }


def _typical_images(evaluation: Evaluation) -> dict[str, int]:
    """Positions of findings of median and small area, and of the healthy images most and least suspected."""
    area, presence = evaluation.counts.truth_area, evaluation.counts.presence
    findings = [place for place in np.argsort(area, kind="stable").tolist() if area[place]]
    healthy = [place for place in np.argsort(-presence, kind="stable").tolist() if not area[place]]
    middle = len(findings) // 2
    chosen = [
        *(("typical finding", place) for place in findings[middle : middle + 1]),
        *(("small finding", place) for place in findings[:1]),
        *(("suspected healthy", place) for place in healthy[:1]),
        *(("healthy", place) for place in healthy[-1:]),
        *(("another typical finding", place) for place in findings[middle + 1 : middle + 2]),
        *(("another small finding", place) for place in findings[1:2]),
    ]
    names = dict[int, str]()
    for name, place in chosen:
        names.setdefault(place, name)
    return {name: place for place, name in names.items()}


def initial_network(network: Network, seed: int) -> PneumothoraxNet:
    """See ``build_network``; the weights may also be those of a model of this project: address or folder.

    What that model has seen, the new network has seen, too. Raises UserError for a model of several networks.
    """
    weights = network.weights
    if not network.starts_from_model:
        return build_network(network.network, weights, seed)
    folder = tracking.model_data(weights, "weights")
    model = load(folder)
    if len(model.members) > 1:
        raise UserError(
            f"weights={weights}: is the mean of {len(model.members)} networks; name a model of one"
        )
    built = build_network(network.network, str(folder / WEIGHTS), seed)
    built.source, built.training_images = weights, model.training_images
    return built


def settings_per_fold(settings: Train) -> list[Train]:
    """The settings of each network to train."""
    if settings.split.fold != "all":
        return [settings]
    folds = range(settings.split.folds)
    return [replace(settings, split=replace(settings.split, fold=str(fold))) for fold in folds]


def seen_by_start(weights: str, splits: Iterable[SplitSettings], dataset: Dataset) -> str:
    """How many of the images to judge by the model in ``weights`` has seen, in words; empty if none.

    A model of the same fold is not doubted: these images have chosen its epoch and thresholds, no more.
    """
    start, judges = load_model(weights, "weights"), list[NDArray[np.int64]]()
    for settings in splits:
        split = make_split(dataset, settings)
        own = hash_image_ids(Subset(dataset, np.append(split.train, split.validation)))
        if start.members[0].split != settings or start.training_images != own:
            judges += [split.validation, split.holdout]
    if not judges:
        return ""
    judged = Subset(dataset, np.unique(np.concatenate(judges)))
    seen = describe_seen(judged, start.training_images, "that model")
    return seen and f"weights={weights}: of those that validate or are held out, {seen}"


def doubt_of_start(settings: Train, dataset: Dataset) -> str:
    """What ``seen_by_start`` means for the scores of a training; empty if nothing."""
    splits = [one.split for one in settings_per_fold(settings)]
    seen = seen_by_start(settings.recipe.network.weights, splits, dataset)
    return seen and (
        f"{seen}: validation and out-of-fold scores and thresholds are too optimistic, and score refuses such"
        " a hold-out; start each fold from a model of the same fold, holdout and split_seed"
    )


def make_detector(
    predictor: Predictor, settings: Train | Search, thresholds: Thresholds, dataset: Dataset, split: Split
) -> Detector:
    """What is saved of a training: it knows the images that trained it or chose its epoch and thresholds."""
    seen = Subset(dataset, np.append(split.train, split.validation))
    member = TrainedNetwork(predictor, as_config(settings))
    size, fingerprint = dataset.image_size, dataset.fingerprint
    known = hash_image_ids(seen) | predictor.network.training_images
    return Detector((member,), size, thresholds, fingerprint, known, prevalence(dataset, split))


def prevalence(dataset: Dataset, split: Split) -> float:
    """The fraction of the training and validation images that is positive."""
    images = Subset(dataset, np.concatenate([split.train, split.validation]))
    return float(np.mean(images.areas_px > 0))
