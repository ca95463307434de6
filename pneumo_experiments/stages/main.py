"""Entry point ``main``: the whole chain as nested runs under one parent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.findings.folder import check_findings_folder
from pneumo_experiments.findings.submission import check_overwrite
from pneumo_experiments.registry import versions
from pneumo_experiments.search.trial_training import split_folds
from pneumo_experiments.settings import (
    Main,
    Preprocess,
    Recipe,
    Register,
    Sample,
    Score,
    Search,
    Settings,
    Train,
    as_text,
    as_texts,
    check_inputs,
    flat,
    from_flat,
)
from pneumo_experiments.settings.groups import STORAGE
from pneumo_experiments.stages.preprocess import preprocess
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.sample import sample
from pneumo_experiments.stages.score import ScoreResult, score
from pneumo_experiments.stages.search import SearchResult, search
from pneumo_experiments.stages.train import training
from pneumo_experiments.words import plural


def main(settings: Main) -> ScoreResult:
    """Preprocess, search, train, score, submit and register; returns the final scores.

    Of all folds without a hold-out these are the out-of-fold scores: every image has trained the ensemble.
    """
    check_inputs(settings)
    is_synthetic, step = settings.source.dicom_dir is None, _steps(settings)
    data = "synthetic" if settings.source.dicom_dir is None else settings.source.dicom_dir.name
    name = f"main {data} {settings.recipe.network.network} {settings.format.image_size}px"
    with tracking.run("main", settings, name):
        if is_synthetic:
            next(step)
            settings = _with_sample(settings)
        submission, findings = settings.output_dir / "submission.csv", settings.output_dir / "findings"
        if settings.test_dir is not None:
            check_overwrite(submission)  # not only when all is trained
            check_findings_folder(findings)
        next(step)
        dataset = preprocess(_of(Preprocess, settings, dataset=_dataset_path(settings), overwrite=True))
        fold = "0" if settings.split.fold == "all" else settings.split.fold
        searching = _of(Search, settings, dataset=dataset, fold=fold, workers=1)  # not those that read files
        with Dataset.open(dataset) as opened:
            tracking.log_dataset(dataset, opened.fingerprint, "main", opened.profile)
            if settings.study.trials:
                print(_work_line(settings, len(split_folds(opened, searching)[0].train)))
        recipe = settings.recipe
        if settings.study.trials:
            next(step)
            best = search(searching, keep_start=True)
            values = as_texts(best.recipe)  # the model is trained with them, whatever the params say
            tracking.log_params({f"{name}_used": values[name] for name in best.searched})
            recipe = _training_recipe(settings, best)
        next(step)
        training_settings = _of(Train, settings, dataset=dataset, storage=STORAGE, **flat(recipe))
        with training(training_settings) as trained:
            scoring = Score(
                model=trained.model,
                dataset=dataset,
                compute=settings.compute,
                overlays=settings.evaluation.overlays,
            )
            next(step)
            result = score(replace(scoring, subset=(scored := _scored_subset(settings))))
            if scored == "all":
                result = replace(result, scores=trained.scores, prefix="oof/")
            assert result.scores is not None  # a labelled data set gives scores
            tracking.log_metrics(result.scores.as_metrics(result.prefix))
            tracking.rename(f"{name} · {result.scores.dice:.4f}")
            constant = {"dice_baseline": result.scores.dice_baseline}
            tracking.log_params(constant | {"interval_reliable": result.scores.interval_reliable})
            if settings.test_dir is not None:
                next(step)
                of_test = replace(scoring, dicom_dir=settings.test_dir, image_id=settings.source.image_id)
                score(replace(of_test, submission=submission, findings=findings))
            next(step)
            version = register(Register(model=trained.model, dataset=dataset, registry=settings.registry))
        assert version is not None  # None is the answer to history alone
        source = "Synthetic sample" if is_synthetic else settings.source.dicom_dir
        tracking.describe(
            f"{source}: {settings.recipe.network.network} at {settings.format.image_size} px.\n"
            f"{result.scores.line}.\n"
            f"[Report]({result.link}), [training]({trained.link}),"
            f" [{version.name} version {version.number}](#/models/{version.name}/versions/{version.number})"
        )
        _print_summary(result, version, settings, is_synthetic)
    return result


def _steps(settings: Main) -> Iterator[None]:
    """Before each step, says which one it is and what is still to come."""
    is_synthetic = settings.source.dicom_dir is None
    has_test = settings.test_dir is not None or (is_synthetic and settings.sample.test_images > 0)
    first, test = ["sample"] * is_synthetic, ["findings of the test images"] * has_test
    searched = ["search"] * (settings.study.trials > 0)
    steps = [*first, "preprocess", *searched, "train", "score", *test, "register"]
    for number, name in enumerate(steps, start=1):
        rest = f"; then {', '.join(steps[number:])}" if steps[number:] else ""
        print(f"main: step {number} of {len(steps)}, {name}{rest}")
        yield


def _work_line(settings: Main, images: int) -> str:
    """How the work is divided between search and training on so many images, in passes over images.

    No trial is pruned, and both train the same network; predictions are left out.
    """
    study, epochs = settings.study, settings.schedule.epochs
    again = study.trained_again
    size = min(study.search_images or images, images)
    passes = (study.trials + again) * study.folds_per_trial * study.search_epochs * size
    passes += (1 + (again > 0)) * study.search_warmup_epochs * images
    folds = settings.split.folds if settings.split.fold == "all" else 1
    fraction = passes / (passes + folds * epochs * images)
    return (
        f"main: search {plural(study.trials, 'trial')}{f' and {again} again' if again else ''},"
        f" {plural(study.search_epochs, 'epoch')} of {size:,} images each; then train"
        f" {plural(folds * epochs, 'epoch')} of {images:,} images:"
        f" {fraction:.0%} and {1 - fraction:.0%} of the training work"
    )


def _of(kind: type[Settings], settings: Main, **others: object) -> Settings:
    """Settings of a step: those of main with the same names, but for the others."""
    return from_flat(kind, flat(settings) | others)


def _training_recipe(settings: Main, best: SearchResult) -> Recipe:
    """The best settings, and as initial weights those of the network that they were searched for.

    Not for all folds: that network has seen images that the other folds validate on. Nor from a model's
    weights: the file does not say what that model has seen.
    """
    network, own = best.recipe.network, settings.recipe.network
    is_same = (network.network, network.weights) == (own.network, own.weights)
    if best.start is None or settings.split.fold == "all" or not is_same or own.starts_from_model:
        return best.recipe
    return replace(best.recipe, network=replace(network, weights=str(best.start)))


def _scored_subset(settings: Main) -> Literal["holdout", "validation", "all"]:
    """The hold-out; without one the images that chose the model's thresholds: of all folds, all images."""
    if settings.split.holdout > 0:
        return "holdout"
    return "all" if settings.split.fold == "all" else "validation"


