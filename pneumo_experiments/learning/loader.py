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
from pneumo_experiments.settings import Recipe


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


def batches(examples: Examples, recipe: Recipe, epoch: int, device: torch.device) -> Iterator[Batch]:
    """As many examples as there are, in random order and batches of nearly equal size."""
    rng = np.random.default_rng([recipe.seed, epoch])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    order = draw(examples.present, recipe.positive_share, rng)
    for chunk in np.array_split(order, count_batches(len(examples), recipe.batch_size)):
        images = to_unit(examples.images[chunk], device)[:, None]
        shares = to_unit(examples.shares[chunk], device)
        if recipe.augment:
            images, shares = augment(images, shares, generator)
        present = torch.from_numpy(examples.present[chunk]).to(device, torch.float32)
        yield Batch(images, shares, present)


def draw(present: NDArray[np.bool_], positive_share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (n,) for an epoch over n images with that share of positives, in random order.

    A class that is asked for more often than it has images repeats, each image equally often or once
    more. With a share of 0, or where a class is missing, every image comes once.
    """
    positives, negatives = np.flatnonzero(present), np.flatnonzero(~present)
    if positive_share == 0 or not len(positives) or not len(negatives):
        return rng.permutation(len(present))
    wanted = round(positive_share * len(present))
    parts = ((positives, wanted), (negatives, len(present) - wanted))
    chosen = [np.resize(rng.permutation(indices), count) for indices, count in parts]
    return rng.permutation(np.concatenate(chosen))


def count_batches(examples: int, batch_size: int) -> int:
    """How many batches an epoch has."""
    return -(-examples // batch_size)


def to_unit(values: NDArray[np.uint8], device: torch.device) -> Tensor:
    """8-bit values as float32 in [0, 1] on the device, same shape."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device).float() / 255
