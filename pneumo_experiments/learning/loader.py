"""Batches for training from a data set held in memory as 8-bit values."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pneumo_experiments.learning.augment import augment


@dataclass(frozen=True)
class Examples:
    """Images and annotated shares (n, S, S) as 0-255, and presence (n,)."""

    images: NDArray[np.uint8]
    shares: NDArray[np.uint8]
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Batch:
    """Tensors on the training device: images (n, 1, S, S), shares (n, S, S), present (n,), in [0, 1]."""

    images: Tensor
    shares: Tensor
    present: Tensor


def batches(
    examples: Examples, batch_size: int, *, changed: bool, device: torch.device, seed: int, epoch: int
) -> Iterator[Batch]:
    """Every example once in random order, in batches of nearly equal size; ``changed`` augments them."""
    rng = np.random.default_rng([seed, epoch])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    order = rng.permutation(len(examples))
    for chunk in np.array_split(order, count_batches(len(examples), batch_size)):
        images = to_unit(examples.images[chunk], device)[:, None]
        shares = to_unit(examples.shares[chunk], device)
        if changed:
            images, shares = augment(images, shares, generator)
        present = torch.from_numpy(examples.present[chunk]).to(device, torch.float32)
        yield Batch(images, shares, present)


def count_batches(examples: int, batch_size: int) -> int:
    """How many batches an epoch has."""
    return -(-examples // batch_size)


def to_unit(values: NDArray[np.uint8], device: torch.device) -> Tensor:
    """8-bit values as float32 in [0, 1] on the device, same shape."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device).float() / 255
