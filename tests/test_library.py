"""The package from Python: its names, their examples, and the wheel that brings it."""

from __future__ import annotations

import ast
import doctest
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from helpers import ROOT, environment, store_in
from mlflow import MlflowClient

import pneumo_experiments
import pneumo_experiments.search.space  # a room with the name of a function
from pneumo_experiments import TorchDataset, UserError, best_thresholds, cli, load_model
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import Rejected
from pneumo_experiments.settings import ENTRY_POINTS, Recipe, Train, from_flat

pytestmark = pytest.mark.usefixtures("tiny_default", "no_charts", "no_code")
FINDER = doctest.DocTestFinder()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, trained_store: Path, small_dataset: Path, dataset: Path
) -> Iterator[Path]:
    """The working directory: a data set, a model, the store that has it as champion, and radiographs."""
    with store_in(tmp_path_factory.mktemp("library"), trained_store) as here:
        (model,) = mlflow.search_logged_models(output_format="list")
        version = mlflow.register_model(model.model_uri, "pneumothorax").version
        MlflowClient().set_registered_model_alias("pneumothorax", "champion", version)
        shutil.copytree(mlflow.artifacts.download_artifacts(model.model_uri), here / "model")
        shutil.copy(small_dataset, here / "dataset.h5")
        (here / "radiographs").mkdir()
        for name, file in zip("ab", sorted((dataset.parent / "sample").rglob("*.dcm")), strict=False):
            shutil.copy(file, here / "radiographs" / f"{name}.dcm")
        (here / "rle.csv").write_text("ImageId, EncodedPixels\na, 5000 400\nb, -1\n")
        yield here


@pytest.mark.parametrize("name", pneumo_experiments.__all__)
def test_the_example_of_a_public_name_does_what_it_says(name: str, folder: Path, no_pictures: None) -> None:
    names = {each: getattr(pneumo_experiments, each) for each in pneumo_experiments.__all__}
    known = names | {"np": np, "torch": torch, "Path": Path}
    found = FINDER.find(names[name], name, globs=known)
    if isinstance(names[name], type) and name.lower() in ENTRY_POINTS:
        found = FINDER.find(names[name].of, f"{name}.of", globs=known)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = list[str]()
    for each in found:
        runner.run(each, out=said.append)
    assert runner.tries and not runner.failures, "".join(said)


