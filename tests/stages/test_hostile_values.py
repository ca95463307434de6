"""Hostile texts and paths for every setting that takes one: a success, or one line and exit code 2.

A few of all cases, many in make soak.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import IS_SOAK, environment, make, store_address, store_in
from mlflow import MlflowClient

from pneumo_experiments.settings import ENTRY_POINTS, Register, leaves
from pneumo_experiments.stages.register import register

if TYPE_CHECKING:
    from command_server import CommandServer

VALUES = (
    *("", " ", "x" * 300, "~nosuchuser/x", "../../..", ".", "a\nb", "%s {0} $(id) ;&|", "\udcff", "ü é 気胸"),
    *("/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self/fd/0", "/proc/nowhere/at/all"),
    *("models:/", "models:/a@b@c", "models:/pneumothorax/0", "models:/m-1,models:/m-2"),
    *("runs:/", "runs:/x/../.."),
    *("http://127.0.0.1:9/x", "file:///dev/zero", "s3://bucket/x", "sqlite:///", "sqlite:////dev/full"),
    *("postgresql://u:Secret@127.0.0.1:9/x", "best", "auto", "none", "null", "all", "-1", "1e999", "true"),
)
# What makes an entry point short.
SHORT = {
    "main": ["--images", 10, "--test_images", 1, "--image_size", 32, "--epochs", 1, "--trials", 1],
    "sample": ["--images", 10, "--test_images", 1],
    "get_data": [],
    "preprocess": ["--dicom_dir", "{sample}/dicom-images-train", "--rle_csv", "{sample}/train-rle.csv"],
    "train": ["--dataset", "{dataset}", "--epochs", 1],
    "search": ["--dataset", "{dataset}", "--trials", 1, "--search_epochs", 1, "--confirm", 0, "--keep", 0],
    "score": ["--dataset", "{dataset}", "--overlays", 1],
    "register": [],
}
UNTRAINED = ["--weights", "none", "--device", "cpu", "--threshold_trials", 0, "--overlays", 0]


def cases() -> list[tuple[str, str, str]]:
    """Entry point, setting, value."""
    return [
        (entry_point, leaf.name, value)
        for entry_point, kind in ENTRY_POINTS.items()
        for leaf in leaves(kind)
        if leaf.type in (str, Path, Path | None)
        for value in VALUES
        # A folder or file to write may have any name, and the step says where it is.
        if "Secret" not in value or leaf.name not in ("output_dir", "dataset")
    ]


@dataclass(frozen=True)
class Desk:
    """A store with a champion, a sample and its data set, in a folder beside that of the commands."""

    folder: Path
    dataset: Path
    commands: CommandServer

    def words(self, entry_point: str) -> list[str]:
        values = {"sample": self.dataset.parent / "sample", "dataset": self.dataset}
        words = [str(word).format(**values) for word in SHORT[entry_point]]
        if entry_point in ("main", "train", "search"):
            words += [str(word) for word in UNTRAINED if entry_point != "search"]
            words += ["--weights", "none", "--folds", "2"]
        return words


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    dataset: Path,
    tiny_default: None,
    trained_store: Path,
    commands: CommandServer,
) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(dataset.parent, folder, dirs_exist_ok=True)
    with store_in(folder, trained_store):
        (model,) = MlflowClient().search_logged_models(["0"])
        register(make(Register, model=model.model_uri, promote="always"))
        yield Desk(folder, folder / dataset.name, commands)


def chosen() -> list[tuple[str, str, str]]:
    return random.Random(0).sample(cases(), 400 if IS_SOAK else 5)


@pytest.mark.parametrize(
    ("entry_point", "setting", "value"), chosen(), ids=lambda text: ascii(text)[1:-1][:30]
)
def test_a_hostile_text_is_a_success_or_one_line(
    desk: Desk, tmp_path: Path, entry_point: str, setting: str, value: str
) -> None:
    work = tmp_path / "a" / "b" / "c"
    work.mkdir(parents=True)
    words = [*desk.words(entry_point), f"--{setting}={value}"]
    variables = environment() | {"MLFLOW_TRACKING_URI": store_address(desk.folder)}
    variables |= {"KAGGLE_API_ENDPOINT": "http://127.0.0.1:9"}  # who runs this may have a token
    options: dict[str, Any] = {"folder": work, "environment": variables, "tiny": True}
    code, said = desk.commands.start(entry_point, *words, **options).communicate()
    assert code in (0, 2), said
    assert "Traceback" not in said, said
    assert said.count("Error:") == (code == 2), said
    assert "Secret" not in said, said
    assert len(said.splitlines()[-1]) < 2000
    running = MlflowClient().search_runs(["0"], "attributes.status = 'RUNNING'")
    assert not running, [run.info.run_name for run in running]
    # What goes above the working directory was asked for by name.
    assert {path.name for path in tmp_path.iterdir()} == {"a"} or value == "../../.."
    shutil.rmtree(tmp_path / "a")  # of all cases together it would be much
