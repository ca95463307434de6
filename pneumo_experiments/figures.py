"""Figures: masks drawn on radiographs (truth green, prediction orange), learning curves."""

from __future__ import annotations

import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

BACKGROUND: Colour = (17, 18, 20)
TEXT: Colour = (236, 236, 236)
MUTED: Colour = (160, 163, 168)
# Bluish green and orange are distinct for colour-blind readers (after the palette of Okabe and Ito).
TRUTH: Colour = (45, 212, 160)
PREDICTION: Colour = (255, 146, 20)
OUTLINE_PX = 2  # on each side of the edge, at twice the panel's size
FILL_OPACITY = 0.16  # inside an outline: lung markings stay visible


def overlay(
    image: NDArray[np.uint8],
    truth: NDArray[np.bool_] | None,
    prediction: NDArray[np.bool_] | None,
    caption: str,
    size_px: int = 384,
) -> NDArray[np.uint8]:
    """Panels radiograph, truth and prediction (unless None) of (H, W) arrays side by side, RGB (h, w, 3).

    A panel has the proportions of the first mask, else of the image; its longer side measures ``size_px``.
    The caption above is cut to the width.
    """
    shape = next((mask.shape for mask in (truth, prediction) if mask is not None), image.shape)
    base = _panel(image, shape, size_px)
    panels = [("radiograph", MUTED, base)]
    for name, colour, mask in (("truth", TRUTH, truth), ("prediction", PREDICTION, prediction)):
        if mask is not None:
            panels.append((name if mask.any() else f"{name}: empty", colour, _draw_mask(base, mask, colour)))

    width, height = base.size
    gap = max(4, size_px // 32)
    text_px = max(11, size_px // 15)  # pages show it smaller
    font = ImageFont.load_default(size=text_px)
    line = round(text_px * 1.3)
    canvas_size = (gap + (width + gap) * len(panels), 4 * gap + 2 * line + height)
    canvas = Image.new("RGB", canvas_size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, gap), _fit_text(caption, font, canvas_size[0] - 2 * gap), TEXT, font)
    for i, (name, colour, panel) in enumerate(panels):
        left, top = gap + i * (width + gap), 2 * gap + line
        canvas.paste(panel, (left, top))
        pen.text((left, top + height + gap), _fit_text(name, font, width), colour, font)
    return np.asarray(canvas)


def outlines(
    image: NDArray[np.uint8],
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    caption: str,
    size_px: int = 384,
) -> NDArray[np.uint8]:
    """One panel with the outlines of truth (green) and prediction (orange), both (H, W); RGB, square.

    The UI's image grid shows a square; of a wide picture it would cut off most.
    """
    panel = _draw_mask(_draw_mask(_panel(image, truth.shape, size_px), truth, TRUTH), prediction, PREDICTION)
    canvas = Image.new("RGB", (size_px, size_px), BACKGROUND)
    canvas.paste(panel, ((size_px - panel.width) // 2, (size_px - panel.height) // 2))
    font = ImageFont.load_default(size=size_px // 22)
    ImageDraw.Draw(canvas).text((size_px // 64, size_px // 64), _fit_text(caption, font, size_px), TEXT, font)
    return np.asarray(canvas)


def outlined(image: NDArray[np.uint8], mask: NDArray[np.bool_], size_px: int) -> NDArray[np.uint8]:
    """The image (h, w) with the outline of the mask (H, W), in the mask's proportions; RGB.

    Its longer side measures ``size_px``.
    """
    return np.asarray(_draw_mask(_panel(image, mask.shape, size_px), mask, PREDICTION))


def contact_sheet(pictures: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """One RGB picture of n >= 1 pictures (h, w, 3) of any size, row by row, each centred in its cell."""
    columns = min(columns, len(pictures))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    widths = [max(picture.shape[1] for picture in pictures[i::columns]) for i in range(columns)]
    gap = max(4, max(widths) // 64)
    sheet = np.empty((sum(heights) + gap * (len(rows) + 1), sum(widths) + gap * (columns + 1), 3), np.uint8)
    sheet[:] = BACKGROUND
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top = gap * (i + 1) + sum(heights[:i]) + (heights[i] - picture.shape[0]) // 2
            left = gap * (j + 1) + sum(widths[:j]) + (widths[j] - picture.shape[1]) // 2
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def new_axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of that size in inches, and its axes; Matplotlib's types have unknown parts."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def learning_curves(history: Sequence[Mapping[str, float]], baseline: float) -> NDArray[np.uint8]:
    """Losses, and validation Dice with its all-empty baseline, over n >= 1 epochs; RGB (h, w, 3)."""
    epochs = range(1, len(history) + 1)
    losses = [name for name in history[-1] if name.startswith("loss/")]
    dices = [name for name in ("epoch/dice", "epoch/dice_positive") if name in history[-1]]
    figure, both = new_axes(10, 4, 2)
    for axes, title, names in zip(both, ("training loss", "validation"), (losses, dices), strict=True):
        for name in names:
            values = [metrics.get(name, float("nan")) for metrics in history]
            axes.plot(epochs, values, label=name.partition("/")[2].replace("_", " "), marker=".")
        if names is dices:
            axes.axhline(baseline, label="all-empty baseline", color="grey", linestyle="--")
        axes.set(title=title, xlabel="epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return pixels_of(figure)


def history_of_trials(
    points: Mapping[str, Sequence[tuple[int, float]]], best: Sequence[tuple[int, float]]
) -> NDArray[np.uint8]:
    """Number and Dice of trials, each kind with its own mark, and the best so far; RGB (h, w, 3)."""
    figure, (axes,) = new_axes(9, 5)
    for marker, (name, kind) in zip("ox+", points.items(), strict=False):
        if kind:
            axes.plot(*zip(*kind, strict=True), marker, label=name)
    if best:
        axes.step(*zip(*best, strict=True), where="post", color="tab:green", label="best so far")
    axes.set(xlabel="trial", ylabel="cross-fitted Dice")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return pixels_of(figure)


def pyplot_picture(draw: Callable[[], object], inches: tuple[float, float] = (9, 5)) -> NDArray[np.uint8]:
    """What a function draws with pyplot in a figure of its own, at least so wide and high; RGB (h, w, 3)."""
    import matplotlib
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")  # a process without a screen draws as well
    own_style: Any = cast("Any", matplotlib).rc_context()  # Optuna sets one, which other figures do not want
    with warnings.catch_warnings(), own_style:
        warnings.simplefilter("ignore")  # Optuna's plots are experimental, and some leave a contour empty
        draw()
        figure: Any = pyplot.gcf()
        content = BytesIO()
        try:
            width, height = figure.get_size_inches()
            figure.set_size_inches(max(width, inches[0]), max(height, inches[1]))
            figure.savefig(content, bbox_inches="tight")
        finally:
            pyplot.close(figure)
    return np.asarray(Image.open(content).convert("RGB"))


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """An RGB picture (H, W, 3) as a data: URI, for a page that is one file."""
    content = BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + b64encode(content.getvalue()).decode()


def pixels_of(figure: Any) -> NDArray[np.uint8]:
    """The figure, drawn; RGB (h, w, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _panel(image: NDArray[np.uint8], shape: tuple[int, ...], size_px: int) -> Image.Image:
    """The image in the proportions of a shape (rows, columns); its longer side measures ``size_px``."""
    width, height = (max(1, round(side * (size_px / max(shape)))) for side in shape[::-1])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS).convert("RGB")


def _draw_mask(base: Image.Image, mask: NDArray[np.bool_], colour: Colour) -> Image.Image:
    """The panel with the mask (H, W) lightly filled and outlined 2 px wide; unchanged if it is empty."""
    double = (base.width * 2, base.height * 2)  # drawn at twice the size, then halved, for smooth edges
    # Any coverage counts, so that a finding of a few native pixels stays visible.
    covered = Image.fromarray(mask.astype(np.uint8) * 255).resize(double, Image.Resampling.BOX)
    inside = np.asarray(covered) > 0
    window = _surrounding(inside, OUTLINE_PX)
    outer, inner = _widened(inside[window]), ~_widened(~inside[window])
    opacity = np.zeros(inside.shape, np.uint8)
    opacity[window] = np.where(outer & ~inner, np.uint8(255), inner * np.uint8(FILL_OPACITY * 255))
    blend = Image.fromarray(opacity).reduce(2)
    return Image.composite(Image.new("RGB", base.size, colour), base, blend)


def _surrounding(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice]:
    """The smallest rectangle around the mask (H, W), wider by a margin; empty without a mask."""
    sides: list[slice] = []
    for axis in (1, 0):
        where = np.flatnonzero(mask.any(axis=axis))
        sides.append(slice(max(0, where[0] - margin), where[-1] + 1 + margin) if where.size else slice(0, 0))
    return sides[0], sides[1]


def _widened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask (H, W) and all pixels within a square around it; Pillow's filter takes ten times as long."""
    down = mask.copy()
    for distance in range(1, OUTLINE_PX + 1):
        down[distance:] |= mask[:-distance]
        down[:-distance] |= mask[distance:]
    wide = down.copy()
    for distance in range(1, OUTLINE_PX + 1):
        wide[:, distance:] |= down[:, :-distance]
        wide[:, :-distance] |= down[:, distance:]
    return wide


def _fit_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut with an ellipsis if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
