"""The entry point ``register`` with models that predict: what it scores, moves, prints and writes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from helpers import changed, ended, make, store_in
from mlflow import MlflowClient
from samples import SIZE, examples, packed, write_dataset
from tiny_network import CPU, random_network

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.scored_images import digests
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.registry import model_scores, versions
from pneumo_experiments.registry.card_text import MAX_CHARACTERS, CardScore, ModelCard, card_text
from pneumo_experiments.serving import Detector, TrainedNetwork, load, save
from pneumo_experiments.settings import Register, Score, Search, Train, as_config
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.score import score

pytestmark = pytest.mark.usefixtures("no_layout", "no_code")

MARKED = 12  # images of the hold-out that the weak model gives a mask


@dataclass(frozen=True)
class Shelf:
    """Models of one data set of positives: the strong one marks all images, the weak one a few."""

    folder: Path
    settings: Train
    weak: str
    strong: str
    other_split: str

    @property
    def dataset(self) -> Path:
        return self.settings.dataset


def written(path: Path, seed: int) -> Path:
    chosen = [example for number, example in enumerate(examples(160, seed)) if number % 2]
    if seed:  # other images of other patients
        chosen = [
            replace(each, entry=replace(each.entry, image_id=f"{seed}-{each.entry.image_id}", patient=f"{n}"))
            for n, each in enumerate(chosen)
        ]
    write_dataset(path, packed(chosen, "uint8"), image_size=SIZE, pixel_dtype="uint8")
    return path


def detector_of(settings: Train, presence_threshold: float) -> Detector:
    with Dataset.open(settings.dataset) as dataset:
        parts = make_split(dataset, settings.split)
        return Detector(
            members=(TrainedNetwork(Predictor(random_network(0), CPU), as_config(settings)),),
            image_size=SIZE,
            thresholds=Thresholds(presence_threshold, 0, 0, 0),
            data_fingerprint=dataset.fingerprint,
            training_images=digests(Subset(dataset, np.append(parts.train, parts.validation))),
        )


def logged(detector: Detector, settings: Train) -> str:
    with tempfile.TemporaryDirectory() as folder, tracking.run("train", settings):
        save(Path(folder), detector)
        return tracking.log_model(Path(folder))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, tiny: None) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    settings = make(Train, network="tiny", dataset=written(folder / "d.h5", 0), holdout=0.3, folds=2)
    with store_in(folder, empty_store):
        everything = detector_of(settings, 0)
        with Dataset.open(settings.dataset) as dataset:
            holdout = Subset(dataset, make_split(dataset, settings.split).holdout)
            presences = sorted(found.presence for _, found in holdout.predictions(everything.predictor))
        between = float(np.mean(presences[-MARKED - 1 : -MARKED + 1]))
        few = replace(everything, thresholds=Thresholds(between, 0, 0, 0))
        other = changed(settings, split_seed=7)
        yield Shelf(
            *(folder, settings, logged(few, settings), logged(everything, settings)),
            logged(detector_of(other, 0), other),
        )


def called(shelf: Shelf, **values: Any) -> versions.Version:
    version = register(make(Register, **({"dataset": shelf.dataset} | values)))
    assert version is not None
    return version


def alias(name: str, which: str = "champion") -> str:
    return str(MlflowClient().get_registered_model(name).aliases.get(which))


def test_a_walk_from_a_weak_champion_to_a_better_one_and_back(
    shelf: Shelf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = called(shelf, model=shelf.weak, name="walk")
    assert (first.number, first.champion) == ("1", True)
    assert f"scores the new version, {shelf.weak}, on {shelf.dataset}" in capsys.readouterr().out
    second = called(shelf, model=shelf.strong, name="walk")
    out = capsys.readouterr().out
    assert (second.champion, alias("walk"), alias("walk", "challenger")) == (True, "2", "None")
    assert f"scores the new version, {shelf.strong}" in out
    assert "scores version 1" not in out  # it has that score already
    assert "walk version 2 is champion: Dice " in out
    assert "of the champion, version 1: +" in out
    assert "; decision 2 on these images requires 0.9925\n" in out
    third = called(shelf, model=shelf.weak, name="walk")
    assert (third.champion, alias("walk"), alias("walk", "challenger")) == (False, "2", "3")
    assert third.reason.endswith("decision 3 on these images requires 0.996667; not better")
    best = called(shelf, name="walk")
    told = re.search(
        r"decision 4 on these images, of the best of (\d) models, requires ([\d.]+)", best.reason
    )
    assert told and float(told[2]) == pytest.approx(1 - 0.03 / (16 * int(told[1])), abs=1e-6)
    tags = MlflowClient().get_model_version("walk", "2").tags
    with Dataset.open(shelf.dataset) as dataset:
        holdout = make_split(dataset, shelf.settings.split).holdout
    assert (tags["images"], tags["subset"], tags["data_fingerprint"]) == (
        *(str(len(holdout)), "holdout"),
        load(tracking.model_data(shelf.strong)).data_fingerprint,
    )
    assert float(tags["dice_low"]) < float(tags["dice"]) < float(tags["dice_high"])
    assert (tags["code_version"], tags["network"]) == (tracking.code_version(), "tiny")

    capsys.readouterr()
    back = ended(["register", "--name", "walk", "--version", "1"], monkeypatch, capsys)
    assert back.out == "register: walk version 1 is champion: moved by hand from version 2\n"
    assert alias("walk") == "1"
    assert (
        MlflowClient()
        .get_registered_model("walk")
        .description.startswith(
            "The champion is [version 1](#/models/walk/versions/1).\n\nFinds and outlines"
        )
    )
    assert called(shelf, name="walk", version=2).champion
    assert called(shelf, name="walk", version=2).champion  # is it already
    capsys.readouterr()
    shown = ended(["register", "--name", "walk", "--history", "true"], monkeypatch, capsys)
    rows = shown.out.splitlines()
    assert [row.split()[0] for row in rows] == ["version", "1", "2", "1", "2"]
    assert [row.split()[2] for row in rows[1:]] == [row.split()[1] for row in rows[2:]] + ["now"]
    assert (back.code, shown.code) == (0, 0)


def test_models_without_common_images_are_scored_on_a_data_set_that_neither_has_seen(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "external"
    assert called(shelf, model=shelf.strong, name=name).champion
    version = called(shelf, model=shelf.other_split, name=name)
    assert (version.champion, alias(name, "challenger")) == (False, "2")
    assert "holdout=0.3 split_seed=7 and holdout=0.3 split_seed=0" in version.reason
    for dataset, reason in {
        Path("nowhere.h5"): "nowhere.h5: no such data set",
        shelf.folder / "shelf.txt": "shelf.txt",
    }.items():
        (shelf.folder / "shelf.txt").touch()
        version = called(shelf, model=shelf.other_split, name=name, dataset=dataset)
        assert (version.champion, reason in version.reason) == (False, True)
    foreign = written(shelf.folder / "foreign.h5", 3)
    capsys.readouterr()
    version = called(shelf, model=shelf.other_split, name=name, dataset=foreign)
    out = capsys.readouterr().out
    assert "scores the new version" in out
    assert "scores version 1" in out
    assert "on 80 external images" in version.reason
    assert MlflowClient().get_model_version(name, version.number).tags["probability_better"] == "0.5"
    runs = MlflowClient().search_runs(["0"])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_several_models_are_registered_as_one(shelf: Shelf) -> None:
    scored = make(Score, model=shelf.strong, dataset=shelf.dataset, overlays=0, device="cpu")
    score(scored)
    version = called(shelf, model=f"{shelf.strong},{shelf.weak}", name="several")
    assert version.champion
    assert len(load(tracking.model_data("models:/several/1")).members) == 2
    ids = sorted(address.removeprefix("models:/") for address in (shelf.strong, shelf.weak))
    assert (version.tags or {})["members"] == ",".join(ids)
    links = dict(re.findall(r"\[(.*?)\]\(#/experiments/0/runs/(\w+)[)/]", version.description))
    trainings = [MlflowClient().get_logged_model(one).source_run_id for one in ids]
    assert [links["training 1"], links["training 2"]] == trainings


def test_the_card_agrees_with_tags_and_tables(shelf: Shelf) -> None:
    with tracking.run("preprocess", Score()) as prepared:
        tracking.log_dataset(
            shelf.dataset, load(tracking.model_data(shelf.strong)).data_fingerprint, "preprocessed"
        )
        tracking.log_page("<h1>Data</h1>", "d.report.html")
    training = str(mlflow.get_logged_model(shelf.strong.removeprefix("models:/")).source_run_id)
    for study in ("mine", "another"):
        with tracking.run("search", Search()) as search:
            tracking.log_params({"study_used": study})
        if study == "mine":
            MlflowClient().log_param(training, "study_used", study)  # as `train -P from_study=` does
            searched = search
    called(shelf, model=shelf.weak, name="card")
    version = called(shelf, model=shelf.strong, name="card")
    tags, card = version.tags or {}, version.description
    head = f"{float(tags['dice']):.3f} ({float(tags['dice_low']):.3f} to {float(tags['dice_high']):.3f})"
    assert card.splitlines()[0] == (
        f"Finds and outlines pneumothorax on chest radiographs: Dice {head} on {tags['images']} holdout"
        " images."
    )
    for text in (
        *("Not a medical device", "mlflow models serve -m models:/card/2 ", "- presence\\_threshold: 0\n"),
        *(
            f"code: `{tags['code_version']}`",
            "made the champion; Dice ",
            "; decision 2 on these images requires 0.9925.",
            "Each decision about a champion uses these images up a little",
            "all-empty masks, the baseline: 0.0000",
        ),
        *(
            "fingerprint: `" + tags["data_fingerprint"][:16],
            "split_seed=0",
        ),
    ):
        assert text in card, text
    run_id = model_scores.scores_of(version.model_id)[tags["identity"]].run_id
    rows = model_scores.read_table(run_id, "by_group")
    assert rows is not None
    large = next(row for row in rows if str(row["value"]).startswith("3: "))
    images, patients = large["images"], large["patients"]
    low = patients / (patients + 1.959964**2)  # Wilson's, of so many patients
    note = "" if patients >= 5 else ", unreliable"
    cells = (
        f"| large ({large['value'][3:]}) | &emsp;{images}"
        f" | &emsp;1.000 ({low:.3f} to 1.000), {images} of {images}{note} | &emsp;– |"
    )
    assert cells in card
    links = dict(re.findall(r"\[(.*?)\]\((#/experiments/0/runs/.*?)\)", card))
    assert links == {
        "training": f"#/experiments/0/runs/{training}",
        "config": f"#/experiments/0/runs/{training}/artifacts/config.yaml",
        "search": f"#/experiments/0/runs/{searched}",
        "scores": f"#/experiments/0/runs/{run_id}",
        "report of the scores": f"#/experiments/0/runs/{run_id}/artifacts/report.html",
        "data report": f"#/experiments/0/runs/{prepared}/artifacts/d.report.html",
    }


def test_a_card_fits_whatever_its_texts_and_shows_no_markup_of_others() -> None:
    card = ModelCard(
        *("lungs", "1", "fcn`x", CardScore(0.5, 0.1, 0.9, "unreliable"), 0.25, "3 holdout images", None),
        *("a challenger", "<b>*why*</b> [x](y) " * 100, [], {}, {"data set": "a`|<script>"}, {}, "1"),
        [(f"training {number}", f"#/experiments/0/runs/{number:032}") for number in range(100)],
    )
    text = card_text(card)
    assert MAX_CHARACTERS - 100 < len(text) <= MAX_CHARACTERS
    assert "unreliable" in text
    assert "\\<b\\>\\*why\\*" in text
    assert not re.search(r"(?<!\\)<(b|script)", text)
    assert "[training 0](#/experiments/0/runs/00" in text
    assert text.rstrip().endswith(")")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--version", "2", "--history", "true"], "version and history: two tasks"),
        (["--version", "2", "--model", "models:/m-1"], "version and model=models:/m-1: version registers"),
        (["--history", "true", "--model", "models:/m-1"], "history and model=models:/m-1: history registers"),
        (["--version", "2", "--export", "onnx"], "version and export=onnx: version exports nothing"),
        (["--version", "2", "--promote", "never"], "version and promote=never"),
        (["--version", "99"], "version=99: mistakes has no such version"),
        (["--version", "1", "--name", "nobody"], "name=nobody: no such registered model"),
        (["--history", "true", "--name", "nobody"], "name=nobody: no such registered model"),
    ],
)
def test_a_mistake_is_one_line_and_moves_nothing(
    words: list[str], message: str, shelf: Shelf, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    versions.claim("mistakes")
    end = ended(["register", "--name", "mistakes", *words], monkeypatch, capsys)
    assert end.code == 2
    assert end.err.startswith(f"Error: {message}")
    assert len(end.err.splitlines()) == 1
    last = MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"], max_results=1)[0]
    assert (last.info.status, last.data.tags["error"]) == ("FAILED", end.err.removeprefix("Error: ").rstrip())
    assert MlflowClient().get_registered_model("mistakes").aliases == {}


def test_the_version_of_another_project_does_not_become_champion(shelf: Shelf, tmp_path: Path) -> None:
    class Theirs(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    mlflow.pyfunc.save_model(str(tmp_path / "theirs"), python_model=Theirs(), pip_requirements=["mlflow"])
    versions.claim("mixed")
    MlflowClient().create_model_version("mixed", str(tmp_path / "theirs"))
    with pytest.raises(UserError, match="is not a model of this project"):
        called(shelf, name="mixed", version=1)
    assert alias("mixed") == "None"
