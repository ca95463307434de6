from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from pneumo_experiments.dataset.resize import area_resize, resize_image
from pneumo_experiments.dicom.radiograph import read_radiograph

PICTURES = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7))


def slow_shrink(pixels: np.ndarray, size: int) -> list[list[Fraction]]:
    """Area means in exact fractions, each pair of source pixel and target pixel by itself."""
    rows, columns = pixels.shape

    def overlap(source: int, target: int, length: int) -> Fraction:
        scale = Fraction(length, size)
        return max(Fraction(0), min(Fraction(source + 1), (target + 1) * scale) - max(source, target * scale))

    return [
        [
            sum(
                (
                    int(pixels[y, x]) * overlap(y, i, rows) * overlap(x, j, columns)
                    for y in range(rows)
                    for x in range(columns)
                ),
                Fraction(0),
            )
            / (Fraction(rows, size) * Fraction(columns, size))
            for j in range(size)
        ]
        for i in range(size)
    ]


@settings(deadline=None)
@given(PICTURES, st.integers(1, 9))
def test_shrinking_is_the_exact_area_mean_for_any_shape_and_scale(pixels: np.ndarray, size: int) -> None:
    exact = slow_shrink(pixels, size)
    small = area_resize(pixels, size)
    assert small.dtype == np.float32
    assert np.array_equal(small, np.array(exact, np.float64).astype(np.float32))
    assert np.array_equal(resize_image(pixels, size), [[round(mean) for mean in row] for row in exact])


@pytest.mark.parametrize("shape", [(67, 5), (5, 67), (65, 9)])
def test_sides_that_share_no_factor_with_the_size_are_as_exact(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    exact = np.array(slow_shrink(pixels, 4), np.float64).astype(np.float32)
    assert np.array_equal(area_resize(pixels, 4), exact)


def test_a_mask_keeps_its_share_of_the_area_and_its_layout_does_not_matter() -> None:
    mask = np.random.default_rng(1).random((1000, 700)) < 0.3
    share = area_resize(mask, 96)
    assert share.mean(dtype=np.float64) == pytest.approx(mask.mean(), abs=1e-7)
    assert np.array_equal(share, area_resize(np.asfortranarray(mask), 96))
    assert area_resize(np.ones((1024, 1024), bool), 384).min() == 1
    assert area_resize(np.ones((1024, 1024), bool), 384).max() == 1


def test_one_annotated_pixel_lands_with_its_share() -> None:
    mask = np.zeros((1024, 1024), bool)
    mask[2, 1021] = True  # row 2 lies two thirds in target row 0; column 1021 one third in target column 382
    share = area_resize(mask, 384)
    pixel = (384 / 1024) ** 2
    assert share[0, 382] == pytest.approx(pixel * 2 / 3 * 1 / 3)
    assert share[0, 383] == pytest.approx(pixel * 2 / 3 * 2 / 3)
    assert share[1, 383] == pytest.approx(pixel * 1 / 3 * 2 / 3)
    assert np.count_nonzero(share) == 4
    assert share.sum() == pytest.approx(pixel)


def test_a_real_radiograph_agrees_with_pillow_where_the_ratio_is_whole(real_data: Path) -> None:
    path = min((real_data / "dicom-images-test").glob("*.dcm"))
    pixels = read_radiograph(path.read_bytes(), path.stem).pixels
    pillow = np.asarray(Image.fromarray(pixels).reduce(4))
    difference = np.abs(resize_image(pixels, 256).astype(int) - pillow)
    assert difference.max() <= 1  # Pillow rounds halves up
    assert difference.mean() < 0.1
