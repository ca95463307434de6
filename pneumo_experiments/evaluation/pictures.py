"""Plots of the scores of a set of images, and overlays of some of them; each an RGB picture (h, w, 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.evaluation.evaluate import Evaluation, ModelComparison
from pneumo_experiments.evaluation.given_masks import GivenMasks
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import new_axes, overlay, pixels_of
from pneumo_experiments.learning.predict import AnyPredictor, to_native
from pneumo_experiments.metrics.best_thresholds import Optimum
from pneumo_experiments.metrics.dice import precision_recall_points, roc_points
from pneumo_experiments.metrics.scores import Row
from pneumo_experiments.metrics.thresholds import Thresholds, apply_thresholds

Picture = NDArray[np.uint8]


def calibration_plot(rows: Sequence[Row]) -> Picture:
    """Fraction of positives with its interval over mean presence, a point for each row of a calibration."""
    presence, positive, low, high = [*zip(*rows, strict=True)][-4:]
    figure, (axes,) = new_axes(6, 5)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.vlines(presence, low, high, alpha=0.5, label="95% interval")
    axes.plot(presence, positive, marker="o", label="bins of presence")
    axes.set(xlabel="mean probability of presence", ylabel="fraction with pneumothorax")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return pixels_of(figure)


def comparison_plot(models: ModelComparison) -> Picture:
    """Differences of Dice of each image in order, and of the mean in resamples."""
    differences, comparison = models.differences, models.comparison
    figure, (left, right) = new_axes(10, 4, 2)
    ordered = np.sort(differences)[::-1]
    left.bar(range(len(ordered)), ordered, width=1, color=np.where(ordered > 0, "tab:green", "tab:red"))
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    left.set(
        title=f"{better} images better, {worse} worse, {len(ordered) - better - worse} equal",
        xlabel="images",
        ylabel="Dice minus baseline's Dice",
    )
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


def presence_curves(evaluation: Evaluation) -> Picture:
    """ROC and precision-recall curve of presence, which is known, of images with both classes.

    A dot marks the masks: which images have one after all thresholds.
    """
    images, sensitivity = evaluation.images, evaluation.scores.sensitivity
    assert images.presence is not None
    specificity = evaluation.scores.specificity
    figure, (left, right) = new_axes(10, 4.6, 2)
    left.plot(*roc_points(images.truth, images.presence), label="presence")
    left.plot([0, 1], [0, 1], color="grey", linestyle="--", label="chance")
    left.plot(1 - specificity, sensitivity, "o", color="tab:orange", label="masks, after all thresholds")
    left.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    left.legend(loc="lower right")
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


def dice_by_area_plot(evaluation: Evaluation) -> Picture:
    """Dice of n >= 1 positives over their annotated area, and whether the prediction has a mask."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    positive = evaluation.images.truth
    area_px, dices = evaluation.counts.truth_area[positive], evaluation.images.dices[positive]
    predicted = evaluation.images.predicted[positive]
    figure, (axes,) = new_axes(10, 4.2)
    for chosen, colour, marker, name in (
        (predicted, "tab:blue", "o", "with a predicted mask"),
        (~predicted, "tab:red", "x", "missed"),
    ):
        style = {"s": 26, "alpha": 0.7, "color": colour, "marker": marker}
        axes.scatter(area_px[chosen], dices[chosen], **style, label=f"{name} ({int(chosen.sum())})")
    axes.axhline(dices.mean(), color="grey", linestyle="--", label=f"mean {dices.mean():.3f}")
    axes.set(xscale="log", xlabel="annotated area in native pixels", ylabel="Dice", ylim=(-0.04, 1.04))
    axes.set_xlim(area_px.min() / 1.6, area_px.max() * 1.6)  # at least one of the ticks is inside
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return pixels_of(figure)


