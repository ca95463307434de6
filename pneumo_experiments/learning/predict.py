"""Predictions of a trained network: probabilities of pixels and of presence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import ComputeConfig, from_numpy
from pneumo_experiments.learning.loader import to_unit
from pneumo_experiments.learning.network import PneumothoraxNet


@dataclass(frozen=True)
class Prediction:
    """Probability of each pixel (S, S), float32, and of a pneumothorax in the image."""

    mask: NDArray[np.float32]
    presence: float


@dataclass(frozen=True)
class Predictor:
    """A network and its inference settings; ``tta_flip`` averages predictions of image and flipped image."""

    network: PneumothoraxNet
    compute: ComputeConfig
    tta_flip: bool = False

    def predict(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[Prediction]:
        """One prediction for each 8-bit image (n, S, S), in order; UserError when an output is NaN."""
        for masks, presences in self.predict_batches(images, batch_size):
            present = presences.cpu().numpy()
            require_finite(present)
            for mask, presence in zip(masks.cpu().numpy(), present, strict=True):
                yield Prediction(mask, float(presence))

    def predict_batches(
        self, images: NDArray[np.uint8], batch_size: int = 16
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Probabilities of pixels (b, S, S) and of presence (b,) of each batch, float32, on the device.

        Presence is NaN where any output of the image is: callers pass it to ``require_finite``.
        """
        self.network.to(device=self.compute.device, memory_format=torch.channels_last)  # pyright: ignore
        self.network.eval()
        for start in range(0, len(images), batch_size):
            inputs = to_unit(images[start : start + batch_size], self.compute.device)[:, None]
            mask, presence = self._probabilities(inputs)
            if self.tta_flip:
                flipped_mask, flipped_presence = self._probabilities(inputs.flip(-1))
                mask, presence = (mask + flipped_mask.flip(-1)) / 2, (presence + flipped_presence) / 2
            yield mask, presence + 0 * mask.amax(dim=(1, 2))  # the maximum is NaN where any pixel is

    def _probabilities(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (n, S, S) and of presence (n,) for images (n, 1, S, S)."""
        with torch.inference_mode(), self.compute.autocast():
            output = self.network(inputs.contiguous(memory_format=torch.channels_last))
        return torch.sigmoid(output.mask), torch.sigmoid(output.presence)


def require_finite(presence: NDArray[np.float32]) -> None:
    """Raises UserError when a probability of presence (n,) is NaN: the training of the network diverged."""
    if not np.isfinite(presence).all():
        raise UserError("network output is NaN: training diverged; try a tenth of the learning_rate")


def to_native(mask: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Probabilities (S, S) interpolated bilinearly to the radiograph's own rows and columns."""
    tensor = from_numpy(np.ascontiguousarray(mask))[None, None]
    return functional.interpolate(tensor, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
