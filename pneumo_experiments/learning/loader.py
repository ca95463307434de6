"""Batches for training: which images, in what order, and how they reach the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.augment import augment, crop, soften_borders
from pneumo_experiments.learning.device import copy_to_device, from_numpy
from pneumo_experiments.settings import Recipe

if TYPE_CHECKING:  # a served model has no library to read it
    from pneumo_experiments.dataset.hdf5 import Dataset

Indices = NDArray[np.int64]
Item = TypeVar("Item")
Fetched = TypeVar("Fetched")
PREFETCHED_BATCHES = 2  # fetched while the device computes
READ_AT_ONCE = 256  # images
# Fractions of the free memory that images may take; the network needs the rest.
DEVICE_FRACTION, HOST_FRACTION = 0.4, 0.5
POSITIVES, NEGATIVES, ALL_IMAGES = 1, 2, 3  # random streams under one seed


@dataclass(frozen=True)
class InMemoryData:
    """Training data in device or host memory: images and soft masks (n, S, S) as 0-255, presence (n,).

    ``patients`` (n,) numbers the patient of each image; without it each image counts as a patient.
    """

    images: Tensor
    targets: Tensor
    present: NDArray[np.bool_]
    patients: Indices | None = None

    def __len__(self) -> int:
        return len(self.present)

    def select(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images and masks (k, S, S), in the memory that holds the data."""
        index = from_numpy(indices).to(self.images.device, non_blocking=True)
        return self.images[index], self.targets[index]


@dataclass(frozen=True)
class StreamedData:
    """Training data that is read when needed: rows of an open data set."""

    source: Dataset
    rows: Indices
    present: NDArray[np.bool_]
    patients: Indices | None = None

    def __len__(self) -> int:
        return len(self.present)

    def select(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images and masks (k, S, S), in host memory."""
        rows = self.rows[indices]
        return from_numpy(self.source.images(rows)), from_numpy(self.source.targets(rows))

    def load(self, device: str, progress: Callable[[int], None] = lambda images: None) -> InMemoryData:
        """The same in the memory of ``device`` (cpu for the host).

        ``progress`` is called with the number of images after each read.
        """
        size = self.source.image_size
        images, targets = torch.empty((2, len(self), size, size), dtype=torch.uint8, device=device)
        for start in range(0, len(self), READ_AT_ONCE):
            chunk = slice(start, start + READ_AT_ONCE)
            images[chunk], targets[chunk] = self.select(np.arange(len(self))[chunk])
            progress(len(images[chunk]))
        return InMemoryData(images, targets, self.present, self.patients)


@dataclass(frozen=True)
class Batch:
    """Tensors on the training device: images (n, 1, S, S), soft masks (n, S, S), presence (n,), in [0, 1].

    ``size`` is the number of images in the whole batch; each process of a group holds n of them.
    """

    images: Tensor
    targets: Tensor
    present: Tensor
    size: int


def choose_cache(requested: str, size_bytes: int, device: torch.device) -> str:
    """Where to hold images of that size: device, host or stream; ``requested`` is one of these, or auto."""
    if requested != "auto":
        return requested
    if device.type == "cuda" and size_bytes < DEVICE_FRACTION * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if fits_host(size_bytes) else "stream"


def fits_host(size_bytes: int) -> bool:
    """Whether that many bytes in each process on this host leave enough free memory."""
    return size_bytes * distributed.local_world_size() < HOST_FRACTION * psutil.virtual_memory().available


def batches(
    data: InMemoryData | StreamedData, recipe: Recipe, epoch: int, epochs: int, device: torch.device
) -> Iterator[Batch]:
    """An epoch of ``len(data)`` images in batches of nearly equal size; determined by seed and epoch.

    In a group of processes each takes ``batch[rank::world_size]``.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng([recipe.seed, epoch]).integers(2**62))
    )
    order = epoch_indices(data.present, recipe, epoch, epochs, data.patients)
    whole_batches = np.array_split(order, count_batches(len(data), recipe.batches.batch_size))
    own_rows = slice(distributed.rank(), None, distributed.world_size())
    own_batches = [indices[own_rows] for indices in whole_batches]
    fetched = _fetch(data, own_batches, device)
    for whole, indices, (images, targets) in zip(whole_batches, own_batches, fetched, strict=True):
        image, target = images[:, None].float() / 255, targets.float() / 255
        image, target = augment(image, target, generator, own_rows, len(whole), recipe.batches)
        if recipe.batches.crop:
            image, target = crop(image, target, recipe.batches.crop, generator, own_rows, len(whole))
        if recipe.batches.mask_smoothing:
            target = soften_borders(target, recipe.batches.mask_smoothing)
        present = from_numpy(data.present[indices]).to(device, torch.float32, non_blocking=True)
        if recipe.batches.augment == "strong" or recipe.batches.crop:  # some findings are out of the image
            present = present * (target.flatten(1).amax(1) > 0)
        yield Batch(image, target, present, len(whole))


def require_crop(recipe: Recipe, image_size: int) -> None:
    """Raises UserError for a crop that is no smaller than the images."""
    if (side := recipe.batches.crop) >= image_size:
        raise UserError(f"crop={side}: the images have {image_size} px; give less, or 0 for whole images")