def _with_sample(settings: Main) -> Main:
    size, seed = settings.sample, settings.recipe.seed
    name = f"sample-{size.images}-{size.test_images}-{seed}"
    folder = sample(Sample(output_dir=settings.output_dir / name, size=size, seed=seed))
    source = replace(
        settings.source, dicom_dir=folder / "dicom-images-train", rle_csv=folder / "train-rle.csv"
    )
    test_dir = folder / "dicom-images-test" if size.test_images else None
    return replace(settings, source=source, test_dir=settings.test_dir or test_dir)


def _dataset_path(settings: Main) -> Path:
    """One file per input and pixel settings, so that one output folder holds them all."""
    source, pixels = settings.source, settings.format
    shaping = (source.dicom_dir, source.rle_csv, source.patients_csv, source.image_id)
    shaping = (*shaping, pixels.image_size, pixels.pixel_dtype)
    if source.masks_dir is not None or source.rle_size:
        shaping = (*shaping, source.masks_dir, source.rle_size)
    key = hashlib.sha256(repr([as_text(value) for value in shaping]).encode()).hexdigest()[:8]
    return settings.output_dir / f"dataset-{settings.format.image_size}px-{key}.h5"


def _print_summary(
    result: ScoreResult, version: versions.Version, settings: Main, is_synthetic: bool
) -> None:
    assert result.scores is not None
    s = result.scores
    who = "the patients that chose its thresholds"
    if settings.split.holdout > 0:
        who = "patients the model never saw"
    elif settings.split.fold == "all":
        who = "patients, out of fold: by networks that they did not train"
    alias = ", the champion" if version.champion else f", not the champion: {version.reason}"
    print(f"""
Dice                {s.dice:.4f} ({s.interval}), {s.images} images of {who}
all-empty baseline  {s.dice_baseline:.4f}
Dice on positives   {s.on_positives}, {s.positives} images

report    {result.report}
model     models:/{version.name}/{version.number}{alias}
runs      {tracking.tracking_uri()}

next: look at the runs in the browser    make ui""")
    if is_synthetic:
        print("""      take your own data
          source .venv/bin/activate
          mlflow run . --env-manager local -P dicom_dir=siim/dicom-images-train \\
              -P rle_csv=siim/train-rle.csv -P test_dir=siim/dicom-images-test""")
