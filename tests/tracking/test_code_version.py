"""The version of the code that a run records."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tracked import last_run

from pneumo_experiments import __version__, tracking
from pneumo_experiments.settings import Train
from pneumo_experiments.tracking.code_version import version_in


def test_the_code_version_is_the_commit_with_a_mark_for_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        options = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *options, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert version_in(package) == __version__
    git("init", "-q")
    assert version_in(package) == __version__  # no part of the checkout around it
    git("add", "package")
    git("commit", "-qm", "first")
    clean = f"{__version__}+{git('rev-parse', 'HEAD')[:12]}"
    assert version_in(package) == clean
    (tmp_path / "elsewhere.txt").touch()
    assert version_in(package) == clean
    (package / "new.py").touch()
    assert version_in(package) == f"{clean}-dirty"


def test_every_run_records_its_code_version(store: Path) -> None:
    with tracking.run("train", Train()):
        pass
    assert last_run().data.tags["code_version"] == tracking.code_version()
    assert tracking.code_version().startswith(__version__)
