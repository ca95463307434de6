"""Batches: which images, in what order, from where, and their random changes."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import make
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_network import CPU, squares
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.augment import (
    BRIGHTNESS,
    CONTRAST,
    CONTROL_POINTS,
    DISTORTION,
    GAMMA,
    ROTATION_DEGREES,
    SCALE,
    SHIFT,
    adjust_intensity,
    augment,
    random_affine,
    random_displacement,
    random_intensity,
    warp,
)
from pneumo_experiments.learning.loader import (
    StreamedData,
    batches,
    choose_cache,
    epoch_indices,
    load,
    prefetch,
)
from pneumo_experiments.settings import Recipe


def test_each_batch_has_the_epoch_s_fraction_of_positives_which_changes_linearly() -> None:
    present, recipe = np.arange(100) < 10, make(Recipe, positive_share=0.8, final_positive_share=0.4)
    for epoch, target in ((1, 0.8), (2, 0.6), (3, 0.4)):
        order = epoch_indices(present, recipe, epoch, epochs=3)
        assert len(order) == 100
        assert present[order].sum() == target * 100
        for batch in np.split(order, 10):
            assert present[batch].sum() == pytest.approx(target * 10, abs=1)
    assert present[epoch_indices(present, recipe, 1, epochs=1)].sum() == 80


def test_over_the_epochs_every_image_of_a_class_is_seen_equally_often() -> None:
    present, recipe = np.arange(50) < 20, make(Recipe, positive_share=0.8, final_positive_share=0.4)
    seen = np.zeros(50, int)
    for epoch in range(1, 6):
        seen += np.bincount(epoch_indices(present, recipe, epoch, epochs=5), minlength=50)
        for part in (seen[:20], seen[20:]):
            assert part.max() - part.min() <= 1
    assert seen.min() >= 3


def test_the_order_follows_from_seed_and_epoch() -> None:
    present = np.arange(30) < 11
    first, again, other, later = (
        epoch_indices(present, Recipe(seed=seed), epoch, epochs=4)
        for seed, epoch in ((1, 2), (1, 2), (2, 2), (1, 3))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, later)


@pytest.mark.parametrize("present", [np.zeros(7, np.bool_), np.ones(7, np.bool_), np.arange(7) < 3])
def test_fraction_zero_or_a_missing_class_uses_every_image_once(present: np.ndarray) -> None:
    recipe = make(Recipe, positive_share=0.0 if 0 < present.sum() < 7 else 0.5)
    assert sorted(epoch_indices(present, recipe, 2, epochs=3)) == list(range(7))


def test_batches_hold_images_and_masks_from_zero_to_one() -> None:
    data = squares(6)
    recipe = make(Recipe, augment=False, positive_share=0, batch_size=4)
    seen = list(batches(data, recipe, 1, 1, CPU.device))
    assert [len(batch.images) for batch in seen] == [3, 3]
    assert {batch.images.shape for batch in seen} == {(3, 1, 32, 32)}
    total = sum(float(batch.images.double().sum()) for batch in seen)
    assert total == pytest.approx(int(data.images.sum()) / 255)
    assert sum(float(batch.present.sum()) for batch in seen) == 3


@dataclass(frozen=True)
class Stored:
    """Pixels as an open data set gives them."""

    def images(self, indices: np.ndarray) -> np.ndarray:
        return squares(6).images.numpy()[indices]

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return squares(6).targets.numpy()[indices]


def test_streamed_images_are_those_in_memory() -> None:
    recipe = make(Recipe, augment=True, batch_size=2)
    rows, present = np.array([5, 0, 3, 2]), squares(6).present[[5, 0, 3, 2]]
    held = load(Stored(), rows, present, 32, "cpu")
    assert torch.equal(held.images, squares(6).images[[5, 0, 3, 2]])
    one, two = (
        list(batches(each, recipe, 1, 2, CPU.device))
        for each in (held, StreamedData(Stored(), rows, present))
    )
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.present, b.present)


def test_prefetched_items_come_in_order_and_raise_where_they_were_requested() -> None:
    def halved(number: int) -> float:
        return 10 / number

    assert list(prefetch(halved, range(1, 8))) == [10 / number for number in range(1, 8)]
    fetched, results = prefetch(halved, [1, 2, 0, 4]), list[float]()
    with pytest.raises(ZeroDivisionError):
        results.extend(fetched)
    assert results == [10, 5]


def test_a_dropped_iterator_of_batches_ends_its_thread_and_frees_its_images() -> None:
    requested = list[np.ndarray]()

    class Counting(Stored):
        def images(self, indices: np.ndarray) -> np.ndarray:
            requested.append(indices)
            return super().images(indices)

    data = StreamedData(Counting(), np.zeros(64, int), np.arange(64) % 2 == 0)
    reference = weakref.ref(data)
    iterator = batches(data, make(Recipe, batch_size=1), 1, 1, CPU.device)
    assert next(iterator).images.shape == (1, 1, 32, 32)
    del iterator, data
    gc.collect()
    assert len(requested) <= 4  # the one that was requested for and those ahead of it
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert reference() is None


def test_images_are_held_where_there_is_room() -> None:
    assert choose_cache("auto", 10**6, CPU.device) == "host"
    assert choose_cache("auto", 10**15, CPU.device) == "stream"
    assert choose_cache("device", 10**15, CPU.device) == "device"


# Random changes: what each does, and that image and mask stay together


STILL = torch.zeros(1, 2, CONTROL_POINTS, CONTROL_POINTS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def affine(*numbers: float) -> Tensor:
    """The map of one image, row by row."""
    return torch.tensor(numbers).view(1, 2, 3)


def discs(count: int, side: int, radius: float, x: float = 0, y: float = 0) -> Tensor:
    """Masks (count, side, side) of one disc with a soft edge; x, y and radius in halves of the side."""
    centres = (torch.arange(side) * 2 + 1) / side - 1
    distance = torch.hypot(centres - x, centres[:, None] - y)
    return ((radius - distance) * side / 2 + 0.5).clamp(0, 1).expand(count, side, side).clone()


def centroids_px(targets: Tensor) -> Tensor:
    """Column and row (n, 2) of the middle of each mask, 0 in the image's middle."""
    places = torch.arange(targets.shape[-1]) - (targets.shape[-1] - 1) / 2
    moments = torch.stack([(targets * places).sum((1, 2)), (targets.mT * places).sum((1, 2))], dim=1)
    return moments / targets.sum((1, 2))[:, None]