def epoch_indices(
    present: NDArray[np.bool_], recipe: Recipe, epoch: int, epochs: int, patients: Indices | None = None
) -> Indices:
    """Indices (n,) for an epoch (from 1) over n images, each batch with the epoch's fraction of positives.

    The fraction changes linearly from ``positive_fraction`` in the first epoch to
    ``final_positive_fraction`` in the last. Each class is sampled without replacement across epochs: an image
    comes again only after all others of its class. With a fraction of 0, or without one of the classes, every
    image comes once an epoch.

    With ``balance=patient`` it is the patient (n,) who comes again only after all others of the class, each
    time with the next of their images there; with a fraction of 0 all images are one class.
    """
    count, by_patient = len(present), recipe.batches.balance == "patient"

    def draw(indices: Indices, stream: int, start: int, count: int) -> Indices:
        if by_patient and patients is not None:
            return _sample_patients(indices, patients[indices], [recipe.seed, stream], start, count)
        return _sample_without_replacement(indices, [recipe.seed, stream], start, count)

    positives, negatives = np.flatnonzero(present), np.flatnonzero(~present)
    if recipe.batches.positive_fraction == 0 or not len(positives) or not len(negatives):
        if by_patient:
            return draw(np.arange(count), ALL_IMAGES, (epoch - 1) * count, count)
        return np.random.default_rng([recipe.seed, ALL_IMAGES, epoch]).permutation(count)
    done = np.arange(epoch) / max(1, epochs - 1)
    fractions = (
        recipe.batches.positive_fraction
        + (recipe.batches.final_positive_fraction - recipe.batches.positive_fraction) * done
    )
    wanted = np.rint(fractions * count).astype(int)  # positives of each epoch up to this one
    by_class = [
        draw(positives, POSITIVES, int(wanted[:-1].sum()), int(wanted[-1])),
        draw(negatives, NEGATIVES, int((count - wanted[:-1]).sum()), int(count - wanted[-1])),
    ]
    # Both classes are spread evenly, so that every batch has the epoch's fraction.
    position = [(np.arange(len(indices)) + 0.5) / max(1, len(indices)) for indices in by_class]
    return np.concatenate(by_class)[np.argsort(np.concatenate(position), kind="stable")]


def count_batches(images: int, batch_size: int) -> int:
    """Number of batches in an epoch."""
    return -(-images // batch_size)


def to_unit(values: NDArray[np.uint8], device: torch.device) -> Tensor:
    """8-bit values as float32 in [0, 1] on the device, same shape."""
    return copy_to_device(from_numpy(np.ascontiguousarray(values)), device).float() / 255


def prefetch(fetch: Callable[[Item], Fetched], items: Iterable[Item], threads: int = 1) -> Iterator[Fetched]:
    """``fetch(item)`` of each item in order, called in threads while the caller works on earlier results.

    Closing or dropping the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(threads, "prefetch")
    pending = deque[Future[Fetched]]()
    try:
        for item in items:
            pending.append(pool.submit(fetch, item))
            if len(pending) > PREFETCHED_BATCHES * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _sample_without_replacement(indices: Indices, seed: list[int], start: int, count: int) -> Indices:
    """Draws ``start`` to ``start + count`` from repeated random permutations of the indices."""
    first, last = start // len(indices), (start + count - 1) // len(indices)
    rounds = [np.random.default_rng([*seed, k]).permutation(indices) for k in range(first, last + 1)]
    skipped = start - first * len(indices)
    return np.concatenate([*rounds, indices[:0]])[skipped : skipped + count]


def _sample_patients(indices: Indices, patients: Indices, seed: list[int], start: int, count: int) -> Indices:
    """Draws ``start`` to ``start + count`` of images (k,) by way of their patients (k,).

    Patients come in repeated random permutations; the images of one in random orders, each of them complete.
    """
    present, own, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    drawn = _sample_without_replacement(np.arange(len(present)), seed, start, count)
    times_before = np.arange(start, start + count) // len(present)  # that each has been drawn
    orders, places = np.divmod(times_before, sizes[drawn])
    places += (np.cumsum(sizes) - sizes)[drawn]
    result = np.empty(count, np.int64)
    for order in np.unique(orders):  # few: patients with equally many images are always in the same one
        rng = np.random.default_rng([*seed, order, 1])  # 1: not the stream of a permutation of patients
        by_patient = indices[np.lexsort((rng.random(len(indices)), own))]
        result[orders == order] = by_patient[places[orders == order]]
    return result


def _fetch(
    data: InMemoryData | StreamedData, batch_indices: list[Indices], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """8-bit images and masks of each batch, on the device."""
    if isinstance(data, InMemoryData) and data.images.device.type == device.type:
        return map(data.select, batch_indices)

    def select_and_copy(indices: Indices) -> tuple[Tensor, Tensor]:
        images, targets = data.select(indices)
        return copy_to_device(images, device), copy_to_device(targets, device)

    return prefetch(select_and_copy, batch_indices)
