"""kill -9 at random moments, then the same command again: the end is an undisturbed run's.

PNEUMO_KILLS=25 (make soak) kills more often than the few times of the suite, and prints where it struck.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.synthetic.kaggle_layout import write_sample

KILLS = int(os.environ.get("PNEUMO_KILLS") or 4)
IMAGES = 160  # five batches
PATIENCE_SECONDS = 120
# What lies on the disk tells how far the work is.
STAGES = ("starting", "reading", "assembling", "reporting")


def stage(dataset: Path) -> str:
    work = dataset.with_name(f"{dataset.name}.work")
    if not work.exists():
        return "starting"
    if dataset.exists():
        return "reporting"
    return "assembling" if [*work.glob(f"{dataset.name}.*.part")] and all_made(work) else "reading"


def all_made(work: Path) -> bool:
    return sum(not path.suffix and not path.name.startswith(".") for path in work.iterdir()) == 5


def start(sample: Path, folder: Path) -> subprocess.Popen[str]:
    words = ["--dicom_dir", sample / "dicom-images-train", "--rle_csv", sample / "train-rle.csv"]
    words += ["--dataset", "d.h5", "--image_size", "384", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "pneumo_experiments", "preprocess", *map(str, words)],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{sample.parent}/mlflow.db"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(sample: Path, folder: Path) -> bytes:
    """Runs the command to its end; the data set's bytes."""
    process = start(sample, folder)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert {path.name for path in folder.glob("d.*")} == {"d.h5", "d.report.html", "d.report.json"}
    return (folder / "d.h5").read_bytes()


def kill_in(wanted: str, sample: Path, folder: Path, chance: random.Random) -> str:
    """Starts the command, kills it a little after it reached the stage; where it was when it died."""
    dataset = folder / "d.h5"
    process = start(sample, folder)
    workers = list[psutil.Process]()
    while process.poll() is None and stage(dataset) != wanted:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, {"starting": 2, "reading": 0.5}.get(wanted, 0.02)))
    if process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        struck = stage(dataset)
        process.send_signal(signal.SIGKILL)
    else:
        struck = "ended"
    process.communicate()
    assert psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)[1] == []  # no worker outlives its parent
    return struck


def test_killed_at_any_moment_the_same_command_ends_in_the_same_file(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample", IMAGES, 0, seed=1)
    (tmp_path / "whole").mkdir()
    whole = finish(tmp_path / "sample", tmp_path / "whole")
    chance, struck = random.Random(0), Counter[str]()
    for number in range(KILLS):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        # Sometimes more than once before it may end.
        for wanted in [STAGES[number % len(STAGES)], *chance.choices(STAGES[:2], k=number % 3 // 2)]:
            struck[kill_in(wanted, tmp_path / "sample", folder, chance)] += 1
            try:
                Dataset.open(folder / "d.h5").close()  # under the final name lies a whole file or none
            except UserError as error:
                assert "no such data set" in str(error)
        assert finish(tmp_path / "sample", folder) == whole
    print(f"\n{sum(struck.values())} kills, {KILLS} reruns, all equal: {dict(struck)}")
    assert len(set(struck) - {"ended"}) >= 3


@pytest.mark.skipif(KILLS < 10, reason="make soak")
def test_a_killed_worker_is_an_error_and_the_same_command_ends_the_work(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample", IMAGES, 0, seed=1)
    (tmp_path / "whole").mkdir()
    whole = finish(tmp_path / "sample", tmp_path / "whole")
    process = start(tmp_path / "sample", tmp_path)
    while stage(tmp_path / "d.h5") != "reading" or not list((tmp_path / "d.h5.work").glob("*.now")):
        time.sleep(0.001)
    workers = [
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, output
    assert "workers: a worker process was killed" in output
    assert finish(tmp_path / "sample", tmp_path) == whole
