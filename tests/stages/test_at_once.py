"""The same command twice at once, and files of others where ours shall go: nothing is mixed or lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_server import CommandServer
from helpers import STRUCK, few_radiographs, make, soak, words_of
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import runs
from tracking_server import TIMEOUT_SECONDS, wait_until

from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import write_submission
from pneumo_experiments.settings import Main, Preprocess, Train
from pneumo_experiments.stages import main
from pneumo_experiments.synthetic.kaggle_layout import Contents, is_sample, write_sample

pytestmark = pytest.mark.usefixtures("no_charts", "no_code", "tiny_default")

SHORT = {"weights": "none", "precision": "fp32", "threshold_trials": 0, "overlays": 0}
SHORT |= {"batch_size": 8, "best_k": 1, "tta": "none"}


def steps_of(run: Run, metric: str = "loss/total") -> list[int]:
    return [found.step for found in MlflowClient().get_metric_history(run.info.run_id, metric)]


@pytest.mark.parametrize("second_seed", [0, 7])
@pytest.mark.parametrize("is_first_interrupted", [False, True])
def test_a_second_sample_waits_for_the_first_and_takes_what_that_made_or_is_refused(
    is_first_interrupted: bool, second_seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the first has failed, the second makes its own."""
    folder, said = tmp_path / "s", list[str]()
    second = list[Future[bool]]()

    def hears_waiting() -> bool:
        said.append(capsys.readouterr().out)
        return f"another process writes {folder}; waiting until it ends" in "".join(said)

    def start_the_second() -> None:
        if not second:
            second.append(pool.submit(write_sample, folder, Contents(2, 0, second_seed), lambda: None, 1))
            wait_until(hears_waiting)
            if is_first_interrupted:
                raise KeyboardInterrupt

    with ThreadPoolExecutor() as pool:
        if is_first_interrupted:
            with pytest.raises(KeyboardInterrupt):
                write_sample(folder, Contents(2, 0, 0), start_the_second, 1)
            assert second[0].result(TIMEOUT_SECONDS) is True
        else:
            assert write_sample(folder, Contents(2, 0, 0), start_the_second, 1) is True
            if second_seed == 0:
                assert second[0].result(TIMEOUT_SECONDS) is False
            else:
                with pytest.raises(UserError, match="exists and is not an empty folder"):
                    second[0].result(TIMEOUT_SECONDS)
    assert is_sample(folder, Contents(2, 0, second_seed if is_first_interrupted else 0))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".dcm", ".csv", ".json"}


Both = Callable[[str, str, list[str]], tuple[str, str]]


@pytest.fixture
def both(commands: CommandServer, store: Path) -> Both:
    """What two processes say that run the same command; the first stops until the second waits for it."""

    def run(moment: str, entry_point: str, words: list[str]) -> tuple[str, str]:
        options: dict[str, Any] = {"folder": store, "environment": dict(os.environ), "tiny": True}
        first = commands.start("SIGSTOP", moment, entry_point, *words, code=STRUCK, **options)
        wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
        second, heard = commands.start(entry_point, *words, **options), ""
        while "waiting until it ends" not in heard:
            line = second.stdout.readline()
            assert line, heard
            heard += line
        first.send_signal(signal.SIGCONT)
        ends = first.communicate(), second.communicate()
        assert [code for code, _ in ends] == [0, 0], (ends, heard)
        return ends[0][1], heard + ends[1][1]

    return run


def test_a_second_preprocess_waits_for_the_first_and_takes_what_it_made(
    dataset: Path, store: Path, both: Both
) -> None:
    source = few_radiographs(dataset.with_name("sample"), store / "few", 3)
    settings = make(Preprocess, **source, dataset=store / "d.h5", image_size=32, workers=1)
    first, second = both("h5py.Group.create_dataset=1", "preprocess", words_of(settings))
    assert "exists already" not in first
    assert f"another process writes {store / 'd.h5'}" in second
    assert "exists already, from the same files and settings" in second
    assert not (store / "d.h5.work").exists()
    assert [run.info.status for run in runs("preprocess")] == ["FINISHED", "FINISHED"]