def test_the_example_of_the_page_from_python_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block.replace("epochs=1,", "epochs=1, threshold_trials=0, overlays=0,"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["a", "b"]
    assert re.fullmatch(r"models:/m-\w+ [01]\.\d+ 95% .*", lines[-1])
    names = set(re.findall(r"`(\w+)", page.partition("## Names")[2]))
    assert {*pneumo_experiments.__all__} <= names


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, pneumo_experiments; print({*sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    imported = ast.literal_eval(done.stdout)
    assert {name for name in imported if name.startswith("pneumo")} == {"pneumo_experiments"}
    assert not {name.partition(".")[0] for name in imported} & {"yaml", "click", "numpy", "torch", "mlflow"}


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(pneumo_experiments.__file__).read_text(encoding="utf-8"))
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    assert sorted(name.asname or "" for node in imports for name in node.names) == sorted(
        pneumo_experiments.__all__
    )
    for node in imports:
        for name in node.names:
            home: Any = __import__(node.module or "", fromlist=[name.name])
            assert getattr(home, name.name) is getattr(pneumo_experiments, name.asname or "")


def test_search_is_the_function_although_a_room_has_its_name() -> None:
    assert pneumo_experiments.search.__module__ == "pneumo_experiments.stages.search"
    assert sys.modules["pneumo_experiments.search"].__name__ == "pneumo_experiments.search"


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_settings_from_python_are_those_of_the_command_line(name: str) -> None:
    kind, given = ENTRY_POINTS[name], {"dicom_dir": "d"} if name == "main" else {}
    words = [word for name, text in given.items() for word in (f"--{name}", text)]
    context = cli.cli.commands[name].make_context(name, words, parent=cli.cli.make_context("", [name]))
    assert [kind.of(**given)] == cli.resolve(context, kind)  # pyright: ignore


def test_a_setting_from_python_has_the_type_and_the_errors_of_the_command_line() -> None:
    settings = Train.of(dataset="d.h5", epochs="3", compile="no", learning_rate=1, fold=2)
    typed = {"dataset": Path.cwd() / "d.h5", "epochs": 3, "compile": False, "learning_rate": 1.0, "fold": "2"}
    assert settings == Train.of(**typed)
    assert settings.split.fold == "2" and type(settings.recipe.optimizer.learning_rate) is float
    for given, reason in (
        ({"epochs": 1.5}, "epochs: '1.5' is not a valid whole number"),
        ({"compile": 1}, "compile: 1 is not a boolean"),
        ({"network": "unet"}, "network: 'unet' is no network; the nearest are unet:"),
        ({"image_size": 64}, "train: no setting is called 'image_size'; "),
    ):
        with pytest.raises(UserError, match=f"^{reason}"):
            Train.of(**given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (True, "mild"),
        (False, "none"),
        ("true", "mild"),
        ("Off", "none"),
        ("strong", "strong"),
        ("none", "none"),
    ],
)
def test_augment_takes_what_it_was_when_it_was_true_or_false(given: bool | str, word: str) -> None:
    assert Train.of(augment=given).recipe.batches.augment == word
    if isinstance(given, bool):  # as a trial of an earlier version holds it
        assert from_flat(Recipe, {"augment": given}) == from_flat(Recipe, {"augment": word})
    with pytest.raises(UserError, match=r"^augment: 'weak' is not one of 'none', 'mild', 'strong'$"):
        Train.of(augment="weak")
    with pytest.raises(UserError, match=r"^tta: True is not a number or a text$"):
        Train.of(tta=True)


def test_what_logs_nothing_works_without_a_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    file = folder / "radiographs" / "a.dcm"
    finding = load_model(folder / "model").detect(file.read_bytes())
    assert finding.mask is not None and finding.mask.shape == (1024, 1024)
    for name in ("models:/pneumothorax@champion", "modle"):
        with pytest.raises(UserError, match=rf"^model={name}: no folder, and there is no store {tmp_path}"):
            load_model(name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_used_costs_its_own_finding_and_alone_it_is_an_error(folder: Path) -> None:
    detector, file = load_model("model"), folder / "radiographs" / "a.dcm"
    os.mkfifo(folder / "pipe.dcm")
    findings = detector.detect_files(
        [folder / "pipe.dcm", str(file), "gone.dcm", "\0.dcm", folder, "rle.csv"]
    )
    name = folder.name
    assert [finding.error for finding in findings] == [
        "pipe: is no file",
        "",
        "gone: cannot be read (No such file or directory)",
        "\0: is no file: its path has a null character",
        f"{name}: is no file",
        "rle: not a DICOM file",
    ]
    with pytest.raises(Rejected, match=r"^image: not a DICOM file"):
        detector.detect(b"none")


def test_a_torch_dataset_has_the_chosen_rows_in_order_and_travels_to_other_processes(
    small_dataset: Path,
) -> None:
    with Dataset.open(small_dataset) as dataset:
        chosen = pickle.loads(pickle.dumps(TorchDataset(dataset, np.array([3, 1, 7]))))
        image, target = chosen[1]
        assert len(chosen) == 3 and image.dtype == target.dtype == torch.float32
        assert np.array_equal(image[0].numpy() * 255, dataset.images([1])[0])
        assert np.array_equal(target.numpy() * 255, dataset.targets([1])[0]) and target.any()
        everything = TorchDataset(dataset)
        assert len(everything) == len(dataset) and torch.equal(everything[7][0], chosen[2][0])
        chosen.dataset.close()
        with pytest.raises(IndexError):
            everything[len(dataset)]


def test_a_script_without_a_main_guard_does_not_run_again_in_worker_processes(tmp_path: Path) -> None:
    script = """
import os
from multiprocessing import get_context
from pneumo_experiments.spawning import without_main
print("once", flush=True)
with without_main():
    process = get_context("spawn").Process(target=os.getpid)
    process.start()
process.join()
print(process.exitcode)
"""
    (tmp_path / "script.py").write_text(script)
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n0\n", "")


def test_best_thresholds_refuses_what_is_no_probability() -> None:
    truths = np.zeros((2, 8, 8), bool)
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^probabilities outside \[0, 1\]"):
            best_thresholds(np.full((2, 4, 4), value, np.float32), np.zeros(2, np.float32), truths)
    with pytest.raises(ValueError, match="2 predictions for 1 truths"):
        best_thresholds(np.zeros((2, 4, 4), np.float32), np.zeros(2, np.float32), truths[:1])


def test_the_wheel_holds_the_whole_package_and_works_from_anywhere(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    package = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pneumo_experiments", source / "pneumo_experiments", ignore=package)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(unpacked)
    (about,) = unpacked.glob("*.dist-info")
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    ours = {path.relative_to(source) for path in (source / "pneumo_experiments").rglob("*") if path.is_file()}
    assert {path for path in held if about.name not in path.parts} == ours
    assert all((unpacked / path).read_bytes() == (source / path).read_bytes() for path in ours)
    assert {"py.typed", "demo.yaml", "example.dcm", "siim_patients.bin", "page.html.j2"} < {
        path.name for path in held
    }
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    assert "\nClassifier: Typing :: Typed\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "pneumo = pneumo_experiments.cli:main" in (about / "entry_points.txt").read_text()
    code = "from pneumo_experiments import rle, settings; print(settings.DEMO, rle.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        f"{unpacked}/pneumo_experiments/configs/demo.yaml",
        f"{unpacked}/pneumo_experiments/dataset/rle.py",
    ]
