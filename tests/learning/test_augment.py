"""Random changes of images: what each does, and that image and mask stay together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from helpers import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.augment import (
    CONTROL_POINTS,
    DEGRADATION_PROBABILITY,
    RANGES,
    Ranges,
    adjust_intensity,
    augment,
    crop,
    degrade,
    random_affine,
    random_degradation,
    random_displacement,
    random_intensity,
    soften_borders,
    warp,
)
from pneumo_experiments.settings import Batches

MILD, STRONG = RANGES["mild"], RANGES["strong"]
BOTH = pytest.mark.parametrize("ranges", [MILD, STRONG], ids=["mild", "strong"])
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
    maps, displacement = random_affine(8, seeded(1), MILD), random_displacement(8, seeded(2), MILD)
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


@BOTH
def test_the_strongest_distortion_never_folds_the_image(ranges: Ranges) -> None:
    generator = seeded(0)
    signs = torch.randint(2, (500, 2, CONTROL_POINTS, CONTROL_POINTS), generator=generator) * 2.0 - 1
    smooth = functional.interpolate(
        2 * ranges.distortion * signs, (129, 129), mode="bicubic", align_corners=True
    )
    place = torch.linspace(-1, 1, 129)
    x, y = smooth[:, 0] + place, smooth[:, 1] + place[:, None]
    step = 2 / 128
    along_x = [c.diff(dim=2)[:, :-1] / step for c in (x, y)]
    along_y = [c.diff(dim=1)[:, :, :-1] / step for c in (x, y)]
    areas = along_x[0] * along_y[1] - along_x[1] * along_y[0]
    assert areas.min() > 0.25  # nowhere is the image stretched to more than four times its area


@BOTH
def test_warps_stay_within_their_limits_and_reach_them(ranges: Ranges) -> None:
    maps = random_affine(4000, seeded(0), ranges)
    linear = maps[:, :, :2]
    determinant = torch.linalg.det(linear)
    scale = determinant.abs() ** -0.5
    degrees = torch.rad2deg(torch.atan2(-linear[:, 0, 1], linear[:, 1, 1]))
    for values, low, high in (
        (scale, 1 - ranges.scale, 1 + ranges.scale),
        (degrees, -ranges.rotation_degrees, ranges.rotation_degrees),
        (maps[:, 0, 2] / 2, -ranges.shift, ranges.shift),
        (maps[:, 1, 2] / 2, -ranges.shift, ranges.shift),
    ):
        edge = 0.01 * (high - low)
        assert low - 1e-4 <= values.min() < low + edge
        assert high - edge < values.max() <= high + 1e-4
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=3 * edge)
    assert (determinant < 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    shape = linear @ linear.mT * scale[:, None, None] ** 2  # neither sheared nor squeezed
    torch.testing.assert_close(shape, torch.eye(2).expand(4000, 2, 2), atol=1e-4, rtol=0)


@BOTH
def test_half_of_the_images_are_distorted_within_the_strength(ranges: Ranges) -> None:
    displacement = random_displacement(1000, seeded(0), ranges)
    still = (displacement == 0).flatten(1)
    assert torch.equal(still.any(1), still.all(1))
    assert still.all(1).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert 1.98 * ranges.distortion < displacement.abs().max() <= 2 * ranges.distortion
    assert displacement.mean().abs() < 0.02 * ranges.distortion


def test_each_image_changes_by_its_own_gamma_then_contrast_then_brightness() -> None:
    grey = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(2, 1, 1, 4)
    actual = adjust_intensity(grey, torch.tensor([[2.0, 1.0], [1.2, 1.0], [-0.1, 0.1]]))
    first = [0, (1 / 16 - 0.5) * 1.2 + 0.4, (0.25 - 0.5) * 1.2 + 0.4, 1.0]
    expected = torch.tensor([first, [0.1, 0.35, 0.6, 1.1]]).clamp(0, 1)
    torch.testing.assert_close(actual[:, 0, 0], expected)


@BOTH
def test_intensities_stay_within_their_limits_and_are_symmetric(ranges: Ranges) -> None:
    gamma, contrast, brightness = random_intensity(4000, seeded(0), ranges)
    for values, high in (
        (gamma.log(), math.log(ranges.gamma)),
        (contrast - 1, ranges.contrast),
        (brightness, ranges.brightness),
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
    assert inside.min() >= 1 - MILD.contrast / 2 - MILD.brightness - 1e-6


@settings(deadline=None)
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


def test_no_augmentation_changes_nothing_and_draws_nothing() -> None:
    image, generator = torch.rand(2, 1, 8, 8, generator=seeded(0)), seeded(1)
    same = augment(image, image[:, 0], generator, settings=Batches(augment="none"))
    assert torch.equal(same[0], image) and torch.equal(same[1], image[:, 0])
    assert torch.equal(generator.get_state(), seeded(1).get_state())


def test_a_seed_gives_the_mild_changes_that_it_gave_before_there_were_strong_ones() -> None:
    generator, ranges = seeded(0), MILD._replace(factor=1.5)
    matrix = random_affine(2, generator, ranges)[1]
    displacement = random_displacement(2, generator, ranges)
    intensity = random_intensity(2, generator, ranges)
    assert matrix.flatten().tolist() == pytest.approx(
        [0.94354409, 0.18407446, 0.14272012, -0.18407446, 0.94354409, 0.04763026], rel=1e-6
    )
    assert displacement[:, 0, 1, :2].flatten().tolist() == pytest.approx(
        [1.5 * 0.00148174, 1.5 * 0.01581341, 0, 0], rel=1e-5
    )
    assert intensity.flatten().tolist() == pytest.approx(
        [0.81571734, 1.35487700, 1.20559001, 0.74701512, -0.03733265, 0.00676839], rel=1e-5
    )
    assert torch.rand(1, generator=generator).item() == pytest.approx(0.57295054)
    images, after = torch.rand(3, 1, 16, 16), seeded(7)
    augment(images, images[:, 0], after)
    drawn = seeded(7)
    for draw in (random_affine, random_displacement, random_intensity):
        draw(3, drawn, MILD)
    assert torch.equal(after.get_state(), drawn.get_state())  # and it draws nothing more


def test_the_docs_have_the_ranges() -> None:
    lines = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    table = {cells[1]: cells[3:5] for line in lines if len(cells := re.split(r" *\| *", line)) == 6}
    expected = {
        "rotation, to either side": [f"{each.rotation_degrees}°" for each in (MILD, STRONG)],
        "larger or smaller": [f"{each.scale}" for each in (MILD, STRONG)],
        "shift, fraction of the side": [f"{each.shift}" for each in (MILD, STRONG)],
        "distortion, fraction of the side": [f"{each.distortion}" for each in (MILD, STRONG)],
        "gamma, contrast, brightness": [
            f"{each.gamma}, {each.contrast}, {each.brightness}" for each in (MILD, STRONG)
        ],
        "noise, standard deviation": ["", f"{STRONG.noise}"],
        "blur, standard deviation in pixels": ["", f"{STRONG.blur_px}"],
    }
    assert table.items() >= expected.items()
    assert (MILD.noise, MILD.blur_px, MILD.low_resolution, STRONG.low_resolution) == (0, 0, 0, 1)


# Noise, blur and low resolution


def test_a_fifth_of_the_images_is_degraded_in_each_way_up_to_the_strength() -> None:
    drawn = random_degradation(4000, seeded(0), STRONG._replace(factor=2.0))
    for values, high in zip(drawn, (0.1, 3.0, 2.0), strict=False):
        assert (values > 0).float().mean().item() == pytest.approx(DEGRADATION_PROBABILITY, abs=0.03)
        assert 0.99 * high < values.max() <= high
        assert values[values > 0].mean().item() == pytest.approx(high / 2, rel=0.05)


def test_each_degradation_is_what_it_says() -> None:
    dots = torch.zeros(4, 1, 64, 64)
    dots[:, :, 30, 33] = 0.8
    none, blurred, small, noisy = degrade(
        dots + 0.1, torch.tensor([[0, 0, 0, 0.03], [0, 1.2, 0, 0], [0, 0, 1, 0], [0.2] * 4, [0.7] * 4])
    )
    assert torch.equal(none, (dots + 0.1)[0])
    places = torch.arange(64.0)
    for along, middle in ((blurred[0].sum(0) - 6.4, 33), (blurred[0].sum(1) - 6.4, 30)):
        assert along.sum().item() == pytest.approx(0.8, rel=1e-4)
        assert (along @ (places - middle) ** 2).item() / 0.8 == pytest.approx(1.2**2, rel=0.03)
    assert small.max() < 0.1 + 0.8 / 4 + 1e-6  # a pixel of half as many per side averages four
    assert (small - 0.1).sum().item() == pytest.approx(0.8, rel=1e-3)
    lost = (noisy - dots[3] - 0.1).flatten()
    assert lost.std().item() == pytest.approx(0.03, rel=0.05)
    assert lost.mean().abs() < 0.002


def test_two_images_of_a_batch_have_different_noise() -> None:
    grey = torch.full((2, 1, 32, 32), 0.5)
    one, two = degrade(grey, torch.tensor([[0.1, 0.1], [0, 0], [0, 0], [0.1, 0.6], [0.3, 0.9]]))
    noise = torch.stack([one.flatten(), two.flatten()])
    assert torch.corrcoef(noise)[0, 1].abs() < 0.15


@pytest.mark.parametrize("strength", ["mild", "strong"])
def test_rows_of_a_batch_change_as_in_the_whole_batch(strength: Literal["mild", "strong"]) -> None:
    images, chosen = torch.rand(13, 1, 24, 24, generator=seeded(0)), Batches(augment=strength)
    whole = augment(images, images[:, 0], seeded(2), settings=chosen)
    for rank in range(3):
        rows = slice(rank, None, 3)
        part = augment(images[rows], images[rows, 0], seeded(2), rows, 13, chosen)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


def test_a_crop_is_one_part_of_image_and_mask_wherever_and_in_every_process() -> None:
    images = torch.arange(7 * 9 * 9).float().view(7, 1, 9, 9)
    whole, masks = crop(images, images[:, 0] + 1000, 5, seeded(4), slice(None), 7)
    assert whole.shape == (7, 1, 5, 5)
    assert torch.equal(whole[:, 0] + 1000, masks)
    corners = (whole[:, 0, 0, 0] - images[:, 0, 0, 0]).long()
    for image, part, corner in zip(images, whole, corners.tolist(), strict=True):
        y, x = divmod(corner, 9)
        assert torch.equal(part[0], image[0, y : y + 5, x : x + 5])
    assert len(set(corners.tolist())) > 3
    every = torch.zeros(400, 1, 6, 6)
    every[:, :, 0, 0] = every[:, :, 5, 5] = 1
    parts, _ = crop(every, every[:, 0], 5, seeded(0), slice(None), 400)  # two places along each axis
    assert 0.15 < parts[:, 0, 0, 0].mean() < 0.35 and 0.15 < parts[:, 0, 4, 4].mean() < 0.35
    for rank in range(2):
        rows = slice(rank, None, 2)
        own = crop(images[rows], images[rows, 0], 5, seeded(4), rows, 7)
        assert torch.equal(own[0], whole[rows])
    assert crop(images, images[:, 0], 9, seeded(0), slice(None), 7)[0] is images


@pytest.mark.parametrize("factor", [0.0, 0.3, 3.0])
def test_strong_changes_of_every_factor_stay_in_range(factor: float) -> None:
    images, chosen = torch.rand(64, 1, 9, 9), Batches(augment="strong", augment_strength=factor)
    moved, targets = augment(images, images[:, 0], seeded(1), settings=chosen)
    for values in (moved, targets):
        assert values.isfinite().all() and values.min() >= 0 and values.max() <= 1
    if not factor:
        still = torch.stack([images, images.flip(-1)])
        torch.testing.assert_close(
            (moved - still).abs().amax((2, 3, 4)).amin(0), torch.zeros(64), atol=1e-4, rtol=0
        )


# Soft borders


@pytest.mark.parametrize("width", [0, 1, 3])
def test_a_border_is_a_binomial_and_what_is_farther_away_stays_exact(width: int) -> None:
    masks = torch.zeros(2, 40, 40)
    masks[0, :, 20:] = 1
    masks[1, 10:30, 8:33] = 1
    soft = soften_borders(masks, width)
    chances = [math.comb(2 * width, k) / 4**width for k in range(2 * width + 1)]
    expected = [sum(chances[: k + 1]) for k in range(2 * width)]
    assert soft[0, 5, 20 - width : 20 + width].tolist() == expected
    assert soft[0, 0].tolist() == soft[0, 39].tolist() == soft[0, 5].tolist()  # the image's edge is no border
    near = functional.max_pool2d(masks, 2 * width + 1, 1, width) + functional.max_pool2d(
        1 - masks, 2 * width + 1, 1, width
    )
    far = near < 2
    assert torch.equal(soft[far], masks[far])
    assert soft[~far].min() > 0 and soft[~far].max() < 1 if width else torch.equal(soft, masks)
    assert soft[1].sum() == masks[1].sum()
