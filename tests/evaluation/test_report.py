"""The report of a score: its page, its pictures, and which images they show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import make
from html_reader import HOSTILE, Reader
from reference_counts import Image, count_images
from samples import packed, write_dataset

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed_image import Entry, ResizedImage
from pneumo_experiments.dataset.resize import area_resize
from pneumo_experiments.evaluation import report as report_module
from pneumo_experiments.evaluation.evaluate import Evaluation, ModelComparison
from pneumo_experiments.evaluation.report import SCORES, Context, Report, choose_images, make_report
from pneumo_experiments.evaluation.subset import all_images
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import Output, PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork
from pneumo_experiments.settings import Score
from pneumo_experiments.tracking import code_version

pytestmark = pytest.mark.usefixtures("no_layout")

SIZE, NATIVE = 32, 64
THRESHOLDS = Thresholds(0.4, 0.7, 20, 0.4)


class Brightness(PneumothoraxNet):
    """A network that calls bright pixels, and images with some, pneumothorax."""

    def forward(self, images: torch.Tensor) -> Output:
        mask = 12 * (images[:, 0] - 0.5)
        brightest = images.flatten(1).topk(10).values.mean(dim=1)
        return Output(mask, mask, 12 * (brightest - 0.6))


def radiographs(
    findings: Sequence[tuple[int, int]], ids: Sequence[str] = (), seed: int = 0
) -> Iterator[ResizedImage]:
    """An image for each pair: height of the annotated band, height of the bright band; two a patient."""
    rng = np.random.default_rng(seed)
    for number, (annotated, bright) in enumerate(findings):
        truth, shown = np.zeros((2, NATIVE, NATIVE), bool)
        truth[10 : 10 + annotated, 8:40] = shown[10 : 10 + bright, 8:40] = True
        light = rng.normal(60, 25, (SIZE, SIZE)) + area_resize(shown, SIZE) * rng.uniform(60, 150)
        entry = Entry(
            image_id=ids[number] if ids else f"image-{number}",
            patient=f"{number // 2:016x}",
            view=("PA", "AP", "")[number % 3],
            sex="FM"[number % 2],
            age=17 + number,
            rows=NATIVE,
            columns=NATIVE,
            annotations=int(annotated > 0),
            area_px=int(truth.sum()),
        )
        pixels = np.clip(light, 0, 255).astype(np.uint8)
        yield ResizedImage(entry, pixels, area_resize(truth, SIZE), rle.encode(truth))


@dataclass(frozen=True)
class Made:
    """A report, and of what."""

    report: Report
    evaluation: Evaluation
    comparison: ModelComparison | None

    @property
    def html(self) -> str:
        return self.report.page

    @property
    def scores(self) -> Scores:
        return self.evaluation.scores

    @property
    def pictures(self) -> list[str]:
        """Names of the overlays."""
        return [name.removeprefix("overlays/") for name in self.report.pictures if "/" in name]

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each overlay by image id, as far as a file name has it."""
        return {name.split("-", 2)[2].removesuffix(".png"): name.split("-")[1] for name in self.pictures}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table."""
        columns, rows = self.report.tables[name]
        return [dict(zip(columns, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def network(tiny: None) -> PneumothoraxNet:
    return Brightness("tiny")


def report_of(
    path: Path,
    network: PneumothoraxNet,
    findings: Sequence[tuple[int, int]],
    ids: Sequence[str] = (),
    overlays: int = 8,
    baseline: Thresholds | None = None,
) -> Made:
    """The report of a data set of these images, which is written."""
    write_dataset(path, packed(radiographs(findings, ids), "uint8"), image_size=SIZE, pixel_dtype="uint8")
    settings = make(Score, dataset=path, model="models:/m-<b>&", subset="all", overlays=overlays)
    predictor = Predictor(network, ComputeConfig(torch.device("cpu"), "fp32"))
    detector = Detector((TrainedNetwork(predictor, {"network": "tiny"}),), SIZE, THRESHOLDS, "f" * 64)
    with Dataset.open(path) as dataset:
        subset = all_images(dataset)
        evaluation, comparison = Evaluation(subset, subset.count(predictor), THRESHOLDS), None
        if baseline is not None:
            other = Evaluation(subset, subset.count(predictor), baseline)
            comparison = ModelComparison("models:/m-<other>", evaluation, other)
        context = Context(settings, "all", ["d0" * 16])
        report = make_report(context, evaluation, detector, comparison)
        assert len(evaluation.image_set_id) == 32
        return Made(report, evaluation, comparison)


MIXED = [(0, 0)] * 9 + [(0, 12), (0, 20), (6, 0), (12, 0), (8, 8), (16, 16), (24, 20), (30, 12), (9, 18)] * 2


@pytest.fixture(scope="module")
def mixed(network: PneumothoraxNet, tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("mixed") / "d.h5"
    return report_of(path, network, MIXED, overlays=12, baseline=Thresholds(0.1, 0.1, 0, 0.1))


def texts(html: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)


def test_the_page_has_every_score_with_its_interval(mixed: Made) -> None:
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [re.sub("<.*?>", "", cell) for _, cell in re.findall(r"<(t[hd])[^>]*>(.*?)</\1>", row)]
            for row in texts(mixed.html, "tr")
        )
    }
    positives, images = mixed.scores.positives, mixed.scores.images
    predicted = round(positives / mixed.scores.precision * mixed.scores.sensitivity)
    of = {"sensitivity": positives, "specificity": images - positives, "precision": predicted}
    of |= {"false_alarms": images, "misses": images}
    found = round(mixed.scores.sensitivity * positives)
    assert rows["sensitivity"][1].endswith(f"{found} of {positives}")
    assert rows["misses"][1].endswith(f"{positives - found} of {images}")
    for name in SCORES:
        value, interval, meaning = rows[name.replace("_", " ")]
        assert value == f"{getattr(mixed.scores, name):.4f}", name
        assert len(meaning) > 20
        if name == "dice_baseline":
            assert interval == ""
        else:
            low, high = mixed.evaluation.intervals[f"{name}_low"], mixed.evaluation.intervals[f"{name}_high"]
            count = rf"; \d+ of {of[name]}" if name in of else "; unreliable" * (name == "calibration_error")
            assert re.fullmatch(f"{low:.3f} to {high:.3f}{count}", interval), name
    assert 0 < mixed.scores.dice_positive < mixed.scores.dice < 1
    # As in the table of the run.
    groups = [row for row in mixed.rows("by_group") if row["group"] != "all"]
    assert {row["group"] for row in groups} == {"area", "view", "sex", "age"}
    for row in groups:
        images, positives, patients, dice, *_ = rows[row["value"]]
        assert [images, positives, patients] == [str(row[n]) for n in ("images", "positives", "patients")]
        interval = f"{float(row['dice_low']):.2f} to {float(row['dice_high']):.2f}"
        note = "; unreliable" if int(row["positive_patients"]) < 5 else ""
        assert dice == f"{float(row['dice']):.3f}{interval}{note}"
    seen = Reader(mixed.html).text
    assert f"{mixed.scores.images} images" not in seen  # the strip's number stands before its name
    assert f"Dice {mixed.scores.dice:.4f}" in seen
    for fact in (
        *(f"network tiny, {SIZE} px", f"training run {'d0' * 16}", f"trained on data set {'f' * 16}"),
        *(f"data set {mixed.evaluation.subset.dataset.fingerprint[:16]}", f"code {code_version()}"),
    ):
        assert fact in seen
    assert re.search(rf"scored {datetime.now(UTC).year}-\d\d-\d\d \d\d:\d\d UTC", seen)
    assert "the findings are of" not in seen  # those of 7 patients are not few


def test_the_page_is_one_file_without_outside_resources(mixed: Made) -> None:
    assert "http" not in mixed.html
    page = Reader(mixed.html)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "a"})
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1 + 4 + len(mixed.pictures)  # of the comparison, the curves and the galleries
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "url(" not in mixed.html
    assert len(mixed.html) < 10e6


def test_the_page_compares_with_the_baseline_model_and_the_best_thresholds(mixed: Made) -> None:
    assert mixed.comparison is not None
    seen, metrics = Reader(mixed.html).text, mixed.comparison.as_metrics("")
    dices, others = mixed.evaluation.images.dices, mixed.comparison.baseline.images.dices
    assert metrics["dice_difference"] == pytest.approx((dices - others).mean())
    assert metrics["baseline_model_dice"] == others.mean()
    assert f"models:/m-<other> has a Dice of {others.mean():.4f} on the same images" in seen
    difference, low, high = (metrics[f"dice_difference{end}"] for end in ("", "_low", "_high"))
    assert f"{difference:+.4f} Dice (95% {low:+.4f} to {high:+.4f})" in seen
    changed = mixed.rows("changed_images")
    assert len(changed) == np.count_nonzero(dices != others) > 2
    best = best_of_all(mixed.evaluation.counts)
    assert best.dice > mixed.scores.dice
    sentence = (
        f"of all thresholds is {best.dice:.4f} on these images, those used have {mixed.scores.dice:.4f}"
    )
    assert sentence in seen
    for row in changed[:20]:
        values = f"{row['difference']:+.4f} {row['dice']:.4f} {row['baseline_dice']:.4f}"
        assert f"{row['image_id']} {values}" in seen


def test_each_overlay_on_the_page_is_a_picture_with_its_id_in_the_name(mixed: Made) -> None:
    on_page = re.findall(r"prediction of (.*?)\"><figcaption><b>(.*?)</b>", mixed.html)
    assert len(on_page) == len(mixed.pictures) == 12
    assert all(alt == caption for alt, caption in on_page)
    assert mixed.kinds.keys() == {image_id for _, image_id in on_page}
    for row in mixed.rows("scores"):
        areas = f"truth {row['truth_area_px']:,} px, predicted {row['predicted_area_px']:,} px"
        note = f"<b>{row['image_id']}</b><br>Dice {row['dice']:.2f}, {areas}"
        assert (note in mixed.html) == (row["image_id"] in mixed.kinds)
    assert {*mixed.kinds.values()} == {"best", "median", "worst", "false_alarm", "miss"}
    for title in ("Best", "Median", "Worst", "False alarms", "Misses"):
        assert title in texts(mixed.html, "h2")
    charts = {name for name in mixed.report.pictures if "/" not in name}
    names = ("presence_curves", "calibration", "dice_by_area", "threshold_surface", "comparison")
    assert charts == {f"{name}.png" for name in names}
    for name, picture in mixed.report.pictures.items():
        assert len(np.unique(picture[::3, ::3].reshape(-1, 3), axis=0)) > 20, name


def test_hostile_names_are_escaped_and_stay_in_the_folder(tmp_path: Path, network: PneumothoraxNet) -> None:
    ids = [HOSTILE, '"><img src=x onerror=alert(1)>', "../../up", "a\nb\x1b[0m", "{{ 7 * 7 }}", "x" * 5000]
    report = report_of(
        tmp_path / "<i>.h5", network, [(8, 8), (0, 20), (20, 0), (30, 20), (16, 30), (9, 9)], ids
    )
    page = Reader(report.html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "i", "b>"})
    assert all("onerror" not in attributes for _, attributes in page.tags)
    for text in (HOSTILE, "{{ 7 * 7 }}", "models:/m-<b>&", "all images of <i>", "x" * 128):
        assert text in page.text
    assert "\x1b" not in report.html and "x" * 129 not in report.html
    assert len(report.pictures) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,110}", name) for name in report.pictures)


def test_a_page_without_pictures_has_no_gallery(tmp_path: Path, network: PneumothoraxNet) -> None:
    report = report_of(tmp_path / "d.h5", network, MIXED[:14], overlays=0)
    assert "Best" not in texts(report.html, "h2")
    assert report.pictures == []
    assert "Intervals are unreliable: the findings are of 2 patients." in Reader(report.html).text
    (precision,) = re.findall(r"<th scope=row>precision</th>.*?</tr>", report.html)
    (specificity,) = re.findall(r"<th scope=row>specificity</th>.*?</tr>", report.html)
    assert ("; 1 of 3, unreliable" in precision, "unreliable" in specificity) == (True, False)


@pytest.mark.parametrize(
    ("findings", "absent", "kinds"),
    [
        ([(0, 0), (0, 20), (0, 0)], {"dice_positive", "sensitivity", "auroc"}, ["false_alarm"]),
        ([(8, 8), (20, 0), (16, 14)], {"specificity", "auroc"}, ["best", "median", "miss"]),
        ([(8, 8)], {"specificity", "auroc"}, ["best"]),
        ([(0, 0)], {"dice_positive", "precision", "auroc"}, []),
    ],
    ids=["no positives", "no negatives", "one positive", "one negative"],
)
def test_sets_that_leave_scores_undefined_have_a_page(
    tmp_path: Path,
    network: PneumothoraxNet,
    findings: list[tuple[int, int]],
    absent: set[str],
    kinds: list[str],
) -> None:
    report = report_of(tmp_path / "d.h5", network, findings)
    for name in SCORES:
        row = re.search(rf"<th scope=row>{name.replace('_', ' ')}</th><td><b>(.*?)</b>", report.html)
        assert row is not None
        assert (row[1] == "–") == np.isnan(getattr(report.scores, name)), name
    assert all(np.isnan(getattr(report.scores, name)) for name in absent)
    assert "nan" not in Reader(report.html).text.split()
    assert sorted(report.kinds.values()) == kinds
    assert ("<b>Presence: ROC" in report.html) == ("auroc" not in absent)
    assert ("<b>Dice by area" in report.html) == (report.scores.positives > 0)


def test_overlays_without_room_are_only_artifacts(
    tmp_path: Path, network: PneumothoraxNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(report_module, "MAX_PICTURE_BYTES", 0)
        report = report_of(tmp_path / "d.h5", network, MIXED[:16], overlays=5)
    assert len(report.pictures) == 5
    assert "5 more overlays had no room here" in Reader(report.html).text


def test_galleries_take_turns_and_show_each_image_once() -> None:
    """Dice of the positives: 2/3 for twice their area, and so on; the last four are negatives."""
    truth_px = [100, 100, 100, 100, 100, 50, 90, 0, 0, 0, 0]
    predicted_px = [100, 110, 150, 200, 400, 0, 0, 0, 7, 90, 30]
    images, filled = list[Image](), np.arange(400).reshape(20, 20)
    for truth_area, predicted_area in zip(truth_px, predicted_px, strict=True):
        images.append(((filled < predicted_area).astype(np.float32), 1.0, filled < truth_area))
    evaluation = Evaluation(cast("Any", None), count_images(images), Thresholds())
    whole = choose_images(evaluation, 100)
    first = [(0, "best"), (3, "median"), (4, "worst"), (9, "false alarm"), (6, "miss")]
    assert list(whole.items())[:5] == first
    assert set(whole) == set(range(11)) - {7}
    assert whole[5] == "miss"
    assert [position for position, kind in whole.items() if kind == "false alarm"] == [9, 10, 8]
    for number in range(12):
        assert list(choose_images(evaluation, number).items()) == list(whole.items())[:number]
