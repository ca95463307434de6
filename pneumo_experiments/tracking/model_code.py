"""The code and the libraries that a logged model was trained with, against those of this process."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow.models.model import MLMODEL_FILE_NAME

from pneumo_experiments.tracking.models import model_data

PACKAGE = Path(__file__).parents[1]


def code_differences(address: str) -> list[str]:
    """Files of this package that differ from those in the model, and libraries of another version.

    Empty if both are the same. Raises UserError as ``model_data``.
    """
    data = model_data(address)
    root = next(folder for folder in data.parents if (folder / MLMODEL_FILE_NAME).is_file())
    logged, current = _files(root / "code" / PACKAGE.name), _files(PACKAGE)
    files = sorted(name for name in logged | current if logged.get(name) != current.get(name))
    return files + _other_versions(root / "requirements.txt")


def _files(package: Path) -> dict[str, bytes]:
    """The contents of the package's Python files by their path in it."""
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}


def _other_versions(requirements: Path) -> list[str]:
    differing: list[str] = []
    for line in requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []:
        name, _, logged = line.partition("==")
        try:
            installed = version(name).split("+")[0]  # as in log_model
        except (PackageNotFoundError, ValueError):
            installed = "none"
        if logged != installed:
            differing.append(f"{name} {logged} (now {installed})")
    return differing
