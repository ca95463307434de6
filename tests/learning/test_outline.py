"""Masks made on a device are those of the rule on the host, bit for bit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.learning.threshold_counts import masks_on_device
from pneumo_experiments.metrics.thresholds import HUNDREDTHS, Thresholds, apply_thresholds

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(40, 40), (64, 24), (40, 40), (24, 64), (7, 5), (64, 24), (16, 16), (1, 1)]


def next_to_hundredths() -> np.ndarray:
    """Maps (n, 16, 16) of hundredths and of the floats next to them, brighter from map to map."""
    around = [np.nextafter(HUNDREDTHS, np.float32(end)) for end in (-1, 2)]
    values = np.sort(np.concatenate([HUNDREDTHS, *around]).clip(0, 1))
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(values[30 * row : 60 + 35 * row], (16, 16)) for row in range(len(SHAPES))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("top", "bottom", "area"), [*product((0.0, 0.29, 0.7, 1.0), (0.0, 0.58), (0, 1, 400_000))]
)
def test_masks_are_those_of_the_host(device: str, top: float, bottom: float, area: int) -> None:
    thresholds, maps = Thresholds(0.5, top, area, bottom), next_to_hundredths()
    found = masks_on_device([torch.from_numpy(each).to(device) for each in maps], SHAPES, thresholds)
    assert len(found) == len(SHAPES)
    for probability, shape, mask in zip(maps, SHAPES, found, strict=True):
        assert mask.dtype == np.bool_
        expected = apply_thresholds(to_native(probability, shape), 0.5, thresholds)
        if device == "cpu" or shape == (16, 16):
            assert np.array_equal(mask, expected)
        else:  # CUDA's interpolation may differ in the last bit
            assert np.count_nonzero(mask != expected) <= 0.01 * mask.size


def test_no_image_has_no_mask() -> None:
    assert masks_on_device([], [], Thresholds()) == []
