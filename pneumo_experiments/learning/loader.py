"""Batches for training: which images, where they lie, and how they reach the device."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.augment import augment
from pneumo_experiments.learning.device import copied_to
from pneumo_experiments.settings import Recipe

Indices = NDArray[np.int64]
Item = TypeVar("Item")
Fetched = TypeVar("Fetched")
AHEAD = 2  # batches that are fetched while the device computes
# Shares of the free memory that images may take; the network needs the rest.
DEVICE_SHARE, HOST_SHARE = 0.4, 0.5
POSITIVES, NEGATIVES, EVERY = 1, 2, 3  # streams of randomness under one seed


class Pixels(Protocol):
    """8-bit images and annotated shares (n, S, S) by index, as an open data set gives them."""

    def images(self, indices: Indices) -> NDArray[np.uint8]: ...

    def targets(self, indices: Indices) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class InMemoryData:
    """Images and annotated shares (n, S, S) as 0-255 in the memory of device or host; presence (n,)."""

    images: Tensor
    targets: Tensor
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.present)

    def take(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images and shares (k, S, S), where the examples lie."""
        index = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
        return self.images[index], self.targets[index]


@dataclass(frozen=True)
class StreamedData:
    """Examples that are read as they are needed: rows of an open data set."""

    pixels: Pixels
    rows: Indices
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.present)

    def take(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images and shares (k, S, S), in the host's memory."""
        rows = self.rows[indices]
        return torch.from_numpy(self.pixels.images(rows)), torch.from_numpy(self.pixels.targets(rows))


@dataclass(frozen=True)
class Batch:
    """Tensors on the training device: images (n, 1, S, S), shares (n, S, S), present (n,), in [0, 1].

    ``size`` counts the images of the whole batch, of which a group of processes takes n each.
    """

    images: Tensor
    targets: Tensor
    present: Tensor
    size: int


def choose_cache(wish: str, size_bytes: int, device: torch.device) -> str:
    """Where images of so many bytes lie: device, host or stream; ``wish`` is one of these, or auto."""
    if wish != "auto":
        return wish
    if device.type == "cuda" and size_bytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if fits_host(size_bytes) else "stream"


def fits_host(size_bytes: int) -> bool:
    """Whether so many bytes, in each process on this machine, leave the host memory enough."""
    return size_bytes * distributed.local_world_size() < HOST_SHARE * psutil.virtual_memory().available


def load(
    pixels: Pixels,
    rows: Indices,
    present: NDArray[np.bool_],
    side: int,
    place: str,
    progress: Callable[[int], None] = lambda images: None,
) -> InMemoryData:
    """Examples in the memory of the host, or of the device that ``place`` names; read in parts.

    ``progress`` is called with the number of images after each part.
    """
    both = torch.empty((2, len(rows), side, side), dtype=torch.uint8, device=place)
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        both[0, start : start + len(some)] = torch.from_numpy(pixels.images(some))
        both[1, start : start + len(some)] = torch.from_numpy(pixels.targets(some))
        progress(len(some))
    return InMemoryData(both[0], both[1], present)


def batches(
    examples: InMemoryData | StreamedData, recipe: Recipe, epoch: int, epochs: int, device: torch.device
) -> Iterator[Batch]:
    """As many examples as there are, in batches of nearly equal size; equal for equal seed and epoch.

    In a group of processes each takes every so many-th image of a batch.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng([recipe.seed, epoch]).integers(2**62))
    )
    order = epoch_indices(examples.present, recipe, epoch, epochs)
    chunks = np.array_split(order, count_batches(len(examples), recipe.batches.batch_size))
    ours = slice(distributed.rank(), None, distributed.world_size())
    mine = [chunk[ours] for chunk in chunks]
    for whole, chunk, (images, targets) in zip(chunks, mine, _fetched(examples, mine, device), strict=True):
        image, target = images[:, None].float() / 255, targets.float() / 255
        if recipe.batches.augment:
            image, target = augment(image, target, generator, ours, len(whole))
        present = torch.from_numpy(examples.present[chunk]).to(device, torch.float32, non_blocking=True)
        yield Batch(image, target, present, len(whole))


def epoch_indices(present: NDArray[np.bool_], recipe: Recipe, epoch: int, epochs: int) -> Indices:
    """Indices (n,) for an epoch (from 1) over n images, with the epoch's share of positives in each batch.

    The share goes evenly from ``positive_share`` in the first epoch to ``final_positive_share`` in the last.
    Each class is dealt like a pack of cards over all epochs: an image comes again when all others of its
    class have come. With a share of 0, or where a class is missing, every image comes once per epoch.
    """
    count = len(present)
    positives, negatives = np.flatnonzero(present), np.flatnonzero(~present)
    if recipe.batches.positive_share == 0 or not len(positives) or not len(negatives):
        return np.random.default_rng([recipe.seed, EVERY, epoch]).permutation(count)
    done = np.arange(epoch) / max(1, epochs - 1)
    targets = (
        recipe.batches.positive_share
        + (recipe.batches.final_positive_share - recipe.batches.positive_share) * done
    )
    wanted = np.rint(targets * count).astype(int)
    dealt = [
        _sample_without_replacement(
            positives, [recipe.seed, POSITIVES], int(wanted[:-1].sum()), int(wanted[-1])
        ),
        _sample_without_replacement(
            negatives, [recipe.seed, NEGATIVES], int((count - wanted[:-1]).sum()), int(count - wanted[-1])
        ),
    ]
    # Each class at even distances, so that every batch has the share.
    place = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in dealt]
    return np.concatenate(dealt)[np.argsort(np.concatenate(place), kind="stable")]


def count_batches(examples: int, batch_size: int) -> int:
    """How many batches an epoch has."""
    return -(-examples // batch_size)


def to_unit(values: NDArray[np.uint8], device: torch.device) -> Tensor:
    """8-bit values as float32 in [0, 1] on the device, same shape."""
    return copied_to(device, torch.from_numpy(np.ascontiguousarray(values))).float() / 255


def prefetch(fetch: Callable[[Item], Fetched], items: Iterable[Item]) -> Iterator[Fetched]:
    """``fetch(item)`` of each item in order, called by a thread while the caller works on earlier ones.

    Closing the iterator, as happens when it is dropped, ends the thread.
    """
    pool = ThreadPoolExecutor(1, "prefetch")
    waiting = deque[Future[Fetched]]()
    try:
        for item in items:
            waiting.append(pool.submit(fetch, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _sample_without_replacement(indices: Indices, seed: list[int], start: int, count: int) -> Indices:
    """Cards ``start`` to ``start + count`` of a pack that is shuffled anew whenever it is used up."""
    first, last = start // len(indices), (start + count - 1) // len(indices)
    packs = [np.random.default_rng([*seed, k]).permutation(indices) for k in range(first, last + 1)]
    before = start - first * len(indices)
    return np.concatenate([*packs, indices[:0]])[before : before + count]


def _fetched(
    examples: InMemoryData | StreamedData, chunks: list[Indices], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """8-bit images and shares of each chunk, on the device."""
    is_cuda = device.type == "cuda"

    def pinned(chunk: Indices) -> tuple[Tensor, Tensor]:
        images, targets = examples.take(chunk)
        return (images.pin_memory(), targets.pin_memory()) if is_cuda else (images, targets)

    if isinstance(examples, InMemoryData) and examples.images.device.type == device.type:
        fetched = map(examples.take, chunks)
    else:
        fetched = prefetch(pinned, chunks)
    for images, targets in fetched:
        yield images.to(device, non_blocking=is_cuda), targets.to(device, non_blocking=is_cuda)
