"""Random changes of training images, in batches on the device that trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ROTATION_DEGREES = 10.0
SCALE = 0.1
SHIFT = 0.06  # of the image's side
CONTRAST = 0.2
BRIGHTNESS = 0.1  # of the full grey range


def augment(images: Tensor, shares: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flipped, rotated, scaled, shifted images (n, 1, S, S) and shares (n, S, S), grey levels changed.

    Image and share get the same geometry. ``generator`` lives on the CPU, so that a seed means the
    same changes on every device.
    """
    count = len(images)

    def between(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    angle = between(-ROTATION_DEGREES, ROTATION_DEGREES) * (math.pi / 180)
    scale = 1 + between(-SCALE, SCALE)
    flip = 1 - 2 * torch.randint(2, (count,), generator=generator).float()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = flip * torch.cos(angle) / scale
    theta[:, 0, 1] = -torch.sin(angle) / scale
    theta[:, 1, 0] = flip * torch.sin(angle) / scale
    theta[:, 1, 1] = torch.cos(angle) / scale
    theta[:, 0, 2] = between(-2 * SHIFT, 2 * SHIFT)  # the grid spans -1 to 1
    theta[:, 1, 2] = between(-2 * SHIFT, 2 * SHIFT)
    contrast = 1 + between(-CONTRAST, CONTRAST)
    brightness = between(-BRIGHTNESS, BRIGHTNESS)

    device = images.device
    size = [count, 2, images.shape[-2], images.shape[-1]]
    grid = functional.affine_grid(theta.to(device), size, align_corners=False)
    both = torch.cat([images, shares[:, None]], dim=1)
    both = functional.grid_sample(both, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved, moved_shares = both[:, :1], both[:, 1]
    middle = 0.5
    moved = (moved - middle) * contrast.to(device).view(-1, 1, 1, 1) + middle
    moved = moved + brightness.to(device).view(-1, 1, 1, 1)
    return moved.clamp(0, 1), moved_shares.clamp(0, 1)
