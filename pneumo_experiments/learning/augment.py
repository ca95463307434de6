"""Random augmentation of training images, in batches on the training device.

Flip, shift, scale, rotation and a smooth distortion are combined in one grid, so each image is sampled once.
Written by hand because torchvision's transforms draw one set of parameters for a whole batch, on the host.
Nothing here reads a value back from the device, so the host never waits for it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.settings import Batches

FLIP_PROBABILITY = 0.5
DISTORTION_PROBABILITY = 0.5
CONTROL_POINTS = 5  # per side; the outermost lie on the image's edge
DEGRADATION_PROBABILITY = 0.2  # of noise, of blur and of low resolution, each
NOISE_SEED = 0


class Ranges(NamedTuple):
    """How far each random change goes, to either side; ``factor`` applies to all but the flip."""

    rotation_degrees: float
    scale: float  # larger or smaller
    shift: float  # fraction of the image's side, along each axis
    distortion: float  # largest shift of a control point along each axis, as a fraction of the image's side
    gamma: float  # exponents are log-uniform between 1 / gamma and gamma
    contrast: float  # more or less, about mid-grey
    brightness: float  # fraction of the full intensity range
    noise: float = 0.0  # largest standard deviation, as a fraction of the full intensity range
    blur_px: float = 0.0  # largest standard deviation of a Gaussian
    low_resolution: float = 0.0  # how many pixels more a pixel covers at most, along each axis
    factor: float = 1.0


# Strong: rotation, scale and shift of the challenge's winners (albumentations' ShiftScaleRotate); noise, blur
# and low resolution about as in nnU-Net (Isensee et al. 2021).
RANGES = {
    "mild": Ranges(10, 0.1, 0.06, 0.02, gamma=1.25, contrast=0.2, brightness=0.1),
    "strong": Ranges(20, 0.2, 0.2, 0.025, 1.4, 0.3, 0.15, noise=0.05, blur_px=1.5, low_resolution=1.0),
}


def augment(
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    rows: slice = slice(None),
    batch_size: int = 0,
    settings: Batches = Batches(),  # noqa: B008  (it is frozen)
) -> tuple[Tensor, Tensor]:
    """Images (n, 1, S, S) and masks (n, S, S), warped alike, images with other intensities; all in [0, 1].

    Pixels from outside an image are black and unmarked. ``generator`` lives on the CPU, so that a seed gives
    the same changes on every device. Where the images are the ``rows`` of a larger batch of ``batch_size``,
    they change as they would in that batch.
    """
    if settings.augment == "none":
        return images, targets
    count, ranges = batch_size or len(images), RANGES[settings.augment]
    ranges = ranges._replace(factor=settings.augment_strength)
    affine = random_affine(count, generator, ranges)[rows]
    displacement = random_displacement(count, generator, ranges)[rows]
    images = adjust_intensity(images, random_intensity(count, generator, ranges)[:, rows])
    # Intensities change first: the outside stays black.
    warped = warp(torch.cat([images, targets[:, None]], dim=1), affine, displacement)
    images, targets = warped[:, :1], warped[:, 1]
    if ranges.noise:  # the mild ones draw nothing more: what a seed gives is older than the strong ones
        images = degrade(images, random_degradation(count, generator, ranges)[:, rows])
    return images, targets


def crop(
    images: Tensor, targets: Tensor, side: int, generator: torch.Generator, rows: slice, batch_size: int
) -> tuple[Tensor, Tensor]:
    """A random part (n, 1, side, side) of each image (n, 1, S, S), and (n, side, side) of its mask.

    ``generator``, ``rows`` and ``batch_size`` as for ``augment``. Whole images if ``side`` is S or more.
    """
    most = images.shape[-1] - side
    if most <= 0:
        return images, targets
    drawn = torch.randint(most + 1, (batch_size, 2), generator=generator)[rows]
    places = cast("list[list[int]]", drawn.tolist())  # pyright: ignore[reportUnknownMemberType]
    both = torch.cat([images, targets[:, None]], dim=1)
    parts = torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(both, places, strict=True)]
    )
    return parts[:, :1], parts[:, 1]


def random_affine(count: int, generator: torch.Generator, ranges: Ranges) -> Tensor:
    """Matrices (n, 2, 3) from a point (x, y, 1) in the new image to its point in the old, for ``warp``."""
    flip = 1 - 2 * (torch.rand(count, generator=generator) < FLIP_PROBABILITY).float()
    angle = math.radians(ranges.factor * ranges.rotation_degrees) * _uniform((count,), generator)
    scale = 1 + ranges.factor * ranges.scale * _uniform((count,), generator)
    shift = ranges.factor * 2 * ranges.shift * _uniform((2, count), generator)  # an image's side measures 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (flip * cos, -sin, shift[0], flip * sin, cos, shift[1])
    return torch.stack(rows, dim=1).view(count, 2, 3)


def random_displacement(count: int, generator: torch.Generator, ranges: Ranges) -> Tensor:
    """Displacements along x and y (n, 2, K, K) of each image's control points, for ``warp``; often 0."""
    displacement = 2 * ranges.distortion * _uniform((count, 2, CONTROL_POINTS, CONTROL_POINTS), generator)
    is_distorted = torch.rand(count, 1, 1, 1, generator=generator) < DISTORTION_PROBABILITY
    return displacement * is_distorted * ranges.factor


