"""The network, its loss, its batches and its training."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import changed, make
from tiny_network import CPU, random_network

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.fit import fit
from pneumo_experiments.learning.loader import (
    InMemoryData,
    StreamedData,
    batches,
    choose_cache,
    epoch_indices,
    load,
    prefetch,
)
from pneumo_experiments.learning.loss import bce, criterion, focal, soft_dice
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.learning.schedule import lr_factor
from pneumo_experiments.settings import Device, Recipe

LOGIT = math.log(3)  # of probability 0.75


@pytest.fixture(scope="module")
def network(tiny: None) -> PneumothoraxNet:
    return build("tiny", "none", seed=0)


def squares(count: int, side: int = 32, seed: int = 0) -> InMemoryData:
    """Noise; every other image has a bright square, which is the mask."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 100, (count, side, side), dtype=np.uint8)
    targets = np.zeros_like(images)
    for i in range(0, count, 2):
        x, y = rng.integers(0, side // 2, 2)
        images[i, y : y + side // 2, x : x + side // 2] += 120
        targets[i, y : y + side // 2, x : x + side // 2] = 255
    return InMemoryData(torch.from_numpy(images), torch.from_numpy(targets), targets.any(axis=(1, 2)))


# Losses: values by hand


def test_cross_entropy_of_a_quarter_missed_is_the_logarithm() -> None:
    logits, target = torch.full((1, 2, 2), LOGIT), torch.ones(1, 2, 2)
    assert bce(logits, target).item() == pytest.approx(-math.log(0.75))
    assert focal(logits, target).item() == pytest.approx(0.25**2 * -math.log(0.75))


def test_cross_entropy_of_a_half_annotated_pixel_takes_both_sides() -> None:
    logits, target = torch.full((1, 1, 1), LOGIT), torch.full((1, 1, 1), 0.5)
    assert bce(logits, target).item() == pytest.approx(-0.5 * math.log(0.75) - 0.5 * math.log(0.25))


def test_soft_dice_counts_the_whole_batch() -> None:
    logits = torch.full((2, 2, 2), LOGIT)
    target = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)
    assert soft_dice(logits, target).item() == pytest.approx(1 - (2 * 3 + 1) / (6 + 4 + 1))


def test_soft_dice_of_an_empty_prediction_of_an_empty_truth_is_zero() -> None:
    assert soft_dice(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4)).item() == pytest.approx(0, abs=1e-6)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    output = Output(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1))
    recipe = make(Recipe, focal_weight=0, aux_weight=0, presence_weight=0)
    terms = criterion(output, torch.ones(1, 2, 2), torch.ones(1), recipe)
    assert set(terms) == {"loss", "loss_bce", "loss_dice"}
    assert terms["loss"].item() == pytest.approx((terms["loss_bce"] + terms["loss_dice"]).item())


# Batches


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


def test_a_dropped_iterator_ends_its_thread_and_frees_its_items() -> None:
    requested, item = list[int](), np.zeros(3)
    reference = weakref.ref(item)

    def fetch(number: int, item: np.ndarray = item) -> np.ndarray:
        requested.append(number)
        return item

    fetched = prefetch(fetch, range(1000))
    assert next(fetched) is item
    del fetched, fetch, item
    gc.collect()
    assert len(requested) <= 4  # the one that was requested for and those ahead of it
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert reference() is None


def test_images_are_held_where_there_is_room() -> None:
    assert choose_cache("auto", 10**6, CPU.device) == "host"
    assert choose_cache("auto", 10**15, CPU.device) == "stream"
    assert choose_cache("device", 10**15, CPU.device) == "device"


# Training and prediction


def test_training_learns_to_segment_bright_squares() -> None:
    recipe = make(Recipe, batch_size=8, learning_rate=1e-3, augment=False, positive_share=0, seed=1)
    network = build("fcn_resnet50", "none", recipe.seed)
    compute = choose_compute(Device())
    epochs = list(fit(network, squares(16), recipe, 12, compute))
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert epochs[-1].losses["loss"] < 0.7 * epochs[0].losses["loss"]
    unseen = squares(8, seed=5)
    actual = [p.mask for p in Predictor(network, compute).predict(unseen.images.numpy())]
    pairs = list(zip(actual, unseen.targets.numpy(), strict=True))
    inside = np.mean([mask[target > 0].mean() for mask, target in pairs if target.any()])
    outside = np.mean([mask[target == 0].mean() for mask, target in pairs])
    assert inside > outside + 0.2


