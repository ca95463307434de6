"""The entry points ``register`` and ``score``: which scores make a champion, and what both leave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from helpers import Call, changed, make, store_in
from mlflow import MlflowClient
from samples import SIZE, examples, packed, write_dataset
from tiny_network import CPU, random_network
from tracked import artifact, last_run, log_model, table

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed_image import ResizedImage, salted
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, hash_image_ids, image_set_id, make_split
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.registry import model_card, scores, versions
from pneumo_experiments.registry.model_card import MAX_CHANGES, MAX_CHARACTERS, ModelCard
from pneumo_experiments.registry.promotion import Challenge, Decision
from pneumo_experiments.registry.versions import Version
from pneumo_experiments.serving import Detector, TrainedNetwork, load
from pneumo_experiments.settings import Register, Score, Search, Train, as_config
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.score import ScoreResult, score
from pneumo_experiments.tracking.log import MODEL_TRAINING

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")

MARKED = 12  # images of the hold-out that the weak model gives a mask


@dataclass(frozen=True)
class Shelf:
    """Models of one data set of positives, and other images that are new to them.

    The strong one marks all images, the weak one a few, the empty one none.
    """

    folder: Path
    settings: Train
    foreign: Path
    weak: str
    strong: str
    empty: str
    other_split: str

    @property
    def dataset(self) -> Path:
        return self.settings.dataset


def stored(path: Path, images: Iterable[ResizedImage]) -> Path:
    write_dataset(path, packed(images, "uint8"), image_size=SIZE, pixel_dtype="uint8")
    return path


def positives(count: int) -> list[ResizedImage]:
    return [each for each in examples(2 * count) if each.entry.area_px]


def of_others(images: Iterable[ResizedImage]) -> list[ResizedImage]:
    """The same radiographs as other images of other patients."""
    entries = [(each, replace(each.entry, image_id=f"3-{each.entry.image_id}")) for each in images]
    return [replace(each, entry=replace(entry, patient=str(n))) for n, (each, entry) in enumerate(entries)]


def detector_of(settings: Train, presence_threshold: float) -> Detector:
    with Dataset.open(settings.dataset) as dataset:
        parts = make_split(dataset, settings.split)
        return Detector(
            members=(TrainedNetwork(Predictor(random_network(0), CPU), as_config(settings)),),
            image_size=SIZE,
            thresholds=Thresholds(presence_threshold, 0, 0, 0),
            data_fingerprint=dataset.fingerprint,
            training_images=hash_image_ids(Subset(dataset, np.append(parts.train, parts.validation))),
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, tiny: None) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    settings = make(
        Train, network="tiny", dataset=stored(folder / "d.h5", positives(80)), holdout=0.3, folds=2
    )
    foreign = stored(folder / "foreign.h5", of_others(positives(80)))
    with store_in(folder, empty_store):
        strong = detector_of(settings, 0)
        with Dataset.open(settings.dataset) as dataset:
            holdout = Subset(dataset, make_split(dataset, settings.split).holdout)
            presences = sorted(found.presence for _, found in holdout.predictions(strong.predictor))
        between = float(np.mean(presences[-MARKED - 1 : -MARKED + 1]))
        models = (replace(strong, thresholds=Thresholds(least, 0, 0, 0)) for least in (between, 0, 1))
        weak, everything, empty = (log_model(model, settings) for model in models)
        other = changed(settings, split_seed=7)
        other_split = log_model(detector_of(other, 0), other)
        yield Shelf(folder, settings, foreign, weak, everything, empty, other_split)


def called(shelf: Shelf, **values: Any) -> Version:
    version = register(make(Register, **({"dataset": shelf.dataset} | values)))
    assert version is not None
    return version


def scored(model: str, dataset: Path, subset: str = "holdout", **values: Any) -> ScoreResult:
    options: dict[str, Any] = {"device": "cpu", "overlays": 0, **values}
    return score(make(Score, model=model, dataset=dataset, subset=subset, **options))


def alias(name: str, which: str = "champion") -> str:
    return str(MlflowClient().get_registered_model(name).aliases.get(which))


# The champion


def test_a_walk_from_a_weak_champion_to_a_better_one_and_back(
    shelf: Shelf, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    first = called(shelf, model=shelf.weak, name="walk")
    assert (first.number, first.champion) == ("1", True)
    assert f"scores the new version, {shelf.weak}, on {shelf.dataset}" in capsys.readouterr().out
    second = called(shelf, model=shelf.strong, name="walk")
    out = capsys.readouterr().out
    assert (second.champion, alias("walk"), alias("walk", "challenger")) == (True, "2", "None")
    assert f"scores the new version, {shelf.strong}" in out
    assert "scores version 1" not in out  # it has that score already
    for text in (
        *("walk version 2 is the champion: Dice ", "of the champion, version 1: +"),
        "; decision 2 on these images requires 0.9925\n",
    ):
        assert text in out
    again = called(shelf, model=shelf.weak, name="walk")  # compared with another champion than at first
    assert (again.number, again.champion) == ("1", False)
    assert (alias("walk"), alias("walk", "challenger")) == ("2", "1")
    assert again.reason.endswith("decision 3 on these images requires 0.996667; not better")
    capsys.readouterr()
    for settings, end in (
        (
            {"model": shelf.weak},
            f"{shelf.weak} is already walk version 1, not the champion ({again.reason}); version=1 makes it"
            " the champion\n",
        ),
        ({"model": shelf.strong}, f"{shelf.strong} is already walk version 2, the champion\n"),
        ({"model": shelf.strong, "promote": "always"}, "is already walk version 2, the champion\n"),
        ({}, "is already walk version 2, the champion\n"),
    ):
        called(shelf, name="walk", **settings)
        assert end.rstrip() in capsys.readouterr().out
    assert len(MlflowClient().search_model_versions("name = 'walk'")) == 2
    best = called(shelf, name="best")
    told = re.search(
        r"decision 1 on these images, of the best of (\d) models, requires ([\d.]+)", best.reason
    )
    assert told and float(told[2]) == pytest.approx(1 - 0.03 / int(told[1]), abs=1e-6)

    back = call(["register", "--name", "walk", "--version", "1"])
    said = (
        "register: walk version 1 is the champion: moved by hand from version 2\nmodel     models:/walk/1\n"
    )
    assert back.out.startswith(said)
    assert alias("walk") == "1"
    description = MlflowClient().get_registered_model("walk").description
    assert description.startswith("The champion is [version 1](#/models/walk/versions/1).\n\nDice 0.")
    assert called(shelf, name="walk", version=2).champion
    assert called(shelf, name="walk", version=2).champion  # is it already
    shown = call(["register", "--name", "walk", "--history", "true"])
    rows = [row.split() for row in shown.out.splitlines()]
    assert rows[0] == ["version", "from", "until", "Dice", "why"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "1", "2"]
    assert [row[2] for row in rows[1:]] == [row[1] for row in rows[2:]] + ["now"]
    assert (back.code, shown.code) == (0, 0)


def test_models_without_common_images_are_scored_on_a_data_set_that_neither_has_seen(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "external"
    assert called(shelf, model=shelf.strong, name=name).champion
    (shelf.folder / "shelf.txt").touch()
    for dataset, reason in {
        shelf.dataset: "holdout=0.3 split_seed=7 and holdout=0.3 split_seed=0",
        Path("nowhere.h5"): "nowhere.h5: no such data set",
        shelf.folder / "shelf.txt": "shelf.txt",
    }.items():
        version = called(shelf, model=shelf.other_split, name=name, dataset=dataset)
        assert (version.champion, reason in version.reason) == (False, True)
        assert alias(name, "challenger") == version.number
    capsys.readouterr()
    version = called(shelf, model=shelf.other_split, name=name, dataset=shelf.foreign)
    out = capsys.readouterr().out
    assert "scores the new version" in out
    assert "scores version 1" in out
    assert "on 80 external images" in version.reason
    changed = "### Changed since version 1, then the champion\n\n- split_seed: `0`, now `7`\n\n###"
    assert changed.replace("_", "\\_") in version.description
    assert "better with a probability of 0.5;" in version.reason
    assert {run.info.status for run in MlflowClient().search_runs(["0"])} == {"FINISHED"}


def test_several_models_are_registered_as_one(shelf: Shelf) -> None:
    scored(shelf.strong, shelf.dataset)
    version = called(shelf, model=f"{shelf.strong},{shelf.weak}", name="several")
    assert version.champion
    assert len(load(tracking.model_data("models:/several/1")).members) == 2
    ids = sorted(address.removeprefix("models:/") for address in (shelf.strong, shelf.weak))
    links = dict(re.findall(r"\[(.*?)\]\(#/experiments/0/runs/(\w+)[?/]", version.description))
    trainings = [MlflowClient().get_logged_model(one).source_run_id for one in ids]
    assert [links["training 1"], links["training 2"]] == trainings
    assert called(shelf, model=f"{shelf.weak},{shelf.strong}", name="several").number == version.number
    assert len(MlflowClient().search_model_versions("name = 'several'")) == 1


@pytest.mark.parametrize(
    ("words", "message", "has_run"),
    [
        (["--version", "2", "--history", "true"], "version and history: two tasks", False),
        (["--version", "2", "--model", "models:/m-1"], "version and model=models:/m-1: ", False),
        (["--history", "true", "--export", "onnx"], "history and export=onnx: ", False),
        (["--version", "2", "--promote", "never"], "version and promote=never: ", False),
        (["--version", "99"], "version=99: mistakes has no such version", True),
        (["--version", "1", "--name", "nobody"], "name=nobody: no such registered model", True),
        (["--history", "true", "--name", "nobody"], "name=nobody: no such registered model", True),
    ],
)
def test_a_mistake_is_one_line_and_moves_nothing(
    words: list[str], message: str, has_run: bool, shelf: Shelf, call: Call
) -> None:
    versions.claim("mistakes")
    before = last_run().info.run_id
    line, run = call(["register", "--name", "mistakes", *words]).mistake, last_run()
    assert line.startswith(message)
    assert (run.info.run_id != before) == has_run
    if has_run:
        assert (run.info.status, run.data.tags["error"]) == ("FAILED", line)
    assert MlflowClient().get_registered_model("mistakes").aliases == {}


def test_the_version_of_another_project_does_not_become_champion(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {python_function: {loader_module: theirs, data: data}}")
    versions.claim("mixed")
    MlflowClient().create_model_version("mixed", str(tmp_path))
    with pytest.raises(UserError, match="is not a model of this project"):
        called(shelf, name="mixed", version=1)
    assert alias("mixed") == "None"


# The model card


def test_the_card_agrees_with_tags_and_tables(shelf: Shelf) -> None:
    training = str(mlflow.get_logged_model(shelf.strong.removeprefix("models:/")).source_run_id)
    searches = dict[str, str]()
    for study in ("mine", "another"):
        with tracking.run("search", Search()) as searches[study]:
            tracking.log_params({"study_used": study})
    MlflowClient().log_param(training, "study_used", "mine")  # as `train -P from_study=` does
    called(shelf, model=shelf.weak, name="card")
    version = called(shelf, model=shelf.strong, name="card")
    tags, card = version.tags, version.description
    score = scores.scores_of(version.model_id)[tags["identity"]]
    low, high = (score.metrics[f"dice_{end}"] for end in ("low", "high"))
    assert (tags["dice"], tags["dice_interval"]) == (f"{score.dice:.4f}", f"{low:.4f} to {high:.4f}")
    assert card.splitlines()[0] == (
        f"Dice {score.dice:.3f} ({low:.3f} to {high:.3f}) on {score.images} holdout images. Finds and"
        " outlines pneumothorax on chest radiographs."
    )
    run_id = score.run_id
    rows = scores.read_table(run_id, "by_group")
    with Dataset.open(shelf.dataset) as dataset:
        fingerprint = dataset.fingerprint
    large = next(row for row in rows if row["group"] == "area" and row["value"].startswith("3: "))
    images, patients = large["images"], large["patients"]
    low = patients / (patients + 1.959964**2)  # Wilson's, of so many patients
    note = "" if patients >= 5 else ", unreliable"
    for text in (
        *("Not a medical device", "\n- presence\\_threshold 0: an image with a lower"),
        f"`MLFLOW_TRACKING_URI={tracking.tracking_uri()} mlflow models serve -m models:/card/2 ",
        "### Changed since version 1, then the champion\n\nNo difference is recorded",
        *(f"code: `{tracking.code_version()}`", "made the champion; Dice ", "requires 0.9925."),
        *("Each decision about a champion uses these images up", "masks, the baseline: 0.0000"),
        *(f"fingerprint: `{fingerprint[:16]}", "split_seed=0", "\n| all images | "),
        f"| {large['value']} | &emsp;{images}"
        f" | &emsp;1.00 ({low:.2f} to 1.00), {images} of {images}{note} | &emsp;– |",
    ):
        assert text in card, text
    links, view = dict(re.findall(r"\[(.*?)\]\((#/experiments/0/runs/.*?)\)", card)), f"?{MODEL_TRAINING}"
    assert links == {
        "training": f"#/experiments/0/runs/{training}{view}",
        "config": f"#/experiments/0/runs/{training}/artifacts/config.yaml",
        "search": f"#/experiments/0/runs/{searches['mine']}{view}",
        "scores": f"#/experiments/0/runs/{run_id}{view}",
        "report of the scores": f"#/experiments/0/runs/{run_id}/artifacts/report.html",
    }


def test_a_card_is_written_though_tables_of_its_runs_are_damaged(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_card, "read_table", lambda *_: [{"group": "all"}, {"value": "3", "images": "x"}]
    )
    monkeypatch.setattr(model_card, "read_artifact", lambda *_: {"parts": [5]})
    assert "### Data and split" in called(shelf, model=shelf.strong, name="damaged").description


def test_a_card_fits_whatever_its_texts_and_shows_no_markup_of_others(tiny: None) -> None:
    member = TrainedNetwork(
        Predictor(random_network(0), CPU), as_config(make(Train, dataset="a`|<script>", network="tiny"))
    )
    member.settings["network"] = "fcn`x"  # pyright: ignore[reportIndexIssue]
    score = scores.UnseenScore(
        *("a" * 32, "holdout", 3, 0.5, 0.25, 0, "", {"dice": 0.5, "dice_low": 0.1, "dice_high": 0.9})
    )
    text = ModelCard(
        Version("lungs", "1", {}),
        Detector((member,), SIZE, Thresholds(), "f" * 64),
        Decision(
            "challenger", "<b>*why*</b> [x](y) " * 100, Challenge(Version("lungs", "0", {}), score, None)
        ),
        "1",
        {f"training {number}": f"#/experiments/0/runs/{number:032}" for number in range(100)},
        [{"group": "all", "images": 3, "patients": 2, "dice": 0.5, "dice_note": "unreliable"}],
        {},
        {"seed": ("0", "`1`"), **{f"name {n}": ("a", "b") for n in range(MAX_CHANGES + 1)}},
    ).text
    assert MAX_CHARACTERS - 100 < len(text) <= MAX_CHARACTERS
    assert text.startswith("Dice 0.500 (0.100 to 0.900) on 3 holdout images. Finds and")
    assert "\n\n**Unreliable: so few patients" in text
    assert "- seed: `0`, now `?1?`\n" in text
    assert "- and 2 more settings: compare" in text
    assert "\\<b\\>\\*why\\*" in text
    assert not re.search(r"(?<!\\)<(b|script)", text)
    assert "[training 0](#/experiments/0/runs/00" in text
    assert text.rstrip().endswith(")")


# What a score leaves


def test_a_score_names_its_images_whatever_their_stored_size_and_order(shelf: Shelf) -> None:
    images = positives(80)
    pixels = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    larger = packed((replace(each, image=pixels, target=pixels / 255) for each in images), "float32")
    write_dataset(shelf.folder / "larger.h5", larger, image_size=2 * SIZE, pixel_dtype="float32")
    moved = list(examples(161))[-1]  # whose mask has one row less
    other = [*images[:-1], replace(images[-1], rle=moved.rle)]
    everyone = np.arange(len(images))
    with Dataset.open(shelf.dataset) as small, Dataset.open(shelf.folder / "larger.h5") as large:
        assert small.fingerprint != large.fingerprint
        whole = image_set_id(Subset(small, everyone))
        assert whole == image_set_id(Subset(large, everyone)) == image_set_id(Subset(small, everyone[::-1]))
        assert len(whole) == 32
        assert whole != image_set_id(Subset(small, everyone[1:]))
    with Dataset.open(stored(shelf.folder / "changed.h5", other)) as different:
        assert image_set_id(Subset(different, everyone)) != whole


def test_a_score_against_a_baseline_shows_the_difference_and_the_images_that_changed(
    shelf: Shelf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Subset.count

    def count_unless_baseline(subset: Subset, predictor: Any, desc: str = "") -> Any:
        if desc == "baseline":
            raise MemoryError
        return count(subset, predictor, desc)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Subset, "count", count_unless_baseline)
        scored(shelf.strong, shelf.foreign, "all", baseline=shelf.empty)
    assert "dice" in last_run("score").data.metrics  # the scores stay
    result = scored(shelf.strong, shelf.foreign, "all", baseline=shelf.empty)
    run = last_run("score")
    metrics = run.data.metrics
    # All images have a finding: the baseline, which marks nothing, has Dice 0 on each.
    assert result.scores is not None
    assert (metrics["baseline_model_dice"], metrics["probability_better"]) == (0, 1)
    assert [metrics[f"dice_difference{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [result.scores.dice, result.scores.dice_low, result.scores.dice_high], abs=0.01
    )
    changes = [float(row["difference"]) for row in table(run, "changed_images.csv")]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == result.scores.images
    assert f"against {shelf.empty}: +" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"baseline=.* images trained it"):
        scored(shelf.strong, shelf.dataset, "train", baseline=shelf.weak)


def test_every_score_keeps_the_identity_of_its_images_and_a_row_for_each(shelf: Shelf) -> None:
    model, runs = log_model(detector_of(shelf.settings, 0), shelf.settings), dict[str, Any]()
    for subset, dataset, which, precision in (
        ("holdout", shelf.dataset, "holdout", "auto"),
        ("train", shelf.dataset, "train", "auto"),
        ("external", shelf.foreign, "all", "bf16"),
    ):
        scored(model, dataset, which, precision=precision)
        runs[subset] = last_run("score")
    logged = mlflow.get_logged_model(model.removeprefix("models:/"))
    found = {(metric.key, metric.dataset_digest): metric.value for metric in logged.metrics or []}
    for subset, run in runs.items():
        params, metrics = run.data.params, run.data.metrics
        name = "train/dice" if subset == "train" else "dice"
        assert found[name, params["identity"]] == metrics[name]
        assert f'"subset": "{subset}"' in logged.tags[f"score.{params['identity']}"]
        assert {"images", "positives", "patients", "dice_baseline"} <= params.keys()
        assert not {"images", "positives", "dice_baseline"} & metrics.keys()
        assert run.data.tags["thresholds"].startswith("presence_threshold 0, ")
        assert params["interval_reliable"] == "true"
        assert params["precision_used"] == ("bf16" if subset == "external" else "fp32")
    assert len({run.data.params["identity"] for run in runs.values()}) == 3
    assert "dice" not in runs["train"].data.metrics

    rows = table(runs["holdout"], "scores.csv")
    with Dataset.open(shelf.dataset) as dataset:
        entries = Subset(dataset, make_split(dataset, shelf.settings.split).holdout).entries
    assert [(row["image_id"], row["patient"]) for row in rows] == [(e.image_id, e.patient) for e in entries]
    areas = [(int(row["truth_area_px"]), int(row["predicted_area_px"])) for row in rows]
    assert areas == [(entry.area_px, entry.rows * entry.columns) for entry in entries]
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(
        runs["holdout"].data.metrics["dice"]
    )
    assert all(0 <= float(row["presence"]) <= 1 for row in rows)


def test_images_and_patients_that_a_model_has_seen_are_not_external(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    # Patients of two images, one in each data set; the second has an image of the first as well.
    pairs = [
        (each, replace(each, entry=replace(each.entry, image_id=f"other {n}")))
        for n, each in enumerate(positives(10))
    ]
    settings = changed(shelf.settings, dataset=stored(shelf.folder / "first.h5", [one for one, _ in pairs]))
    detector = detector_of(settings, 0)
    with Dataset.open(settings.dataset) as dataset:
        seen = np.setdiff1d(np.arange(len(dataset)), make_split(dataset, settings.split).holdout)
        known = {dataset.entries[i].patient for i in seen}
        ids = frozenset(salted(f"image {dataset.entries[i].image_id}") for i in seen)
    model = log_model(detector, settings)
    old = log_model(replace(detector, training_images=ids), settings)  # as before models knew their patients
    others = [pairs[seen[0]][0], *(other for _, other in pairs)]
    second = stored(shelf.folder / "second.h5", others)
    expected = ["image"] + ["patient" * (one.entry.patient in known) for one in others[1:]]
    shared = expected.count("patient")
    assert 2 < shared < 9  # some of them are new to the model

    scored(model, second, "all")
    told = f"1 of 11 images trained the model or chose its thresholds, the patients of {shared} more did"
    remedy = " (rename them by patients_csv if others are meant): no external score"
    assert f"score: {told}{remedy}" in capsys.readouterr().out
    run = last_run("score")
    assert told in run.data.tags["mlflow.note.content"]
    assert ("all/dice" in run.data.metrics, "dice" in run.data.metrics) == (True, False)
    assert [row["seen"] for row in table(run, "scores.csv")] == expected
    page = artifact(run, "report.html").read_text(encoding="utf-8")
    assert told in page
    assert "11 masks cover more than half of their image: look at their overlays." in page
    version = called(shelf, model=model, name="halves", dataset=second)
    assert not version.champion
    assert told.replace("the model", "the new version") in version.reason

    # So they are to a baseline, but for one that knows images alone.
    endings = {model: f", the patients of {shared} more did (rename", old: "; compare models"}
    for baseline, ending in endings.items():
        words = f"baseline={baseline}: 1 of 11 images trained it or chose its thresholds{ending}"
        with pytest.raises(UserError, match=re.escape(words)):
            scored(model, second, "all", baseline=baseline)

    # Without these patients the images are new.
    new = [one for one, by in zip(others, expected, strict=True) if not by]
    capsys.readouterr()
    version = called(shelf, model=model, name="halves", dataset=stored(shelf.folder / "third.h5", new))
    assert f"on {len(new)} external images" in version.reason
    out = capsys.readouterr().out
    assert "trained the model" not in out
    assert f"score: {len(new)} masks cover more than half of their image: look at their overlays" in out
    assert "a finding on" not in out  # of all images, as their labels say


def test_an_interval_from_few_patients_is_marked(shelf: Shelf) -> None:
    scored(shelf.strong, stored(shelf.folder / "few.h5", of_others(positives(4))), "all")
    params, description = last_run("score").data.params, last_run("score").data.tags["mlflow.note.content"]
    assert (params["positive_patients"], params["interval_reliable"]) == ("4", "false")
    assert ", unreliable with 4 patients with a finding)" in description
    assert "4 with pneumothorax, masks on 4 of 4" in description
