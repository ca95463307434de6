"""The whole chain through a real `mlflow run`, and what it leaves in the store and the registry.

It trains the tiny network, and in `make soak` the default one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import cpu_seconds
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from command_server import CommandServer
from helpers import BIN, ROOT, copy_store, environment_of_mlflow, make, soak
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from tracked import artifact, runs, table

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.errors import UserError
from pneumo_experiments.serving.model_folder import WEIGHTS
from pneumo_experiments.settings import Main, Search
from pneumo_experiments.stages.main import _work_line, main
from pneumo_experiments.stages.search import search

SMALL = {
    "images": 18,
    "folds": 2,  # else a fold has one patient
    "holdout": 0.3,
    "test_images": 2,
    "image_size": 32,
    "epochs": 2,
    "trials": 2,
    "pruner": "none",
    "confirm": 0,
    "keep": 3,
    "search_images": 4,
    "search_epochs": 1,
    "search_warmup_epochs": 1,
    "threshold_trials": 5,
    "overlays": 2,
    "weights": "none",
    "learning_rate": "1e-3",
    "promote": "always",  # so small a model is no better than the all-empty baseline
}


@dataclass(frozen=True)
class Chain:
    """A finished run of the chain: its folder, store and runs by name."""

    folder: Path
    uri: str
    output: str
    runs: dict[str, list[Run]]

    def only(self, name: str) -> Run:
        (run,) = self.runs[name]
        return run


def run_chain(folder: Path, commands: CommandServer | None, **settings: object) -> Chain:
    """`mlflow run` of the entry point main, called in another folder than the project's, on a store there.

    With commands it trains the tiny network.
    """
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    MlflowClient().create_experiment("chain", artifact_location=(folder / "artifacts").as_uri())
    settings |= {"output_dir": "output", "storage": "sqlite:///optuna.db"}
    words = ["run", ROOT, "--env-manager", "local", "--experiment-name", "chain"]
    words += [f"-P{name}={value}" for name, value in settings.items()]
    environment = environment_of_mlflow(uri)
    if commands is None:
        done = subprocess.run(
            [BIN / "mlflow", *words], env=environment, cwd=folder, stdout=PIPE, stderr=STDOUT, text=True
        )
        code, output = done.returncode, done.stdout
    else:
        commands.write_python(folder)
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
        command = commands.start(
            *words, folder=folder, environment=environment, code="from mlflow.cli import cli; cli()"
        )
        code, output = command.communicate()
        cpu_seconds.count_command(float((folder / "python.seconds").read_text()))
    assert code == 0, output[-5000:]
    runs: dict[str, list[Run]] = {}
    found = mlflow.search_runs(
        search_all_experiments=True, order_by=["attributes.start_time ASC"], output_format="list"
    )
    for run in found:
        stage, name = run.data.tags["pneumo.stage"], str(run.info.run_name)
        runs.setdefault(name[: len("trial 0")] if stage == "trial" else stage, []).append(run)
    return Chain(folder, uri, output, runs)


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, tiny_default: None, commands: CommandServer
) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    copy_store(empty_store, folder)
    yield run_chain(folder, commands, **SMALL)
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def dicom(chain: Chain) -> Path:
    return next((chain.folder / "output").glob("sample-*/dicom-images-test/*.dcm"))


def test_every_step_is_a_finished_run_below_the_parent(chain: Chain) -> None:
    parent = chain.only("main")
    below = {name: run for name, runs in chain.runs.items() for run in runs if name != "main"}
    assert set(below) == {
        "sample", "preprocess", "search", "trial 0", "trial 1", "train", "score", "register",
    }  # fmt: skip
    for name, run in below.items():
        above = chain.only("search") if name.startswith("trial") else parent
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert {run.info.status for runs in chain.runs.values() for run in runs} == {"FINISHED"}
    assert all(run.data.tags.get("mlflow.note.content") for runs in chain.runs.values() for run in runs)


def test_a_setting_is_one_param_of_every_run_that_uses_it(chain: Chain) -> None:
    parent, train = chain.only("main").data.params, chain.only("train").data.params
    assert parent["learning_rate"] == "1e-3"  # the user's own text, which `mlflow run` logged first
    assert train["learning_rate"] == "0.001"
    assert (parent["image_size"], parent["network"]) == ("32", "fcn_resnet50")
    assert train["epochs"] == "2"
    for trial in ("trial 0", "trial 1"):
        assert {"bce_weight", "dice_weight", "focal_weight"} <= chain.only(trial).data.params.keys()
    best = yaml.safe_load(artifact(chain.only("search"), "best.yaml").read_text())
    for name in ("dice_weight", "focal_weight", "presence_weight", "bce_weight"):
        assert train[name] == str(best[name])
    assert best["dice_weight"] in [
        float(chain.only(f"trial {number}").data.params["dice_weight"]) for number in (0, 1)
    ]


def test_dice_is_what_score_measured_and_val_dice_what_training_did(chain: Chain) -> None:
    of_validation = {"search": "search/value", "trial 0": "trial/value", "trial 1": "trial/value"}
    for name, metric in of_validation.items():
        metrics = chain.only(name).data.metrics
        assert metric in metrics
        assert not {each for each in metrics if each.startswith(("dice", "auroc", "val/"))}, name
    train, scored = chain.only("train").data, chain.runs["score"][0].data
    assert "val/dice" in train.metrics
    headline = {name: value for name, value in train.metrics.items() if "/" not in name}
    assert headline == {
        name: scored.metrics[name] for name in ("dice", "dice_low", "dice_high", "dice_positive")
    }
    assert train.params["dice_baseline"] == scored.params["dice_baseline"]
    assert {"threshold_trials", "presence_threshold"}.isdisjoint(chain.only("search").data.params)
    for name in ("preprocess", "train", "score", "main"):
        constants = {"images", "positives", "patients", "dice_baseline", "val_images", "val_dice_baseline"}
        assert constants.isdisjoint(chain.runs[name][0].data.metrics), name
    assert chain.only("preprocess").data.params["images"] == str(SMALL["images"])
    assert float(chain.only("main").data.params["dice_baseline"]) > 0


def test_the_final_scores_stand_at_the_parent_and_the_model_and_on_the_terminal(chain: Chain) -> None:
    dice = chain.only("main").data.metrics["dice"]
    scored = next(run for run in chain.runs["score"] if "dicom_dir" not in run.data.params)
    assert scored.data.metrics["dice"] == dice
    model = mlflow.get_logged_model(scored.data.params["model"].removeprefix("models:/"))
    assert dice in {metric.value for metric in model.metrics or [] if metric.key == "dice"}
    assert f"Dice                {dice:.4f}" in chain.output


def test_the_data_set_is_an_input_with_its_fingerprint(chain: Chain) -> None:
    path = next((chain.folder / "output").glob("dataset-*.h5"))
    with Dataset.open(path) as dataset:
        fingerprint, entries = dataset.fingerprint, dataset.entries
    assert len(entries) == SMALL["images"]
    for name in ("preprocess", "search", "train"):
        (used,) = chain.only(name).inputs.dataset_inputs
        assert used.dataset.digest == fingerprint[:16]


def test_every_score_has_its_interval_and_stands_by_group(chain: Chain) -> None:
    scored = next(run for run in chain.runs["score"] if "dicom_dir" not in run.data.params)
    metrics = scored.data.metrics
    assert metrics["dice_low"] <= metrics["dice"] <= metrics["dice_high"]
    for name in ("specificity", "auroc", "average_precision", "false_alarms", "calibration_error"):
        assert metrics[f"interval/{name}_low"] <= metrics[f"interval/{name}_high"]
        assert name in metrics
    rows = table(scored, "by_group.csv")
    assert {row["group"] for row in rows} == {"all", "area", "view", "sex", "age"}
    assert float(rows[0]["dice"]) == metrics["dice"]
    assert float(rows[0]["specificity_high"]) == metrics["interval/specificity_high"]
    for group in ("view", "sex", "age"):
        images = sum(int(row["images"]) for row in rows if row["group"] == group)
        assert images == int(scored.data.params["images"])
    images = sum(int(row["images"]) for row in table(scored, "calibration.csv"))
    assert images == int(scored.data.params["images"])
    assert artifact(scored, "calibration.png").is_file()
    tables = json.loads(scored.data.tags["mlflow.loggedArtifacts"])
    names = ["scores.json", "calibration.json", "by_group.json"]  # the evaluation view opens the first
    assert tables == [{"path": name, "type": "table"} for name in names]


def test_the_thresholds_are_the_exact_ones_and_the_study_is_recorded_beside_them(chain: Chain) -> None:
    train = chain.only("train")
    found = {name: train.data.metrics[f"thresholds/dice_{name}"] for name in ("exact", "distance", "optuna")}
    assert found["exact"] == pytest.approx(train.data.metrics["val/dice"], abs=1e-12)
    assert found["distance"] == found["exact"] - found["optuna"] >= 0
    assert len(table(train, "threshold_trials.csv")) == SMALL["threshold_trials"]
    for name in ("threshold_history.png", "threshold_contours.png"):
        with Image.open(artifact(train, name)) as picture:
            assert picture.width > 500


def test_the_report_and_its_pictures_are_artifacts_of_the_final_run(chain: Chain) -> None:
    scored = next(run for run in chain.runs["score"] if "dicom_dir" not in run.data.params)
    page = artifact(scored, "report.html").read_text(encoding="utf-8")
    assert f"<b>{scored.data.metrics['dice']:.4f}</b>" in page
    pictures = sorted(item.path for item in MlflowClient().list_artifacts(scored.info.run_id, "overlays"))
    assert len(pictures) > 1
    assert page.count("radiograph, truth and prediction of") == len(pictures)
    images = [item.path for item in MlflowClient().list_artifacts(scored.info.run_id, "images")]
    steps = sorted(tuple(path.split("+")[:3:2]) for path in images if path.endswith(".png"))
    kinds = [path.split("/")[1].split("-")[1].replace("_", " ") for path in pictures]
    expected = [(f"images/{kind}", str(kinds[:place].count(kind))) for place, kind in enumerate(kinds)]
    assert steps == sorted(expected)
    with Image.open(artifact(scored, pictures[0])) as picture:
        assert picture.width > 700
        assert np.asarray(picture).std() > 20


def test_the_submission_has_a_row_for_every_test_image(chain: Chain) -> None:
    with (chain.folder / "output" / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = {path.stem for path in (chain.folder / "output").glob("sample-*/dicom-images-test/*.dcm")}
    assert {row["ImageId"] for row in rows} == files
    for row in rows:
        assert decode(row["EncodedPixels"], (1024, 1024)).shape == (1024, 1024)


def test_the_registered_champion_answers_dicom_bytes_and_survives_a_bad_file(
    chain: Chain, dicom: Path
) -> None:
    mlflow.set_tracking_uri(chain.uri)
    version = MlflowClient().get_model_version_by_alias("pneumothorax", "champion")
    assert version.tags["dice"] == f"{chain.only('main').data.metrics['dice']:.4f}"
    with Dataset.open(next((chain.folder / "output").glob("dataset-*.h5"))) as dataset:
        assert dataset.fingerprint[:16] in version.description
    model = mlflow.pyfunc.load_model("models:/pneumothorax@champion")
    content = dicom.read_bytes()
    asked = pd.DataFrame(
        {"image_id": ["good", "cut", "text"], "dicom": [content, content[: len(content) // 2], b"no DICOM"]}
    )
    answer = model.predict(asked)
    assert list(answer.columns) == ["image_id", "presence", "area_px", "rle", "error"]
    good, cut, text = answer.to_dict("records")
    assert good["error"] == ""
    assert 0 <= good["presence"] <= 1
    assert decode(good["rle"], (1024, 1024)).sum() == good["area_px"]
    for bad, name in ((cut, "cut"), (text, "text")):
        assert name in bad["error"]
        assert (bad["area_px"], bad["rle"]) == (None, None)


def test_the_champions_card_leads_to_the_runs_it_comes_from(chain: Chain) -> None:
    client = MlflowClient(chain.uri)
    card = client.get_model_version_by_alias("pneumothorax", "champion").description
    links = dict(re.findall(r"\[(.*?)\]\(#/experiments/\d+/runs/(.*?)\)", card))
    runs = {"training": "train", "search": "search", "data report": "preprocess", "scores": "score"}
    for text, name in runs.items():
        assert re.split("[/?]", links[text])[0] in {run.info.run_id for run in chain.runs[name]}, text
    for text in ("config", "report of the scores", "data report"):
        run_id, path = links[text].split("/artifacts/")
        assert path in {file.path for file in client.list_artifacts(run_id)}
    parts = json.loads(artifact(chain.only("train"), "split.json").read_text())["parts"]
    assert (
        f"- holdout: {parts['holdout']['images']} images of {parts['holdout']['patients']} patients" in card
    )
    code = chain.only("train").data.tags["code_version"]
    assert f"- code: `{code}`" in card
    assert "all images" in card
    model = client.get_registered_model("pneumothorax")
    assert model.description == f"The champion is [version 1](#/models/pneumothorax/versions/1).\n\n{card}"


def test_no_logged_model_holds_a_pickle(chain: Chain) -> None:
    folders = [*(chain.folder / "artifacts" / "models").glob("m-*/artifacts")]
    assert len(folders) == 3  # of the training and of the two trials
    names = [path.name for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert names.count("weights.pt") == 3  # read with weights_only
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".joblib"))]


def test_every_path_that_is_printed_or_a_param_can_be_opened_from_anywhere(chain: Chain) -> None:
    said = [line for line in chain.output.splitlines() if " INFO mlflow." not in line]
    paths = re.findall(r"(?<![\w:/.…])/[^\s,;]+", "\n".join(said))
    assert {Path(path.rstrip(".:")).exists() for path in paths} == {True}, paths
    assert f" in sqlite:///{chain.folder}/optuna.db\n" in chain.output
    for end in ("report.html", ".h5", "submission.csv", "findings.csv"):
        assert [path for path in paths if path.startswith(str(chain.folder)) and path.endswith(end)], end
    for name in ("sample", "preprocess", "search", "train", "score", "register"):
        params = chain.runs[name][0].data.params
        settings = {"dataset", "dicom_dir", "rle_csv", "output_dir"} & params.keys()
        assert settings, name
        for setting in settings:
            assert params[setting] == "none" or Path(params[setting]).is_absolute(), (name, setting)
    main = chain.only("main").data.params
    assert (main["output_dir"], main["output_dir_used"]) == ("output", f"{chain.folder}/output")
    assert main["storage_used"] == f"sqlite:///{chain.folder}/optuna.db"


def test_main_says_which_step_it_is_and_what_is_still_to_come(chain: Chain) -> None:
    steps = re.findall(r"main: step (\d) of 7, (.*)", chain.output)
    assert [number for number, _ in steps] == list("1234567")
    assert steps[1][1] == "preprocess; then search, train, score, findings of the test images, register"
    assert steps[6][1] == "register"


def test_main_says_how_the_work_is_divided(chain: Chain) -> None:
    split = json.loads(artifact(chain.only("train"), "split.json").read_text())
    images = split["parts"]["train"]["images"]
    searched = 2 * 4 + images  # two trials of 4 images, and an epoch of warm-up
    share = searched / (searched + 2 * images)
    assert (
        f"main: search 2 trials, 1 epoch of 4 images each; then train 2 epochs of {images} images:"
        f" {share:.0%} and {1 - share:.0%} of the training work"
    ) in chain.output


def test_the_work_of_second_trainings_and_of_all_folds_counts() -> None:
    def line(**values: Any) -> str:
        return _work_line(make(Main, **values), 1000)

    assert line(trials=4, search_epochs=1, search_images=100, confirm=1, epochs=6, folds_per_trial=2) == (
        "main: search 4 trials and 2 again, 1 epoch of 100 images each; then train 6 epochs of 1,000 images:"
        " 17% and 83% of the training work"
    )
    all_folds = line(trials=1, search_epochs=1, search_images=0, epochs=3, fold="all", folds=3)
    assert "search 1 trial, 1 epoch of 1,000 images each; then train 9 epochs" in all_folds
    assert "10% and 90%" in all_folds


def test_the_training_starts_where_the_trials_started(chain: Chain) -> None:
    params = chain.only("train").data.params
    assert re.fullmatch(
        rf"{chain.folder}/output/checkpoints/warm-up-[0-9a-f]{{16}}/epoch-1\.pt", params["weights"]
    )
    assert params["weights_source"] == "epoch-1.pt"


def test_without_trials_and_hold_out_main_trains_with_the_settings_as_given_and_shows_out_of_fold_scores(
    tmp_path: Path, tiny_default: None, no_charts: None, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SMALL | {"trials": 0, "test_images": 0, "epochs": 1, "threshold_trials": 0, "overlays": 0}
    small |= {"images": 24, "fold": "all", "holdout": 0, "learning_rate": "1e-2"}
    result = main(Main.of(**small, output_dir=tmp_path / "output", dice_weight=2.5))
    said = capsys.readouterr().out
    assert "step 2 of 5, preprocess; then train, score, register" in said
    stages = [run.data.tags["pneumo.stage"] for run in mlflow.search_runs(output_format="list")]
    assert sorted(stages) == ["fold", "fold", "main", "preprocess", "register", "sample", "score", "train"]
    (parent,), (trained,), (scored,) = runs("main"), runs("train"), runs("score")
    dice, optimistic = trained.data.metrics["oof/dice"], scored.data.metrics["all/dice"]
    assert dice != optimistic
    assert result.scores is not None and result.scores.dice == parent.data.metrics["oof/dice"] == dice
    assert parent.info.run_name.endswith(f" · {dice:.4f}") and "all/dice" not in parent.data.metrics
    assert f"\nDice                {dice:.4f} (" in said and "patients, out of fold: by networks that" in said
    assert f"Dice {dice:.4f} " in parent.data.tags["mlflow.note.content"]
    assert trained.data.params["dice_weight"] == "2.5"
    with pytest.raises(UserError, match=r"^trials=0: leaves nothing to search"):
        search(Search.of(trials=0))


@soak
def test_the_chain_runs_with_the_default_network(tmp_path: Path) -> None:
    chain = run_chain(tmp_path, None, **SMALL)
    mlflow.set_tracking_uri(None)
    assert {run.info.status for runs in chain.runs.values() for run in runs} == {"FINISHED"}
    assert max(path.stat().st_size for path in chain.folder.rglob(WEIGHTS)) > 10**8


def test_real_radiographs_go_through_the_same_command(
    real_data: Path, store: Path, commands: CommandServer
) -> None:
    settings = {
        "dicom_dir": real_data / "dicom-images-train",
        "rle_csv": real_data / "train-rle.csv",
        "test_dir": real_data / "dicom-images-test",
        "image_size": 64,
        "epochs": 1,
        "trials": 0,
        "weights": "none",
        "batch_size": 4,
        "threshold_trials": 0,
        "overlays": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = commands.start("main", *words, folder=store, environment=dict(os.environ), tiny=True)
    code, output = command.communicate()
    assert code == 0, output
    with Dataset.open(next((store / "output").glob("dataset-*.h5"))) as dataset:
        areas = {e.image_id: (e.annotations, e.area_px, e.view, e.sex, e.age) for e in dataset.entries}
        masks = {e.image_id: int(dataset.mask(i).sum()) for i, e in enumerate(dataset.entries)}
    with (real_data / "known_areas.csv").open(newline="") as file:
        known = {row["ImageId"]: row for row in csv.DictReader(file)}
    for image_id, row in known.items():
        numbers = int(row["n_annotations"]), int(row["union_area_px"])
        assert areas.pop(image_id) == (*numbers, row["view"], row["sex"], int(row["age"]))
    assert areas == {}
    assert masks == {image_id: int(row["union_area_px"]) for image_id, row in known.items()}
    scored = next(run for run in runs("score") if "dicom_dir" not in run.data.params)
    assert int(scored.data.params["images"]) >= 2
    with (store / "output" / "submission.csv").open() as file:
        assert len(file.readlines()) == 1 + 10
