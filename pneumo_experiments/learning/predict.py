"""Probabilities of a trained network."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pneumo_experiments.learning.device import Machine
from pneumo_experiments.learning.loader import to_unit
from pneumo_experiments.learning.network import PneumothoraxNet


@dataclass(frozen=True)
class Prediction:
    """Probability of each pixel (S, S), float32, and of presence."""

    mask: NDArray[np.float32]
    presence: float


def predict(
    network: PneumothoraxNet, images: NDArray[np.uint8], machine: Machine, batch_size: int = 16
) -> Iterator[Prediction]:
    """One prediction for each 8-bit image (n, S, S), in order."""
    network.to(device=machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network.eval()
    for start in range(0, len(images), batch_size):
        grey = to_unit(images[start : start + batch_size], machine.device)[:, None]
        with torch.inference_mode(), machine.autocast():
            output = network(grey.contiguous(memory_format=torch.channels_last))
        masks = torch.sigmoid(output.mask).cpu().numpy()
        presences = torch.sigmoid(output.presence).cpu().numpy()
        for mask, presence in zip(masks, presences, strict=True):
            yield Prediction(mask, float(presence))


def to_native(mask: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Probabilities (S, S) interpolated bilinearly to the radiograph's own rows and columns."""
    tensor = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    return functional.interpolate(tensor, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
