"""The geometry of a synthetic chest, with and without a pneumothorax.

All shapes are polygons or curves in pixels of the 1024-pixel image: x from the midline to the right, y down.
Side -1 is the left of the image, the patient's right. A pneumothorax is the space between the chest wall and
the visceral pleura, which is modelled as the wall drawn towards the hilum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

AREA_PX = (3_000, 160_000)  # smallest and largest target area of a pneumothorax
MEDIAN_AREA_PX = 25_000  # 8,630 in the real set; larger here, since the demo trains on tiny images
# The real set has 55 to 161,421 px, quartiles 4,059, 8,630 and 18,388: about log-normal.
HARD_AREA_PX, HARD_MEDIAN_AREA_PX, HARD_SPREAD = (55, 160_000), 9_000, 1.12
# Where a pneumothorax runs along the wall, from the medial apex (0) to the lateral angle (1).
REACH = {"apical": (0.03, 0.5), "lateral": (0.38, 0.97), "basal": (0.68, 0.99), "whole": (0.01, 0.99)}

Points = NDArray[np.float64]  # (n, 2): x, y


@dataclass(frozen=True)
class Build:
    """The dimensions of one patient's chest."""

    half_width: float
    apex: float  # y of the top of the lungs
    dome: float  # y of the right diaphragm
    sulcus: float  # how far the lateral angle lies below the dome
    heart: float  # extent to the left, as a fraction of half_width
    shoulder: float  # y of the top of the shoulders
    fat: float  # 0 slim to 1
    sex: str


@dataclass(frozen=True)
class Lung:
    """One half of the chest cavity: wall from medial apex to lateral angle, rest of the outline, hilum."""

    side: int
    wall: Points
    rest: Points
    hilum: Points

    @property
    def outline(self) -> Points:
        return np.vstack([self.wall, self.rest])


@dataclass(frozen=True)
class Collapse:
    """A pneumothorax: part of the chest wall and, point by point, the visceral pleura opposite."""

    side: int
    wall: Points
    pleura: Points

    def crescent(self, begin: float = 0, end: float = 1) -> Points:
        """The polygon between wall and pleura, from fraction ``begin`` to ``end`` of its length."""
        part = slice(int(begin * len(self.wall)), int(np.ceil(end * len(self.wall))))
        return np.vstack([self.wall[part], self.pleura[part][::-1]])


def spline(points: Sequence[tuple[float, float]], steps: int = 10) -> Points:
    """The Catmull-Rom curve through k points: ((k - 1) * steps + 1, 2)."""
    knots = np.array(points, dtype=np.float64)
    knots = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (knots[k : len(knots) - 3 + k, None] for k in range(4))
    curve = b + 0.5 * t * ((c - a) + t * ((2 * a - 5 * b + 4 * c - d) + t * (3 * b - a - 3 * c + d)))
    return np.vstack([curve.reshape(-1, 2), knots[-2]])


def oval(centre: ArrayLike, a: float, b: float) -> Points:
    """An upright ellipse with half-axes a and b: (32, 2)."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.asarray(centre, dtype=np.float64) + np.stack([a * np.cos(angle), b * np.sin(angle)], axis=1)


def area_px(polygon: Points) -> float:
    """Area inside a polygon (n, 2)."""
    x, y = polygon.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def build(rng: np.random.Generator, sex: str) -> Build:
    """A random patient; women are slightly smaller."""
    return Build(
        half_width=rng.uniform(325, 385) - 15 * (sex == "F"),
        apex=rng.uniform(80, 135),
        dome=rng.uniform(640, 745),
        sulcus=rng.uniform(80, 135),
        heart=rng.uniform(0.42, 0.54),
        shoulder=rng.uniform(100, 165),
        fat=rng.uniform(0, 1),
        sex=sex,
    )


def lung(build: Build, side: int, rng: np.random.Generator) -> Lung:
    """One half of the chest cavity; the left diaphragm is lower."""
    width, top = build.half_width, build.apex + rng.normal(0, 6)
    dome = build.dome + (rng.uniform(10, 50) if side > 0 else 0)
    tall = dome + build.sulcus - top

    def at(u: float, v: float) -> tuple[float, float]:
        return side * width * (u + rng.normal(0, 0.008)), top + tall * v

    wall = [at(0.20, 0.10), at(0.26, 0.025), at(0.38, 0), at(0.55, 0.035), at(0.73, 0.13), at(0.87, 0.3)]
    wall += [at(0.95, 0.48), at(1.0, 0.66), at(1.02, 0.84), at(1.0, 1)]
    floor = [wall[-1], at(0.87, 1 - 0.6 * build.sulcus / tall), at(0.68, 1 - 0.93 * build.sulcus / tall)]
    floor += [(side * width * 0.47, dome), (side * width * 0.25, dome + 12), (side * width * 0.1, dome + 45)]
    inner = [floor[-1], at(0.10, 0.7), at(0.12, 0.45), at(0.16, 0.25), wall[0]]
    rest = np.vstack([spline(floor)[1:], spline(inner)[1:-1]])
    return Lung(side, spline(wall, 14), rest, np.array(at(0.27, 0.48)))


def heart(build: Build, rng: np.random.Generator) -> Points:
    """Heart and great vessels, extending further to the patient's left: a closed curve."""
    width, top = build.half_width, build.apex
    tall = build.dome + 20 - top
    right, left = rng.uniform(0.19, 0.26), build.heart + rng.normal(0, 0.01)
    curve = [(0.05, 0.2), (-0.13, 0.3), (-0.16, 0.5), (-right, 0.72), (-right + 0.02, 0.9), (-0.12, 1.06)]
    curve += [(0.2, 1.12), (left - 0.06, 1.06), (left, 0.96), (left * 0.92, 0.8), (left * 0.7, 0.62)]
    curve += [(0.26, 0.5), (0.19, 0.42), (0.17, 0.36)]
    curve += [(0.23, 0.3), (0.22, 0.24), (0.14, 0.2), (0.05, 0.2)]  # aortic knob
    return spline([(width * u, top + tall * v) for u, v in curve], 5)


