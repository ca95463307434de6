"""Entry point ``main``: the whole chain as nested runs under one parent."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.scoring.submission import refuse_to_replace
from pneumo_experiments.settings import (
    Main,
    Preprocess,
    Register,
    Sample,
    Score,
    Search,
    Train,
    as_text,
    derive,
)
from pneumo_experiments.stages.preprocess import preprocess
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.sample import sample
from pneumo_experiments.stages.score import ScoreResult, score, scores_line
from pneumo_experiments.stages.search import search
from pneumo_experiments.stages.train import clear_checkpoints, train


def main(settings: Main) -> ScoreResult:
    """Preprocess, search, train, score, submit and register; returns the final scores."""
    with tracking.run("main", settings):
        on_sample = settings.dicom_dir is None
        if settings.dicom_dir is None:
            settings = _with_sample(settings)
        elif not settings.dicom_dir.exists():
            raise UserError(
                f"dicom_dir={settings.dicom_dir}: no such folder; name the one that holds the .dcm files"
            )
        elif settings.rle_csv is None:
            raise UserError(
                "rle_csv: none given; the chain trains, so it needs dicom_dir's annotations (train-rle.csv)"
            )
        submission = settings.output_dir / "submission.csv"
        if settings.test_dir is not None:
            refuse_to_replace(submission)  # not only when all is trained
        dataset = preprocess(derive(Preprocess, settings, dataset=_dataset_path(settings), overwrite=True))
        with Dataset.open(dataset) as opened:
            tracking.log_dataset(dataset, opened.fingerprint, "main")
        fold = "0" if settings.fold == "all" else settings.fold
        found = search(derive(Search, settings, dataset=dataset, fold=fold))
        training = derive(Train, settings, dataset=dataset, **found.loss_weights)
        trained = train(training, keep=True)  # until all is done: what ended is not trained again
        subset = "holdout" if settings.holdout > 0 else "validation"
        judged = score(
            derive(Score, settings, dataset=dataset, model=trained.model, subset=subset, dicom_dir=None)
        )
        assert judged.scores is not None  # a labelled data set gives scores
        tracking.log_metrics(judged.scores.as_metrics(judged.prefix))
        constant = {"dice_baseline": judged.scores.dice_baseline}
        tracking.log_params(constant | {"interval_reliable": judged.scores.interval_reliable})
        if settings.test_dir is not None:
            unlabelled = derive(Score, settings, dataset=dataset, model=trained.model)
            score(replace(unlabelled, dicom_dir=settings.test_dir, submission=submission))
        version = register(derive(Register, settings, model=trained.model))
        line = scores_line(judged.scores)
        source = "Synthetic sample" if on_sample else settings.dicom_dir
        tracking.describe(f"{source}: {settings.network} at {settings.image_size} px.\n{line}.")
        _print_summary(judged, version, settings, on_sample)
    clear_checkpoints(training)
    return judged


def _with_sample(settings: Main) -> Main:
    seeded = f"sample-{settings.images}-{settings.test_images}-{settings.seed}"
    folder = sample(derive(Sample, settings, output_dir=settings.output_dir / seeded))
    test_dir = folder / "dicom-images-test" if settings.test_images else None
    return replace(
        settings,
        dicom_dir=folder / "dicom-images-train",
        rle_csv=folder / "train-rle.csv",
        test_dir=settings.test_dir or test_dir,
    )


def _dataset_path(settings: Main) -> Path:
    """One file per input and pixel settings, so that one output folder holds them all."""
    shaping = (
        settings.dicom_dir,
        settings.rle_csv,
        settings.patients_csv,
        settings.image_size,
        settings.pixel_dtype,
    )
    key = hashlib.sha256(repr([as_text(value) for value in shaping]).encode()).hexdigest()[:8]
    return settings.output_dir / f"dataset-{settings.image_size}px-{key}.h5"


def _print_summary(judged: ScoreResult, version: tracking.Version, settings: Main, on_sample: bool) -> None:
    assert judged.scores is not None
    s = judged.scores
    whom = "patients never seen" if settings.holdout > 0 else "the patients that chose its thresholds"
    alias = ", the champion" if version.champion else f", not the champion: {version.reason}"
    print(f"""
Dice                {s.dice:.4f} ({s.interval}), {s.images} images of {whom}
all-empty baseline  {s.dice_baseline:.4f}
Dice on positives   {s.on_positives}, {s.positives} images

overlays  {judged.overlays}
model     models:/{version.name}/{version.number}{alias}
runs      {tracking.tracking_uri()}

next: look at the runs in the browser    make ui""")
    if on_sample:
        print("""      take your own data
          source .venv/bin/activate
          mlflow run . --env-manager local -P dicom_dir=siim/dicom-images-train \\
              -P rle_csv=siim/train-rle.csv -P test_dir=siim/dicom-images-test""")
