"""The same command twice at once, and files of others where ours shall go: nothing is mixed or lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_server import Command, CommandServer
from helpers import changed, make, soak
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import runs
from tracking_server import TIMEOUT_SECONDS, wait_until

from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import write_submission
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.locks import work_folder
from pneumo_experiments.settings import Main, Preprocess, Train, as_params, flat
from pneumo_experiments.stages import main
from pneumo_experiments.stages.preprocess import preprocess
from pneumo_experiments.stages.train import train, training
from pneumo_experiments.synthetic.kaggle_layout import is_sample, write_sample

pytestmark = pytest.mark.usefixtures("no_layout", "no_code", "tiny_default")


def settings_of(dataset: Path, **changes: Any) -> Train:
    short = make(Train, dataset=dataset, weights="none", precision="fp32", epochs=1, batch_size=8, best_k=1)
    return changed(short, tta="none", threshold_trials=0, overlays=0, **changes)


def steps_of(run: Run, metric: str = "loss") -> list[int]:
    return [found.step for found in MlflowClient().get_metric_history(run.info.run_id, metric)]


# sample and preprocess


def test_a_second_sample_waits_for_the_first_and_takes_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = tmp_path / "s", list[str]()
    second = list[Future[bool]]()

    def hears_waiting() -> bool:
        said.append(capsys.readouterr().out)
        return "waiting" in "".join(said)

    with ThreadPoolExecutor() as pool:

        def go_on_when_the_second_waits() -> None:
            if not second:
                second.append(pool.submit(write_sample, folder, 3, 1, 0, lambda: None, 1))
                wait_until(hears_waiting)

        assert write_sample(folder, 3, 1, 0, go_on_when_the_second_waits, 1) is True
        assert second[0].result(TIMEOUT_SECONDS) is False
    assert "".join(said) == f"sample: another process writes {folder}; waiting until it ends\n"
    assert is_sample(folder, 3, 1, 0)
    assert len([*folder.rglob("*.dcm")]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert not (folder / ".lock").exists()


def test_a_second_sample_of_other_settings_is_refused_by_what_the_first_made(tmp_path: Path) -> None:
    folder, second = tmp_path / "s", list[Future[bool]]()
    with ThreadPoolExecutor() as pool:

        def start_another() -> None:
            if not second:
                second.append(pool.submit(write_sample, folder, 2, 0, 7, lambda: None, 1))

        write_sample(folder, 3, 0, 0, start_another, 1)
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            second[0].result(TIMEOUT_SECONDS)
    assert is_sample(folder, 3, 0, 0)


def test_when_the_first_sample_fails_the_second_makes_its_own(tmp_path: Path) -> None:
    folder, second = tmp_path / "s", list[Future[bool]]()
    with ThreadPoolExecutor() as pool:

        def fail() -> None:
            second.append(pool.submit(write_sample, folder, 2, 0, 0, lambda: None, 1))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_sample(folder, 2, 0, 0, fail, 1)
        assert second[0].result(TIMEOUT_SECONDS) is True
    assert is_sample(folder, 2, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_of_the_users_that_has_the_name_of_unfinished_work_stays(tmp_path: Path) -> None:
    for name in ("s.part", "d.h5.work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"s\.part: exists and was not created by this program"):
        write_sample(tmp_path / "s", 1, 0, 0)
    with (
        pytest.raises(UserError, match=r"d\.h5\.work: exists"),
        work_folder(tmp_path / "d.h5.work", ""),
    ):
        pass
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        *("s.part", "s.part/thesis.txt", "d.h5.work", "d.h5.work/thesis.txt")
    }


def test_a_second_preprocess_waits_for_the_first_and_takes_what_it_made(
    dataset: Path, store: Path, start: Start
) -> None:
    source = dataset.with_name("sample")
    settings = make(
        Preprocess,
        dicom_dir=source / "dicom-images-train",
        rle_csv=source / "train-rle.csv",
        dataset=store / "d.h5",
        image_size=32,
    )
    words = [word for name, text in as_params(settings).items() for word in (f"--{name}", text)]
    with work_folder(store / "d.h5.work", ""):
        second = start("preprocess", words, store)
        heard = hear(second, "waiting until it ends")
        preprocess(changed(settings, dataset=store / "made.h5"))
        (store / "made.h5").rename(store / "d.h5")
    code, rest = second.communicate()
    assert code == 0, rest
    assert f"another process writes {store / 'd.h5'}" in heard
    assert "exists already, from the same files and settings" in rest
    assert not (store / "d.h5.work").exists()


Start = Callable[[str, list[str], Path], Command]


@pytest.fixture
def start(commands: CommandServer) -> Start:
    def started(entry_point: str, words: list[str], folder: Path) -> Command:
        return commands.start(entry_point, *words, folder=folder, environment=dict(os.environ), tiny=True)

    return started


def hear(command: Command, word: str) -> str:
    """What the command says up to the line with the word."""
    said = ""
    while word not in said:
        line = command.stdout.readline()
        assert line, said
        said += line
    return said


# train and main


def test_a_second_training_with_the_same_settings_waits_and_neither_enters_the_others_run(
    small_dataset: Path, store: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, save, second = settings_of(small_dataset), Checkpoint.save, list[Command]()
    words = [word for name, text in as_params(settings).items() for word in (f"--{name}", text)]

    def save_and_start_another(self: Checkpoint, last: dict[str, Any], networks: dict[int, Any]) -> None:
        save(self, last, networks)
        second.append(start("train", words, store))
        hear(second[0], "another training with the same settings is running; waiting until it ends")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_start_another)
        train(settings)
    code, said = second[0].communicate()
    assert code == 0, said
    assert "epoch 1/1" in said
    one, two = runs("train")
    assert steps_of(one) == steps_of(two) == [1]
    assert steps_of(one, "val_dice_final") == steps_of(two, "val_dice_final") == [1]
    assert one.data.metrics["loss"] == two.data.metrics["loss"]
    models = MlflowClient().search_logged_models(["0"])
    assert {model.source_run_id for model in models} == {one.info.run_id, two.info.run_id}
    assert len(models) == 2
    assert not (store / "output").exists()


def test_main_killed_after_its_training_takes_it_as_it_ended(
    dataset: Path,
    store: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(settings: object) -> None:
        raise KeyboardInterrupt

    source = dataset.with_name("sample")
    (store / "few").mkdir()
    for file in sorted((source / "dicom-images-train").rglob("*.dcm"))[:14]:
        shutil.copy(file, store / "few")
    short = changed(settings_of(dataset), epochs=2)
    settings = make(
        Main,
        **{name: value for name, value in flat(short).items() if name in flat(Main())}
        | {
            "dicom_dir": store / "few",
            "rle_csv": source / "train-rle.csv",
            "trials": 1,
            "search_epochs": 1,
            "search_images": 8,
            "confirm": 0,
            "image_size": 32,
        },
    )
    with monkeypatch.context() as patch:
        patch.setattr(main, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            main.main(settings)
    assert len([*Path("output/checkpoints").iterdir()]) == 1
    assert "epoch 2/2" in capsys.readouterr().out
    main.main(settings)
    said = capsys.readouterr().out
    assert "train: continues after epoch 2 of 2" in said
    assert "/2  loss" not in said  # the search has one epoch
    ended, taken = runs("train")
    assert ended.info.status == taken.info.status == "FINISHED"
    assert steps_of(ended) == steps_of(taken) == [1, 2]  # each run shows all, once
    assert ended.data.metrics["val_dice_final"] == taken.data.metrics["val_dice_final"]
    assert [run.info.status for run in runs("main")] == ["KILLED", "FINISHED"]
    assert not [*Path("output").rglob("*.pt")]


@soak  # each stage beside its like is tested above
@pytest.mark.usefixtures("tiny_default")
def test_two_whole_chains_at_once_in_one_folder_both_end_well(store: Path, start: Start) -> None:
    chosen = {"images": 24, "test_images": 2, "image_size": 32, "epochs": 1, "trials": 1, "search_images": 8}
    chosen |= {"threshold_trials": 0, "overlays": 1, "weights": "none", "precision": "fp32", "device": "cpu"}
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    both = [start("main", words, store) for _ in range(2)]
    for process in both:
        code, said = process.communicate()
        assert code == 0, said
    found = MlflowClient().search_runs(["0"])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len(found) == 18
    assert len({run.data.metrics["dice"] for run in runs("main")}) == 1
    assert {v.version for v in MlflowClient().search_model_versions("name = 'pneumothorax'")} == {1, 2}
    left = {path.suffix for path in (store / "output").rglob("*")}
    assert not left & {".part", ".work", ".pt"}


def test_a_training_goes_on_in_no_run_that_has_finished(
    small_dataset: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(small_dataset)
    with pytest.raises(KeyboardInterrupt), training(settings):
        raise KeyboardInterrupt
    train(settings)
    assert "continues after epoch 1 of 1" in capsys.readouterr().out
    one, two = runs("train")
    assert steps_of(one, "val_dice_final") == steps_of(two, "val_dice_final") == [1]


# score


def test_a_submission_replaces_a_submission_and_nothing_else(tmp_path: Path) -> None:
    path, rows = tmp_path / "labels.csv", [("a", "1 2"), ("b", "-1")]
    labels = "ImageId,EncodedPixels\na,1 2\nb,-1\n"  # the same ids, header and form, and even the same rows
    path.write_text(labels)
    for existing in (labels, "Dear Sir", ""):
        path.write_text(existing)
        with pytest.raises(UserError, match=r"labels\.csv: exists, and is not as score wrote it; remove it"):
            write_submission(path, iter(rows))
        assert path.read_text() == existing
    path.unlink()
    write_submission(path, rows)
    write_submission(path, [("c", "3 4")])  # other images, by the same program
    assert path.read_text() == "ImageId,EncodedPixels\nc,3 4\n"
    path.write_text(path.read_text() + "d,-1\n")
    with pytest.raises(UserError, match="is not as score wrote it"):
        write_submission(path, rows)
    assert {file.name for file in tmp_path.iterdir()} == {"labels.csv", ".labels.csv.sha256"}


def test_a_submission_never_replaces_a_device_or_a_file_of_its_own_name_with_part(tmp_path: Path) -> None:
    fifo, mine = tmp_path / "pipe", tmp_path / "s.csv.part"
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="pipe: exists"):
        write_submission(fifo, [("a", "-1")])
    assert fifo.is_fifo()
    mine.write_text("mine")
    write_submission(tmp_path / "s.csv", [("a", "-1")])
    assert mine.read_text() == "mine"


def test_main_refuses_a_submission_of_others_before_it_trains(dataset: Path, store: Path) -> None:
    (store / "output").mkdir()
    (store / "output" / "submission.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    source = dataset.with_name("sample")
    settings = make(
        Main,
        dicom_dir=source / "dicom-images-train",
        rle_csv=source / "train-rle.csv",
        test_dir=source / "dicom-images-test",
    )
    with pytest.raises(UserError, match=r"output/submission\.csv: exists"):
        main.main(settings)
    assert [run.info.status for run in runs("main")] == ["FAILED"]
    assert not runs("preprocess")
