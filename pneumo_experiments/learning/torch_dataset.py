"""A data set as torch's DataLoader takes it, for trainings of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.learning.loader import to_unit

CPU = torch.device("cpu")


class TorchDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Image (1, S, S) and target mask (S, S) of each radiograph, float32 in [0, 1].

    A target is the annotated fraction of each pixel. ``rows`` (n,) are the images to take, such as the train
    ones of ``make_split``; without them all. Nothing is augmented. Worker processes of a DataLoader open the
    file themselves. Raises UserError for a data set without labels, and when a damaged image is read.

    >>> from torch.utils.data import DataLoader
    >>> with Dataset.open("dataset.h5") as dataset:
    ...     training = TorchDataset(dataset, make_split(dataset, Train.of().split).train)
    ...     images, targets = next(iter(DataLoader(training, batch_size=8, shuffle=True)))
    >>> images.shape, targets.shape
    (torch.Size([8, 1, 16, 16]), torch.Size([8, 16, 16]))
    """

    def __init__(self, dataset: Dataset, rows: Sequence[int] | NDArray[np.int64] | None = None) -> None:
        dataset.require_labels()
        self.dataset, self.rows = dataset, range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and target at a place in ``rows``."""
        row = [int(self.rows[index])]
        return to_unit(self.dataset.images(row), CPU), to_unit(self.dataset.targets(row)[0], CPU)