@pytest.mark.usefixtures("tiny")
def test_one_seed_trains_to_the_same_weights() -> None:
    recipe = make(Recipe, batch_size=4, augment=True, seed=3)
    ends: list[torch.Tensor] = []
    for _ in range(2):
        network = build("tiny", "none", recipe.seed)
        list(fit(network, squares(4), recipe, 1, CPU))
        ends.append(network.mask_head[0].weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.usefixtures("tiny")
def test_a_loss_that_is_not_finite_ends_with_advice() -> None:
    recipe = make(Recipe, batch_size=4, learning_rate=1e30, augment=False)
    network = build("tiny", "none", 0)
    with pytest.raises(UserError, match="learning_rate=1e\\+30"):
        list(fit(network, squares(4), recipe, 3, CPU))


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    recipe = make(Recipe, warmup=0.2, schedule="cosine")
    assert lr_factor(recipe, 0) == pytest.approx(0.05)
    assert lr_factor(recipe, 0.2) == pytest.approx(1)
    assert lr_factor(recipe, 0.6) == pytest.approx(0.5)
    assert lr_factor(recipe, 1) == pytest.approx(0, abs=1e-9)
    polynomial = make(Recipe, warmup=0, schedule="polynomial")
    assert [lr_factor(polynomial, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])


def test_predictions_do_not_depend_on_the_batch(network: PneumothoraxNet) -> None:
    images = squares(5).images.numpy()
    one, all_at_once = (list(Predictor(network, CPU).predict(images, batch_size)) for batch_size in (1, 5))
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_allclose(a.mask, b.mask, atol=1e-5)
        assert a.presence == pytest.approx(b.presence, abs=1e-5)


def test_flip_averaging_treats_both_sides_alike(network: PneumothoraxNet) -> None:
    images = squares(2).images.numpy()
    predictor = Predictor(network, CPU, tta="flip")
    (a, _), (b, _) = list(predictor.predict(images)), list(predictor.predict(images[:, :, ::-1]))
    np.testing.assert_allclose(a.mask, b.mask[:, ::-1], atol=1e-5)
    assert a.presence == pytest.approx(b.presence, abs=1e-5)
    plain = next(Predictor(network, CPU).predict(images))
    assert np.abs(plain.mask - a.mask).max() > 1e-4


@pytest.mark.usefixtures("tiny")
def test_scale_adds_the_prediction_of_the_enlarged_image_brought_back() -> None:
    network, images = random_network(0), squares(3).images.numpy()
    (all_views,) = Predictor(network, CPU, tta="flip+scale").predict_batches(images)
    masks: list[torch.Tensor] = []
    presences: list[torch.Tensor] = []
    for side, flip in ((32, []), (32, [-1]), (40, []), (40, [-1])):
        inputs = torch.from_numpy(images)[:, None].float() / 255
        larger = torch.nn.functional.interpolate(inputs, size=side, mode="bilinear")
        with torch.inference_mode():
            output = network.eval()(larger.flip(flip))
        mask = torch.sigmoid(output.mask).flip(flip)
        masks.append(torch.nn.functional.interpolate(mask[:, None], size=32, mode="bilinear")[:, 0])
        presences.append(torch.sigmoid(output.presence))
    assert all_views.mask.shape == (3, 32, 32)
    torch.testing.assert_close(all_views.mask, torch.stack(masks).mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(all_views.presence, torch.stack(presences).mean(0), atol=1e-6, rtol=0)
    assert (masks[0] - masks[2]).abs().max() > 1e-3  # the larger image is another one to the network


def test_native_size_is_bilinear_between_pixel_centres() -> None:
    small = np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_allclose(to_native(small, (1, 4)), [[0, 0.25, 0.75, 1]])


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is available")
    with pytest.raises(UserError, match="device=cuda"):
        choose_compute(changed(Device(), device="cuda"))
