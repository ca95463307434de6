"""Random augmentation of training images, in batches on the training device.

Flip, shift, scale, rotation and a smooth distortion are combined in one grid, so each image is sampled once.
Written by hand because torchvision's transforms draw one set of parameters for a whole batch, on the host.
Nothing here reads a value back from the device, so the host never waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

FLIP_PROBABILITY = 0.5
ROTATION_DEGREES = 10.0  # to either side
SCALE = 0.1  # larger or smaller
SHIFT = 0.06  # fraction of the image's side, along each axis
DISTORTION_PROBABILITY = 0.5
DISTORTION = 0.02  # largest shift of a control point along each axis, as a fraction of the image's side
CONTROL_POINTS = 5  # per side; the outermost lie on the image's edge
GAMMA = 1.25  # exponents are log-uniform between 1 / GAMMA and GAMMA
CONTRAST = 0.2  # more or less, about mid-grey
BRIGHTNESS = 0.1  # fraction of the full intensity range


def augment(
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    rows: slice = slice(None),
    batch_size: int = 0,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Images (n, 1, S, S) and masks (n, S, S), warped alike, images with other intensities; all in [0, 1].

    Pixels from outside an image are black and unmarked. ``generator`` lives on the CPU, so that a seed gives
    the same changes on every device. Where the images are the ``rows`` of a larger batch of ``batch_size``,
    they change as they would in that batch. ``strength`` scales every range but the flip's probability.
    """
    count = batch_size or len(images)
    affine = random_affine(count, generator, strength)[rows]
    displacement = random_displacement(count, generator)[rows] * strength
    images = adjust_intensity(images, random_intensity(count, generator, strength)[:, rows])
    # Intensities change first: the outside stays black.
    warped = warp(torch.cat([images, targets[:, None]], dim=1), affine, displacement)
    return warped[:, :1], warped[:, 1]


def random_affine(count: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Matrices (n, 2, 3) from a point (x, y, 1) in the new image to its point in the old, for ``warp``."""
    flip = 1 - 2 * (torch.rand(count, generator=generator) < FLIP_PROBABILITY).float()
    angle = math.radians(strength * ROTATION_DEGREES) * _uniform((count,), generator)
    scale = 1 + strength * SCALE * _uniform((count,), generator)
    shift = strength * 2 * SHIFT * _uniform((2, count), generator)  # an image's side measures 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (flip * cos, -sin, shift[0], flip * sin, cos, shift[1])
    return torch.stack(rows, dim=1).view(count, 2, 3)


def random_displacement(count: int, generator: torch.Generator) -> Tensor:
    """Displacements along x and y (n, 2, K, K) of each image's control points, for ``warp``; often 0."""
    displacement = 2 * DISTORTION * _uniform((count, 2, CONTROL_POINTS, CONTROL_POINTS), generator)
    return displacement * (torch.rand(count, 1, 1, 1, generator=generator) < DISTORTION_PROBABILITY)


def random_intensity(count: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Gamma, contrast and brightness (3, n), for ``adjust_intensity``."""
    gamma, contrast, brightness = strength * _uniform((3, count), generator)
    return torch.stack([GAMMA**gamma, 1 + CONTRAST * contrast, BRIGHTNESS * brightness])


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
