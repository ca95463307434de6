"""What --dry_run says, and that it does nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import Call
from tiny_network import tiny_member

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, new_folder, save
from pneumo_experiments.settings import ENTRY_POINTS, SplitSettings
from pneumo_experiments.tracking.models import save_model


@pytest.fixture
def desk(tmp_path: Path, dataset: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a data set, its radiographs and a model, but without a store."""
    with new_folder() as data:
        save(data, Detector((tiny_member(0),), 32, Thresholds(), "f" * 64))
        save_model(tmp_path / "model", data)
    shutil.copy(dataset, tmp_path)
    (tmp_path / "sample").symlink_to(dataset.with_name("sample"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


WORDS = {
    "main": "--dicom_dir sample --rle_csv sample/train-rle.csv",
    "sample": "",
    "get_data": "",
    "preprocess": "--dicom_dir sample --rle_csv sample/train-rle.csv",
    "train": "--dataset d.h5 --fold 1 --epochs 3",
    "search": "--dataset d.h5",
    "score": "--dataset d.h5 --model model",
    "register": "",
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_dry_run_says_where_the_run_would_be_and_writes_nothing(name: str, desk: Path, call: Call) -> None:
    before = sorted(desk.rglob("*"))
    end = call([name, *WORDS[name].split(), "--dry-run"])
    assert (end.code, end.err) == (0, "")
    lines = end.out.splitlines()
    assert f"  a run in sqlite:///{desk}/mlflow.db".replace(f"{desk}/", "") in lines
    assert lines[-1] == f"{name}: a dry run: nothing is done"
    assert sorted(desk.rglob("*")) == before


def test_a_dry_training_shows_what_was_chosen_and_each_subset(desk: Path, call: Call) -> None:
    lines = call(["train", *WORDS["train"].split(), "--dry_run"]).out.splitlines()
    chosen = [line.split()[1:] for line in lines if line.startswith("*")]
    assert chosen == [["dataset", "d.h5"], ["epochs", "3"], ["fold", "1"]]
    with Dataset.open(Path("d.h5")) as dataset:
        parts = make_split(dataset, SplitSettings(fold="1"))
        for name in ("train", "validation", "holdout"):
            subset = Subset(dataset, getattr(parts, name))
            counts = len(subset), (subset.areas_px > 0).sum(), len(set(subset.patients))
            assert [name, *map(str, counts)] in [line.split() for line in lines]
    count = len(parts.train)
    assert any(
        f"3 epochs of {count} images, and {len(parts.validation)} to validate" in line for line in lines
    )
    assert any("kB of memory" in line for line in lines)


def test_a_dry_preprocess_counts_the_files_and_a_dry_score_of_a_folder_too(desk: Path, call: Call) -> None:
    with Dataset.open(Path("d.h5")) as dataset:
        positive = sum(entry.annotations > 0 for entry in dataset.entries)
        count = len(dataset)
    said = call(["preprocess", *WORDS["preprocess"].split(), "--image_size", "64", "--dry_run"]).out
    assert f"  {count} images, {positive} with run lengths\n" in said
    assert f"  at 64 px less than {2 * count * 64 * 64 * 4 / 1000:.0f} kB" in said
    words = "score --model model --dicom_dir sample/dicom-images-train --submission s.csv --dry_run"
    said = call(words.split()).out
    assert "  model model: tiny at 32 px\n" in said
    assert f"  {count} images in sample/dicom-images-train\n" in said
    assert "  s.csv\n" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --dataset d.h5 --fold 7", "fold=7: does not exist; set fold from 0 to 4"),
        ("score --dataset d.h5", "model=models:/pneumothorax@champion: no folder, and there is no store"),
        ("register --model nothing", "model=nothing: no folder, and there is no store"),
        ("train --dataset missing.h5", "dataset=missing.h5: no such file; run preprocess to write it"),
        ("preprocess --dicom_dir . --rle_csv sample/sample.json", "sample/sample.json: found the one column"),
    ],
)
def test_a_dry_run_finds_mistakes(words: str, line: str, desk: Path, call: Call) -> None:
    assert call([*words.split(), "--dry_run"]).mistake.startswith(line)
