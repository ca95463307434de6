"""Entry point ``score``: Dice on labelled images, the submission for unlabelled ones, or its check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import isnan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.label_table import LabelTable
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.dicom.segmentation import require_highdicom
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation, ModelComparison, evaluate
from pneumo_experiments.evaluation.given_masks import GivenMasks
from pneumo_experiments.evaluation.load_models import addresses_of, check_unseen, load_models
from pneumo_experiments.evaluation.report import PAGE, Context, make_report
from pneumo_experiments.evaluation.subset import (
    LabelledImages,
    Subset,
    all_images,
    describe_seen,
    make_split,
)
from pneumo_experiments.evaluation.threshold_search import (
    CountsSearch,
    counts_file,
    load_counts,
    search_counts,
)
from pneumo_experiments.findings.folder import write_findings
from pneumo_experiments.findings.submission_check import (
    CHALLENGE,
    check_submission,
    mask_doubts,
    mask_warnings,
    native_shapes,
    sample_images,
    usual_masks,
)
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.progress_bar import said_if_slow
from pneumo_experiments.registry.scores import UNSEEN_SUBSETS
from pneumo_experiments.serving import Detector
from pneumo_experiments.settings import (
    AUTO,
    Device,
    GivenThresholds,
    Score,
    SplitSettings,
    chosen,
    flat,
    is_none,
)
from pneumo_experiments.stages.train import log_threshold_search
from pneumo_experiments.words import command, plural, rows

# How names of metrics begin. Without a prefix they tell of images that neither trained the model nor chose
# its epoch or thresholds; "external" is subset=all of another data set than that of the training.
PREFIXES = dict.fromkeys(UNSEEN_SUBSETS, "") | {
    "validation": "val/",
    "train": "train/",
    "all": "all/",
}
# The settings that may be given for each task, by the one that asks for it. Model, data set and device may
# stand in a config file for all tasks; beside predictions a model would be misunderstood.
COMMON = {"dataset", *flat(Device())}
OF_A_MODEL = {"model", "tta", "prevalence", "overlays", *flat(GivenThresholds())}
USED = {
    "check": {"model", "sample_submission", "dicom_dir", "image_id"},
    "counts": {"model", "threshold_trials", *flat(GivenThresholds())},
    "predictions": {"rle_csv", "rle_size", "patients_csv", "subset", "baseline", "unseen", "overlays"},
    "dicom_dir": {"image_id", "submission", "findings", "dicom_seg", "max_rejected", "sample_submission"}
    | OF_A_MODEL,
    "model": {"subset", "baseline", "rle_size"} | OF_A_MODEL,
}


@dataclass(frozen=True)
class ScoreResult:
    """What score left: scores and report of labelled images, or the submission, written or checked."""

    scores: Scores | None
    report: str  # its address
    submission: Path | None
    prefix: str = ""  # of the scores' names
    link: str = ""  # to the report, in the UI


def score(settings: Score) -> ScoreResult:
    """Scores the model on one part of a data set, writes its findings in a folder, or checks a submission.

    With ``predictions`` the masks of that file are scored, as those of a model are; with ``counts`` it only
    searches thresholds in that file. In a run of MLflow, as on the command line.
    Raises UserError for a model and a data set that do not fit, and for a submission with problems.

    >>> scores = score(Score.of(dataset="dataset.h5", subset="holdout")).scores
    score: holdout: Dice ...
    >>> scores.images, scores.positives, scores.dice_baseline
    (4, 2, 0.5)
    """
    settings = _with_predictions(settings)
    with tracking.run("score", settings):
        result, page = _score(settings), tracking.page_of_active_run()
    if tracking.active_run() is None:
        closing = {"report": result.report, "run": page}
        is_one = settings.predictions is None and addresses_of(settings.model) == [settings.model]
        if result.prefix == "" and result.report and is_one:
            closing["next"] = command("register", model=settings.model, dataset=settings.dataset)
        print(hide_passwords(rows({name: text for name, text in closing.items() if text})))
    return result


def _with_predictions(settings: Score) -> Score:
    """The settings with ``predictions`` in the place of the model; UserError for others that do not fit."""
    path, table, given = settings.predictions, settings.rle_csv, chosen(settings)
    task = next(name for name in USED if name in given or name == "model")
    if task == "model" and table is not None:
        raise UserError(
            f"rle_csv={table}: has labels for predictions; a model needs images: run preprocess and name its"
            " file in dataset"
        )
    if unused := sorted(given.keys() - USED[task] - COMMON - {task}):
        what = f"{task}={given.get(task, settings.model)}"
        hint = " (baseline compares with a model)" if "model" in unused and task == "predictions" else ""
        raise UserError(f"{what}: {', '.join(unused)} would change nothing; leave that out{hint}")
    if path is None:
        return settings
    settings = replace(settings, model=str(path))
    if table is None:
        return settings
    if not is_none(settings.baseline) and not Path(settings.baseline).is_file():
        raise UserError(
            f"baseline={settings.baseline}: a model needs images; name a dataset in place of rle_csv, or a"
            " submission in baseline"
        )
    if settings.subset in ("validation", "train"):
        raise UserError(f"subset={settings.subset}: rle_csv is scored as a whole; name a dataset for a part")
    return replace(settings, subset="all")


def _score(settings: Score) -> ScoreResult:
    if settings.check is not None:
        return _check(settings, settings.check)
    if settings.counts is not None:
        search = search_counts(load_counts(settings.counts), settings.threshold_trials, _given(settings))
        _log_counts_search(settings.counts, search)
        return ScoreResult(search.scores, "", None)
    if settings.predictions is not None:
        return _score_labelled(settings, None, None)
    if settings.dicom_dir is not None and settings.dicom_seg:
        require_highdicom()
    own = load_models(settings.model, settings.dataset, settings.compute)
    detector = own.with_thresholds(_given(settings)).with_tta(settings.tta)
    detector = detector.at_prevalence(settings.prevalence)
    device = str(detector.predictor.device)
    used = {"device": device, "precision": detector.precisions, "tta": detector.ttas}
    tracking.log_params({f"{name}_used": value for name, value in used.items()})
    tracking.log_params({"network": detector.networks, "image_size": detector.image_size})
    tracking.log_thresholds(asdict(detector.thresholds))
    if settings.dicom_dir is not None:
        return _score_folder(settings, detector, settings.dicom_dir)
    addresses = addresses_of(settings.model)
    # The scores are no model's if it was put together or changed for this run alone.
    model = addresses[0] if len(addresses) == 1 and detector == own else None
    return _score_labelled(settings, detector, model)


@dataclass(frozen=True)
class _LabelledScore:
    """An evaluation on labelled images, what is to be said of it, and what it is compared with."""

    name: str
    """of the subset: holdout, external, …"""
    prefix: str
    """of the names of metrics"""
    model: Detector | GivenMasks
    evaluation: Evaluation
    baseline: Detector | GivenMasks | None
    notes: Sequence[str]
    training_runs: Sequence[str] = ()


def _score_labelled(settings: Score, detector: Detector | None, model: str | None) -> ScoreResult:
    """Scores a detector, or without one ``predictions``; the scores are also those of the logged model."""
    table, opened = settings.rle_csv, None
    if table is not None:
        opened = nullcontext(LabelTable.read(table, settings.rle_size, settings.patients_csv))
    with opened or Dataset.open(settings.dataset) as dataset:
        if not dataset.labelled:
            raise UserError(
                f"dataset={settings.dataset}: has no annotations to score by; dicom_dir=… writes a submission"
            )
        if detector and isinstance(dataset, Dataset) and dataset.image_size != detector.image_size:
            raise UserError(
                f"dataset={settings.dataset}: has images of {dataset.image_size} px, the model was trained on"
                f" {detector.image_size} px; run preprocess with image_size={detector.image_size}"
            )
        tracking.log_dataset(dataset.path, dataset.fingerprint, settings.subset, dataset.profile)
        return _log_score(settings, model, _evaluate(settings, detector, dataset))


def _evaluate(settings: Score, detector: Detector | None, dataset: Dataset | LabelTable) -> _LabelledScore:
    """Evaluates the detector, or without one ``predictions``, on the images that are asked for."""
    # Asked before the long work: the store may be unreachable after it.
    models = [tracking.model_info(each) for each in addresses_of(settings.model)] if detector else []
    runs = [model.run_id for model in models if model.run_id]
    other = None
    if not is_none(settings.baseline) and not Path(settings.baseline).is_file():
        other = load_models(settings.baseline, settings.dataset, settings.compute, "baseline")
    subset = _subset(settings, detector or other, dataset)
    seen = describe_seen(subset, detector.training_images, "the model") if detector else ""
    name = _name_subset(settings, detector, dataset, seen)
    prefix, model = PREFIXES[name], detector
    if model is None:
        assert settings.predictions is not None
        model = GivenMasks.read("predictions", settings.predictions, subset, settings.rle_size)
    baseline = other
    if other is not None:
        assert isinstance(subset, Subset)  # a table alone is compared with files
        check_unseen(settings.baseline, other, subset)
    elif not is_none(settings.baseline):
        baseline = GivenMasks.read("baseline", Path(settings.baseline), subset, settings.rle_size)
    evaluation = evaluate(subset, model, "score")
    scores = evaluation.scores
    covered: list[float] = (evaluation.predicted_area / evaluation.counts.image_area).tolist()
    positive = {"in training": detector.prevalence} if detector else {}
    notes = mask_warnings(covered, positive | {"by their labels": scores.positives / scores.images})
    unknown = "whether these images trained what predicted {} is not known"
    if isinstance(model, GivenMasks):
        usual = usual_masks(settings.dataset) if settings.rle_csv is None else CHALLENGE
        notes += mask_doubts(model.labels, subset.entries, usual)
        notes += filter(None, [model.resized(subset.entries)])
        if not settings.unseen:
            prefix = prefix or f"{name}/"  # without one they would be taken for scores on unseen images
            end = f": its scores are {prefix}dice and so on; if none did, say unseen=true"
            notes.append(unknown.format(Path(settings.model).name) + end)
    elif isinstance(baseline, GivenMasks):
        notes.append(unknown.format(Path(settings.baseline).name))
    if seen and name == "all":
        notes.append(f"{seen}: no external score; scores.csv marks what to leave out for one")
    return _LabelledScore(name, prefix, model, evaluation, baseline, notes, runs)


def _log_score(settings: Score, model: str | None, result: _LabelledScore) -> ScoreResult:
    """Logs the scores in the run, and as those of the model at an address if given; and the report.

    The baseline is evaluated after that: the scores stay if it fails.
    """
    evaluation, prefix, scores = result.evaluation, result.prefix, result.evaluation.scores
    dataset, detector = evaluation.labelled.dataset, result.model
    facts = {"subset": result.name, "data_fingerprint": dataset.fingerprint} | scores.as_facts()
    metrics = scores.as_metrics(prefix)
    for name, value in evaluation.intervals.items():
        if not isnan(value) and prefix + name not in metrics:  # that of dice is among the scores
            metrics[f"{prefix}interval/{name}"] = value
    tracking.log_scores(metrics, model, dataset.path, evaluation.image_set_id, facts)
    constants = {key: value for key, value in facts.items() if key != "subset"}
    tracking.log_params(constants | {"identity": evaluation.image_set_id})
    if isinstance(detector, GivenMasks):
        model_name = Path(settings.model).name
        tracking.log_params({"predictions_sha256": detector.sha256})
    else:
        model_name = f"{detector.networks} {detector.image_size}px"
        with counts_file(evaluation.counts) as path:
            tracking.log_file(path)
    tracking.rename(f"score {model_name} on {result.name} · {scores.dice:.4f}")
    line = scores.line
    print(f"score: {result.name}: {line}")
    for note in result.notes:
        print(f"score: {note}")
    text = f"{result.name} images of {dataset.path}, by {_model_text(settings)}.\n"
    text += "\n".join(f"{each}." for each in (line, *result.notes))
    compared = None
    if (baseline := result.baseline) is not None:
        other = evaluate(evaluation.labelled, baseline, "baseline")
        compared = ModelComparison(settings.baseline, evaluation, other)
        tracking.log_metrics(compared.as_metrics(prefix))
        print(f"score: against {compared.address}: {compared.comparison.line}")
        for image_id, difference, dice, before in compared.changed[:3]:
            print(f"score:   {image_id}: Dice {dice:.3f} instead of {before:.3f} ({difference:+.3f})")
        text += f"\nAgainst {compared.address}: {compared.comparison.line}."
    context = Context(settings, result.name, result.training_runs, result.notes)
    with said_if_slow("score: writing the report"):
        report = make_report(context, evaluation, detector, compared)
        for file_name, picture in report.pictures.items():
            tracking.log_image(picture, file_name)
        steps = Counter[str]()  # of each kind the slider goes through its images
        for kind, picture in report.gallery:
            tracking.log_image_step(picture, kind, steps[kind])
            steps[kind] += 1
        tracking.log_page(report.page, PAGE)
        for name, table in report.tables.items():  # the evaluation view opens the last one
            tracking.log_table(*table, name)
    tracking.describe(text)
    report, link = f"{tracking.artifacts_of_active_run()}/{PAGE}", tracking.link_to_active_run(PAGE)
    return ScoreResult(scores, report, None, prefix, link)


def _log_counts_search(path: Path, result: CountsSearch) -> None:
    lines = result.lines()
    tracking.log_metrics(result.as_metrics())
    tracking.log_params(result.scores.as_facts())
    log_threshold_search(result.search)
    tracking.rename(f"score thresholds of {plural(len(result.counts), 'image')}")
    tracking.describe("\n".join([f"Thresholds searched in {path}.", *lines]))
    for line in lines:
        print(f"score: {line}")


def _score_folder(settings: Score, detector: Detector, folder: Path) -> ScoreResult:
    model = _model_text(settings)
    findings = write_findings(settings, detector, folder, model)
    for file in findings.files:
        tracking.log_file(file)
    for name, picture in findings.pictures.items():
        tracking.log_image(picture, name)
    tracking.log_params(findings.counts)
    tracking.rename(
        f"score {detector.networks} {detector.image_size}px on {plural(findings.counts['images'], 'file')}"
    )
    tracking.describe(findings.description(model))
    for line in findings.lines:
        print(f"score: {line}")
    if findings.failure:
        raise UserError(findings.failure)
    return ScoreResult(None, "", settings.submission)


def _given(settings: Score) -> dict[str, float]:
    """The thresholds that were given in place of the model's own."""
    return {name: value for name, value in flat(settings.thresholds).items() if value is not None}


