"""Runs, their files and models in the store where a test works."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pneumo_experiments import tracking
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.serving import Detector, new_folder, save
from pneumo_experiments.settings import Train


def runs(name: str = "") -> list[Run]:
    """Those whose name begins so, the oldest first."""
    every = MlflowClient().search_runs(["0"], order_by=["attributes.start_time ASC"])
    return [run for run in every if run.info.run_name.startswith(name)]


def last_run(name: str = "") -> Run:
    """The newest whose name begins so."""
    return runs(name)[-1]


def artifact(run: Run, path: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=path))


def table(run: Run, path: str) -> list[dict[str, str]]:
    """The rows of a CSV file among the artifacts."""
    with artifact(run, path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log_model(detector: Detector, settings: Train) -> str:
    """Logs a model as ``train`` does, but for the training; returns its address."""
    with new_folder() as folder, tracking.run("train", settings):
        save(folder, detector)
        return tracking.log_model(folder)


def log_empty_model() -> str:
    """Logs a model without a network in a training's run; returns its address."""
    with tempfile.TemporaryDirectory() as folder, tracking.run("train", Train()):
        Path(folder, "model.json").write_text("{}")
        return tracking.log_model(Path(folder))


@contextmanager
def stopped_in_training(number: int, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Ctrl-C as soon as the training of that number in the block has saved its first checkpoint."""
    save, saved = Checkpoint.save, list[str]()

    def save_and_stop(self: Checkpoint, *state: Any) -> None:
        save(self, *state)
        saved.append(self.folder.name)
        if len(set(saved)) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_stop)
        yield
