"""Validation: counts taken on the device, scores of a subset, and its overlays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_counts import Image, count_images

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.pictures import ranked_overlays
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import overlay
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.learning.threshold_counts import ThresholdCounter, count_at_thresholds
from pneumo_experiments.metrics.thresholds import HUNDREDTHS, ThresholdCounts, Thresholds

CPU = ComputeConfig(torch.device("cpu"), "fp32")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def counts_of(counts: ThresholdCounts) -> np.ndarray:
    """Counts (n, 2, 101)."""
    return np.stack([np.stack(counts.at(float(score))) for score in HUNDREDTHS], axis=-1).swapaxes(0, 1)


def one_by_one(masks: np.ndarray, truths: list[np.ndarray]) -> np.ndarray:
    """Counts (n, 2, 101) by numpy, on the host."""
    pairs = zip(masks, truths, strict=True)
    return counts_of(count_images([(to_native(mask, truth.shape), 0.5, truth) for mask, truth in pairs]))


def counted(masks: np.ndarray, truths: list[np.ndarray], device: str = "cpu", at_once: int = 0) -> np.ndarray:
    on_device = [torch.from_numpy(values).to(device) for values in (masks, HUNDREDTHS)]
    return count_at_thresholds(on_device[0], truths, on_device[1], at_once).cpu().numpy()


def next_to_hundredths(count: int, side: int) -> np.ndarray:
    """Maps (count, side, side) of hundredths, 0 and 1 among them, and of the floats next to them."""
    around = [np.nextafter(HUNDREDTHS, np.float32(end)) for end in (-1, 2)]
    values = np.concatenate([HUNDREDTHS, *around])
    values = values[(values >= 0) & (values <= 1)]
    maps = np.random.default_rng(0).choice(values, (count, side, side))
    maps[:, 0, :2] = [0, 1]
    return maps


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_next_to_a_hundredth_are_counted_as_numpy_counts_them(device: str) -> None:
    masks = next_to_hundredths(5, 24)
    rng = np.random.default_rng(1)
    truths = [rng.random((24, 24)) < target for target in (0, 0.1, 0.5, 0.9, 1)]  # from empty to full
    actual = counted(masks, truths, device)
    assert actual.dtype == np.int32
    assert np.array_equal(actual, one_by_one(masks, truths))
    assert actual[0, 1].tolist() == [0] * 101
    assert np.array_equal(actual[4, 0], actual[4, 1])
    assert actual[:, 0, 0].tolist() == [24 * 24] * 5


def levels_of(probabilities: np.ndarray) -> np.ndarray:
    """Level 0 to 100 of each probability (n,): an image of one pixel for each."""
    masks = probabilities.astype(np.float32).reshape(-1, 1, 1)
    return np.count_nonzero(counted(masks, [np.zeros((1, 1), bool)] * len(masks))[:, 0], axis=1) - 1


def test_a_level_is_the_number_of_hundredths_reached_even_next_to_them() -> None:
    values = np.concatenate([np.nextafter(HUNDREDTHS, np.float32(end)) for end in (-1, 2)] + [HUNDREDTHS])
    values = values[(values >= 0) & (values <= 1)]
    assert len(values) == 3 * 101 - 2
    assert levels_of(values).tolist() == [
        sum(p >= np.float32(k / 100) for k in range(1, 101)) for p in values
    ]


@given(st.floats(0, 1, width=32))
def test_a_level_is_the_number_of_hundredths_reached(p: float) -> None:
    assert levels_of(np.array([p])) == [sum(p >= np.float32(k / 100) for k in range(1, 101))]


def test_an_upsampled_1_that_rounds_up_is_at_level_100() -> None:
    assert levels_of(np.array([1.0000001])) == [100]


def test_images_of_several_shapes_are_counted_at_their_own_and_in_their_order() -> None:
    shapes = [(40, 40), (64, 24), (40, 40), (24, 64), (7, 5), (64, 24), (40, 40), (1, 1)]
    masks = next_to_hundredths(len(shapes), 16)
    rng = np.random.default_rng(2)
    truths = [np.asfortranarray(rng.random(shape) < 0.3) for shape in shapes]  # as run lengths are decoded
    actual = counted(masks, truths)
    assert np.array_equal(actual, one_by_one(masks, truths))
    assert actual[:, 0, 0].tolist() == [rows * columns for rows, columns in shapes]


@pytest.mark.parametrize("at_once", [1, 3 * 30 * 20, 10**9])
def test_several_at_once_give_the_counts_of_one_at_a_time(at_once: int) -> None:
    masks = next_to_hundredths(7, 16)
    rng = np.random.default_rng(3)
    truths = [rng.random((20, 30) if row == 2 else (30, 20)) < 0.3 for row in range(7)]
    assert np.array_equal(counted(masks, truths, at_once=at_once), one_by_one(masks, truths))


@given(st.integers(1, 9), st.tuples(st.integers(1, 30), st.integers(1, 30)), st.integers(0, 2**32 - 1))
def test_random_maps_are_counted_as_numpy_counts_them(side: int, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((2, side, side), np.float32) ** rng.integers(1, 9)
    truths = [rng.random(shape) < rng.random() for _ in masks]
    assert np.array_equal(counted(masks, truths), one_by_one(masks, truths))


def test_counting_does_not_wait_for_the_device() -> None:
    masks, hundredths = torch.empty(4, 8, 8, device="meta"), torch.empty(101, device="meta")
    truths = [np.eye(rows, 9, dtype=bool) for rows in (9, 7, 9, 9)]
    # Tensors on "meta" have no values: an operation that would wait for one ends with an error.
    assert count_at_thresholds(masks, truths, hundredths, 2 * 81).shape == (4, 2, 101)
    with pytest.raises(RuntimeError):
        torch.bincount(masks.long().flatten())


def test_a_missing_truth_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 truths"):
        counted(np.zeros((2, 4, 4), np.float32), [np.zeros((4, 4), bool)])


def test_counts_from_the_device_equal_the_reference() -> None:
    masks, truths = next_to_hundredths(3, 8), [np.eye(8, dtype=bool)] * 3
    presence = np.array([0, 0.3, 1], np.float32)
    slow = count_images(list(zip(masks, presence.tolist(), truths, strict=True)))
    fast = ThresholdCounts.of(counted(masks, truths), presence)
    assert np.array_equal(counts_of(fast), counts_of(slow))
    assert fast.presence.tolist() == slow.presence.tolist() == presence.tolist()


def test_impossible_counts_are_refused() -> None:
    good = counted(next_to_hundredths(1, 8), [np.eye(8, dtype=bool)])
    present = np.array([0.5], np.float32)
    for wrong, presence, reason in [
        (good[:, :, 1:], present, "counts"),
        (good, np.array([0.5, 0.5], np.float32), "counts"),
        (good, np.array([np.nan], np.float32), "presence"),
        (good, np.array([1.5], np.float32), "presence"),
        (good[:, :, ::-1], present, "more pixels"),
        (good[:, ::-1], present, "more pixels"),
    ]:
        with pytest.raises(ValueError, match=reason):
            ThresholdCounts.of(wrong, presence)


# A subset of a data set


@pytest.fixture(scope="module")
def opened(dataset: Path) -> Iterator[Dataset]:
    with Dataset.open(dataset) as opened:
        yield opened


@pytest.fixture(scope="module")
def predictor(tiny: None) -> Predictor:
    return Predictor(build("tiny", "none", seed=0), CPU)


def with_native_sizes(opened: Dataset, sizes: list[tuple[int, int]]) -> Dataset:
    """The same radiographs, as if some had other rows and columns."""
    changed = Dataset.open(opened.path)
    for row, (rows, columns) in enumerate(sizes):
        changed.entries[row] = replace(changed.entries[row], rows=rows, columns=columns)
    return changed


def test_the_counts_of_a_subset_are_those_of_its_predictions_one_by_one(
    opened: Dataset, predictor: Predictor
) -> None:
    subset = Subset(opened, np.array([20, 3, 4, 0, 11, 9, 8, 17, 2, 1, 5, 6, 7, 10, 12, 13, 14, 15]))
    with with_native_sizes(opened, [(1024, 1100), (1200, 1024), (1024, 1100), (1200, 1024)]) as larger:
        for part in (subset, Subset(larger, subset.indices)):
            images = list[Image]()
            for index, prediction in part.predictions(predictor):
                truth = part.dataset.mask(index)
                images.append((to_native(prediction.mask, truth.shape), prediction.presence, truth))
            slow, fast = count_images(images), part.count(predictor)
            assert np.array_equal(counts_of(fast), counts_of(slow))
            assert fast.presence.tolist() == slow.presence.tolist()
            assert fast.truth_area.tolist() == [entry.area_px for entry in part.entries]
    assert {entry.area_px > 0 for entry in subset.entries} == {True, False}


def test_an_empty_subset_has_empty_counts(opened: Dataset, predictor: Predictor) -> None:
    assert len(Subset(opened, np.zeros(0, np.int64)).count(predictor)) == 0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("head", ["mask_head", "presence_head"])
def test_a_diverged_network_is_an_error_with_advice(opened: Dataset, head: str) -> None:
    network = build("tiny", "none", seed=0)
    for weights in getattr(network, head).parameters():
        torch.nn.init.constant_(weights, float("nan"))
    diverged = Predictor(network, CPU)
    with pytest.raises(UserError, match=r"NaN: training diverged; .*learning_rate"):
        Subset(opened, np.arange(3)).count(diverged)
    with pytest.raises(UserError, match=r"NaN: training diverged; .*learning_rate"):
        next(diverged.predict(opened.images([0])))


@pytest.mark.usefixtures("tiny")
def test_one_nan_pixel_marks_only_its_image(opened: Dataset) -> None:
    class OneBadPixel(PneumothoraxNet):
        def forward(self, images: torch.Tensor) -> Output:
            mask = torch.zeros(images.shape[0], *images.shape[2:])
            mask[1, 0, 0] = float("nan")
            return Output(mask, mask, torch.zeros(len(images)))

    predictor = Predictor(OneBadPixel("tiny"), CPU)
    (batch,) = predictor.predict_batches(opened.images([0, 1, 2]))
    assert batch.finite.tolist() == [True, False, True]
    assert batch.presence.tolist() == [0.5] * 3
    with pytest.raises(UserError, match="NaN: training diverged"):
        list(predictor.predict(opened.images([0, 1, 2])))


def test_a_counter_reads_chunks_in_their_order(opened: Dataset, predictor: Predictor) -> None:
    whole, parts = (ThresholdCounter(predictor) for _ in range(2))
    for counter, chunks in ((whole, [range(5)]), (parts, [range(2), range(2, 5)])):
        for chunk in chunks:
            counter.add(opened.images(chunk), map(opened.mask, chunk))
    one, two = whole.read(), parts.read()
    assert len(one) == 5
    assert np.abs(one.pixels - two.pixels).max() < 1024**2 / 100  # batches of other sizes round otherwise
    np.testing.assert_allclose(one.presence, two.presence, atol=1e-5)


# Overlays


EVERYTHING = Thresholds(presence_threshold=0, top_score=0, bottom_score=0)  # each pixel is predicted


def some_of(opened: Dataset, positives: int, negatives: int) -> Evaluation:
    """The first negatives and positives, counted as if each pixel had the probability 0."""
    areas = np.array([entry.area_px for entry in opened.entries])
    chosen = np.concatenate([np.flatnonzero(areas == 0)[:negatives], np.flatnonzero(areas)[:positives]])
    nothing = np.zeros((1024, 1024), np.float32)
    counts = count_images([(nothing, 0.5, opened.mask(index)) for index in chosen.tolist()])
    return Evaluation(Subset(opened, chosen), counts, EVERYTHING)


def caption_of(picture: np.ndarray) -> bytes:
    """The pixels of the line above the panels."""
    return picture[: picture.shape[0] // 16].tobytes()


def written(caption: str) -> bytes:
    """The same, of a caption that overlay writes above a square radiograph."""
    empty = np.zeros((64, 64), bool)
    return caption_of(overlay(np.zeros((64, 64), np.uint8), empty, empty, caption))


@pytest.mark.parametrize(("positives", "shown"), [(4, 3), (6, 4), (7, 6), (5, 9)])
def test_overlays_show_and_label_best_median_and_worst(
    opened: Dataset, predictor: Predictor, positives: int, shown: int
) -> None:
    evaluation = some_of(opened, positives, negatives=4)
    captions = [caption_of(picture) for picture in ranked_overlays(evaluation, predictor, shown)]
    assert len(captions) == shown
    areas = sorted((entry.area_px for entry in evaluation.subset.entries if entry.area_px), reverse=True)
    middle = (positives - 1) // 2
    for name, area in (("best", areas[0]), ("median", areas[middle]), ("worst", areas[-1])):
        dice = 2 * area / (area + 1024**2)
        text = f"{name}: Dice {dice:.2f}, truth {area:,} px, predicted 1,048,576 px"
        assert captions.count(written(text)) == 1, text


def test_two_positives_have_no_labels(opened: Dataset, predictor: Predictor) -> None:
    evaluation = some_of(opened, positives=2, negatives=1)
    captions = [caption_of(picture) for picture in ranked_overlays(evaluation, predictor, 8)]
    assert len(captions) == 3
    for entry in evaluation.subset.entries:
        dice = 2 * entry.area_px / (entry.area_px + 1024**2)
        text = f"Dice {dice:.2f}, truth {entry.area_px:,} px, predicted 1,048,576 px"
        assert captions.count(written(text)) == 1, text
