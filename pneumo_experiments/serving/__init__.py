"""The code of a registered model: DICOM files in, presence and run lengths out.

MLflow imports this package by name (``loader_module``) and calls ``_load_pyfunc``; nothing is pickled.
"""

# These names are for other modules.
# ruff: noqa: F401
# pyright: reportUnusedImport=false
from pneumo_experiments.serving.detector import Detector, Finding, TrainedNetwork, make_ensemble
from pneumo_experiments.serving.model_folder import load, new_folder, save
from pneumo_experiments.serving.service import ServedModel


def _load_pyfunc(data_path: str) -> ServedModel:  # pyright: ignore[reportUnusedFunction]  # MLflow calls it
    from pathlib import Path

    return ServedModel(load(Path(data_path)))
