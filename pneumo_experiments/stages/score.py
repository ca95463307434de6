"""Entry point ``score``: Dice on labelled images, or the submission for unlabelled ones."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.data.archive import SEVERAL, open_archive, read_member
from pneumo_experiments.data.decoders import File
from pneumo_experiments.data.dicom import MAX_PIXELS
from pneumo_experiments.data.rle import EMPTY
from pneumo_experiments.data.store import Dataset
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.learning.device import choose_machine_for
from pneumo_experiments.scoring.scores import Scores
from pneumo_experiments.scoring.submission import write_submission
from pneumo_experiments.serving import Detector, load
from pneumo_experiments.settings import Score
from pneumo_experiments.stages.cohort import Cohort, log_overlays, parts_of, split_of
from pneumo_experiments.stages.scored import digests, identity, log_each

# How names of metrics begin. Without a prefix they tell of images that neither trained the model nor chose
# its epoch or thresholds; "external" is subset=all of another data set than that of the training.
PREFIXES = dict.fromkeys(tracking.EVIDENCE, "") | {"validation": "val_", "train": "train_", "all": "all_"}


@dataclass(frozen=True)
class Judged:
    """What score left: scores and pictures of labelled images, or the submission."""

    scores: Scores | None
    overlays: str
    submission: Path | None
    prefix: str = ""  # of the scores' names


def score(settings: Score) -> Judged:
    """Scores the model on one part of a data set, or writes the submission for ``dicom_dir``."""
    with tracking.run("score", settings):
        detector = load(tracking.model_data(settings.model))
        machine = choose_machine_for(detector.predictor.machine.precision, settings)
        detector = replace(detector, predictor=replace(detector.predictor, machine=machine))
        tracking.log_found({"device_used": str(machine.device), "precision_used": machine.precision})
        if settings.dicom_dir is not None:
            return _submit(settings, detector, settings.dicom_dir)
        return _judge(settings, detector)


def _judge(settings: Score, detector: Detector) -> Judged:
    with Dataset.open(settings.dataset) as dataset:
        if not dataset.labelled:
            raise UserError(
                f"dataset={settings.dataset}: has no annotations to score by; dicom_dir=… writes a submission"
            )
        if dataset.image_size != detector.image_size:
            raise UserError(
                f"dataset={settings.dataset}: has images of {dataset.image_size} px, the model was trained on"
                f" {detector.image_size} px; run preprocess with image_size={detector.image_size}"
            )
        tracking.log_dataset(settings.dataset, dataset.fingerprint, settings.subset)
        cohort = Cohort(dataset, _indices(settings, detector, dataset))
        subset, images = _subset(settings, detector, cohort), identity(cohort)
        tally = cohort.tally(detector.predictor, desc="score")
        scores = cohort.score(tally, detector.thresholds)
        facts = {"subset": subset, "data_fingerprint": dataset.fingerprint} | scores.as_facts()
        tracking.log_scores(
            scores.as_metrics(PREFIXES[subset]), settings.model, settings.dataset, images, facts
        )
        found = {name: value for name, value in facts.items() if name != "subset"}
        tracking.log_found(found | {"identity": images} | asdict(detector.thresholds))
        log_each(cohort, tally, detector.thresholds)
        where = log_overlays(cohort, tally, detector.predictor, detector.thresholds, settings.overlays)
        line = scores_line(scores)
        tracking.describe(f"{subset} images of {settings.dataset}, by {settings.model}.\n{line}.")
        print(f"score: {subset}: {line}")
    return Judged(scores, where, None, PREFIXES[subset])


def _subset(settings: Score, detector: Detector, cohort: Cohort) -> str:
    """The subset, or ``external`` where all images of another data set are new to the model."""
    seen = len(detector.seen & digests(cohort))
    if settings.subset == "holdout" and seen:
        raise UserError(
            f"subset=holdout: {seen} of {len(cohort)} images trained the model or chose its thresholds: its"
            " split was drawn in another way; train anew to score a hold-out part"
        )
    if settings.subset != "all" or cohort.dataset.fingerprint == detector.data_fingerprint:
        return settings.subset
    if seen:
        print(f"score: {seen} of {len(cohort)} images trained the model or chose its thresholds")
    return "all" if seen else "external"


def scores_line(scores: Scores) -> str:
    """Dice with its interval and company, for the terminal."""
    return (
        f"Dice {scores.dice:.4f} ({scores.interval}), all-empty baseline"
        f" {scores.dice_baseline:.4f}, Dice on positives {scores.on_positives},"
        f" {scores.images} images, {scores.positives} with pneumothorax"
    )


def _indices(settings: Score, detector: Detector, dataset: Dataset) -> NDArray[np.int64]:
    if settings.subset == "all":
        return np.arange(len(dataset.entries))
    if dataset.fingerprint != detector.data_fingerprint:
        raise UserError(
            f"subset={settings.subset}: the model was trained on another data set than {settings.dataset};"
            " subset=all scores every image"
        )
    made = split_of(detector.settings)
    indices: NDArray[np.int64] = getattr(parts_of(dataset, made), settings.subset)
    if not len(indices):
        raise UserError(
            f"subset={settings.subset}: the model's split has none, holdout={made.holdout}; try validation"
        )
    return indices


def _submit(settings: Score, detector: Detector, folder: Path) -> Judged:
    archive, errors = open_archive(folder), list[str]()

    def files() -> Iterator[File]:
        for member in archive.members:
            try:
                yield member.image_id, read_member(archive.root, member, MAX_PIXELS)
            except Rejected as reason:
                yield member.image_id, reason

    def rows() -> Generator[tuple[str, str]]:
        for image_id in archive.differing:
            errors.append(f"{image_id}: {SEVERAL}")
            yield image_id, EMPTY
        bar = tqdm(total=len(archive.members), desc="submission", unit="image", disable=None)
        with bar, closing(detector.detect(files())) as found:
            for row in found:
                bar.update()
                if row["error"]:
                    errors.append(row["error"])
                yield row["image_id"], row["rle"]
        if len(errors) == len(archive.image_ids):
            raise UserError(f"dicom_dir={folder}: no file can be used; the first: {errors[0]}")

    with closing(rows()) as lines:
        count = write_submission(settings.submission, lines)
    tracking.log_file(settings.submission)
    tracking.log_found({"images": count, "rejected": len(errors)})
    tracking.describe(
        f"Submission of {count} images from {folder}, by {settings.model}.\n{len(errors)} could not be read."
    )
    for error in errors[:3]:
        print(f"score: submitted as empty: {error}")
    print(f"score: {count} images in {settings.submission}, {len(errors)} could not be read")
    return Judged(None, "", settings.submission)
