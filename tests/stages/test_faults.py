"""Trainings that are killed, meet a full disk, lose their server or get other data: nothing is lost or mixed.

All that end compare bit for bit with one that nothing disturbed.
"""

from __future__ import annotations

import os
import re
import resource
import runpy
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import CommandServer
from helpers import (
    STRUCK,
    before_each_step,
    changed,
    copy_store,
    interrupted_before_step,
    make,
    soak,
    store_in,
    words_of,
    working_in,
)
from mlflow import MlflowClient
from mlflow.entities import Run
from samples import write
from tracked import runs
from tracking_server import Server, free_port

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import Train
from pneumo_experiments.stages.train import train

pytestmark = pytest.mark.usefixtures("no_charts", "no_code", "tiny_default")

# How the time was spent, which no two trainings share.
TIMES = {"speed/seconds_per_epoch", "speed/images_per_second", "speed/wait_fraction"}


def settings_of(dataset: Path, **changes: Any) -> Train:
    """Three epochs of two steps."""
    short = make(Train, dataset=dataset, weights="none", precision="fp32", epochs=3, batch_size=8, best_k=2)
    return changed(short, tta="none", threshold_trials=0, overlays=0, **changes)


def recorded(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all that was logged, as often as it was; but for times and the machine's state."""
    names = {name for name in run.data.metrics if not name.startswith("system/")} - TIMES
    client = MlflowClient()
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names
    }