# Geometry


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1, 0, 0, 0, 1, 0), lambda image: image),
        ((-1, 0, 0, 0, 1, 0), lambda image: image.flip(-1)),
        ((0, 1, 0, -1, 0, 0), lambda image: image.rot90(-1, (-2, -1))),
        # 3 columns from the right, 2 rows from above; what comes from outside is black
        ((1, 0, 6 / 32, 0, 1, -4 / 32), lambda image: functional.pad(image, (0, 3, 2, 0))[..., :-2, 3:]),
    ],
    ids=["still", "mirrored", "a quarter turn", "shifted"],
)
def test_a_map_of_whole_pixels_moves_them_unchanged(
    numbers: tuple[float, ...], expected: Callable[[Tensor], Tensor]
) -> None:
    image = torch.rand(1, 2, 32, 32, generator=seeded(0))
    moved = warp(image, affine(*numbers), STILL)
    torch.testing.assert_close(moved, expected(image), atol=1e-4, rtol=0)


def test_the_distortion_is_bicubic_between_control_points() -> None:
    images = torch.rand(8, 1, 33, 33, generator=seeded(0))
    maps, displacement = random_affine(8, seeded(1)), random_displacement(8, seeded(2))
    assert 0 < displacement.abs().sum((1, 2, 3)).count_nonzero() < 8
    smooth = functional.interpolate(displacement, (33, 33), mode="bicubic", align_corners=True)
    grid = functional.affine_grid(maps, [8, 1, 33, 33], align_corners=False) + smooth.permute(0, 2, 3, 1)
    expected = functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(warp(images, maps, displacement), expected, atol=2e-5, rtol=0)


