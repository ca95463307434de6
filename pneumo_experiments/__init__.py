"""Tracked experiments for finding and outlining pneumothorax on chest radiographs.

The names in ``__all__`` are for use from Python: docs/python.md shows them at work. Each is imported when it
is first used, with the libraries that it needs: ``import pneumo_experiments`` alone takes no time.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of _HOMES
    from pneumo_experiments.dataset import rle as rle
    from pneumo_experiments.dataset.hdf5 import Dataset as Dataset
    from pneumo_experiments.errors import UserError as UserError
    from pneumo_experiments.evaluation.load_models import load_model as load_model
    from pneumo_experiments.evaluation.subset import make_split as make_split
    from pneumo_experiments.learning.network import build_network as build_network
    from pneumo_experiments.learning.threshold_counts import best_thresholds as best_thresholds
    from pneumo_experiments.learning.torch_dataset import TorchDataset as TorchDataset
    from pneumo_experiments.metrics.comparison import compare as compare
    from pneumo_experiments.metrics.dice import dice as dice
    from pneumo_experiments.serving.detector import Detector as Detector
    from pneumo_experiments.settings import Preprocess as Preprocess
    from pneumo_experiments.settings import Sample as Sample
    from pneumo_experiments.settings import Score as Score
    from pneumo_experiments.settings import Search as Search
    from pneumo_experiments.settings import Train as Train
    from pneumo_experiments.stages.preprocess import preprocess as preprocess
    from pneumo_experiments.stages.sample import sample as sample
    from pneumo_experiments.stages.score import score as score
    from pneumo_experiments.stages.search import search as search
    from pneumo_experiments.stages.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "load_model": "evaluation.load_models",
    "Detector": "serving.detector",
    "Dataset": "dataset.hdf5",
    "make_split": "evaluation.subset",
    "TorchDataset": "learning.torch_dataset",
    "build_network": "learning.network",
    "rle": "dataset.rle",
    "dice": "metrics.dice",
    "best_thresholds": "learning.threshold_counts",
    "compare": "metrics.comparison",
    **dict.fromkeys(("Sample", "Preprocess", "Search", "Train", "Score"), "settings"),
    **{stage: f"stages.{stage}" for stage in ("sample", "preprocess", "search", "train", "score")},
    "UserError": "errors",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A name of ``__all__``, from where it is at home."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(home, name, home)  # rle is a module


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(ModuleType):
    """Keeps ``search`` the function: Python would put the room of that name in its place, once imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "search" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
