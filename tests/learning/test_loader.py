"""Batches: which images, in what order, from memory or from the file."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import make
from tiny_network import CPU, squares

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
