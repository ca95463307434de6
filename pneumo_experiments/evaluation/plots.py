"""Plots of the scores of a set of images; each an RGB picture (h, w, 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.figures import pixels_of
from pneumo_experiments.metrics.comparison import Comparison
from pneumo_experiments.metrics.dice import precision_recall_points, roc_points
from pneumo_experiments.metrics.scores import ScoredImages
from pneumo_experiments.metrics.thresholds import Thresholds


def calibration_plot(
    presence: Sequence[float], positive: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> NDArray[np.uint8]:
    """Fraction of positives with its interval over mean presence, one point per bin; RGB (h, w, 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.vlines(presence, low, high, alpha=0.5, label="95% interval")
    axes.plot(presence, positive, marker="o", label="bins of presence")
    axes.set(xlabel="mean probability of presence", ylabel="fraction with pneumothorax")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return pixels_of(figure)


def comparison_plot(differences: NDArray[np.float64], comparison: Comparison) -> NDArray[np.uint8]:
    """Differences of Dice (n,) of each image in order, and of the mean in resamples; RGB (h, w, 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left: Any = figure.add_subplot(1, 2, 1)
    ordered = np.sort(differences)[::-1]
    left.bar(range(len(ordered)), ordered, width=1, color=np.where(ordered > 0, "tab:green", "tab:red"))
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    left.set(
        title=f"{better} images better, {worse} worse, {len(ordered) - better - worse} equal",
        xlabel="images",
        ylabel="Dice minus baseline's Dice",
    )
    right: Any = figure.add_subplot(1, 2, 2)
    is_spread = np.ptp(comparison.resamples) > 1e-9  # else the bins would be too narrow for float64
    right.hist(comparison.resamples, bins=40 if is_spread else 1, color="tab:grey")
    right.axvline(0, color="black", linestyle="--", label="no difference")
    right.axvspan(comparison.low, comparison.high, alpha=0.2, label="95% interval")
    right.set(
        title=f"better with a probability of {comparison.probability_better:.3f}",
        xlabel="difference of mean Dice",
        ylabel="resamples of the patients",
    )
    right.legend()
    return pixels_of(figure)


def presence_curves(images: ScoredImages, sensitivity: float, specificity: float) -> NDArray[np.uint8]:
    """ROC and precision-recall curve of presence, of images with both classes.

    A dot marks the masks: which images have one after all thresholds, with these rates.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left: Any = figure.add_subplot(1, 2, 1)
    left.plot(*roc_points(images.truth, images.presence), label="presence")
    left.plot([0, 1], [0, 1], color="grey", linestyle="--", label="chance")
    left.plot(1 - specificity, sensitivity, "o", color="tab:orange", label="masks, after all thresholds")
    left.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    left.legend(loc="lower right")
    right: Any = figure.add_subplot(1, 2, 2)
    recall, precision = precision_recall_points(images.truth, images.presence)
    # Precision holds for the recall that a presence adds: steps, whose area is the average precision.
    right.step(np.append(0, recall), np.append(precision[:1], precision), where="pre", label="presence")
    prevalence = float(images.truth.mean())
    right.axhline(prevalence, color="grey", linestyle="--", label="chance")
    if images.predicted.any():
        marked = float(images.truth[images.predicted].mean())
        right.plot(sensitivity, marked, "o", color="tab:orange", label="masks, after all thresholds")
    right.set(title="precision and recall", xlabel="recall (sensitivity)", ylabel="precision")
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    return pixels_of(figure)


def dice_by_area_plot(
    area_px: NDArray[np.int64], dices: NDArray[np.float64], predicted: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Dice of n >= 1 positives (n,) over their annotated area, and whether the prediction has a mask."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for chosen, colour, marker, name in (
        (predicted, "tab:blue", "o", "with a predicted mask"),
        (~predicted, "tab:red", "x", "missed"),
    ):
        axes.scatter(
            area_px[chosen],
            dices[chosen],
            s=26,
            alpha=0.7,
            color=colour,
            marker=marker,
            label=f"{name} ({int(chosen.sum())})",
        )
    axes.axhline(dices.mean(), color="grey", linestyle="--", label=f"mean {dices.mean():.3f}")
    axes.set(xscale="log", xlabel="annotated area in native pixels", ylabel="Dice", ylim=(-0.04, 1.04))
    axes.set_xlim(area_px.min() / 1.6, area_px.max() * 1.6)  # at least one of the ticks is inside
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return pixels_of(figure)


def threshold_surface(
    surface: NDArray[np.float64], used: Thresholds, used_dice: float, best: Thresholds
) -> NDArray[np.uint8]:
    """Mean Dice of each top_score and bottom_score (101, 101), with those used and the best ones marked."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.5, 5.6), layout="constrained")
    axes: Any = figure.add_subplot()
    shown = axes.imshow(surface, origin="lower", extent=(-0.005, 1.005, -0.005, 1.005), cmap="viridis")
    figure.colorbar(shown, label="mean Dice, with the best presence threshold and area")
    axes.plot(
        *(used.bottom_score, used.top_score),
        *("o",),
        color="tab:orange",
        markeredgecolor="black",
        markersize=10,
        label=f"used: Dice {used_dice:.4f}",
    )
    axes.plot(
        *(best.bottom_score, best.top_score),
        *("x",),
        color="red",
        markersize=10,
        markeredgewidth=2.5,
        label=f"best on these images: {np.nanmax(surface):.4f}",
    )
    axes.set(xlabel="bottom_score", ylabel="top_score", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right")
    return pixels_of(figure)
