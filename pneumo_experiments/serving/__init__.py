"""The code of a registered model: DICOM bytes in, presence and run lengths out.

MLflow imports this package by name (``loader_module``) and calls ``_load_pyfunc``; nothing is pickled.
"""

from pneumo_experiments.serving.detector import Detector, Member, join
from pneumo_experiments.serving.model_folder import load, save

__all__ = ["Detector", "Member", "join", "load", "save"]


def _load_pyfunc(data_path: str) -> Detector:  # pyright: ignore[reportUnusedFunction]  # MLflow calls it
    from pathlib import Path

    return load(Path(data_path))
