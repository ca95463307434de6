"""The house stands as CONTRIBUTING.md draws it: who may import whom, and what follows from the settings."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import house
import pytest
import yaml
from helpers import ROOT
from mlflow.utils.environment import _PythonEnv
from mlflow.utils.requirements_utils import _parse_requirements
from packaging.requirements import Requirement

from pneumo_experiments.mlproject import mlproject_text
from pneumo_experiments.settings import ENTRY_POINTS, as_text, leaves

PACKAGE = ROOT / "pneumo_experiments"
# Heavy or telling libraries, and the only rooms (or files) that may import them.
LIBRARIES = {
    "click": {"cli.py"},
    "mlflow": {"tracking", "registry"},
    "optuna": {"stages/search.py", "search", "evaluation/threshold_search.py"},
    "torch": {"learning", "serving"},
    "torchvision": {"learning"},
    "pydicom": {"dicom", "synthetic"},
    "segmentation_models_pytorch": {"learning"},
    "highdicom": {"dicom"},
    "h5py": {"dataset"},
    "jinja2": {"data_report", "registry"},
    "onnx": {"learning"},
    "onnxruntime": {"learning"},
    "pandas": {"serving"},
    "matplotlib": {"figures.py", "evaluation"},
}
MODULES = house.read_modules(PACKAGE)


def test_only_the_room_of_a_library_imports_it() -> None:
    wrong = list[str]()
    for module in MODULES:
        file = "/".join(module.name.split(".")[1:]) + ".py"
        for name in module.imports():
            rooms = LIBRARIES.get(name.partition(".")[0], {file})
            wrong += [] if {module.room, file} & rooms else [f"{file} imports {name}"]
    assert wrong == []


def test_no_function_has_more_than_six_parameters() -> None:
    wide = {
        f"{module.name.partition('.')[2]}.{function.name}"
        for module in MODULES
        for function in module.functions()
        if house.parameters(function) > house.MAX_PARAMETERS
    }
    assert not wide


def test_the_folders_of_tests_are_rooms_of_the_package() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {module.room for module in MODULES}


def test_imports_point_down_and_no_two_rooms_import_each_other() -> None:
    assert house.imports_up(MODULES) == []
    assert house.circle(house.imports_between(MODULES)) == house.circle(house.room_graph(MODULES)) == ""


def test_mlproject_is_generated_from_the_settings() -> None:
    assert (ROOT / "MLproject").read_text(encoding="utf-8") == mlproject_text(), (
        "run: python -m pneumo_experiments mlproject"
    )


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_default_in_mlproject_is_the_text_that_is_logged(name: str) -> None:
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    found = {each: parameter["default"] for each, parameter in entry_points[name]["parameters"].items()}
    declared = {leaf.name: as_text(leaf.default) for leaf in leaves(ENTRY_POINTS[name]) if leaf.arg.declared}
    assert found == declared | {"config": "none"}


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked_versions() -> dict[str, set[str]]:
    """Versions by package; several where they depend on the platform."""
    found: dict[str, set[str]] = {}
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def test_the_lock_has_what_pyproject_asks_for() -> None:
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    locked = locked_versions()
    for requirement in map(Requirement, wanted):
        versions = locked.get(requirement.name, set())
        assert versions and all(map(requirement.specifier.contains, versions)), (
            f"{requirement}: {versions} in requirements.lock; run: make lock"
        )


def test_mlflow_in_the_lock_is_the_oldest_of_the_range() -> None:
    (version,) = locked_versions()["mlflow"]
    assert f"mlflow>={version},<4" in PYPROJECT["project"]["dependencies"]


def test_mlflow_run_installs_the_lock() -> None:
    environment = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    pins = [each.req_str for each in _parse_requirements(environment.dependencies, False, ROOT)]
    assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} == set(locked_versions())


def test_dependency_files_hold_no_address() -> None:
    for name in ("requirements.lock", "conda.yaml", "pyproject.toml", "MLproject"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("sqlite:///", "")
        assert "://" not in text, name


def test_help_printed_settings_and_missing_inputs_import_nothing_heavy() -> None:
    heavy = {"torch", "mlflow", "optuna", "numpy", "h5py", "pydicom", "pandas"}
    code = f"""
import sys
from pneumo_experiments.cli import cli
from pneumo_experiments.errors import UserError
for words in (["--help"], ["main", "--help"], ["train", "--help"], ["train", "--print_config"]):
    cli.main(words, standalone_mode=False)
for words in (["train", "--dataset", "missing"], ["score", "--dicom_dir", "missing"], ["preprocess"]):
    try:
        cli.main(words, standalone_mode=False)
        assert False, words
    except UserError:
        pass
print(sorted({heavy} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_stages_holds_the_entry_points_and_nothing_else() -> None:
    assert {path.stem for path in (PACKAGE / "stages").glob("*.py")} == {*ENTRY_POINTS, "__init__"}


def test_no_test_module_imports_another() -> None:
    modules = house.read_modules(ROOT / "tests")
    found = {module.name: [name for name in module.imports() if ".test_" in f".{name}"] for module in modules}
    assert len(found) > 40
    assert not {name: names for name, names in found.items() if names}