def threshold_surface(evaluation: Evaluation, optimum: Optimum) -> Picture:
    """Mean Dice of each top_score and bottom_score, with those used and the best ones marked."""
    surface, best = optimum.surface, optimum.thresholds
    used, used_dice = evaluation.thresholds, evaluation.scores.dice
    figure, (axes,) = new_axes(6, 5)
    shown = axes.imshow(surface, origin="lower", extent=(-0.005, 1.005, -0.005, 1.005), cmap="viridis")
    figure.colorbar(shown, label="mean Dice, with the best presence threshold and area", shrink=0.85)
    circle = {"color": "tab:orange", "markeredgecolor": "black", "markersize": 10}
    axes.plot(used.bottom_score, used.top_score, "o", **circle, label=f"used: Dice {used_dice:.4f}")
    cross = {"color": "red", "markeredgewidth": 2.5, "markersize": 10}
    label = f"best on these images: {np.nanmax(surface):.4f}"
    axes.plot(best.bottom_score, best.top_score, "x", **cross, label=label)
    axes.set(xlabel="bottom_score", ylabel="top_score", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right")
    return pixels_of(figure)


def draw_overlays(
    evaluation: Evaluation,
    predictor: AnyPredictor | GivenMasks,
    captions: Mapping[int, str],
    size_px: int = 384,
    draw: Callable[..., Picture] = overlay,
) -> Iterator[Picture]:
    """Overlays of the images at some positions of the subset, with their captions."""
    subset = evaluation.subset
    shown = Subset(subset.dataset, subset.indices[list(captions)])
    masks = _masks(shown, predictor, evaluation.thresholds)
    for caption, index, mask in zip(captions.values(), shown.indices.tolist(), masks, strict=True):
        image, truth = shown.dataset.images([index])[0], shown.dataset.mask(index)
        yield draw(image, truth, mask, caption, size_px)


def _masks(
    subset: Subset, predictor: AnyPredictor | GivenMasks, thresholds: Thresholds
) -> Iterator[NDArray[np.bool_]]:
    """The predicted mask of each image at native size."""
    shapes = [(entry.rows, entry.columns) for entry in subset.entries]
    if isinstance(predictor, GivenMasks):
        for entry, shape in zip(subset.entries, shapes, strict=True):
            mask = predictor.mask(entry)
            yield np.zeros(shape, np.bool_) if mask is None else mask
        return
    for shape, (_, prediction) in zip(shapes, subset.predictions(predictor), strict=True):
        yield apply_thresholds(to_native(prediction.mask, shape), prediction.presence, thresholds)


def ranked_overlays(
    evaluation: Evaluation, predictor: AnyPredictor, count: int, draw: Callable[..., Picture] = overlay
) -> list[Picture]:
    """Overlays of so many positives from best to worst Dice, with negatives when there are too few.

    Three and more include the best, median and worst, so labelled.
    """
    dices, truth = evaluation.images.dices, evaluation.images.truth
    positives = [i for i in np.argsort(-dices, kind="stable").tolist() if truth[i]]
    negatives = [i for i in np.argsort(dices, kind="stable").tolist() if not truth[i]]
    chosen = _evenly_spaced(positives, count) | dict.fromkeys(negatives[: max(0, count - len(positives))], "")
    texts = evaluation.captions()
    captions = {position: f"{label} {texts[position]}".strip() for position, label in chosen.items()}
    return list(draw_overlays(evaluation, predictor, captions, draw=draw)) if count else []


def _evenly_spaced(ordered: list[int], count: int) -> dict[int, str]:
    """At most ``count`` items of a list from best to worst, evenly spaced on both sides of the median.

    Returns their labels: three and more items include the best, median and worst, so labelled; others are "".
    """
    middle, last = (len(ordered) - 1) // 2, len(ordered) - 1
    count = min(count, len(ordered))
    before = np.linspace(0, middle, (count + 1) // 2)
    after = np.linspace(middle, last, count // 2 + 1)[1:]
    names = {0: "best:", middle: "median:", last: "worst:"} if len(ordered) >= 3 else {}
    return {ordered[i]: names.get(i, "") for i in np.append(before, after).round().astype(int).tolist()}
