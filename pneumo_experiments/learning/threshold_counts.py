"""Counts of predicted pixels at each threshold, and masks, taken on the device where the network computes.

A probability map at native size takes 4 MB, its counts less than 1 kB: only they are copied to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.device import copy_to_device, from_numpy
from pneumo_experiments.learning.predict import AnyPredictor, require_finite
from pneumo_experiments.metrics.best_thresholds import Optimum, best_of_all
from pneumo_experiments.metrics.thresholds import HUNDREDTHS, ThresholdCounts, Thresholds

MAX_PIXELS_AT_ONCE = 2**23  # native pixels, about 30 bytes each while they are counted


def best_thresholds(
    probabilities: NDArray[np.float32], presences: NDArray[np.float32], truths: Sequence[NDArray[np.bool_]]
) -> Optimum:
    """The thresholds with the highest mean Dice of all, for the predictions of n labelled images.

    Probabilities of pixels (n, S, S) are interpolated to the size (H, W) of each truth, and compared with
    whole hundredths; ``presences`` (n,) are the probabilities of a pneumothorax in the image. Raises
    ValueError for probabilities outside [0, 1] and for numbers of images that differ.

    >>> truths = np.zeros((3, 64, 64), bool)
    >>> truths[:2, 16:32, 16:32] = True
    >>> probabilities = np.where(truths, 0.6, 0.2).astype(np.float32)
    >>> best = best_thresholds(probabilities, np.array([0.9, 0.7, 0.1], np.float32), truths)
    >>> best.dice
    1.0
    >>> best.thresholds
    Thresholds(presence_threshold=0.35, top_score=0.7, min_area_px=0, bottom_score=0.4)
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities outside [0, 1]")
    pixels = from_numpy(np.ascontiguousarray(probabilities, np.float32))
    counts = count_at_thresholds(pixels, truths, from_numpy(HUNDREDTHS)).numpy()
    return best_of_all(ThresholdCounts.of(counts, presences.astype(np.float32)))


class ThresholdCounter:
    """Counts predictions against the truth on the predictor's device; the host waits only in ``read``."""

    def __init__(self, predictor: AnyPredictor) -> None:
        self._predictor = predictor
        device = predictor.device
        self._hundredths = copy_to_device(from_numpy(HUNDREDTHS), device)
        # A CPU counts one image in its cache; several at once wait for memory: at least twice as slow.
        self._pixels_at_once = 0 if device.type == "cpu" else MAX_PIXELS_AT_ONCE
        self._counts = [self._hundredths.new_empty((0, 2, 101), dtype=torch.int32)]
        self._presence = [self._hundredths.new_empty(0)]
        self._finite = [self._hundredths.new_empty(0, dtype=torch.bool)]

    def add(self, images: NDArray[np.uint8], truths: Iterable[NDArray[np.bool_]]) -> None:
        """Predicts 8-bit images (n, S, S) and counts them, given the truth (H, W) of each at native size."""
        remaining = iter(truths)
        for batch in self._predictor.predict_batches(images):
            batch_truths = list(islice(remaining, len(batch.mask)))
            self._counts.append(
                count_at_thresholds(batch.mask, batch_truths, self._hundredths, self._pixels_at_once)
            )
            self._presence.append(batch.presence)
            self._finite.append(batch.finite)

    def read(self) -> ThresholdCounts:
        """The counts of all images, in order, each with a patient of its own.

        Raises UserError when the network's output is NaN.
        """
        per_image = torch.stack(
            [torch.cat(self._presence).view(torch.int32), torch.cat(self._finite).int()], 1
        )
        # Copied as one tensor, so that the host waits for the device once.
        packed = torch.cat([per_image, torch.cat(self._counts).flatten(1)], dim=1).cpu().numpy()
        require_finite(packed[:, 1])
        presence = np.ascontiguousarray(packed[:, 0]).view(np.float32)
        return ThresholdCounts.of(np.ascontiguousarray(packed[:, 2:]).reshape(-1, 2, 101), presence)