def half_body(build: Build, view: str) -> Points:
    """Right half of the body's silhouette: neck, shoulder, arm, flank."""
    neck, slope, flank = 95 + 35 * build.fat, build.shoulder, build.half_width + 25 + 75 * build.fat
    outer = [(neck, -300), (neck, -60), (neck + 8, slope - 120), (neck + 90, slope - 55), (380, slope)]
    outer.append((560, slope + 70))
    if view == "PA":  # arms away from the body: air under the axilla
        outer += [(900, slope + 130), (900, 560), (560, 500), (build.half_width + 110, 440)]
        outer += [(flank + 25, 470), (flank, 620)]
    else:  # arms along the body
        outer += [(650, slope + 260), (700, 1300), (flank + 70, 1300), (flank + 50, 560), (flank + 30, 700)]
    return np.vstack([spline(outer, 6), [(flank + 20, 1300), (0, 1300), (0, -300)]])


def belly(build: Build) -> Points:
    """The abdomen below the diaphragm; higher on the patient's right, where the liver is."""
    flank = build.half_width + 25 + 75 * build.fat
    liver, spleen = (-0.8 * flank, build.dome + 90), (0.8 * flank, build.dome + 120)
    return np.array([(-flank, 1300), liver, (0, build.dome), spleen, (flank, 1300)])


def girdle(build: Build, view: str, side: int, lift: float) -> tuple[Points, Points, Points, Points]:
    """Shoulder girdle: line of the clavicle, outlines of scapula and humeral head, line of the humerus."""
    width, top, slope = build.half_width, build.apex, build.shoulder
    collar = [(36, top + 95), (110, top + 85 - lift), (220, slope + 60 - lift)]
    collar += [(330, slope + 42), (430, slope + 58)]
    edges = ((90, 80), (30, 75), (-25, 140), (15, 340), (50, 240), (100, 140), (90, 80))
    blade = [(width + x, slope + y) for x, y in edges]
    joint = (width + 125, slope + 125)
    arm = np.array([joint, (joint[0] + (330 if view == "PA" else 70), joint[1] + 420)])
    mirror = (side, 1)
    return spline(collar) * mirror, spline(blade) * mirror, oval(joint, 48, 54) * mirror, arm * mirror


def collapses(
    lungs: Sequence[Lung], annotations: int, overlap: bool, rng: np.random.Generator, hard: bool = False
) -> tuple[list[Collapse], list[Points]]:
    """The pneumothoraces of a patient, and one polygon per annotation.

    Overlapping annotations are parts of one crescent; separate ones are pockets, at most four. Hard ones are
    as small as the real ones, and thin rims as often as apical slivers.
    """
    if annotations == 0:
        return [], []
    median, spread = (HARD_MEDIAN_AREA_PX, HARD_SPREAD) if hard else (MEDIAN_AREA_PX, 0.75)
    low, high = HARD_AREA_PX if hard else AREA_PX
    size = min(max(rng.lognormal(log(median), spread), low), high)
    side = int(rng.integers(2))
    if annotations == 1 or overlap:
        # Small ones are apical: along the whole side they would be too thin to see.
        mixed = str(rng.choice(["apical", "lateral"]))
        place = "apical" if size < 20_000 else "whole" if size > 60_000 else mixed
        if hard:
            rims = ["apical", "apical", "lateral", "basal"] + ["whole"] * (size > 6_000)
            place = "whole" if size > 60_000 else str(rng.choice(rims))
        whole = collapse(lungs[side], size, place, rng, (size / 8_000) ** 0.5 if hard else 1)
        cuts, lap = np.linspace(0, 1, annotations + 1), 0.1 * overlap
        return [whole], [whole.crescent(max(0, a - lap), min(1, b + lap)) for a, b in pairwise(cuts.tolist())]
    pockets = [(side, "apical"), (side, "basal"), (1 - side, "apical"), (1 - side, "basal")][:annotations]
    pocket_px = min(max(size / annotations, 2 * low), 20_000)
    extent = (pocket_px / 4_000) ** 0.5 if hard else 1
    separate = [collapse(lungs[k], pocket_px, place, rng, extent) for k, place in pockets]
    return separate, [pocket.crescent() for pocket in separate]


