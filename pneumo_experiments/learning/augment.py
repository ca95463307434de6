"""Random changes of training images, in batches on the device that trains.

Every picture is sampled once: mirror, shift, scale, rotation and a smooth distortion make up one grid.
Nothing here reads a value back from the device, so that it never has to wait.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

MIRRORED = 0.5  # share of the images
ROTATION_DEGREES = 10.0  # to either side
SCALE = 0.1  # larger or smaller
SHIFT = 0.06  # of the image's side, along each axis
DISTORTED = 0.5  # share of the images
DISTORTION = 0.02  # of the image's side: the farthest that a control point moves along each axis
CONTROL_POINTS = 5  # per side, the outermost on the image's edge
GAMMA = 1.25  # exponents lie between its inverse and itself, evenly in their logarithm
CONTRAST = 0.2  # more or less, about the middle grey
BRIGHTNESS = 0.1  # of the full grey range


def augment(
    images: Tensor, targets: Tensor, generator: torch.Generator, part: slice = slice(None), of: int = 0
) -> tuple[Tensor, Tensor]:
    """Images (n, 1, S, S) and shares (n, S, S) with other greys and moved alike, all values in [0, 1].

    What comes from outside a picture is black and unmarked. ``generator`` lives on the CPU, so that a
    seed means the same changes on every device. Where the images are the ``part`` of a batch ``of`` more,
    they change as they would in the whole batch.
    """
    count = of or len(images)
    affine = random_affine(count, generator)[part]
    displacement = random_displacement(count, generator)[part]
    images = adjust_intensity(images, random_intensity(count, generator)[:, part])
    # Greys change first: the outside stays black.
    moved = warp(torch.cat([images, targets[:, None]], dim=1), affine, displacement)
    return moved[:, :1], moved[:, 1]


def random_affine(count: int, generator: torch.Generator) -> Tensor:
    """Maps (n, 2, 3) from a place (x, y, 1) in the new picture to its place in the old, for ``warp``."""
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < MIRRORED).float()
    angle = math.radians(ROTATION_DEGREES) * _signed((count,), generator)
    scale = 1 + SCALE * _signed((count,), generator)
    shift = 2 * SHIFT * _signed((2, count), generator)  # the picture measures 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (mirror * cos, -sin, shift[0], mirror * sin, cos, shift[1])
    return torch.stack(rows, dim=1).view(count, 2, 3)


def random_displacement(count: int, generator: torch.Generator) -> Tensor:
    """Displacements along x and y (n, 2, K, K) of each picture's control points, for ``warp``; many are 0."""
    displacement = 2 * DISTORTION * _signed((count, 2, CONTROL_POINTS, CONTROL_POINTS), generator)
    return displacement * (torch.rand(count, 1, 1, 1, generator=generator) < DISTORTED)


def random_intensity(count: int, generator: torch.Generator) -> Tensor:
    """Gamma, contrast and brightness (3, n), for ``adjust_intensity``."""
    gamma, contrast, brightness = _signed((3, count), generator)
    return torch.stack([GAMMA**gamma, 1 + CONTRAST * contrast, BRIGHTNESS * brightness])


def warp(pictures: Tensor, affine: Tensor, displacement: Tensor) -> Tensor:
    """Pictures (n, c, S, S) sampled bilinearly where the map and the displacement (n, 2, K, K) point.

    Coordinates are x to the right and y down, from -1 to 1 between the picture's outer edges. The
    displacement is interpolated bicubically between its control points and added to the map's place.
    """
    size, device = pictures.shape[-1], pictures.device
    # From ordinary memory a small tensor is copied at once; non_blocking spares the wait for the device.
    affine = affine.to(device, non_blocking=True)[..., None, None]
    displacement = displacement.to(device, non_blocking=True)
    centres = (torch.arange(size, device=device) * 2 + 1) / size - 1
    across, down = centres, centres[:, None]
    identity = torch.eye(displacement.shape[-1], device=device)[None, None]
    spread = functional.interpolate(identity, (size, len(identity[0, 0])), mode="bicubic", align_corners=True)
    grid = (spread @ displacement @ spread.mT).float()  # bicubic along y, then along x
    # Not affine_grid: what TF32 or bf16 round off the small displacement is nothing, but off the map it
    # would be up to a pixel.
    grid.add_(affine[:, :, 0] * across).add_(affine[:, :, 1] * down + affine[:, :, 2])
    moved = functional.grid_sample(
        pictures, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return moved.clamp_(0, 1)  # the four weights of a sample may add up to a little more than 1


def adjust_intensity(images: Tensor, tones: Tensor) -> Tensor:
    """Images (n, 1, S, S) in [0, 1] with gamma, then contrast and brightness (3, n) changed; in [0, 1]."""
    gamma, contrast, brightness = tones.to(images.device, non_blocking=True)[..., None, None, None]
    middle = 0.5  # what contrast leaves as it is
    return (images**gamma).mul_(contrast).add_(middle - middle * contrast + brightness).clamp_(0, 1)


def _signed(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers, evenly between -1 and 1, on the CPU."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator)