@torch.inference_mode()
def count_at_thresholds(
    masks: Tensor, truths: Sequence[NDArray[np.bool_]], hundredths: Tensor, pixels_at_once: int = 0
) -> Tensor:
    """Pixels at or above each hundredth (n, 2, 101), int32: all, and those within the truth.

    Probabilities (n, S, S), float32, are interpolated to the size of each truth (H, W) as in ``to_native``.
    NaN counts as 0. Images of one size are counted together, up to ``pixels_at_once`` native pixels.
    """
    if len(masks) != len(truths):
        raise ValueError(f"{len(masks)} predictions for {len(truths)} truths")
    counts = torch.empty((len(masks), 2, 101), dtype=torch.int32, device=masks.device)
    for rows in group_by_shape([truth.shape for truth in truths], pixels_at_once):
        # One row at a time: the host would wait while a list of indices is copied to the device.
        group = torch.stack([masks[row] for row in rows])
        inside = torch.zeros((len(rows), *truths[rows[0]].shape), dtype=torch.bool, device=masks.device)
        for position, row in enumerate(rows):
            if truths[row].any():  # most are empty
                inside[position].copy_(copy_to_device(from_numpy(truths[row]), masks.device))
        for row, count in zip(rows, _count_group(group, inside, hundredths), strict=True):
            counts[row] = count
    return counts


def group_by_shape(shapes: Sequence[tuple[int, ...]], pixels_at_once: int) -> list[list[int]]:
    """Rows of images to compute together: of one shape, one image or up to ``pixels_at_once`` pixels."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(row)
    groups: list[list[int]] = []
    for shape, rows in by_shape.items():
        size = max(1, pixels_at_once // int(np.prod(shape)))
        groups += [rows[start : start + size] for start in range(0, len(rows), size)]
    return groups


def _count_group(masks: Tensor, inside: Tensor, hundredths: Tensor) -> Tensor:
    """Counts (n, 2, 101) of probabilities (n, S, S) and truths (n, H, W) of one size."""
    size = (inside.shape[1], inside.shape[2])
    # NaN would index out of range; the error is raised when everything is read.
    small = masks.nan_to_num(0.0)[:, None]
    native = functional.interpolate(small, size=size, mode="bilinear", align_corners=False)[:, 0]
    # 0 to 100 where the truth is False, 101 to 201 where it is True.
    code = _levels(native, hundredths).add_(inside.view(torch.uint8), alpha=101).int().long()
    # bincount would make the host wait for the size of its result. Most pixels of a radiograph are at level
    # 0: one histogram per row of pixels keeps them from all updating the same number.
    by_row = torch.zeros((*code.shape[:2], 202), dtype=torch.int32, device=code.device)
    by_row.scatter_add_(2, code, torch.ones_like(code, dtype=torch.int32))
    histogram = by_row.sum(1, dtype=torch.int32).view(-1, 2, 101)
    outside, within = histogram.flip(-1).cumsum(-1).flip(-1).unbind(1)
    return torch.stack((outside + within, within), 1).int()


def _levels(native: Tensor, hundredths: Tensor) -> Tensor:
    """Level 0 to 100 of each probability (n, H, W), float32: how many hundredths from 0.01 up it reaches.

    p * 100 may round up to the next hundredth or down from it. So a product that is never too high is
    followed by one exact comparison. In float32, since a CPU handles mixed types several times more slowly.
    """
    upper = functional.pad(hundredths[1:], (0, 1), value=float("inf"))
    level = (native * 99.999).floor_()
    return level.add_(upper.index_select(0, level.view(-1).int()).view_as(native).le_(native))


@torch.inference_mode()
def masks_on_device(
    probabilities: Sequence[Tensor], shapes: Sequence[tuple[int, int]], thresholds: Thresholds
) -> list[NDArray[np.bool_]]:
    """The mask (H, W) at native size of each probability map (S, S), float32, of an image with presence.

    As ``apply_thresholds`` does it on the host, which is faster for a CPU. Images of one size are upsampled
    together, and only masks are copied to the host: a quarter of the probabilities.
    """
    top_score, bottom_score = map(float, thresholds.scores)
    masks: dict[int, NDArray[np.bool_]] = {}
    for rows in group_by_shape(shapes, MAX_PIXELS_AT_ONCE):
        shape = shapes[rows[0]]
        # One row at a time: the host would wait while a list of indices is copied to the device.
        small = torch.stack([probabilities[row] for row in rows])[:, None]
        native = functional.interpolate(small, size=shape, mode="bilinear", align_corners=False)[:, 0]
        inside = native >= bottom_score
        if (least_core_px := thresholds.least_core_px(prod(shape))) > 0:
            core = (native >= top_score).flatten(1).sum(1) >= least_core_px
            inside &= core[:, None, None]
        masks |= zip(rows, inside.cpu().numpy(), strict=True)
    return [masks[row] for row in range(len(probabilities))]