def collapse(lung: Lung, size: float, place: str, rng: np.random.Generator, extent: float = 1) -> Collapse:
    """A pneumothorax of about ``size`` pixels, reaching at most three quarters of the way to the hilum.

    It takes the fraction ``extent`` of the place's length, if that is below 1.
    """
    begin, end = (fraction + rng.uniform(-0.01, 0.01) for fraction in REACH[place])
    if extent < 1:
        begin += rng.uniform(0, 1) * (1 - max(extent, 0.15)) * (end - begin)
        end = begin + max(extent, 0.15) * (REACH[place][1] - REACH[place][0])
    wall = lung.wall[int(begin * len(lung.wall)) : int(end * len(lung.wall))]
    along, peak = np.linspace(0, 1, len(wall)), rng.uniform(0.35, 0.65)
    bulge = np.sin(np.pi / 2 * np.where(along < peak, along / peak, (1 - along) / (1 - peak))) ** 0.6
    bulge *= 1 + 0.08 * np.sin(along * rng.uniform(5, 12) + rng.uniform(0, 6))
    low, high = 0.0, 0.75
    result = Collapse(lung.side, wall, wall)
    for _ in range(12):  # bisection of the depth
        depth = (low + high) / 2
        result = Collapse(lung.side, wall, wall + depth * bulge[:, None] * (lung.hilum - wall))
        low, high = (low, depth) if area_px(result.crescent()) > size else (depth, high)
    return result


def vessels(lung: Lung, rng: np.random.Generator) -> list[tuple[Points, float]]:
    """Branching vessels from the hilum outwards, with their widths, the thinnest first."""
    count = 10
    place = lung.hilum + rng.normal(0, 1, (count, 2)) * (12, 36)
    angle = np.linspace(-1.7, 1.7, count) + rng.normal(0, 0.2, count)  # 0 is outwards
    width = rng.uniform(5, 12, count)
    branches = list[tuple[Points, float]]()
    for length in (90, 85, 75, 60):
        reach = length * rng.uniform(0.4, 1.4, (len(angle), 1))
        bend = angle + rng.normal(0, 0.3, len(angle))
        middle = place + reach / 2 * np.stack([lung.side * np.cos(angle), np.sin(angle)], axis=1)
        end = middle + reach / 2 * np.stack([lung.side * np.cos(bend), np.sin(bend)], axis=1)
        branches += zip(np.stack([place, middle, end], axis=1), width.tolist(), strict=True)
        place = np.repeat(end, 2, axis=0)
        angle = np.repeat(bend, 2) + np.tile([-0.5, 0.4], len(bend)) * rng.uniform(0.1, 1.4, 2 * len(bend))
        width = np.repeat(width, 2) * rng.uniform(0.5, 0.8, 2 * len(bend))
    return branches[::-1]


def ribs(build: Build, lung: Lung) -> tuple[list[Points], list[Points]]:
    """Centre lines of one side's ribs, from top to bottom: posterior parts, anterior parts."""
    pitch = (build.dome - build.apex) / 8.4
    outside = lung.wall[28:]  # from the top of the apex down
    back, front = list[Points](), list[Points]()
    for number in range(11):
        start, drop = build.apex - 14 + pitch * number, pitch * (1.3 + 0.16 * min(number, 7))
        turn = np.linspace(0.06, 0.8 * np.pi, 30)
        reach = float(np.interp(start + drop / 2, outside[:, 1], np.abs(outside[:, 0])))
        x = np.sin(turn) ** 0.85 * max(reach, build.half_width * 0.5)
        y = start + drop * (1 - np.cos(turn)) / 2 - 16 * np.sin(2 * turn)
        line = np.stack([lung.side * x, y], axis=1)
        back.append(line[:19])
        if 0 < number < 8:
            front.append(line[16:])
    return back, front
