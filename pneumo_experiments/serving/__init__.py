"""The code of a registered model: DICOM files in, presence and run lengths out.

MLflow imports this package by name (``loader_module``) and calls ``_load_pyfunc``; nothing is pickled.
"""

from pneumo_experiments.serving.detector import Detector, Finding, Member, join
from pneumo_experiments.serving.model_folder import load, new_folder, save
from pneumo_experiments.serving.service import ServedModel

__all__ = ["Detector", "Finding", "Member", "ServedModel", "join", "load", "new_folder", "save"]


def _load_pyfunc(data_path: str) -> ServedModel:  # pyright: ignore[reportUnusedFunction]  # MLflow calls it
    from pathlib import Path

    return ServedModel(load(Path(data_path)))
