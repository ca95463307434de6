"""The best of all thresholds: the true optimum of mean Dice, from threshold counts.

For each top_score and bottom_score, an image that is not emptied gains g = Dice(bottom) - Dice(empty). A
presence threshold t and an area a leave the images with presence >= t and core >= a: t and a shall maximise
the sum of their g. Only values that some image has can change it. The images are added in the order of
falling presence; the best area for each t is then the largest suffix sum over ascending cores. A segment tree
keeps it: each node holds the sum of its images' g, and the largest sum from one of its areas up. Here the
tree holds the answers for all t at once, since a node of s images changes s times only. So a pair of scores
takes O(n log n) steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, log10, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.metrics.dice import dice_of_areas
from pneumo_experiments.metrics.thresholds import AREA_GRID, ThresholdCounts, Thresholds

EQUAL = 1e-9  # mean Dice that differs by less is equal: the order of a sum changes its last bits
TURNS = 20


@dataclass(frozen=True)
class Optimum:
    """The best thresholds, and how good the others can be."""

    thresholds: Thresholds
    dice: float
    """mean Dice at these thresholds; none are better"""
    combinations: int
    """how many different ones there are: pairs of scores, and presences and areas that change anything"""
    surface: NDArray[np.float64]
    """(101, 101): mean Dice of each top_score (row) and bottom_score with the best presence and area for
    them; NaN where bottom_score exceeds top_score"""


@dataclass(frozen=True)
class _Images:
    """n counted images in the order of falling presence."""

    presence: NDArray[np.float32]  # (n,)
    cores: NDArray[np.int64]  # (n, 101): pixels at or above each hundredth, as of 1024 x 1024
    gains: NDArray[np.float64]  # (n, 101): Dice with this bottom_score, less that of an empty mask

    @classmethod
    def of(cls, counts: ThresholdCounts) -> _Images:
        area, truth = counts.pixels.astype(np.int64), counts.truth_area[:, None]
        gains = dice_of_areas(area[:, 1], area[:, 0], truth) - (truth == 0)
        order = np.argsort(-counts.presence, kind="stable")
        return cls(counts.presence[order], counts.cores()[order], gains[order])


def best_of_all(counts: ThresholdCounts) -> Optimum:
    """The thresholds with the highest mean Dice of all with bottom_score <= top_score.

    Of equally good ones those far from where Dice falls: see ``_centred``. The defaults without images.
    Takes seconds for thousands of images.
    """
    if len(counts) == 0:
        return Optimum(Thresholds(), float("nan"), 0, np.full((101, 101), np.nan))
    images = _Images.of(counts)
    sums, combinations = _best_sums(images)
    tied = np.argwhere(sums >= np.nanmax(sums) - EQUAL * len(counts))
    pair = tied[((tied - tied.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    thresholds = _centred(images, _any_best(images, *pair.tolist()))
    if_empty = np.count_nonzero(counts.truth_area == 0)
    dice = float(counts.dice(thresholds).mean())
    return Optimum(thresholds, dice, combinations, (sums + if_empty) / len(counts))


def _best_sums(images: _Images) -> tuple[NDArray[np.float64], int]:
    """Largest sum of gains of each top_score (row) and bottom_score (101, 101); how many were compared."""
    separable = np.append(images.presence[1:] < images.presence[:-1], True)  # a threshold fits behind them
    presences = int(np.count_nonzero(separable)) + int(images.presence[0] < 1)
    sums, combinations = np.full((101, 101), np.nan), 0
    for top in range(101):
        cores = images.cores[:, top]
        largest = _largest_sums(cores, images.gains[:, : top + 1])[separable]
        sums[top, : top + 1] = np.maximum(largest.max(axis=0), 0)  # 0: every image is emptied
        combinations += (top + 1) * presences * (len(np.unique(cores)) + 1)
    return sums, combinations


def _largest_sums(cores: NDArray[np.int64], gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row k (n, w): the largest sum of gains (n, w) of those of images 0 to k with core >= a, over all a.

    a is the core of an image, whether among them or not. Bottom-up over the tree: a node of s leaves has
    s + 1 rows, one before each of its images is added and one after the last.
    """
    n, width = gains.shape
    size = 1 << (n - 1).bit_length()
    by_core = np.argsort(cores, kind="stable")
    leaf = np.arange(size, dtype=np.min_scalar_type(size))  # small integers are sorted faster
    leaf[by_core] = np.arange(n)
    sums = np.zeros((size, 2, width))
    sums[:n, 1] = gains[by_core]
    ascending = cores[by_core]
    # No area lies between equal cores.
    starts = np.flatnonzero(np.append(True, ascending[1:] > ascending[:-1]))
    largest = np.full((size, 2, width), -np.inf)
    largest[starts] = sums[starts]
    sums, largest = sums.reshape(-1, width), largest.reshape(-1, width)
    span = 1
    while span < size:
        # The images below each pair of nodes in the order in which they are added: left or right?
        members = np.argsort(leaf // (2 * span), kind="stable").reshape(-1, 2 * span)
        added_left = np.zeros((len(members), 2 * span + 1), np.int64)
        np.cumsum(leaf[members] // span % 2 == 0, axis=1, out=added_left[:, 1:])
        added_right = np.arange(2 * span + 1) - added_left
        first_row = np.arange(len(members))[:, None] * 2 * (span + 1)
        left, right = (first_row + added_left).ravel(), (first_row + span + 1 + added_right).ravel()
        right_sums = sums[right]
        largest = np.maximum(largest[right], right_sums + largest[left])
        sums = sums[left] + right_sums
        span *= 2
    return largest[1 : n + 1]


def _any_best(images: _Images, top: int, bottom: int) -> Thresholds:
    """Some of the best thresholds with these scores, in hundredths."""
    cores, gains = images.cores[:, top], images.gains[:, bottom]
    largest = _largest_sums(cores, gains[:, None])[:, 0]
    largest[:-1][images.presence[1:] == images.presence[:-1]] = -np.inf
    tied = np.flatnonzero(largest >= largest.max() - EQUAL * len(cores))
    last = int(tied[len(tied) // 2])
    edges, sums = _sums_from(cores[: last + 1], gains[: last + 1], _area_end(cores))
    area = int(edges[sums.argmax()])
    return Thresholds(float(images.presence[last]), top / 100, area, bottom / 100)


def _centred(images: _Images, best: Thresholds) -> Thresholds:
    """Equally good thresholds, centred in their plateau.

    Each in turn moves to the middle of the interval around it in which Dice does not change, the other three
    fixed, until none moves. Presence is then halfway between that of two images. Areas are halved as lengths,
    the square roots, since a difference of 100 pixels means less to a large finding.
    """
    presence, cores, gains = images.presence, images.cores, images.gains
    for _ in range(TURNS):
        before, top, bottom = best, round(best.top_score * 100), round(best.bottom_score * 100)
        has_core = cores[:, top] >= best.min_area_px
        low, high = _interval(presence[has_core], gains[has_core, bottom], best.presence_threshold, 1.0)
        best = replace(best, presence_threshold=_presence_between(low, high))

        present = presence >= np.float32(best.presence_threshold)
        end = max(_area_end(cores[:, top]), best.min_area_px)  # which a lower top_score may have brought
        low, high = _interval(cores[present, top], gains[present, bottom], best.min_area_px, end)
        middle = round(((sqrt(max(low, 0)) + sqrt(high)) / 2) ** 2)
        best = replace(best, min_area_px=int(min(max(middle, low + 1), high)))

        left = present[:, None] & (cores[:, bottom:] >= best.min_area_px)
        first, last = _run_of_equals(gains[:, bottom] @ left, top - bottom, len(gains))
        top = bottom + (first + last) // 2
        left = present & (cores[:, top] >= best.min_area_px)
        first, last = _run_of_equals(left @ gains[:, : top + 1], bottom, len(gains))
        best = replace(best, top_score=top / 100, bottom_score=(first + last) // 2 / 100)
        if best == before:
            break
    return best


def _area_end(cores: NDArray[np.int64]) -> int:
    """The largest min_area_px to try: it empties all of these cores (n,)."""
    return max(int(cores.max()) + 1, int(AREA_GRID[-1]))


def _sums_from(
    values: NDArray[Any], gains: NDArray[np.float64], end: float
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Ascending thresholds that differ in which values (n,) reach them, and the sums of the gains of those.

    They are the values, and ``end`` if none reaches it; one in between does what the next higher does.
    """
    edges, inverse = np.unique(values, return_inverse=True)
    sums = np.bincount(inverse, gains, len(edges))[::-1].cumsum()[::-1]
    if not len(edges) or edges[-1] < end:
        return np.append(edges, edges.dtype.type(end)), np.append(sums, 0.0)
    return edges, sums


def _interval(
    values: NDArray[Any], gains: NDArray[np.float64], threshold: float, end: float
) -> tuple[float, float]:
    """The interval (low, high] of thresholds around this one with equal sums of gains; low = -1: from 0."""
    edges, sums = _sums_from(values, gains, end)
    place = np.searchsorted(edges, np.array(threshold, edges.dtype))
    first, last = _run_of_equals(sums, int(place), len(gains))
    return float(edges[first - 1]) if first else -1.0, float(edges[last])


def _run_of_equals(sums: NDArray[np.float64], place: int, images: int) -> tuple[int, int]:
    """First and last index of the run around ``place`` of sums (n,) that equal the one there."""
    other = np.flatnonzero(np.abs(sums - sums[place]) > EQUAL * images)
    before, after = other[other < place], other[other > place]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) if len(after) else len(sums)) - 1


def _presence_between(low: float, high: float) -> float:
    """A number in the middle of (low, high], with no more digits than that needs; both are float32."""
    length = high - max(low, 0.0)
    if length > 0:
        middle = round(high - length / 2, 1 - floor(log10(length)))
        if low < np.float32(middle) <= high:
            return middle
    return high
