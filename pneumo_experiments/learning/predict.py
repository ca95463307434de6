"""Probabilities of a trained network."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import to_unit
from pneumo_experiments.learning.network import PneumothoraxNet


@dataclass(frozen=True)
class Prediction:
    """Probability of each pixel (S, S), float32, and of presence."""

    mask: NDArray[np.float32]
    presence: float


@dataclass(frozen=True)
class Predictor:
    """A network and how it is asked; ``tta_flip`` takes the mean with the answer to the flipped image."""

    network: PneumothoraxNet
    compute: ComputeConfig
    tta_flip: bool = False

    def predict(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[Prediction]:
        """One prediction for each 8-bit image (n, S, S), in order."""
        for masks, presences in self.answers(images, batch_size):
            present = presences.cpu().numpy()
            require_finite(present)
            for mask, presence in zip(masks.cpu().numpy(), present, strict=True):
                yield Prediction(mask, float(presence))

    def answers(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
        """Probabilities of pixels (b, S, S) and of presence (b,) of each batch, float32, on the device.

        Presence is nan where any answer is: who brings it to the host asks ``require_finite``.
        """
        self.network.to(device=self.compute.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network.eval()
        for start in range(0, len(images), batch_size):
            grey = to_unit(images[start : start + batch_size], self.compute.device)[:, None]
            mask, presence = self._probabilities(grey)
            if self.tta_flip:
                flipped_mask, flipped_presence = self._probabilities(grey.flip(-1))
                mask, presence = (mask + flipped_mask.flip(-1)) / 2, (presence + flipped_presence) / 2
            yield mask, presence + 0 * mask.amax(dim=(1, 2))  # the largest is nan where any is

    def _probabilities(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (n, S, S) and of presence (n,) for images (n, 1, S, S)."""
        with torch.inference_mode(), self.compute.autocast():
            output = self.network(grey.contiguous(memory_format=torch.channels_last))
        return torch.sigmoid(output.mask), torch.sigmoid(output.presence)


def require_finite(presence: NDArray[np.float32]) -> None:
    """UserError where a probability of presence (n,) is no number: so answers a network that diverged."""
    if not np.isfinite(presence).all():
        raise UserError(
            "learning_rate: the network's answers are no longer numbers, its training diverged;"
            " try a tenth of it"
        )


def to_native(mask: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Probabilities (S, S) interpolated bilinearly to the radiograph's own rows and columns."""
    tensor = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    return functional.interpolate(tensor, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
