"""Masks of a file, scored in place of a model's: Dice as of sets of pixels, and nothing of probabilities."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import changed, ended, make
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from samples import examples, packed, write_dataset
from tiny_network import tiny_member
from tracked import artifact, last_run, log_model, runs, table

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.label_table import LabelTable
from pneumo_experiments.dataset.packed_image import ResizedImage
from pneumo_experiments.dataset.resize import area_resize
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation, ModelComparison, evaluate
from pneumo_experiments.evaluation.given_masks import GivenMasks
from pneumo_experiments.evaluation.subset import LabelledImages, Subset, hash_image_ids, make_split
from pneumo_experiments.metrics.scores import PRESENCE_SCORES
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.registry.scores import best_model
from pneumo_experiments.serving import Detector
from pneumo_experiments.settings import Score, SplitSettings, Train
from pneumo_experiments.stages.score import score

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")

SIDE = 40  # of the native images here
Masks = Mapping[str, Iterable[str]]  # run lengths by image id


def pixels_of(texts: Iterable[str]) -> set[int]:
    """The places of the mask's pixels, counted down columns; straight from the contest's description."""
    found = set[int]()
    for text in texts:
        numbers, end = [int(word) for word in text.split() if text != "-1"], 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            found |= {*range(end + gap, end + gap + length)}
            end += gap + length
    return found


def dice_of(truth: Iterable[str], predicted: Iterable[str]) -> float:
    sets = pixels_of(truth), pixels_of(predicted)
    areas = sum(map(len, sets))
    return 2 * len(sets[0] & sets[1]) / areas if areas else 1.0


def write(path: Path, masks: Masks, header: str = "ImageId,EncodedPixels\n") -> Path:
    path.write_text(header + "".join(f"{name},{text}\n" for name, texts in masks.items() for text in texts))
    return path


def shifted(text: str, pixels: int) -> str:
    """The runs of a mask that much further down their columns, and over the ends of these."""
    gap, _, rest = text.partition(" ")
    return text if text == "-1" else f"{int(gap) + pixels} {rest}"


def with_errors(truth: Masks, seed: int) -> dict[str, list[str]]:
    """Masks that are shifted, missed, or invented, by turns."""
    rng, made = np.random.default_rng(seed), dict[str, list[str]]()
    for name, texts in truth.items():
        kind = rng.integers(4)
        if [*texts] == ["-1"]:
            made[name] = ["7 5 20 11"] if kind == 0 else ["-1"]
        else:
            made[name] = ["-1"] if kind == 0 else [shifted(text, int(rng.integers(6))) for text in texts]
    return made


@pytest.fixture(scope="module")
def truth() -> dict[str, list[str]]:
    """Of 24 images of 40 x 40 pixels."""
    found = dict[str, list[str]]()
    for number in range(24):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[3 : 9 + number % 7, 5 : 8 + number] = number % 3 != 0
        found[f"image-{number}"] = [encode(mask)]
    return found


@pytest.fixture(scope="module")
def square_dataset(tmp_path_factory: pytest.TempPathFactory, truth: dict[str, list[str]]) -> Path:
    """Data set of these images, two of each patient."""

    def square(image: ResizedImage) -> ResizedImage:
        (text,) = truth[image.entry.image_id]
        mask = np.zeros(SIDE * SIDE, bool)
        mask[[*pixels_of([text])]] = True
        mask = mask.reshape(SIDE, SIDE).T
        sizes = {"rows": SIDE, "columns": SIDE, "area_px": int(mask.sum()), "annotations": int(mask.any())}
        entry = replace(image.entry, **sizes)
        return ResizedImage(entry, image.image, area_resize(mask, len(image.image)), text)

    path = tmp_path_factory.mktemp("square") / "square.h5"
    images = packed(map(square, examples(24, 0)), "uint8")
    write_dataset(path, images, image_size=16, pixel_dtype="uint8")
    return path


@pytest.fixture
def labels(tmp_path: Path, truth: dict[str, list[str]]) -> dict[str, object]:
    """Settings that name the same labels as tables alone."""
    table = write(tmp_path / "labels.csv", truth, "ImageId, EncodedPixels\n")
    patients = {name: [str(number // 2)] for number, name in enumerate(truth)}
    return {
        "rle_csv": table,
        "rle_size": SIDE,
        "patients_csv": str(write(tmp_path / "patients.csv", patients, "id,patient\n")),
    }


# The numbers


def evaluated(table: Path, submission: Path, side: int = 0) -> Evaluation:
    images = LabelTable.read(table, side)
    everything = LabelledImages(images, np.arange(len(images)))
    return evaluate(everything, GivenMasks.read("predictions", submission, everything, side), "")


@pytest.fixture(scope="module")
def annotations(real_data: Path) -> dict[str, list[str]]:
    """Of 50 images with several annotations each, which may overlap, and 250 others."""
    found = dict[str, list[str]]()
    with gzip.open(real_data / "labels" / "train-rle.csv.gz", "rt") as file:
        for name, text in [*csv.reader(file)][1:]:
            found.setdefault(name, []).append(text.strip())
    several = [name for name, texts in found.items() if len(texts) > 1]
    return {name: found[name] for name in (*[*found][:250], *several[:50])}


def test_the_dice_of_real_annotations_with_known_errors_is_that_of_sets_of_pixels(
    annotations: dict[str, list[str]], tmp_path: Path
) -> None:
    # Of several annotations the first one.
    predicted = with_errors({name: texts[:1] for name, texts in annotations.items()}, seed=1)
    known = np.array([dice_of(texts, predicted[name]) for name, texts in annotations.items()])
    other = {name: [shifted(texts[0], 900)] for name, texts in annotations.items()}
    known_other = np.array([dice_of(texts, other[name]) for name, texts in annotations.items()])
    assert 0.5 < known.mean() < 0.95
    assert known.mean() - known_other.mean() > 0.01
    labels = write(tmp_path / "labels.csv", annotations)
    model = evaluated(labels, write(tmp_path / "model.csv", predicted))
    baseline = evaluated(labels, write(tmp_path / "other.csv", other))
    assert model.images.dices == pytest.approx(known, abs=1e-12)
    assert model.scores.dice == pytest.approx(known.mean(), abs=1e-12)
    comparison = ModelComparison("other.csv", model, baseline)
    assert comparison.differences == pytest.approx(known - known_other, abs=1e-12)
    assert model.scores.patients < len(known)  # by the table that ships


@settings(deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.binary(min_size=35, max_size=35), st.binary(min_size=35, max_size=35)), min_size=1
    )
)
def test_dice_and_presence_of_any_masks_are_those_of_sets_of_pixels(
    pairs: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def text(content: bytes) -> str:
        bits = np.unpackbits(np.frombuffer(content, np.uint8))[:256].astype(bool)
        return encode(np.pad(bits, (0, 256 - len(bits))).reshape(16, 16)) if content[0] > 60 else "-1"

    folder = tmp_path_factory.mktemp("pair")
    truth = {f"i{number}": [text(one)] for number, (one, _) in enumerate(pairs)}
    made = {f"i{number}": [text(other)] for number, (_, other) in enumerate(pairs)}
    found = evaluated(write(folder / "t.csv", truth), write(folder / "m.csv", made), 16)
    known = [dice_of(truth[name], made[name]) for name in truth]
    assert found.images.dices.tolist() == pytest.approx(known)
    assert found.predicted_area.tolist() == [len(pixels_of(texts)) for texts in made.values()]
    assert found.images.predicted.tolist() == [texts != ["-1"] for texts in made.values()]


def test_several_rows_of_an_image_are_united_whatever_their_order_and_spelling(
    tmp_path: Path, truth: dict[str, list[str]]
) -> None:
    labels = write(tmp_path / "t.csv", truth)
    whole = evaluated(labels, write(tmp_path / "m.csv", with_errors(truth, seed=2)), SIDE).images.dices
    rows = list[tuple[str, str]]()
    for name, (text,) in with_errors(truth, seed=2).items():
        numbers, end = [int(word) for word in text.split()], 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=False):
            rows.append((name, f"{end + gap} {length}"))  # each run in a row of its own
            end += gap + length
        rows += [(name, " -1")] * (text == "-1")
    path = tmp_path / "apart.csv"
    path.write_text(
        "\ufeffimage_id;rle\r\n" + "".join(f"test/{name}.dcm;{text}\r\n" for name, text in rows[::-1])
    )
    assert len(rows) > len(truth)
    assert evaluated(labels, path, SIDE).images.dices.tolist() == whole.tolist()


def test_masks_of_copies_are_resized_to_the_images(tmp_path: Path, square_dataset: Path) -> None:
    half = np.zeros((SIDE // 2, SIDE // 2), bool)
    half[4:11, 5:9] = True
    path = write(tmp_path / "m.csv", {f"image-{number}": [encode(half)] for number in range(24)})
    with Dataset.open(square_dataset) as dataset:
        images = Subset(dataset, np.arange(24))
        masks = GivenMasks.read("predictions", path, images, SIDE // 2)
        assert masks.resized(images.entries) == "24 masks resized to the size of the images"
        native = np.repeat(np.repeat(half, 2, axis=0), 2, axis=1)
        assert (masks.mask(dataset.entries[5]) == native).all()
        assert GivenMasks.read("predictions", path, images).resized(images.entries) == ""


# The stage


@pytest.mark.usefixtures("store", "tiny")
def test_a_submission_is_scored_like_a_model_and_compared_with_one(
    tmp_path: Path,
    truth: dict[str, list[str]],
    square_dataset: Path,
    labels: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predicted, other = with_errors(truth, seed=3), with_errors(truth, seed=4)
    file, second = write(tmp_path / "kernel.csv", predicted), write(tmp_path / "unet.csv", other)
    known = np.array([dice_of(truth[name], predicted[name]) for name in truth])
    known_other = np.array([dice_of(truth[name], other[name]) for name in truth])
    monkeypatch.setattr("pneumo_experiments.progress_bar.SILENT_SECONDS", 0.0)
    settings = make(Score, predictions=file, dataset=square_dataset, subset="all", baseline=str(second))
    result = score(changed(settings, overlays=2))
    out, run = capsys.readouterr().out, last_run("score kernel.csv on all")
    assert f"score: all: Dice {known.mean():.4f} (95%" in out
    assert f"score: against {second}: {known.mean() - known_other.mean():+.4f} Dice" in out
    unknown = "hether these images trained what predicted kernel.csv is not known: its scores are all/dice"
    assert f"score: w{unknown}" in out
    assert "score: writing the report\n" in out
    assert "next" not in out  # nothing to register
    metrics = run.data.metrics
    assert metrics["all/dice"] == pytest.approx(known.mean())
    assert metrics["all/baseline_model_dice"] == pytest.approx(known_other.mean())
    assert {"all/dice_low", "all/interval/sensitivity_low", "all/probability_better"} <= metrics.keys()
    assert not [name for name in metrics if any(each in name for each in PRESENCE_SCORES)]
    assert "dice" not in metrics
    assert run.data.params["model"] == str(file)
    assert "thresholds" not in run.data.tags
    names = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.html", "dice_by_area.png", "comparison.png", "overlays", "by_group.csv"} <= names
    assert not names & {"threshold_counts.npz", "calibration.csv", "threshold_surface.png"}
    assert not names & {"presence_curves.png", "calibration.png"}
    rows = table(run, "scores.csv")
    assert [float(row["dice"]) for row in rows] == pytest.approx(known.tolist())
    assert {(row["presence"], row["seen"]) for row in rows} == {("", "unknown")}
    page = artifact(run, "report.html").read_text(encoding="utf-8")
    assert f"W{unknown}" in page
    assert "auroc" not in page
    assert page.count('alt="radiograph, truth') == 2

    # The same labels as a table alone: the same images, scores and intervals, but no pixels to draw.
    alone = score(make(Score, predictions=file, baseline=str(second), overlays=2, **labels))
    table_run = last_run("score kernel.csv on all")
    assert table_run.info.run_id != run.info.run_id
    assert table_run.data.params["identity"] == run.data.params["identity"]
    assert alone.scores is not None and result.scores is not None
    assert alone.scores.as_metrics() == result.scores.as_metrics()
    assert table_run.data.metrics == metrics
    assert "overlays" not in {item.path for item in MlflowClient().list_artifacts(table_run.info.run_id)}

    # No champion of it, even if its images are said to be unseen.
    score(make(Score, predictions=file, unseen=True, overlays=0, **labels))
    vouched = last_run("score kernel.csv on external")
    assert vouched.data.metrics["dice"] == pytest.approx(known.mean())
    with pytest.raises(UserError, match="no model of this experiment was scored"):
        _best_of_the_experiment()


def _best_of_the_experiment() -> object:
    from pneumo_experiments import tracking

    with tracking.run("register", make(Score)):
        return best_model(None)


@pytest.mark.usefixtures("store", "tiny")
def test_a_model_and_a_submission_are_compared_in_both_directions_on_the_models_hold_out(
    tmp_path: Path, truth: dict[str, list[str]], square_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = {"holdout": 0.3, "folds": 2, "split_seed": 3}
    with Dataset.open(square_dataset) as dataset:
        parts = make_split(dataset, make(SplitSettings, **split))
        other = make_split(dataset, SplitSettings()).holdout
        seen = hash_image_ids(Subset(dataset, np.append(parts.train, parts.validation)))
        member = tiny_member(0, **split)
        detector = Detector((member,), dataset.image_size, Thresholds(0, 0, 0, 0), dataset.fingerprint, seen)
        held_out = [dataset.entries[index].image_id for index in parts.holdout.tolist()]
    assert parts.holdout.tolist() != other.tolist()
    model = log_model(detector, make(Train, network="tiny"))
    predicted = with_errors({name: truth[name] for name in held_out}, seed=5)
    file = write(tmp_path / "kernel.csv", predicted)
    known = np.mean([dice_of(truth[name], predicted[name]) for name in held_out])
    values = {"dataset": square_dataset, "overlays": 0, "device": "cpu"}
    result = score(make(Score, model=model, baseline=str(file), **values))
    assert result.scores is not None
    told = "score: whether these images trained what predicted kernel.csv is not known\n"
    assert told in capsys.readouterr().out
    forwards = last_run("score tiny").data.metrics
    assert forwards["baseline_model_dice"] == pytest.approx(known)
    assert forwards["dice_difference"] == pytest.approx(result.scores.dice - known)
    assert "auroc" in forwards
    score(make(Score, predictions=file, baseline=model, **values))
    backwards = last_run("score kernel.csv on holdout").data.metrics
    assert backwards["holdout/dice"] == pytest.approx(known)
    assert backwards["holdout/dice_difference"] == pytest.approx(-forwards["dice_difference"])
    assert "its scores are holdout/dice" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"predictions=.*kernel\.csv: \d+ of \d+ images are missing: image-"):
        score(make(Score, predictions=file, **values))  # train's default split has other images


def test_masks_made_row_by_row_are_told(
    tmp_path: Path, store: Path, annotations: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    turned = dict[str, list[str]]()
    for name, texts in annotations.items():
        mask = np.zeros(1024 * 1024, bool)
        mask[[*pixels_of(texts)]] = True
        turned[name] = [encode(mask.reshape(1024, 1024))]  # not transposed
    labels, file = write(tmp_path / "t.csv", annotations), write(tmp_path / "m.csv", turned)
    score(make(Score, predictions=file, rle_csv=labels, overlays=0))
    assert "score: the masks look made row by row" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"ghost": ["-1"], "fog": ["3 4"]}, r"2 ids of no image of .*labels\.csv: ghost, fog;"),
        (lambda m: {n: t for n, t in m.items() if n != "image-4"}, r"1 of 24 images are missing: image-4; w"),
        (lambda m: m | {"image-1": ["5 10", "9 3"]}, r"image-1: rows overlap; write each pixel once"),
        (lambda m: m | {"image-1": ["5 10", "5 10"]}, r"image-1: rows overlap"),
        (lambda m: m | {"image-1": ["-1", "5 10"]}, r"image-1: has a mask and -1; keep one"),
        (lambda m: m | {"image-1": ["1599 2"]}, r"image-1: run lengths reach pixel 1601 of an image with 16"),
        (lambda m: m | {"image-1": ["5 10 3"]}, r"image-1: odd number of run lengths"),
        (lambda m: m | {"image-1": ["5 -3"]}, r"image-1: run length '-3' is negative"),
    ],
)
def test_a_submission_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[Masks], Masks], message: str, tmp_path: Path, truth: dict[str, list[str]]
) -> None:
    good, bad = write(tmp_path / "good.csv", truth), write(tmp_path / "bad.csv", change(truth))
    labels = write(tmp_path / "labels.csv", truth)
    assert (evaluated(labels, good, SIDE).images.dices == 1).all()
    with pytest.raises(UserError, match=rf"^predictions=.*bad\.csv: {message}") as refused:
        evaluated(labels, bad, SIDE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rle_csv t.csv", "rle_csv=t.csv: has labels for predictions; a model needs images"),
        ("--predictions m.csv --tta none --top_score 0.3", "predictions=m.csv: top_score, tta would change"),
        ("--predictions m.csv --model models:/m-1", "predictions=m.csv: model would change nothing; leav"),
        ("--check m.csv --counts m.csv --prevalence 0.3", "check=m.csv: counts, prevalence would change"),
        ("--counts m.csv --tta flip --threshold_trials 9", "counts=m.csv: tta would change nothing; leav"),
        ("--dicom_dir sub --subset all --dicom_seg true", "dicom_dir=sub: subset would change nothing; lea"),
        ("--unseen true --dicom_seg true", "model=models:/pneumothorax@champion: dicom_seg, unseen would"),
        ("--predictions m.csv --rle_csv t.csv --baseline models:/m", "baseline=models:/m: a model needs im"),
        ("--predictions m.csv --rle_csv t.csv --subset train", "subset=train: rle_csv is scored as a whole"),
        ("--predictions missing.csv", "predictions=missing.csv: no such file; name a submission"),
        ("--predictions m.csv --baseline missing.csv", "baseline=missing.csv: no such file or folder; give"),
        ("--predictions m.csv --rle_csv bad.csv", "rle_csv=bad.csv: a: run lengths reach pixel 1048577 of"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    words: str,
    message: str,
    store: Path,
    small_dataset: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(Path("m.csv"), {"a": ["-1"]})
    write(Path("t.csv"), {"a": ["3 4"]})
    write(Path("bad.csv"), {"a": ["0 1048577"]})
    Path("sub").mkdir()
    end = ended(["score", "--dataset", str(small_dataset), *words.split()], monkeypatch, capsys)
    assert (end.code, end.err.count("\n")) == (2, 1), end
    assert end.err.startswith(f"Error: {message}")
    assert len(runs()) == ("bad.csv" in words)  # what a file holds is found in the run


def test_a_dry_run_reads_the_files_and_no_data_set(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("m.csv"), {"a": ["-1"]})
    write(Path("t.csv"), {"a": ["3 4"]})
    end = ended(["score", "--predictions", "m.csv", "--rle_csv", "t.csv", "--dry_run"], monkeypatch, capsys)
    assert (end.code, end.err) == (0, "")
    assert "  predictions=m.csv, " in end.out and "  rle_csv=t.csv, " in end.out
    assert "model models:/" not in end.out
