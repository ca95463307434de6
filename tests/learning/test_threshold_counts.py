"""Validation: counts and masks made on the device, scores of a subset, and its overlays."""

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
from tiny_network import CPU

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.pictures import ranked_overlays
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import overlay
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.learning.threshold_counts import (
    ThresholdCounter,
    count_at_thresholds,
    masks_on_device,
)
from pneumo_experiments.metrics.thresholds import HUNDREDTHS, ThresholdCounts, Thresholds, apply_thresholds

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


SHAPES = [(40, 40), (64, 24), (40, 40), (24, 64), (7, 5), (64, 24), (16, 16), (1, 1)]
MIXED = [(20, 30) if row == 2 else (30, 20) for row in range(7)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shapes", "at_once"),
    [([(16, 16)] * 5, 0), (SHAPES, 0), (MIXED, 1), (MIXED, 3 * 30 * 20), (MIXED, 10**9)],
)
def test_pixels_next_to_a_hundredth_are_counted_as_numpy_counts_them(
    shapes: list[tuple[int, int]], at_once: int, device: str
) -> None:
    if device == "cuda":  # whose interpolation may differ in the last bit
        shapes = [(16, 16)] * len(shapes)
    masks, rng = next_to_hundredths(len(shapes), 16), np.random.default_rng(1)
    fractions = np.linspace(0, 1, len(shapes))  # from empty to full
    truths = [np.asfortranarray(rng.random(s) < f) for s, f in zip(shapes, fractions, strict=True)]
    actual = counted(masks, truths, device, at_once)
    assert actual.dtype == np.int32
    assert np.array_equal(actual, one_by_one(masks, truths))
    assert actual[0, 1].tolist() == [0] * 101
    assert np.array_equal(actual[-1, 0], actual[-1, 1])
    assert actual[:, 0, 0].tolist() == [rows * columns for rows, columns in shapes]


def test_a_level_is_the_number_of_hundredths_reached() -> None:
    around = [np.nextafter(HUNDREDTHS, np.float32(end)) for end in (-1, 2)]
    values = np.concatenate([*around, HUNDREDTHS, np.random.default_rng(0).random(300, np.float32)])
    values = np.append(values[(values >= 0) & (values <= 1)], np.float32(1.0000001))  # upsampled, rounded up
    masks = values.reshape(-1, 1, 1)
    reached = np.count_nonzero(counted(masks, [np.zeros((1, 1), bool)] * len(masks))[:, 0], axis=1) - 1
    assert reached.tolist() == [sum(p >= np.float32(k / 100) for k in range(1, 101)) for p in values]


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


def test_a_missing_truth_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 truths"):
        counted(np.zeros((2, 4, 4), np.float32), [np.zeros((4, 4), bool)])


# Masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("top", "bottom"), [(0.0, 0.0), (0.29, 0.58), (0.7, 0.58), (1.0, 0.0)])
@pytest.mark.parametrize("area", [0, 1, 400_000])
def test_masks_made_on_a_device_are_those_of_the_host(
    device: str, top: float, bottom: float, area: int
) -> None:
    values = np.sort(next_to_hundredths(8, 16).ravel())
    rng, thresholds = np.random.default_rng(0), Thresholds(0.5, top, area, bottom)
    # Brighter from map to map.
    maps = np.stack([rng.choice(values[200 * row : 400 + 235 * row], (16, 16)) for row in range(8)])
    found = masks_on_device([torch.from_numpy(each).to(device) for each in maps], SHAPES, thresholds)
    for probability, shape, mask in zip(maps, SHAPES, found, strict=True):
        assert mask.dtype == np.bool_
        expected = apply_thresholds(to_native(probability, shape), 0.5, thresholds)
        if device == "cpu" or shape == (16, 16):
            assert np.array_equal(mask, expected)
        else:  # CUDA's interpolation may differ in the last bit
            assert np.count_nonzero(mask != expected) <= 0.01 * mask.size
    assert masks_on_device([], [], thresholds) == []


# A subset of a data set


@pytest.fixture(scope="module")
def opened(dataset: Path) -> Iterator[Dataset]:
    with Dataset.open(dataset) as opened:
        yield opened


@pytest.fixture(scope="module")
def predictor(tiny: None) -> Predictor:
    return Predictor(build_network("tiny", "none", seed=0), CPU)


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
        for part in (subset, Subset(larger, subset.indices[:10])):
            images = list[Image]()
            for index, prediction in part.predictions(predictor):
                truth = part.dataset.mask(index)
                images.append((to_native(prediction.mask, truth.shape), prediction.presence, truth))
            slow, fast = count_images(images), part.count(predictor)
            assert np.array_equal(counts_of(fast), counts_of(slow))
            assert fast.presence.tolist() == slow.presence.tolist()
            assert fast.truth_area.tolist() == [entry.area_px for entry in part.entries]
    assert {entry.area_px > 0 for entry in subset.entries} == {True, False}
    assert len(Subset(opened, np.zeros(0, np.int64)).count(predictor)) == 0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("head", ["mask_head", "presence_head"])
def test_a_diverged_network_is_an_error_with_advice(opened: Dataset, head: str) -> None:
    network = build_network("tiny", "none", seed=0)
    for weights in getattr(network, head).parameters():
        torch.nn.init.constant_(weights, float("nan"))
    diverged = Predictor(network, CPU)
    for act in (Subset(opened, np.arange(3)).count, lambda one: next(one.predict(opened.images([0])))):
        with pytest.raises(UserError, match=r"NaN: training diverged; .*learning_rate"):
            act(diverged)


@pytest.mark.usefixtures("tiny")
def test_one_nan_pixel_marks_only_its_image(opened: Dataset) -> None:
    class OneBadPixel(PneumothoraxNet):
        def forward(self, images: torch.Tensor) -> Output:
            mask = torch.zeros(images.shape[0], *images.shape[2:])
            mask[1, 0, 0] = float("nan")
            return Output(mask, mask, torch.zeros(len(images)))

    (batch,) = Predictor(OneBadPixel("tiny"), CPU).predict_batches(opened.images([0, 1, 2]))
    assert batch.finite.tolist() == [True, False, True]
    assert batch.presence.tolist() == [0.5] * 3


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


@pytest.mark.parametrize(("positives", "shown"), [(4, 3), (6, 4), (7, 6), (5, 9), (2, 6)])
def test_overlays_show_and_label_best_median_and_worst(
    opened: Dataset, predictor: Predictor, positives: int, shown: int
) -> None:
    evaluation = some_of(opened, positives, negatives=4)
    captions = [caption_of(picture) for picture in ranked_overlays(evaluation, predictor, shown)]
    assert len(captions) == shown
    areas = sorted((entry.area_px for entry in evaluation.subset.entries if entry.area_px), reverse=True)
    names = {"best: ": areas[0], "median: ": areas[(positives - 1) // 2], "worst: ": areas[-1]}
    labelled = names.items() if positives > 2 else [("", area) for area in areas]
    for name, area in labelled:
        dice = 2 * area / (area + 1024**2)
        text = f"{name}Dice {dice:.2f}, truth {area:,} px, predicted 1,048,576 px"
        assert captions.count(written(text)) == 1, text