def assert_same_weights(folder: Path, other: Path) -> None:
    """Of the one model that was logged below each folder."""
    ours, theirs = (
        torch.load(path, weights_only=True) for each in (folder, other) for path in each.rglob("weights.pt")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def checkpoint_files() -> dict[str, bytes]:
    """The files of the checkpoints in the working directory, but for locks."""
    paths = Path("output", "checkpoints").glob("*/*")
    return {str(path): path.read_bytes() for path in paths if path.suffix != ".lock" and path.name != ".lock"}


@dataclass(frozen=True)
class Whole:
    """A training that nothing disturbed: its folder and what it recorded."""

    folder: Path
    recorded: dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def whole(small_dataset: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with store_in(tmp_path_factory.mktemp("whole"), empty_store) as folder:
        train(settings_of(small_dataset))
        (run,) = runs()
        return Whole(folder, recorded(run))


@pytest.mark.parametrize(
    "moment",
    [
        "torch.optim.AdamW.step=4,torch.save=1",
        pytest.param("torch.optim.AdamW.step=4", marks=soak),
        pytest.param("torch.optim.AdamW.step=4,torch.nn.Module.eval=1", marks=soak),
        pytest.param("torch.optim.AdamW.step=4,torch.save=2", marks=soak),
    ],
)
def test_a_killed_training_continues_in_its_run_and_ends_with_the_same_result(
    moment: str,
    small_dataset: Path,
    whole: Whole,
    store: Path,
    commands: CommandServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the second epoch: in a step, in validation, or when a file of the checkpoint is half written."""
    settings = settings_of(small_dataset)
    words: list[Any] = ["SIGKILL", moment, "train", *words_of(settings)]
    options: dict[str, Any] = {"folder": store, "environment": dict(os.environ), "tiny": True}
    code, said = commands.start(*words, code=STRUCK, **options).communicate()
    assert code == -signal.SIGKILL, said
    (run,) = runs()
    assert run.info.status == "RUNNING"
    assert recorded(run)["epoch/dice"][0][0] == 1
    assert bool([*store.rglob("*.part")]) == ("save" in moment)

    train(settings)
    assert "continues after epoch 1 of 3" in capsys.readouterr().out
    (run,) = runs()
    assert run.info.status == "FINISHED"
    # What was recorded twice has the same values.
    assert {name: sorted(set(steps)) for name, steps in recorded(run).items()} == whole.recorded
    assert_same_weights(store, whole.folder)
    assert not list(store.glob("output/checkpoints/*"))


def test_a_full_disk_costs_the_checkpoint_not_the_training(
    small_dataset: Path, whole: Whole, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, unlimited = {2: 200 * 2**10, 3: 2**16}, resource.getrlimit(resource.RLIMIT_FSIZE)
    epoch, save, kept = 0, torch.save, dict[int, dict[str, bytes]]()

    def before_step(number: int) -> None:
        nonlocal epoch
        epoch = (number + 1) // 2
        kept.setdefault(epoch, checkpoint_files())

    def save_on_a_disk_that_fills(content: object, path: Path) -> None:
        """In the second epoch a network fits and the state does not, in the third not even a network."""
        limit = limits.get(epoch) if "checkpoints" in str(path) else None  # the model is saved elsewhere
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or unlimited[0], unlimited[1]))
        try:
            save(content, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    before_each_step(monkeypatch, before_step)
    monkeypatch.setattr(torch, "save", save_on_a_disk_that_fills)
    with pytest.warns(UserWarning, match="the training continues") as caught:
        train(settings_of(small_dataset))
    assert len([each for each in caught if "checkpoint cannot be written" in str(each.message)]) == 2
    assert kept[2] and kept[2].items() <= kept[3].items()  # the first epoch's, and no half-written file
    assert all(name.endswith(".pt") for name in kept[3])
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert recorded(run) == whole.recorded
    assert not list(store.glob("output/checkpoints/*"))


def test_a_changed_data_set_restarts_the_training_and_the_stale_checkpoint_stays(
    small_dataset: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(small_dataset, store / "d.h5")
    settings = settings_of(store / "d.h5", batch_size=16)  # an epoch has one step
    with interrupted_before_step(2):
        train(settings)
    stale = checkpoint_files()
    assert stale
    (store / "d.h5").unlink()
    fingerprint = write(store / "d.h5", count=12)
    with interrupted_before_step(2):
        train(settings)
    said = capsys.readouterr().out
    assert "continues after" not in said
    assert re.findall(r"at \d+ px.* (\d+) images", said) == ["16", "8"]
    first, second = runs()
    assert len(recorded(first)["loss/total"]) == len(recorded(second)["loss/total"]) == 1
    assert recorded(first)["loss/total"] != recorded(second)["loss/total"]
    assert second.inputs is not None
    assert second.inputs.dataset_inputs[0].dataset.digest == fingerprint[:16]
    assert stale.items() < checkpoint_files().items()


def with_other_shapes(content: Any) -> Any:
    """What ``torch.load`` gave, as of another network."""
    if isinstance(content, dict):
        return {name: with_other_shapes(value) for name, value in content.items()}
    return torch.ones(2, 3) if isinstance(content, torch.Tensor) and content.ndim else content


def test_a_checkpoint_of_another_network_is_refused_and_resume_false_trains_anew(
    small_dataset: Path, store: Path
) -> None:
    settings = settings_of(small_dataset, epochs=2, batch_size=16)
    with interrupted_before_step(2):
        train(settings)
    for name in checkpoint_files():
        torch.save(with_other_shapes(torch.load(name, weights_only=True)), name)
    with pytest.raises(UserError, match=r"^resume=true: .*resume=false"):
        train(settings)
    train(changed(settings, resume=False))
    assert {run.info.status for run in runs()} <= {"FINISHED", "FAILED", "KILLED"}
    assert not checkpoint_files()


def test_a_training_whose_server_dies_sends_everything_when_the_server_is_back(
    small_dataset: Path,
    whole: Whole,
    empty_store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    commands: CommandServer,
) -> None:
    copy_store(empty_store, tmp_path, "mlflow-artifacts:/0").rename(tmp_path / "server.db")
    server = Server(tmp_path, free_port(), commands)
    try:
        server.start()
        with working_in(tmp_path, server.uri), pytest.MonkeyPatch.context() as patch:
            before_each_step(patch, lambda number: number == 3 and server.kill())  # in the second epoch
            trained = train(settings_of(small_dataset))
        assert "unreachable" in caplog.text
        assert trained.model in caplog.text
        (file,) = re.findall(
            r"undelivered.* in (\S+); .* python -m pneumo_experiments\.tracking \1$",
            caplog.text,
            re.MULTILINE,
        )
        server.start()
        with working_in(tmp_path, server.uri):
            (run,) = runs()
            assert {step for steps in recorded(run).values() for step, _ in steps} == {1}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["", file])
                patch.delitem(sys.modules, "pneumo_experiments.tracking.__main__", raising=False)
                runpy.run_module("pneumo_experiments.tracking", run_name="__main__")
            (run,) = runs()
            assert run.info.status == "FINISHED"
            assert recorded(run) == whole.recorded  # every epoch once, in order
            (logged,) = server.client.search_logged_models(["0"])
            assert logged.source_run_id == run.info.run_id
        assert_same_weights(tmp_path / "artifacts", whole.folder)
        assert not (tmp_path / file).parent.exists()
    finally:
        server.kill()
