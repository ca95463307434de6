"""Trainings that are killed, meet a full disk, lose their server or get odd data: nothing is lost or mixed.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from command_server import CommandServer
from helpers import changed, make, store_address, store_in, working_in
from mlflow import MlflowClient
from mlflow.entities import Run
from samples import SIZE, examples, packed, write_dataset
from tracked import runs
from tracking_server import Server, calls_in, free_port

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed import ResizedImage, hash_patient
from pneumo_experiments.dataset.patients import warn
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, make_split, require_positives
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.settings import Score, Search, Train, as_params
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.search import search
from pneumo_experiments.stages.train import train

pytestmark = pytest.mark.usefixtures("no_layout", "no_code")

IMAGES = 24
# How the time was spent, which no two trainings share.
TIMES = {"seconds_per_epoch", "images_per_second", "wait_share"}

# Runs the command line until a moment that the first word names: there the process is killed.
KILLED = """
import os, signal, sys
from io import BytesIO
from pathlib import Path
import torch
from pneumo_experiments import cli
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.stages import train

def half(content, path):
    whole = BytesIO()
    save(content, whole)
    Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])

save = torch.save
MOMENTS = {
    "step": (torch.optim.AdamW, "step", 4, lambda *_: None),
    "validation": (Dataset, "mask", 2, lambda *_: None),
    "checkpoint": (torch, "save", 2, half),
}
room, name, number, first = MOMENTS[sys.argv.pop(1)]
calls, whole = [], getattr(room, name)

def struck(*args, **options):
    calls.append(name)
    if len(calls) == number:
        first(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **options)

setattr(room, name, struck)
cli.main()
"""


def larger(example: ResizedImage) -> ResizedImage:
    assert example.target is not None
    return replace(example, image=np.pad(example.image, 4), target=np.pad(example.target, 4))


def healthy(example: ResizedImage) -> ResizedImage:
    assert example.target is not None
    entry = replace(example.entry, annotations=0, area_px=0)
    return replace(example, entry=entry, target=np.zeros_like(example.target), rle=rle.EMPTY)


def lonely(example: ResizedImage) -> ResizedImage:
    return replace(example, entry=replace(example.entry, patient=hash_patient("the same")))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, tiny_default: None) -> dict[str, Path]:
    """The same radiographs as usual, larger, without a finding, and as those of one patient."""
    folder = tmp_path_factory.mktemp("data")
    kinds: dict[str, tuple[int, Callable[[ResizedImage], ResizedImage]]] = {
        "usual": (IMAGES, lambda example: example),
        "larger": (IMAGES // 2, larger),
        "healthy": (IMAGES // 2, healthy),
        "lonely": (2, lonely),
    }
    paths = {kind: folder / f"{kind}.h5" for kind in kinds}
    for kind, (count, changed_example) in kinds.items():
        images = packed(map(changed_example, examples(count)), "uint8")
        write_dataset(paths[kind], images, image_size=24 if kind == "larger" else SIZE, pixel_dtype="uint8")
    return paths


def settings_of(dataset: Path, **changes: Any) -> Train:
    short = make(
        Train,
        dataset=dataset,
        weights="none",
        precision="fp32",
        epochs=3,
        batch_size=8,  # two steps
        best_k=2,
        tta="none",
        threshold_trials=0,
        overlays=1,
    )
    return changed(short, **changes)


def recorded(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all that was logged, as often as it was; but for times and the machine's state."""
    names = {name for name in run.data.metrics if not name.startswith("system/")} - TIMES
    client = MlflowClient()
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names
    }


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the one model that was logged below the folder."""
    (path,) = folder.rglob("weights.pt")
    return torch.load(path, weights_only=True)


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights_in(folder), weights_in(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@dataclass(frozen=True)
class Whole:
    """A training that nothing disturbed: its folder, what it recorded, and its model's address."""

    folder: Path
    recorded: dict[str, list[tuple[int, float]]]
    model: str