def _model_text(settings: Score) -> str:
    """The model, with what was given in place of its own, for the run's description."""
    other = {} if settings.tta == AUTO else {"tta": settings.tta}
    other |= {} if settings.prevalence is None else {"prevalence": settings.prevalence}
    given = ", ".join(f"{name} {value}" for name, value in (_given(settings) | other).items())
    model = hide_passwords(settings.model)
    return f"{model} with {given}" if given else model


def _name_subset(settings: Score, detector: Detector | None, dataset: Dataset | LabelTable, seen: str) -> str:
    """The subset, or ``external`` where all patients of another data set are new to the model."""
    if settings.subset == "holdout" and seen:
        raise UserError(
            f"subset=holdout: {seen}: its split was drawn in another way; train again to score a hold-out"
            " part"
        )
    is_external = (
        dataset.fingerprint != detector.data_fingerprint and not seen if detector else settings.unseen
    )
    return "external" if settings.subset == "all" and is_external else settings.subset


def _subset(settings: Score, detector: Detector | None, dataset: Dataset | LabelTable) -> LabelledImages:
    """The images to score, in the split of the detector; without one in the default split."""
    if isinstance(dataset, LabelTable):
        return LabelledImages(dataset, np.arange(len(dataset)))
    if settings.subset == "all":
        return all_images(dataset)
    if detector and dataset.fingerprint != detector.data_fingerprint:
        raise UserError(
            f"subset={settings.subset}: the model was trained on another data set than {settings.dataset};"
            " subset=all scores every image"
        )
    splits = [member.split for member in detector.members] if detector else [SplitSettings()]
    if len({*splits}) > 1 and settings.subset != "holdout":  # they have one hold-out
        raise UserError(
            f"subset={settings.subset}: the model's {len(splits)} networks were each trained on"
            " other patients; holdout has those that trained none of them, all has everyone"
        )
    split = splits[0]
    indices: NDArray[np.int64] = getattr(make_split(dataset, split), settings.subset)
    if not len(indices):
        raise UserError(
            f"subset={settings.subset}: the model's split has none, holdout={split.holdout}; try validation"
        )
    return Subset(dataset, indices)


