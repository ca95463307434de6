"""Batches: which images, in what order, from where, and their random changes."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_network import CPU, squares

from pneumo_experiments.dataset.annotations import read_annotations, read_patients
from pneumo_experiments.learning.augment import soften_borders
from pneumo_experiments.learning.loader import (
    InMemoryData,
    StreamedData,
    batches,
    choose_cache,
    epoch_indices,
    prefetch,
)
from pneumo_experiments.settings import Recipe


def test_each_batch_has_the_epoch_s_fraction_of_positives_which_changes_linearly() -> None:
    present, recipe = np.arange(100) < 10, make(Recipe, positive_fraction=0.8, final_positive_fraction=0.4)
    for epoch, target in ((1, 0.8), (2, 0.6), (3, 0.4)):
        order = epoch_indices(present, recipe, epoch, epochs=3)
        assert len(order) == 100
        assert present[order].sum() == target * 100
        for batch in np.split(order, 10):
            assert present[batch].sum() == pytest.approx(target * 10, abs=1)
    assert present[epoch_indices(present, recipe, 1, epochs=1)].sum() == 80


def test_over_the_epochs_every_image_of_a_class_is_seen_equally_often() -> None:
    present, recipe = np.arange(50) < 20, make(Recipe, positive_fraction=0.8, final_positive_fraction=0.4)
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
    recipe = make(Recipe, positive_fraction=0.0 if 0 < present.sum() < 7 else 0.5)
    assert sorted(epoch_indices(present, recipe, 2, epochs=3)) == list(range(7))


# By patient

BY_PATIENT = make(Recipe, balance="patient", positive_fraction=0.8, final_positive_fraction=0.4)


def drawn_slowly(images: dict[int, set[int]], order: list[int]) -> None:
    """Checks draw by draw that a patient comes after all others, and their image after all of theirs."""
    patient_of = {image: patient for patient, own in images.items() for image in own}
    waiting, left = set(images), {patient: set(own) for patient, own in images.items()}
    for image in order:
        patient = patient_of[image]
        assert patient in waiting
        waiting -= {patient}
        waiting = waiting or set(images)
        assert image in left[patient]
        left[patient] -= {image}
        left[patient] = left[patient] or set(images[patient])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.3, 0.8]),
    st.integers(0, 3),
)
def test_a_patient_comes_again_after_all_others_and_an_image_after_all_of_theirs(
    data: list[tuple[int, bool]], share: float, seed: int
) -> None:
    patients, present = np.array([p for p, _ in data]), np.array([y for _, y in data])
    recipe = make(Recipe, balance="patient", positive_fraction=share, final_positive_fraction=0.5, seed=seed)
    epochs = [epoch_indices(present, recipe, epoch, 4, patients) for epoch in range(1, 5)]
    assert {len(order) for order in epochs} == {len(data)}
    order = np.concatenate(epochs)
    has_classes = share > 0 and 0 < present.sum() < len(present)
    for chosen in (present, ~present) if has_classes else (np.ones_like(present),):
        images: dict[int, set[int]] = {}
        for image in np.flatnonzero(chosen).tolist():
            images.setdefault(int(patients[image]), set()).add(image)
        # Within an epoch the classes alternate; the order of each is that of its draws.
        drawn_slowly(images, order[chosen[order]].tolist())


def test_a_patient_with_many_images_is_drawn_as_often_as_one_with_few() -> None:
    patients = np.repeat(np.arange(40), [30] * 4 + [1] * 36)
    present = np.ones(len(patients), np.bool_)
    present[1::2] = False  # of the four: 15 positive and 15 negative each
    top = np.isin(patients, range(4))
    share = {}
    for balance in ("image", "patient"):
        recipe = make(Recipe, balance=balance, positive_fraction=0.5, final_positive_fraction=0.5)
        order = epoch_indices(present, recipe, 1, 3, patients)
        share[balance] = top[order[present[order]]].mean()
    positive = top[present].sum() / present.sum()
    assert share["image"] == pytest.approx(positive, abs=0.02) and positive > 0.7
    assert share["patient"] == pytest.approx(4 / len(np.unique(patients[present])), abs=0.02)


def test_of_the_real_positives_the_top_tenth_of_patients_gets_a_tenth(real_data: Path) -> None:
    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    patient_of = read_patients(real_data / "labels" / "patients.csv.gz")
    present = np.array([bool(texts) for texts in annotations.values()])
    _, patients = np.unique([patient_of.get(image, image) for image in annotations], return_inverse=True)
    counts = np.bincount(patients[present])
    tenth = round((counts > 0).sum() / 10)
    top = np.argsort(-counts, kind="stable")[:tenth]
    fractions = []
    for recipe in (replace(BY_PATIENT, batches=replace(BY_PATIENT.batches, balance="image")), BY_PATIENT):
        order = epoch_indices(present, recipe, 3, 12, patients)
        fractions.append(np.isin(patients[order[present[order]]], top).mean())
    assert fractions == pytest.approx([counts[top].sum() / counts.sum(), 0.1], abs=0.01)
    assert fractions[0] > 0.4


def test_without_patients_each_image_is_one_and_seed_and_epoch_determine_the_order() -> None:
    present, patients = np.arange(60) % 3 == 0, np.arange(60) // 7
    by_image = replace(BY_PATIENT, batches=replace(BY_PATIENT.batches, balance="image"))
    orders = [epoch_indices(present, recipe, 2, 5) for recipe in (BY_PATIENT, by_image)]
    assert np.array_equal(orders[0], orders[1])
    of_patients, again, renumbered, later, other = (
        epoch_indices(present, recipe, epoch, 5, numbers)
        for recipe, epoch, numbers in (
            (BY_PATIENT, 2, patients),
            (BY_PATIENT, 2, patients),
            (BY_PATIENT, 2, patients * 10 + 3),
            (BY_PATIENT, 3, patients),
            (replace(BY_PATIENT, seed=1), 2, patients),
        )
    )
    assert np.array_equal(of_patients, again) and np.array_equal(of_patients, renumbered)
    assert not np.array_equal(of_patients, orders[0])
    assert not np.array_equal(of_patients, later) and not np.array_equal(of_patients, other)
    for batch in np.split(of_patients, 6):
        assert present[batch].sum() == pytest.approx(0.7 * 10, abs=1)


def test_batches_follow_the_patients_of_the_data() -> None:
    data, patients = squares(12), np.array([0] * 10 + [1, 2])
    recipe = make(Recipe, balance="patient", positive_fraction=0, augment="none", batch_size=12)
    given = replace(data, patients=patients)
    (batch,) = batches(given, recipe, 1, 1, CPU.device)
    order = epoch_indices(data.present, recipe, 1, 1, patients)
    assert torch.equal(batch.images[:, 0], data.images[torch.from_numpy(order)].float() / 255)
    assert np.bincount(patients[order]).tolist() == [4, 4, 4]


def test_a_finding_that_strong_augmentation_moves_out_of_the_image_is_absent() -> None:
    images, targets = torch.zeros((2, 300, 16, 16), dtype=torch.uint8)
    targets[::2, 0:2, 0:2] = 255
    data = InMemoryData(images, targets, np.arange(300) % 2 == 0)
    recipe = make(Recipe, augment="strong", positive_fraction=0, batch_size=300)
    (batch,) = batches(data, recipe, 1, 1, CPU.device)
    assert torch.equal(batch.present > 0, batch.targets.amax((1, 2)) > 0)
    assert 30 < batch.present.sum() < 140
    (batch,) = batches(
        data, make(Recipe, augment=True, positive_fraction=0, batch_size=300), 1, 1, CPU.device
    )
    assert batch.present.sum() == 150


def test_mask_smoothing_softens_the_borders_of_the_target_alone() -> None:
    data = squares(6)
    plain, soft = (
        next(batches(data, make(Recipe, augment="none", mask_smoothing=width), 1, 1, CPU.device))
        for width in (0, 2)
    )
    assert torch.equal(plain.images, soft.images) and torch.equal(plain.present, soft.present)
    assert torch.equal(soft.targets, soften_borders(plain.targets, 2))
    assert set(plain.targets.unique().tolist()) == {0, 1} and len(soft.targets.unique()) > 4


def test_batches_hold_images_and_masks_from_zero_to_one() -> None:
    data = squares(6)
    recipe = make(Recipe, augment=False, positive_fraction=0, batch_size=4)
    seen = list(batches(data, recipe, 1, 1, CPU.device))
    assert [len(batch.images) for batch in seen] == [3, 3]
    assert {batch.images.shape for batch in seen} == {(3, 1, 32, 32)}
    total = sum(float(batch.images.double().sum()) for batch in seen)
    assert total == pytest.approx(int(data.images.sum()) / 255)
    assert sum(float(batch.present.sum()) for batch in seen) == 3


@dataclass(frozen=True)
class Stored:
    """Pixels as an open data set gives them."""

    image_size = 32

    def images(self, indices: np.ndarray) -> np.ndarray:
        return squares(6).images.numpy()[indices]

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return squares(6).targets.numpy()[indices]


def test_streamed_images_are_those_in_memory() -> None:
    recipe = make(Recipe, augment=True, batch_size=2)
    rows, present = np.array([5, 0, 3, 2]), squares(6).present[[5, 0, 3, 2]]
    streamed = StreamedData(Stored(), rows, present)
    held = streamed.load("cpu")
    assert torch.equal(held.images, squares(6).images[[5, 0, 3, 2]])
    one, two = (list(batches(each, recipe, 1, 2, CPU.device)) for each in (held, streamed))
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
