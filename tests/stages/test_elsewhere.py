"""`mlflow run` in a folder of the user's: of a project from a git address, with a mistake, interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from command_server import CommandServer
from helpers import ROOT, copy_store, environment_of_mlflow, few_radiographs, store_address
from mlflow import MlflowClient
from mlflow.entities import Run
from tracking_server import wait_until

ADDRESS = "https://git.invalid/project"


def repository(folder: Path) -> dict[str, str]:
    """Makes a git repository of the project; environment in which ADDRESS leads to it."""
    shutil.copytree(ROOT / "pneumo_experiments", folder / "pneumo_experiments")
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, folder)
    author = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{folder}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }


def test_relative_paths_are_those_of_the_folder_where_mlflow_run_was_called(
    tmp_path: Path, empty_store: Path, dataset: Path, commands: CommandServer
) -> None:
    """Inputs, outputs and the store; but a config file that only the project has is found there."""
    here, clones, project = (tmp_path / name for name in ("here", "clones", "project"))
    for folder in (here, clones, project):
        folder.mkdir()
    copy_store(empty_store, here)
    few_radiographs(dataset.with_name("sample"), here / "sample", 3)
    environment = environment_of_mlflow("sqlite:///mlflow.db") | repository(project) | {"TMPDIR": str(clones)}
    words = ["run", ADDRESS, "-e", "preprocess", "--env-manager", "local"]
    given = {"dicom_dir": "sample", "rle_csv": "sample/train-rle.csv", "image_size": 32}
    given |= {"config": "configs/demo.yaml", "workers": 1}
    words += [f"-P{name}={value}" for name, value in given.items()]
    code = "import tempfile; tempfile.tempdir = None; from mlflow.cli import cli; cli()"  # reads TMPDIR
    ended, said = commands.start(*words, folder=here, environment=environment, code=code).communicate()
    assert ended == 0, said
    (clone,) = (path.parent for path in clones.glob("*/MLproject"))
    lines = [line[12:] for line in said.splitlines() if line.startswith("preprocess: ")]
    assert lines[0] == f"config: {clone}/pneumo_experiments/configs/demo.yaml"
    assert lines[-2] == f"report: {here}/output/dataset.report.html"
    assert lines[-1].endswith(f": {here}/output/dataset.h5")
    assert all(Path(path).is_file() for path in re.findall(r"(?<=: )/\S+", "\n".join(lines)))
    assert not (clone / "output").exists()
    names = {"sample", "output", "mlflow.db", "mlflow.db.lock", "mlruns"}
    assert {path.name for path in here.iterdir()} <= names
    (run,) = MlflowClient(f"sqlite:///{here}/mlflow.db").search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset_used"] == f"{here}/output/dataset.h5"
    assert run.data.params["dicom_dir_used"] == f"{here}/sample"


NOTE = "mlflow.note.content"


def only_run(folder: Path) -> Run:
    (run,) = MlflowClient(store_address(folder)).search_runs(["0"])
    return run


def test_a_missing_input_and_ctrl_c_end_the_run_of_mlflow_run_with_name_reason_and_status(
    tmp_path: Path, empty_store: Path, commands: CommandServer
) -> None:
    """MLflow itself names it at random, and calls an interrupted one FAILED."""
    mistaken, stopped = (tmp_path / name for name in ("mistaken", "stopped"))
    started = {}
    for folder, words in ((mistaken, "train -Pdataset=missing.h5"), (stopped, "sample -Pimages=3000")):
        folder.mkdir()
        copy_store(empty_store, folder)
        words = ["run", ROOT, "--env-manager", "local", "-e", *words.split()]
        variables = environment_of_mlflow(store_address(folder))
        if folder == mistaken:  # which needs no signal: its command may be one that has imported everything
            commands.write_python(folder)
            variables["PATH"] = f"{folder}{os.pathsep}{variables['PATH']}"
        code = "from mlflow.cli import cli; cli()"
        started[folder] = commands.start(*words, folder=folder, environment=variables, code=code)
    wait_until(lambda: any(stopped.rglob("*.dcm")))
    os.killpg(started[stopped].pid, signal.SIGINT)  # as in a terminal: it reaches the whole group
    ended, said = started[mistaken].communicate()
    line = f"dataset={mistaken}/missing.h5: no such file; run preprocess to write it"
    assert (ended, f"Error: {line}" in said.splitlines()) == (1, True)
    run = only_run(mistaken)
    assert (run.info.run_name, run.info.status, run.data.tags[NOTE]) == ("train", "FAILED", line)
    _, said = started[stopped].communicate()
    assert "Stopped; the same command again does the rest" in said.splitlines()
    wait_until(lambda: only_run(stopped).info.status == "KILLED")
    assert only_run(stopped).info.run_name == "sample"
    assert not any(stopped.rglob("*.dcm"))
