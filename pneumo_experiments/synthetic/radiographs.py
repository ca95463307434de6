"""Synthetic chest radiographs.

An image is a sum of attenuations along the beam (soft tissue, minus the air of the lungs, plus bone) under an
exposure curve. Only the lung differs between images with and without pneumothorax: build, pose, exposure and
devices have the same distributions, and in hard images the lures: folds of skin, drains, lines, opacities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from pneumo_experiments.synthetic import anatomy
from pneumo_experiments.synthetic.anatomy import Build, Collapse, Lung, Points, oval, spline

SIDE_PX = 1024
GRID_PX = 512  # the anatomy is drawn at this size, then enlarged; noise and text are drawn at full size

Grid = NDArray[np.floating[Any]]  # float32, (GRID_PX, GRID_PX), or coarser until enlarged
Shape = tuple[Points, int, float]  # points, value 1 to 255, width in pixels (0 fills the polygon)


@dataclass(frozen=True)
class SyntheticRadiograph:
    """A radiograph, 8-bit (1024, 1024), and one boolean mask of that shape per annotation."""

    pixels: NDArray[np.uint8]
    annotations: list[NDArray[np.bool_]]


@dataclass(frozen=True)
class Pose:
    """Position of the patient in the image: image = chest @ turn + shift."""

    turn: NDArray[np.float64]
    shift: NDArray[np.float64]

    def place(self, points: Points, side_px: int) -> list[float]:
        """Points of the chest as x, y, x, y, … in an image of that many pixels."""
        return ((points @ self.turn + self.shift) * (side_px / SIDE_PX)).ravel().tolist()


def draw_radiograph(
    rng: np.random.Generator,
    build: Build,
    view: str,
    annotations: int = 0,
    overlap: bool = False,
    hard: bool = False,
) -> SyntheticRadiograph:
    """A radiograph with that many annotations (0 to 4, 0 is healthy); several overlap or are separate.

    A hard one has a fainter pneumothorax, lures that look like one, and a worse exposure.
    """
    if view == "AP":  # supine or sitting: shallow breath, wide heart
        build = replace(build, dome=build.dome - 60, heart=build.heart + 0.09)
    if hard:  # shallower breath
        build = replace(build, dome=build.dome - rng.uniform(0, 120), heart=build.heart + rng.uniform(0, 0.1))
    pose = _pose(rng, hard)
    lungs = [anatomy.lung(build, side, rng) for side in (-1, 1)]
    heart = anatomy.heart(build, rng)
    # A separate random stream, so that the same image without pneumothorax differs only in the lung.
    collapses, polygons = anatomy.collapses(lungs, annotations, overlap, rng.spawn(1)[0], hard)
    attenuation = _soft_tissue(build, pose, view, heart, rng)
    attenuation -= _gas(build, pose, rng)
    attenuation += _lungs(pose, lungs, collapses, heart, rng, hard)
    attenuation += _bones(build, pose, view, lungs, rng)
    attenuation += _devices(build, pose, view, rng)
    if hard:
        attenuation += _lures(build, pose, lungs, rng)
    return SyntheticRadiograph(
        _expose(attenuation, view, rng, hard), [_mask(pose, polygon, heart) for polygon in polygons]
    )


def _pose(rng: np.random.Generator, hard: bool) -> Pose:
    angle, scale = rng.normal(0, 0.025), rng.uniform(0.9, 1.05)
    if hard:
        angle, scale = 2 * angle, scale * rng.uniform(0.85, 1.05)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = np.array([0, SIDE_PX / 2])
    return Pose(turn, rng.normal(0, 14, 2) + SIDE_PX / 2 - middle @ turn)


def _layer(pose: Pose, shapes: Sequence[Shape], blur_px: float = 0, side_px: int = GRID_PX) -> Grid:
    """Shapes drawn over each other in order and blurred (side_px, side_px); values in [0, 1]."""
    image = Image.new("L", (side_px, side_px))
    pen = ImageDraw.Draw(image)
    for points, value, width in shapes:
        if width:
            pen.line(pose.place(points, side_px), value, max(1, round(width * side_px / SIDE_PX)))
        else:
            pen.polygon(pose.place(points, side_px), value)
    if blur_px:
        image = image.filter(ImageFilter.GaussianBlur(blur_px * side_px / SIDE_PX))
    return np.asarray(image, dtype=np.float32) / 255


def _fill(pose: Pose, polygons: Sequence[Points], blur_px: float = 0, side_px: int = GRID_PX) -> Grid:
    """Filled polygons, as ``_layer`` draws them."""
    return _layer(pose, [(polygon, 255, 0) for polygon in polygons], blur_px, side_px)


def _enlarge(layer: Grid) -> Grid:
    """A coarse layer enlarged to GRID_PX: strongly blurred layers need no fine grid."""
    return np.asarray(Image.fromarray(layer).resize((GRID_PX, GRID_PX), Image.Resampling.BILINEAR))


def _noise(rng: np.random.Generator, side_px: int) -> Grid:
    """Smooth noise in [-1, 1] with a grain size of GRID_PX / side_px."""
    image = Image.frombytes("L", (side_px, side_px), rng.bytes(side_px * side_px))
    smooth = image.resize((GRID_PX, GRID_PX), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 127.5 - 1


def _mask(pose: Pose, polygon: Points, heart: Points) -> NDArray[np.bool_]:
    """The native mask of a polygon, without the part that the heart hides."""
    image = Image.new("1", (SIDE_PX, SIDE_PX))
    pen = ImageDraw.Draw(image)
    pen.polygon(pose.place(polygon, SIDE_PX), 1)
    pen.polygon(pose.place(heart, SIDE_PX), 0)
    return np.asarray(image)


def _soft_tissue(build: Build, pose: Pose, view: str, heart: Points, rng: np.random.Generator) -> Grid:
    silhouette = [anatomy.half_body(build, view) * (side, 1) for side in (-1, 1)]
    midline = np.array([(0.0, -300.0), (0.0, 1300.0)])
    broad = 0.16 + 0.22 * _fill(pose, silhouette, 40, 128) + 0.34 * _fill(pose, silhouette, 120, 128)
    broad += 0.2 * _fill(pose, [anatomy.belly(build)], 70, 128)
    broad += 0.16 * _layer(pose, [(midline, 255, 230)], 60, 128)
    broad += 0.14 * _fill(pose, [heart], 50, 128)
    fine = 0.02 * _noise(rng, 12)
    if build.sex == "F":
        x, y, size = 0.55 * build.half_width, build.dome - rng.uniform(20, 110), rng.uniform(120, 180)
        breasts = [oval((side * x, y), size, size * 0.8) for side in (-1, 1)]
        fall = (np.linspace(0, SIDE_PX, GRID_PX, dtype=np.float32) - y + size) / (1.6 * size)
        fine += rng.uniform(0.07, 0.15) * _fill(pose, breasts) * np.clip(fall, 0, 1)[:, None]
    return _enlarge(_fill(pose, silhouette, 5, 256)) * (_enlarge(broad) + fine)


def _gas(build: Build, pose: Pose, rng: np.random.Generator) -> Grid:
    """Air in the trachea, gas in stomach and bowel."""
    windpipe = np.array([(0.0, -300.0), (0.0, build.apex + 130), (rng.normal(5, 5), build.apex + 220)])
    shapes: list[Shape] = [(windpipe, 170, 40)]
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0.1, 0.8) * build.half_width, build.dome + rng.uniform(110, 330)
        shapes.append((oval((x, y), rng.uniform(15, 70), rng.uniform(12, 40)), int(rng.integers(60, 256)), 0))
    return _enlarge(0.16 * _layer(pose, shapes, 9, 256))


def _lungs(
    pose: Pose,
    lungs: list[Lung],
    collapses: list[Collapse],
    heart: Points,
    rng: np.random.Generator,
    hard: bool,
) -> Grid:
    """Attenuation removed by air: less under the heart and in dense lung, most in a pneumothorax."""
    cavity = [lung.outline for lung in lungs]
    air = _fill(pose, cavity) * (1 - 0.85 * _enlarge(_fill(pose, [heart], 7, 256)))
    hila = [oval(lung.hilum - (lung.side * 25, 0), 34, 80) for lung in lungs]
    broad = _enlarge(0.17 * _fill(pose, hila, 40, 128) - 0.3 - 0.2 * _fill(pose, cavity, 60, 128))
    branches = [branch for lung in lungs for branch in anatomy.vessels(lung, rng)]
    vessels = _layer(pose, [(line, int(80 + 14 * width), width) for line, width in branches])
    tissue = 0.13 * vessels + 0.035 * _noise(rng, 20) + 0.03 * _noise(rng, 130)
    darkness, line = rng.uniform(0.12, 0.18), 0.1
    if hard:  # in a thin rim the lung behind is nearly as dark: the line and the missing vessels tell
        darkness, line = rng.uniform(0.02, 0.08), rng.uniform(0.05, 0.1)
    for collapse in collapses:  # a collapsed lung is denser
        lung = next(lung for lung in lungs if lung.side == collapse.side)
        tissue += anatomy.area_px(collapse.crescent()) / 500_000 * _fill(pose, [lung.outline])
    if collapses:
        free_air = _fill(pose, [collapse.crescent() for collapse in collapses])
        pleura = _layer(pose, [(collapse.pleura, 255, 3) for collapse in collapses])
        tissue = (1 - free_air) * tissue - darkness * free_air + line * pleura
    return air * (broad + tissue)


def _bones(build: Build, pose: Pose, view: str, lungs: list[Lung], rng: np.random.Generator) -> Grid:
    back, front, girdle, spine = list[Shape](), list[Shape](), list[Shape](), list[Shape]()
    lift = rng.uniform(0, 40)  # of the arms, and with them of the clavicles
    for lung in lungs:
        behind, before = anatomy.ribs(build, lung)
        for number, line in enumerate(behind):
            back += [(line, 255 - 14 * number, 24), (line, 150 - 9 * number, 17)]
        for line in before:  # towards the sternum ribs turn into cartilage
            front += [(line, 210, 26), (line, 150, 19), (line[6:], 100, 22), (line[9:], 45, 20)]
        collar, blade, head, arm = anatomy.girdle(build, view, lung.side, lift)
        girdle += [(blade, 60, 0), (blade, 110, 6), (arm, 190, 62), (arm, 120, 50), (head, 150, 0)]
        girdle += [(collar, 240, 29), (collar, 150, 21)]
    for y in range(-180, 1200, 58):
        spine += [(oval((0, y), 40, 25), 190, 0), (oval((0, y), 35, 20), 110, 0)]
        spine += [(oval((0, y + 14), 5, 15), 230, 0)]
        spine += [(oval((side * 25, y - 4), 7, 10), 230, 0) for side in (-1, 1)]
    bones = 0.13 * _layer(pose, back) + 0.09 * _layer(pose, front) + 0.16 * _layer(pose, girdle)
    return bones + _enlarge(0.1 * _layer(pose, spine, 3, 256))


def _devices(build: Build, pose: Pose, view: str, rng: np.random.Generator) -> Grid:
    """Leads, lines and tubes: common in AP images, independent of pneumothorax."""
    shapes, likely = list[Shape](), 0.65 if view == "AP" else 0.12
    if rng.random() < likely:  # electrocardiogram
        for side in (-1, 1):
            x, y = side * build.half_width * rng.uniform(0.35, 0.9), rng.uniform(230, 620)
            bend = (x + side * rng.uniform(30, 200), y + 250)
            lead = spline([(x, y), (x + side * 50, y + 80), bend, (side * 400, 1100)])
            shapes += [(lead, 140, 3), (oval((x, y), 9, 9), 255, 0)]
    if rng.random() < likely * 0.8:  # central venous line
        side, top = rng.choice([-1, 1]), build.apex
        line = [
            (side * 260, -100),
            (side * 130, top + 60),
            (side * 50, top + 110),
            (-25, top + 190),
            (-42, 430),
        ]
        shapes.append((spline(line), 150, 4))
    if rng.random() < likely * 0.4:  # tracheal tube
        tube = np.array([(4.0, -300.0), (3.0, build.apex + 150)])
        shapes += [(tube, 140, 10), (tube, 50, 5)]
    return 0.25 * _layer(pose, shapes)


def _lures(build: Build, pose: Pose, lungs: list[Lung], rng: np.random.Generator) -> Grid:
    """What resembles or hides a pneumothorax and is not annotated; independent of pneumothorax."""
    added = np.zeros((GRID_PX, GRID_PX), np.float32)
    width, top, tall = build.half_width, build.apex, build.dome - build.apex
    for lung in lungs:
        side, inwards = lung.side, np.array([-lung.side, 0.0])
        low, high = lung.wall[-1], lung.wall[20]
        # Bullae are dark without a line; effusions and infiltrates are dense; one lung is the darker one.
        clouds = (
            (0.25, -0.12, lung.wall[rng.integers(25, 60)] + inwards * 50, rng.uniform(40, 90)),
            (0.3, 0.35, low + inwards * rng.uniform(0, 150), rng.uniform(80, 200)),
            (0.5, 0.25, high + rng.uniform(0.1, 0.9) * (low - high) + inwards * 110, rng.uniform(60, 170)),
        )
        dense = np.full_like(added, rng.normal(0, 0.04))
        for chance, strength, place, size in clouds:
            if rng.random() < chance:
                cloud = _enlarge(_fill(pose, [oval(place, size, 1.3 * size)], size / 2, 128))
                dense += rng.uniform(0.4, 1) * strength * cloud * (1 + 0.7 * _noise(rng, 50))
        added += dense * _fill(pose, [lung.outline])
        if rng.random() < 0.35:  # a fold of skin: denser towards a sharp edge, and vessels go on beyond it
            x, bend = rng.uniform(0.45, 0.9), rng.uniform(0.05, 0.3)
            knots = [(0, rng.uniform(0, 0.3)), (0.5, 0.45), (0.9, 0.75), (1, rng.uniform(0.85, 1.3))]
            edge = [(side * width * (x + bend * curve), top + tall * y) for curve, y in knots]
            edge = spline(edge) + rng.normal(0, 12, 2)
            taper = inwards * np.sin(np.linspace(0, np.pi, len(edge)))[:, None]
            bands = [np.vstack([edge, (edge + taper * w)[::-1]]) for w in range(160, 0, -10)]
            steps: list[Shape] = [(band, 16 * k + 10, 0) for k, band in enumerate(bands)]
            added += rng.uniform(0.06, 0.16) * _layer(pose, steps, 3)
        lines = list[Shape]()
        if rng.random() < 0.3:  # a scapula's edge, clothes: a line with lung on both sides
            begin = int(rng.integers(20, 60))
            part = lung.wall[begin : begin + int(rng.integers(25, 60))]
            lines.append((part + rng.uniform(0.04, 0.2) * (lung.hilum - part), int(rng.integers(60, 120)), 3))
        if rng.random() < 0.2:  # a drain: two walls and a stripe
            tip = (side * width * rng.uniform(0.35, 0.75), top + tall * rng.uniform(0.05, 0.4))
            entry = (side * width * 1.25, top + tall * rng.uniform(0.7, 1.1))
            drain = spline([entry, (side * width * 0.95, (tip[1] + 2 * entry[1]) / 3), tip])
            stripe = drain + np.array([3.0, 0.0])
            lines += [(drain, 150, 15), (drain, 70, 9), (stripe, 200, 3)]
        added += 0.25 * _layer(pose, lines)
    return added


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _expose(attenuation: Grid, view: str, rng: np.random.Generator, hard: bool) -> NDArray[np.uint8]:
    """The final image (1024, 1024): exposure curve, blur, text, collimator borders, noise."""
    penetration = rng.uniform(1.0, 1.35) * (rng.uniform(0.6, 1.9) if hard else 1)
    exposure = 1 - np.exp(-penetration * np.maximum(attenuation, 0))
    toe = rng.uniform(0.2, 0.8)
    exposure *= 1.5 * (toe + (1 - toe) * exposure)
    low, high = rng.uniform(0, 10), rng.uniform(155, 245)
    if hard:
        low, high = rng.uniform(0, 50), high - rng.uniform(0, 30)
    image = Image.fromarray(np.minimum(low + (high - low) * exposure, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.9, 1.3)))
    image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    pen.text((rng.uniform(900, 970), rng.uniform(30, 140)), "L", 250, _font(40))
    if view == "AP":
        pen.text((rng.uniform(800, 850), rng.uniform(190, 240)), "AP PORTABLE", 235, _font(20))
    if rng.random() < 0.4:  # dark collimator borders, rarely bright ones
        left, top, right, bottom = rng.integers(1, 45, 4).tolist()
        inside = (left, top, SIDE_PX - right, SIDE_PX - bottom)
        framed = Image.new("L", image.size, int(rng.choice([0, 0, 0, 245])))
        framed.paste(image.crop(inside), inside)
        image = framed
    swing = int(rng.integers(6, 16)) * (int(rng.integers(1, 4)) if hard else 1)
    grain = Image.frombytes("L", image.size, rng.bytes(SIDE_PX * SIDE_PX))
    grain = grain.point([value * swing >> 8 for value in range(256)])
    return np.asarray(ImageChops.add(image, grain, 1, -(swing // 2)))
