"""The version of the code that runs: the package's, and the commit of its git checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from pneumo_experiments import __version__

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
