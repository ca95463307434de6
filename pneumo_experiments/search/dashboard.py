"""What optuna-dashboard shows of a study beside its values: notes, and overlays of each trial.

It reads notes from attributes of the study, and pictures as Optuna artifacts; it need not be installed here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.study import Study
from PIL import Image

from pneumo_experiments import tracking
from pneumo_experiments.search.storage import allow_experimental

MAX_ATTRIBUTE = 2045  # characters; a longer note is divided
# Of a database that is no file; else beside it. ``optuna-dashboard --artifact-dir`` shows them.
ARTIFACTS = Path("output/optuna-artifacts")


def save_note(study: Study, text: str, trial_id: int | None = None) -> None:
    """Sets the note (Markdown) of a study, or of one of its trials, as optuna-dashboard's save_note does."""
    storage, study_id = study._storage, study._study_id  # pyright: ignore[reportPrivateUsage]
    prefix = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
    attributes = storage.get_study_system_attrs(study_id)
    starts = range(0, len(text), MAX_ATTRIBUTE)
    parts = {f"{prefix}note_str:{n}": text[i : i + MAX_ATTRIBUTE] for n, i in enumerate(starts)}
    before = {name: "" for name in attributes if name.startswith(f"{prefix}note_str:")}
    version = {f"{prefix}note_ver": attributes.get(f"{prefix}note_ver", 0) + 1}
    for name, value in (before | parts | version).items():
        storage.set_study_system_attr(study_id, name, value)


def show_trial(trial: optuna.Trial, storage: str, note: str, pictures: Sequence[NDArray[np.uint8]]) -> None:
    """Gives a running trial its note and pictures, RGB (h, w, 3), as far as they can be written."""
    save_note(trial.study, note, trial._trial_id)  # pyright: ignore[reportPrivateUsage]
    file = tracking.database_file(storage)
    folder = file.with_name(f"{file.name}-artifacts") if file else ARTIFACTS
    with suppress(OSError), allow_experimental(), tempfile.TemporaryDirectory() as temporary:
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures, start=1):
            path = Path(temporary, f"overlay-{number}.png")
            Image.fromarray(picture).save(path)
            upload_artifact(
                artifact_store=FileSystemArtifactStore(folder), file_path=str(path), study_or_trial=trial
            )