@pytest.fixture(scope="module")
def whole(datasets: dict[str, Path], empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with store_in(tmp_path_factory.mktemp("whole"), empty_store) as folder:
        model = train(settings_of(datasets["usual"])).model
        (run,) = runs()
        return Whole(folder, recorded(run), model)


def test_a_training_killed_in_a_step_in_validation_or_in_the_checkpoint_ends_with_the_same_result(
    datasets: dict[str, Path],
    whole: Whole,
    store: Path,
    commands: CommandServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(datasets["usual"])
    words = [word for name, text in as_params(settings).items() for word in (f"--{name}", text)]
    options: dict[str, Any] = {"folder": store, "environment": dict(os.environ), "tiny": True}
    # All strike in the second epoch, the last when its metrics are recorded and its checkpoint half made.
    for moment, epochs_recorded in (("step", [1]), ("validation", [1]), ("checkpoint", [1, 2])):
        code, said = commands.start(moment, "train", *words, code=KILLED, **options).communicate()
        assert code == -signal.SIGKILL, said
        assert ("continues after epoch 1 of 3" in said) == (moment != "step")
        (run,) = runs()
        assert run.info.status == "RUNNING"
        assert [step for step, _ in recorded(run)["val_dice"]] == epochs_recorded
        (left,) = store.glob("output/checkpoints/*")
        sizes = [path.stat().st_size for path in left.glob("*.part")]
        last = Checkpoint(left).last()
        assert last is not None
        assert (last["run_id"], len(last["history"])) == (run.info.run_id, 1)
        assert not [*left.glob("*.part")]
    assert sizes == [pytest.approx((left / "last.pt").stat().st_size / 2, rel=0.01)]

    train(settings)
    assert "continues after epoch 1 of 3" in capsys.readouterr().out
    (run,) = runs()
    assert run.info.status == "FINISHED"
    found = recorded(run)
    twice = [name for name, steps in found.items() if len(steps) > len(set(steps))]
    assert twice  # the second epoch, and with the same values
    assert {name: sorted(set(steps)) for name, steps in found.items()} == whole.recorded
    assert_same_weights(store, whole.folder)
    assert not list(store.glob("output/checkpoints/*"))


def test_a_full_disk_costs_the_checkpoint_not_the_training(
    datasets: dict[str, Path], whole: Whole, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, unlimited = Checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    stayed: list[int] = []

    def save_on_a_disk_that_fills(self: Checkpoint, last: dict[str, Any], networks: dict[int, Any]) -> None:
        if len(last["history"]) != 2:
            return save(self, last, networks)
        # No file may grow beyond so many bytes: the kept network does not fit, then only the last state.
        for max_bytes in (2**16, 200 * 2**10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, unlimited[1]))
            try:
                save(self, last, networks)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            earlier = self.last()
            assert earlier is not None
            assert [*earlier["networks"]] == [1]
            assert not list(self.folder.glob("*.part"))
            stayed.append(len(earlier["history"]))
        return None

    monkeypatch.setattr(Checkpoint, "save", save_on_a_disk_that_fills)
    with pytest.warns(
        UserWarning, match="the training continues, but an interruption would lose it"
    ) as caught:
        train(settings_of(datasets["usual"]))
    reason = "the checkpoint cannot be written (the disk may be full: "
    assert [reason in str(warning.message) for warning in caught].count(True) == 2
    assert stayed == [1, 1]
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert recorded(run) == whole.recorded
    assert not list(store.glob("output/checkpoints/*"))


def test_a_changed_data_set_restarts_the_training_and_the_stale_checkpoint_stays(
    datasets: dict[str, Path],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(datasets["usual"], store / "d.h5")
    settings = settings_of(store / "d.h5", epochs=2, batch_size=16)
    save = Checkpoint.save

    def save_and_stop(self: Checkpoint, last: dict[str, Any], networks: dict[int, Any]) -> None:
        save(self, last, networks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    (stale,) = store.glob("output/checkpoints/*")
    before = {path.name: path.stat().st_mtime_ns for path in stale.iterdir()}

    shutil.copy(datasets["larger"], store / "d.h5")
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    said = capsys.readouterr().out
    assert "continues after" not in said
    assert re.findall(r"at (\d+) px.* (\d+) images", said) == [("16", "16"), ("24", "8")]
    first, second = runs()
    assert (
        [step for step, _ in recorded(first)["loss"]] == [step for step, _ in recorded(second)["loss"]] == [1]
    )
    assert recorded(first)["loss"] != recorded(second)["loss"]
    with Dataset.open(datasets["larger"]) as dataset:
        assert second.inputs is not None
        assert second.inputs.dataset_inputs[0].dataset.digest == dataset.fingerprint[:16]
    assert {path.name: path.stat().st_mtime_ns for path in stale.iterdir()} == before
    of_run = {last["run_id"] for path in stale.parent.iterdir() if (last := Checkpoint(path).last())}
    assert of_run == {first.info.run_id, second.info.run_id}


def test_a_checkpoint_of_another_network_is_refused_in_one_line(
    datasets: dict[str, Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(datasets["usual"], epochs=2, batch_size=16)
    save = Checkpoint.save

    def save_and_stop(self: Checkpoint, last: dict[str, Any], networks: dict[int, Any]) -> None:
        save(self, last, networks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    (left,) = store.glob("output/checkpoints/*")
    for path in left.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        network = content["state"]["network"] if path.name == "last.pt" else content
        network[next(iter(network))] = torch.ones(2, 3)
        torch.save(content, path)
    with pytest.raises(UserError, match=r"^resume=true: the checkpoint does not fit .*; resume=false") as e:
        train(settings)
    assert "\n" not in str(e.value)
    train(changed(settings, resume=False))
    assert {run.info.status for run in runs()} <= {"FINISHED", "FAILED", "KILLED"}


def test_a_data_set_without_a_finding_is_refused_before_anything_is_learned(
    datasets: dict[str, Path], store: Path
) -> None:
    with Dataset.open(datasets["healthy"]) as dataset:
        images = len(make_split(dataset, make(Train).split).train)
    line = (
        rf"^dataset: none of the {images} training images has a pneumothorax, so there is nothing to learn;"
    )
    with pytest.raises(UserError, match=line):
        train(settings_of(datasets["healthy"], epochs=1))
    with pytest.raises(UserError, match=line):
        search(make(Search, dataset=datasets["healthy"], network="tiny", weights="none", storage="none"))
    assert {run.info.run_name: run.info.status for run in runs()} == {"train": "FAILED"}
    assert not mlflow.search_logged_models(experiment_ids=["0"], output_format="list")


def test_of_findings_alone_a_training_warns(
    datasets: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Dataset.open(datasets["larger"]) as dataset:
        findings = np.flatnonzero([entry.area_px > 0 for entry in dataset.entries])
        for indices, is_warned in ((np.arange(len(dataset)), False), (findings, True)):
            warn.cache_clear()
            require_positives(Subset(dataset, indices))
            assert ("every training image has a pneumothorax" in caplog.text) == is_warned
    assert 0 < len(findings) < len(dataset)


def test_a_data_set_of_one_patient_cannot_be_divided_and_says_so(
    datasets: dict[str, Path], store: Path
) -> None:
    for changes, needed in (({}, 6), ({"holdout": 0.0, "folds": 2}, 2)):
        with pytest.raises(UserError) as caught:
            train(settings_of(datasets["lonely"], **changes))
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"folds={changes.get('folds', 5)}")
        assert f"needs {needed} patients, the data set has 1" in line
        assert line.endswith("name the patients in patients_csv")
    assert {run.info.status for run in runs()} == {"FAILED"}
    assert not (store / "output").exists()


def test_a_model_is_not_scored_on_images_of_a_size_that_it_does_not_serve(
    datasets: dict[str, Path], whole: Whole
) -> None:
    with (
        working_in(whole.folder, store_address(whole.folder)),
        pytest.raises(UserError, match=r"larger\.h5: .*24 px.*=16$") as caught,
    ):
        score(Score(model=whole.model, dataset=datasets["larger"], subset="all", overlays=0))
    assert len(str(caught.value).splitlines()) == 1


def test_a_training_whose_server_dies_sends_everything_when_the_server_is_back(
    datasets: dict[str, Path],
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    commands: CommandServer,
) -> None:
    server = Server(tmp_path, free_port(), commands)
    save = Checkpoint.save

    def save_and_kill_the_server(self: Checkpoint, last: dict[str, Any], networks: dict[int, Any]) -> None:
        save(self, last, networks)
        server.kill()

    try:
        server.start()
        with working_in(tmp_path, server.uri), monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_kill_the_server)
            trained = train(settings_of(datasets["usual"]))
        start, model, last = (record.getMessage() for record in caplog.records)
        assert "unreachable" in start
        assert trained.model in model
        (file,) = re.findall(r"undelivered.* in (\S+); .* python -m pneumo_experiments\.tracking \1$", last)
        missing = calls_in(tmp_path / file)
        assert [call["step"] for call in missing if call["call"] == "metrics"] == [2, 3, 3]
        server.start()
        with working_in(tmp_path, server.uri):
            (run,) = runs()
            assert {step for steps in recorded(run).values() for step, _ in steps} == {1}
            with monkeypatch.context() as patch:
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
