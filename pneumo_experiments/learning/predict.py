"""Predictions of a trained network: probabilities of pixels and of presence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.calibration import EPSILON, Calibration
from pneumo_experiments.learning.device import ComputeConfig, from_numpy
from pneumo_experiments.learning.loader import to_unit
from pneumo_experiments.learning.network import PneumothoraxNet


@dataclass(frozen=True)
class Prediction:
    """Probability of each pixel (S, S), float32, and of a pneumothorax in the image."""

    mask: NDArray[np.float32]
    presence: float


class BatchPrediction(NamedTuple):
    """Probabilities of pixels (b, S, S) and of presence (b,) of a batch, float32, on the device."""

    mask: Tensor
    presence: Tensor
    finite: Tensor  # (b,), bool: whether all of an image's outputs are


class View(NamedTuple):
    """How an image is shown to the network: enlarged by a factor, and mirrored left to right or not."""

    scale: float
    is_flipped: bool


LARGER = 1.25
PLAIN, FLIPPED = (View(1, False), View(1, True))
# Test-time augmentation: the views of an image whose predictions are averaged.
VIEWS = {
    "none": (PLAIN,),
    "flip": (PLAIN, FLIPPED),
    "flip+scale": (PLAIN, FLIPPED, View(LARGER, False), View(LARGER, True)),
}


@dataclass(frozen=True)
class Predictor:
    """A network and its inference settings: the mean of the views that ``tta`` names, presence calibrated."""

    network: PneumothoraxNet
    compute: ComputeConfig
    tta: str = "none"
    calibration: Calibration = Calibration()

    @property
    def device(self) -> torch.device:
        """Where the predictions are."""
        return self.compute.device

    @property
    def work(self) -> float:
        """Arithmetic of predicting an image, in forward passes at its own size."""
        return sum(view.scale**2 for view in VIEWS[self.tta])

    def predict(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[Prediction]:
        """One prediction for each 8-bit image (n, S, S), in order; UserError when an output is NaN."""
        return _on_host(self.predict_batches(images, batch_size))

    def predict_batches(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[BatchPrediction]:
        """Predictions of each batch of 8-bit images (n, S, S), on the device.

        The host does not wait: callers copy ``finite`` with the rest and pass it to ``require_finite``.
        """
        device = self.compute.device
        self.network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network.eval()
        for start in range(0, len(images), batch_size):
            mask, presence = self.mean_of_views(to_unit(images[start : start + batch_size], device)[:, None])
            finite = mask.isfinite().flatten(1).all(1) & presence.isfinite()
            yield BatchPrediction(mask, presence, finite)

    def mean_of_views(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (n, S, S) and of presence (n,) for images (n, 1, S, S) from 0 to 1.

        The network must be on their device, in evaluation mode.
        """
        masks, presences = zip(*(self._view(inputs, view) for view in VIEWS[self.tta]), strict=True)
        return torch.stack(masks).mean(0), self.calibrated(torch.stack(presences).mean(0))

    def calibrated(self, presence: Tensor) -> Tensor:
        """Calibrated probabilities of presence (n,), float32, from those that the network gives."""
        if self.calibration == Calibration():
            return presence
        log_odds = torch.logit(presence, EPSILON)
        return torch.sigmoid(log_odds * self.calibration.slope + self.calibration.bias)

    def _view(self, inputs: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """As ``_probabilities``, from a view of the images; those of pixels are brought back to the image."""
        side, flip = inputs.shape[-1], [-1] if view.is_flipped else []
        larger = round(view.scale * side)
        mask, presence = self._probabilities(_resized(inputs, larger).flip(flip))
        return _resized(mask.flip(flip)[:, None], side)[:, 0], presence

    def _probabilities(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (n, S, S) and of presence (n,) for images (n, 1, S, S)."""
        with torch.inference_mode(), self.compute.autocast():
            output = self.network(inputs.contiguous(memory_format=torch.channels_last))
        return torch.sigmoid(output.mask), torch.sigmoid(output.presence)


@dataclass(frozen=True)
class Ensemble:
    """One or several predictors on one device; it predicts the mean of their probabilities."""

    members: tuple[Predictor, ...]

    @property
    def device(self) -> torch.device:
        """Where the predictions are."""
        return self.members[0].device

    def predict(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[Prediction]:
        """One prediction for each 8-bit image (n, S, S), in order; UserError when an output is NaN."""
        return _on_host(self.predict_batches(images, batch_size))

    def predict_batches(self, images: NDArray[np.uint8], batch_size: int = 16) -> Iterator[BatchPrediction]:
        """Predictions of each batch of 8-bit images (n, S, S), as of a single predictor."""
        for batches in zip(*(one.predict_batches(images, batch_size) for one in self.members), strict=True):
            yield BatchPrediction(
                torch.stack([batch.mask for batch in batches]).mean(0),
                torch.stack([batch.presence for batch in batches]).mean(0),
                torch.stack([batch.finite for batch in batches]).all(0),
            )


AnyPredictor = Predictor | Ensemble


def _on_host(batches: Iterator[BatchPrediction]) -> Iterator[Prediction]:
    for batch in batches:
        for mask, presence in zip(batch.mask.cpu().numpy(), read_presence(batch), strict=True):
            yield Prediction(mask, float(presence))


def read_presence(batch: BatchPrediction) -> NDArray[np.float32]:
    """Presence of a batch (b,), on the host; UserError when an output is NaN."""
    # Copied as one tensor, so that the host does not wait once more.
    presences, finite = torch.stack([batch.presence, batch.finite.float()]).cpu().numpy()
    require_finite(finite)
    return presences


def _resized(images: Tensor, side: int) -> Tensor:
    """Images (n, 1, S, S) interpolated bilinearly to (n, 1, side, side)."""
    if images.shape[-1] == side:
        return images
    return functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def require_finite(finite: NDArray[np.number]) -> None:
    """Raises UserError unless the outputs for every image (n,) were finite: else training diverged."""
    if not finite.all():
        raise UserError("network output is NaN: training diverged; try a tenth of the learning_rate")


def to_native(mask: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Probabilities (S, S) interpolated bilinearly to the radiograph's own rows and columns."""
    tensor = from_numpy(np.ascontiguousarray(mask))[None, None]
    return functional.interpolate(tensor, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()
