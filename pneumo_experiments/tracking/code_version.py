"""The code that runs: its version, and how it differs from the code that a logged model was trained with."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow.models.model import MLMODEL_FILE_NAME

from pneumo_experiments import __version__
from pneumo_experiments.tracking.models import PACKAGE, model_data

CODE_VERSION_TAG = "code_version"  # of runs and of versions
TIMEOUT_SECONDS = 10


@cache
def code_version() -> str:
    """Version of this package: see ``version_in``."""
    return version_in(Path(__file__).parents[1])


def version_in(package: Path) -> str:
    """Such as ``0.1.0+3f2c1b0a9d8e``; ``-dirty`` at the end if files of the package differ from the commit.

    Without git, or where the package is no part of the checkout around it, the package's version alone.
    """
    # A package that is installed below another project's checkout is no part of it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return __version__
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    if commit is None or changes is None:
        return __version__
    return f"{__version__}+{commit[:12]}{'-dirty' if changes else ''}"


def _git(folder: Path, *words: str) -> str | None:
    """What git answers about a folder; None if it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_differences(address: str) -> list[str]:
    """Files of this package that differ from those in a model, and libraries of another version.

    Empty if both are the same. Raises UserError as ``model_data``.
    """
    root = next(each for each in model_data(address).parents if (each / MLMODEL_FILE_NAME).is_file())
    logged, current = _files(root / "code" / PACKAGE.name), _files(PACKAGE)
    differing = sorted(name for name in logged | current if logged.get(name) != current.get(name))
    requirements = root / "requirements.txt"
    for line in requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []:
        name, _, wanted = line.partition("==")
        try:
            installed = version(name).split("+")[0]  # as in save_model
        except (PackageNotFoundError, ValueError):
            installed = "none"
        if wanted != installed:
            differing.append(f"{name} {wanted} (now {installed})")
    return differing


def _files(package: Path) -> dict[str, bytes]:
    """The contents of the package's Python files by their path in it."""
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}