def random_intensity(count: int, generator: torch.Generator, ranges: Ranges) -> Tensor:
    """Gamma, contrast and brightness (3, n), for ``adjust_intensity``."""
    gamma, contrast, brightness = ranges.factor * _uniform((3, count), generator)
    return torch.stack([ranges.gamma**gamma, 1 + ranges.contrast * contrast, ranges.brightness * brightness])


def random_degradation(count: int, generator: torch.Generator, ranges: Ranges) -> Tensor:
    """Noise, blur, low resolution and the noise's place (5, n), for ``degrade``; the first three often 0."""
    drawn, place = torch.rand(3, count, generator=generator), torch.rand(2, count, generator=generator)
    chosen = torch.rand(3, count, generator=generator) < DEGRADATION_PROBABILITY
    largest = ranges.factor * torch.tensor([ranges.noise, ranges.blur_px, ranges.low_resolution])
    return torch.cat([largest[:, None] * drawn * chosen, place])


def degrade(images: Tensor, degradation: Tensor) -> Tensor:
    """Images (n, 1, S, S) in [0, 1] after blur, low resolution and noise, each where it is not 0; in [0, 1].

    ``degradation`` (5, n) lies on the CPU. The noise of an image is a part of one noise for all, which is the
    same on every device, and in every process of a group.
    """
    size = images.shape[-1]
    rows = cast("list[list[float]]", degradation.T.tolist())  # pyright: ignore[reportUnknownMemberType]
    changed = list[Tensor]()
    for image, (noise, blur_px, reduction, *place) in zip(images.unbind(), rows, strict=True):
        if blur_px:
            image = _blur(image, blur_px)
        if reduction:
            small = functional.interpolate(image[None], (round(size / (1 + reduction)),) * 2, mode="area")
            image = functional.interpolate(small, (size, size), mode="bilinear")[0]
        if noise:
            y, x = (int(part * size) for part in place)
            image = image + noise * _noise(size, images.device)[y : y + size, x : x + size]
        changed.append(image)
    return torch.stack(changed).clamp_(0, 1)


def _blur(image: Tensor, sigma_px: float) -> Tensor:
    """An image (1, S, S) after a Gaussian of that standard deviation; mirrored at its edges."""
    radius = min(math.ceil(3 * sigma_px), image.shape[-1] - 1)
    weights = [math.exp(-((k / sigma_px) ** 2) / 2) for k in range(-radius, radius + 1)]
    for dim in (-1, -2):
        padding = [radius, radius, 0, 0] if dim == -1 else [0, 0, radius, radius]
        shifted = functional.pad(image, padding, mode="reflect").unfold(dim, len(weights), 1)
        kernel = torch.tensor(weights) / sum(weights)
        image = (shifted * kernel.to(image.device, non_blocking=True)).sum(-1)
    return image


@cache
def _noise(size: int, device: torch.device) -> Tensor:
    """Standard normal noise (2S, 2S)."""
    noise = torch.randn(2 * size, 2 * size, generator=torch.Generator().manual_seed(NOISE_SEED))
    return noise.to(device, non_blocking=True)


def soften_borders(targets: Tensor, width_px: int) -> Tensor:
    """Masks (n, S, S) with borders that fall from 1 to 0 over ``width_px`` pixels to either side.

    A binomial filter, as repeated means of two neighbours: exact in float32, so that what is farther from a
    border stays exactly 1 or 0.
    """
    softened = functional.pad(targets, [width_px] * 4, mode="replicate")
    for _ in range(2 * width_px):
        softened = (softened[:, 1:] + softened[:, :-1]) / 2
        softened = (softened[:, :, 1:] + softened[:, :, :-1]) / 2
    return softened


def warp(images: Tensor, affine: Tensor, displacement: Tensor) -> Tensor:
    """Images (n, c, S, S) sampled bilinearly at the affine points plus the displacement (n, 2, K, K).

    Coordinates are x to the right and y down, from -1 to 1 between the image's outer edges. The
    displacement is interpolated bicubically between its control points.
    """
    size, device = images.shape[-1], images.device
    # A small tensor in pageable memory is copied at once; non_blocking avoids waiting for the device.
    affine = affine.to(device, non_blocking=True)[..., None, None]
    displacement = displacement.to(device, non_blocking=True)
    centres = (torch.arange(size, device=device) * 2 + 1) / size - 1
    x, y = centres, centres[:, None]
    identity = torch.eye(displacement.shape[-1], device=device)[None, None]
    weights = functional.interpolate(
        identity, (size, len(identity[0, 0])), mode="bicubic", align_corners=True
    )
    grid = (weights @ displacement @ weights.mT).float()  # bicubic along y, then along x
    # Not affine_grid: TF32 or bf16 may round the small displacement, but an affine point would be off by up
    # to a pixel.
    grid.add_(affine[:, :, 0] * x).add_(affine[:, :, 1] * y + affine[:, :, 2])
    warped = functional.grid_sample(
        images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return warped.clamp_(0, 1)  # the four weights of a sample may add up to slightly more than 1


def adjust_intensity(images: Tensor, intensity: Tensor) -> Tensor:
    """Images (n, 1, S, S) in [0, 1] after gamma, then contrast and brightness (3, n); in [0, 1]."""
    gamma, contrast, brightness = intensity.to(images.device, non_blocking=True)[..., None, None, None]
    middle = 0.5  # contrast leaves it unchanged
    return (images**gamma).mul_(contrast).add_(middle - middle * contrast + brightness).clamp_(0, 1)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers, uniform in [-1, 1], on the CPU."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator)