def _check(settings: Score, path: Path) -> ScoreResult:
    """Prints and logs what is wrong with a submission; raises UserError if anything is."""
    expected, shapes = sample_images(settings.sample_submission), dict[str, tuple[int, int]]()
    if settings.dicom_dir is not None:
        archive = open_archive(settings.dicom_dir, settings.image_id, expected or ())
        shapes = native_shapes(archive)
        expected = sorted(archive.image_ids) if expected is None else expected
    usual = usual_masks(settings.dataset)
    result = check_submission(path, expected, shapes, usual)
    tracking.log_json(asdict(result), "submission_check.json")
    tracking.log_params({"images": result.images, "masks": result.positives})
    tracking.rename(f"score check of {path.name}")
    lines = [result.positives_line(usual.positives), *result.doubts]
    summary = "\n".join(f"{each}." for each in lines)
    problems = plural(len(result.problems), "problem")
    tracking.describe(f"Check of the submission {path}: {problems}.\n{summary}")
    for each in (*result.problems, *lines):
        print(f"score: {each}")
    if result.problems:
        raise UserError(f"check={path}: not a valid submission, {problems}; the first: {result.problems[0]}")
    valid, ids = "is a valid submission", "all ids are right"
    if result.doubts:
        valid = "has the form of a submission, but its masks are doubtful"
    if expected is None:
        ids = "its ids were not checked: give sample_submission or dicom_dir"
    print(f"score: {path} {valid}; {ids}")
    return ScoreResult(None, "", path)