def test_a_control_point_moves_its_own_place_by_its_displacement_and_the_others_not() -> None:
    ramp = ((torch.arange(33) * 2 + 1) / 66).expand(33, 33)  # each pixel holds its own place, 0 to 1
    places = torch.stack([ramp, ramp.mT])[None]
    displacement = STILL.clone()
    displacement[0, :, 2, 1] = torch.tensor([0.05, -0.03])
    moved = warp(places, affine(1, 0, 0, 0, 1, 0), displacement) - places
    actual = moved[0, :, 8:-8:8, 8:-8:8]  # control points, but for the outermost, whose pixels touch black
    expected = torch.zeros(2, 3, 3)
    expected[:, 1, 0] = torch.tensor([0.05, -0.03]) / 2  # the image measures 2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_strongest_distortion_never_folds_the_image() -> None:
    generator = seeded(0)
    signs = torch.randint(2, (500, 2, CONTROL_POINTS, CONTROL_POINTS), generator=generator) * 2.0 - 1
    smooth = functional.interpolate(2 * DISTORTION * signs, (129, 129), mode="bicubic", align_corners=True)
    place = torch.linspace(-1, 1, 129)
    x, y = smooth[:, 0] + place, smooth[:, 1] + place[:, None]
    step = 2 / 128
    along_x = [c.diff(dim=2)[:, :-1] / step for c in (x, y)]
    along_y = [c.diff(dim=1)[:, :, :-1] / step for c in (x, y)]
    areas = along_x[0] * along_y[1] - along_x[1] * along_y[0]
    assert areas.min() > 0.25  # nowhere is the image stretched to more than four times its area