def test_a_second_training_with_the_same_settings_waits_and_neither_enters_the_others_run(
    small_dataset: Path, store: Path, both: Both
) -> None:
    settings = make(Train, **SHORT, dataset=small_dataset, epochs=1)
    _, second = both("torch.optim.AdamW.step=1", "train", words_of(settings))
    assert "epoch 1/1" in second
    one, two = runs("train")
    assert steps_of(one) == steps_of(two) == [1]
    assert steps_of(one, "val/dice") == steps_of(two, "val/dice") == [0]
    assert one.data.metrics["loss/total"] == two.data.metrics["loss/total"]
    models = MlflowClient().search_logged_models(["0"])
    assert sorted(str(model.source_run_id) for model in models) == sorted([one.info.run_id, two.info.run_id])
    assert not (store / "output").exists()


def test_main_killed_after_its_training_takes_it_as_it_ended(
    dataset: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(settings: object) -> None:
        raise KeyboardInterrupt

    short = SHORT | few_radiographs(dataset.with_name("sample"), store / "few", 14)
    settings = make(Main, **short, trials=0, image_size=32, epochs=2, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(main, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            main.main(settings)
    assert len([*Path("output/checkpoints").iterdir()]) == 1
    assert "epoch 2/2" in capsys.readouterr().out
    main.main(settings)
    said = capsys.readouterr().out
    assert "train: continues after epoch 2 of 2" in said
    assert "/2  loss" not in said
    ended, taken = runs("train")
    assert ended.info.status == taken.info.status == "FINISHED"
    assert steps_of(ended) == steps_of(taken) == [1, 2]  # each run shows all, once
    assert ended.data.metrics["val/dice"] == taken.data.metrics["val/dice"]
    assert [run.info.status for run in runs("main")] == ["KILLED", "FINISHED"]
    assert not [*Path("output").rglob("*.pt")]


@soak  # each stage beside its like is tested above
def test_two_whole_chains_at_once_in_one_folder_both_end_well(store: Path, commands: CommandServer) -> None:
    chosen = SHORT | {"images": 24, "test_images": 2, "image_size": 32, "epochs": 1, "trials": 1}
    chosen |= {"folds": 2, "holdout": 0.3}  # else a fold has one patient
    words = [f"--{name}={value}" for name, value in (chosen | {"search_images": 8, "overlays": 1}).items()]
    options: dict[str, Any] = {"folder": store, "environment": dict(os.environ), "tiny": True}
    for process in [commands.start("main", *words, **options) for _ in range(2)]:
        code, said = process.communicate()
        assert code == 0, said
    found = MlflowClient().search_runs(["0"])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len(found) == 17  # two of each stage, score twice, but one trial of the common study
    assert len({run.data.metrics["dice"] for run in runs("main")}) == 1
    assert {v.version for v in MlflowClient().search_model_versions("name = 'pneumothorax'")} == {1, 2}
    left = [path for path in (store / "output").rglob("*") if path.suffix in {".part", ".work", ".pt"}]
    # The network that all trials and the training started from is their `weights`.
    assert {path.parent.name.split("-")[0] for path in left} <= {"warm"}, left


def test_a_submission_replaces_a_submission_and_nothing_else(tmp_path: Path) -> None:
    path, rows = tmp_path / "labels.csv", [("a", "1 2"), ("b", "-1")]
    labels = "ImageId,EncodedPixels\na,1 2\nb,-1\n"  # the same ids, header and form, and even the same rows
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
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: exists"):
        write_submission(tmp_path / "pipe", rows)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "s.csv.part").write_text("mine")
    write_submission(tmp_path / "s.csv", rows)
    assert (tmp_path / "s.csv.part").read_text() == "mine"
    names = {"labels.csv", ".labels.csv.sha256", "pipe", "s.csv", ".s.csv.sha256", "s.csv.part"}
    assert {file.name for file in tmp_path.iterdir()} == names