def test_warps_stay_within_their_limits_and_reach_them() -> None:
    maps = random_affine(4000, seeded(0))
    linear = maps[:, :, :2]
    determinant = torch.linalg.det(linear)
    scale = determinant.abs() ** -0.5
    degrees = torch.rad2deg(torch.atan2(-linear[:, 0, 1], linear[:, 1, 1]))
    for values, low, high in (
        (scale, 1 - SCALE, 1 + SCALE),
        (degrees, -ROTATION_DEGREES, ROTATION_DEGREES),
        (maps[:, 0, 2] / 2, -SHIFT, SHIFT),
        (maps[:, 1, 2] / 2, -SHIFT, SHIFT),
    ):
        edge = 0.01 * (high - low)
        assert low - 1e-4 <= values.min() < low + edge
        assert high - edge < values.max() <= high + 1e-4
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=3 * edge)
    assert (determinant < 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    shape = linear @ linear.mT * scale[:, None, None] ** 2  # neither sheared nor squeezed
    torch.testing.assert_close(shape, torch.eye(2).expand(4000, 2, 2), atol=1e-4, rtol=0)


def test_half_of_the_images_are_distorted_within_the_strength() -> None:
    displacement = random_displacement(1000, seeded(0))
    still = (displacement == 0).flatten(1)
    assert torch.equal(still.any(1), still.all(1))
    assert still.all(1).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert 1.98 * DISTORTION < displacement.abs().max() <= 2 * DISTORTION
    assert displacement.mean().abs() < 0.02 * DISTORTION


def test_each_image_changes_by_its_own_gamma_then_contrast_then_brightness() -> None:
    grey = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(2, 1, 1, 4)
    actual = adjust_intensity(grey, torch.tensor([[2.0, 1.0], [1.2, 1.0], [-0.1, 0.1]]))
    first = [0, (1 / 16 - 0.5) * 1.2 + 0.4, (0.25 - 0.5) * 1.2 + 0.4, 1.0]
    expected = torch.tensor([first, [0.1, 0.35, 0.6, 1.1]]).clamp(0, 1)
    torch.testing.assert_close(actual[:, 0, 0], expected)


def test_intensities_stay_within_their_limits_and_are_symmetric() -> None:
    gamma, contrast, brightness = random_intensity(4000, seeded(0))
    for values, high in (
        (gamma.log(), math.log(GAMMA)),
        (contrast - 1, CONTRAST),
        (brightness, BRIGHTNESS),
    ):
        assert -high - 1e-6 <= values.min() < -0.99 * high
        assert 0.99 * high < values.max() <= high + 1e-6
        assert values.mean().abs() < 0.04 * high


# Both together


def test_a_disc_and_its_mask_stay_within_a_pixel() -> None:
    targets = discs(64, 96, radius=0.4)
    images, moved = augment(0.1 + 0.65 * targets[:, None], targets, seeded(1))
    bright = (images[:, 0] > 0.5).float()  # no tone lifts the ground or lowers the disc that far
    apart_px = (centroids_px(bright) - centroids_px(moved)).norm(dim=1)
    assert apart_px.max() < 0.5
    areas = bright.sum((1, 2)) / moved.sum((1, 2))
    assert areas.sub(1).abs().max() < 0.06  # a third of a pixel around


def test_outside_of_the_image_is_black_and_unmarked() -> None:
    images, targets = augment(torch.ones(32, 1, 48, 48), torch.ones(32, 48, 48), seeded(4))
    outside = targets == 0
    assert 0.01 < outside.float().mean() < 0.2
    assert images[:, 0][outside].max() == 0
    inside = images[:, 0][targets == 1]
    assert len(inside.unique()) > 8  # each white image has its own intensity, unless it stays white
    assert inside.min() >= 1 - CONTRAST / 2 - BRIGHTNESS - 1e-6


@settings(max_examples=25, deadline=None)
@example(0, "white", 37)  # here the weights of a sample add up to more than 1
@given(st.integers(0, 2**32), st.sampled_from(["noise", "black", "white", "chequered"]), st.integers(8, 40))
def test_values_stay_in_range_and_what_was_given_is_not_changed(seed: int, kind: str, side: int) -> None:
    noise = torch.rand(16, side, side, generator=seeded(seed))
    given_targets = {
        "noise": noise,
        "black": torch.zeros_like(noise),
        "white": torch.ones_like(noise),
        "chequered": (noise > 0.5).float(),
    }[kind]
    images, targets = given_targets[:, None].clone(), given_targets.clone()
    moved, moved_targets = augment(images, targets, seeded(seed))
    assert torch.equal(images[:, 0], given_targets) and torch.equal(targets, given_targets)
    assert moved.shape == images.shape and moved_targets.shape == targets.shape
    for values in (moved, moved_targets):
        assert values.dtype == torch.float32
        assert values.min() >= 0 and values.max() <= 1
    if kind == "black":
        assert moved_targets.max() == 0


def test_one_seed_is_one_change_of_each_image_and_nothing_else_is_random() -> None:
    image = torch.rand(1, 1, 32, 32, generator=seeded(0)).expand(4, 1, 32, 32)
    before = torch.get_rng_state()
    first, again, other = (augment(image, image[:, 0], seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert len({image.numpy().tobytes() for image in first[0]}) == 4


def test_points_are_as_exact_when_products_are_rounded_to_half_precision() -> None:
    targets = discs(16, 128, radius=0.3)
    expected = augment(targets[:, None], targets, seeded(5))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = augment(targets[:, None], targets, seeded(5))[1]
    # A disc's edge falls from 1 to 0 within a pixel: a difference of 0.02 is a move of 0.02 pixels.
    torch.testing.assert_close(moved, expected, atol=0.02, rtol=0)
