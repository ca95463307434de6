"""The terms of the training loss: values by hand, slow versions, gradients and extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pneumo_experiments.learning.loss import (
    MASK_LOSSES,
    bce,
    criterion,
    focal,
    lovasz_hinge,
    soft_dice,
    soft_dice_per_image,
)
from pneumo_experiments.learning.network import Output
from pneumo_experiments.settings import Recipe

LOGIT = math.log(3)  # of probability 0.75
EVERY_TERM = make(
    Recipe,
    bce_weight=0.5,
    dice_weight=2.0,
    dice_image_weight=0.3,
    focal_weight=3.0,
    lovasz_weight=0.1,
    aux_weight=0.4,
    presence_weight=0.7,
)
every_loss = pytest.mark.parametrize("loss", MASK_LOSSES.values(), ids=MASK_LOSSES.keys())


def pixels(*values: float) -> Tensor:
    """One image of one row."""
    return torch.tensor(values, dtype=torch.float64)[None, None]


def batch(seed: int, count: int = 3, side: int = 4) -> tuple[Tensor, Tensor]:
    """Random logits and masks in float64; a third of the pixels is exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, side, side, generator=generator, dtype=torch.float64) * 2
    targets = torch.rand(count, side, side, generator=generator, dtype=torch.float64) * 3 - 1
    return logits, targets.clamp(0, 1)


# By hand

LN_1_4, LN_3_4 = math.log(0.25), math.log(0.75)
EMPTY, FULL = torch.full((1, 32, 32), -50.0), torch.full((1, 32, 32), 50.0)
NONE, ALL = torch.zeros(1, 32, 32), torch.ones(1, 32, 32)
TWO, FIRST_OF_TWO = torch.full((2, 2, 2), LOGIT), torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)


@pytest.mark.parametrize(
    ("loss", "logits", "target", "expected"),
    [
        (bce, pixels(LOGIT), pixels(1), -LN_3_4),
        (bce, pixels(LOGIT), pixels(0.5), -0.5 * LN_3_4 - 0.5 * LN_1_4),
        (bce, 2 * FULL, NONE, 100),
        (bce, 2 * EMPTY, ALL, 100),
        # Focal loss weighs by the squared distance, also of a partly annotated pixel.
        (focal, pixels(LOGIT), pixels(1), 0.25**2 * -LN_3_4),
        (focal, pixels(LOGIT), pixels(0.25), 0.5**2 * (-0.25 * LN_3_4 - 0.75 * LN_1_4)),
        (focal, pixels(LOGIT), pixels(0.75), 0),
        (focal, 2 * FULL, NONE, 100),
        # Dice of the batch, and the mean of those of its images.
        (soft_dice, TWO, FIRST_OF_TWO, 1 - (2 * 3 + 1) / (6 + 4 + 1)),
        (soft_dice_per_image, TWO, FIRST_OF_TWO, 1 - ((2 * 3 + 1) / (3 + 4 + 1) + 1 / (3 + 0 + 1)) / 2),
        (soft_dice, EMPTY, NONE, 0),
        (soft_dice_per_image, EMPTY, NONE, 0),
        (soft_dice_per_image, FULL, NONE, 1024 / 1025),
        (soft_dice_per_image, EMPTY, ALL, 1024 / 1025),
        # Errors 2, -1, 1: the first costs 1 - 1/2 of the index, the third 1/2 - 1/3, the second is right.
        (lovasz_hinge, pixels(-1, 2, 0), pixels(1, 1, 0), 2 / 2 + 1 / 6),
        # The only true pixel is the worst: it takes the whole index, the false one costs nothing more.
        (lovasz_hinge, pixels(-1, 0.5), pixels(1, 0), 2),
        # A pixel counts as true when at least half of it is annotated.
        (lovasz_hinge, pixels(-1, 2, 0), pixels(0.5, 0.9, 0.49), 2 / 2 + 1 / 6),
        # Every pixel is right by one or more, with and without something to find.
        (lovasz_hinge, pixels(1, 9, -1), pixels(1, 1, 0), 0),
        (lovasz_hinge, pixels(-1, -2), pixels(0, 0), 0),
        (lovasz_hinge, pixels(-0.99, -2), pixels(0, 0), 0.01),
        (lovasz_hinge, pixels(-3, 0.5, -0.2), pixels(0, 0, 0), 1.5),
        # Every pixel is wrong: the worst takes the whole index.
        (lovasz_hinge, 2 * FULL, NONE, 101),
        (lovasz_hinge, 2 * EMPTY, ALL, 101),
    ],
)
def test_a_loss_is_what_its_formula_gives_by_hand(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, expected: float
) -> None:
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


# Lovász hinge


def slow_lovasz_hinge(logits: np.ndarray, truth: np.ndarray) -> float:
    """Of one image of pixels: each wrong pixel, worst first, times what it takes from the Jaccard index."""
    errors = [1 - logit if true else 1 + logit for logit, true in zip(logits, truth, strict=True)]
    annotated = set(np.flatnonzero(truth).tolist())
    wrong: set[int] = set()
    before, loss = 1.0, 0.0
    for pixel in np.argsort(errors, kind="stable")[::-1].tolist():
        wrong.add(pixel)
        after = len(annotated - wrong) / len(annotated | wrong)
        loss += max(errors[pixel], 0) * (before - after)
        before = after
    return loss


images_of_pixels = st.integers(1, 12).flatmap(
    lambda count: st.lists(
        st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=count, max_size=count),
        min_size=1,
        max_size=3,
    )
)


@settings(deadline=None)
@given(images_of_pixels)
def test_lovasz_hinge_equals_the_sum_over_sets_of_wrong_pixels(images: list[list[tuple[int, bool]]]) -> None:
    table = np.array(images, float)  # half-integer logits: errors are often equal
    logits, truth = table[..., 0] / 2, table[..., 1] > 0
    expected = np.mean([slow_lovasz_hinge(*one) for one in zip(logits, truth, strict=True)])
    actual = lovasz_hinge(torch.from_numpy(logits)[:, None], torch.from_numpy(truth)[:, None].double())
    assert actual.item() == pytest.approx(expected, abs=1e-12)


# All terms


@every_loss
def test_gradients_equal_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for seed in range(3):
        logits, target = batch(seed)
        target[0] = 0
        assert torch.autograd.gradcheck(lambda x, target=target: loss(x, target), logits.requires_grad_())


@every_loss
def test_the_order_of_pixels_and_images_does_not_count(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, target = batch(4)
    logits = logits.round()  # equal errors, too
    generator = torch.Generator().manual_seed(0)
    places, order = torch.randperm(16, generator=generator), torch.randperm(3, generator=generator)
    shuffled = [x.flatten(1)[order][:, places].reshape(3, 4, 4) for x in (logits, target)]
    assert loss(*shuffled).item() == pytest.approx(loss(logits, target).item(), rel=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_float32_finite_at_extreme_logits_and_exact_sums(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    logits = torch.tensor([100.0, -100.0, 100.0, -100.0, 0.0, 0.0]).repeat(2, 3, 1).to(dtype)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0]).repeat(2, 3, 1)
    target[1] = 0
    logits.requires_grad_()
    value = loss(logits, target.to(dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert math.isfinite(value.item()) and value.item() > 0
    assert logits.grad is not None and logits.grad.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    # 90,000 pixels: more than float16 can count.
    logits = torch.where(torch.rand(1, 300, 300, generator=generator) < 0.9, 4.0, -4.0)
    target = (torch.rand(1, 300, 300, generator=generator) < 0.8).float()
    exact = loss(logits.double(), target.double()).item()
    assert loss(logits.to(dtype), target.to(dtype)).item() == pytest.approx(exact, rel=1e-5)


# The criterion


def outputs(seed: int) -> tuple[Output, Tensor, Tensor]:
    """Logits of three images of 8 pixels a side, their masks and presence."""
    (mask, target), (aux, _) = batch(seed, side=8), batch(seed + 100, side=8)
    presence, present = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    return Output(mask.float(), aux.float(), presence), target.float(), present


def test_every_term_is_returned_unweighted_under_its_name() -> None:
    output, target, present = outputs(0)
    terms = criterion(output, target, present, EVERY_TERM)
    by_name = {"bce": bce, "dice": soft_dice, "dice_image": soft_dice_per_image}
    by_name |= {"focal": focal, "lovasz": lovasz_hinge}
    assert set(terms) == {"total", "aux", "presence", *by_name}
    total = aux = 0.0
    for name, loss in by_name.items():
        assert terms[name].item() == loss(output.mask, target).item()
        total += getattr(EVERY_TERM.loss, f"{name}_weight") * loss(output.mask, target).item()
        aux += getattr(EVERY_TERM.loss, f"{name}_weight") * loss(output.aux, target).item()
    assert terms["aux"].item() == pytest.approx(aux, rel=1e-5)
    sure = [1 / (1 + math.exp(-x)) for x in (0.3, 1.0, 2.0)]  # of the right prediction
    assert terms["presence"].item() == pytest.approx(-sum(map(math.log, sure)) / 3)
    total += 0.4 * aux + 0.7 * terms["presence"].item()
    assert terms["total"].item() == pytest.approx(total, rel=1e-5)


def test_terms_without_a_weight_are_left_out_and_the_newer_ones_have_none_by_default() -> None:
    output, target, present = outputs(1)
    unasked = {"dice_image", "lovasz"}
    assert not unasked & set(criterion(output, target, present, Recipe()))
    nothing = dict.fromkeys((*MASK_LOSSES, "aux_weight", "presence_weight"), 0.0)
    for name in MASK_LOSSES:
        terms = criterion(output, target, present, make(Recipe, **nothing | {name: 2.0}))
        term = name.removesuffix("_weight")
        assert set(terms) == {"total", term}
        assert terms["total"].item() == pytest.approx(2 * terms[term].item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_is_float32_whatever_the_network_computes_in(dtype: torch.dtype) -> None:
    output, target, present = outputs(2)
    half = Output(*(logits.to(dtype) for logits in output))
    rounded = Output(*(logits.float() for logits in half))
    expected = criterion(rounded, target, present, EVERY_TERM)
    context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with context:
        terms = criterion(half, target, present, EVERY_TERM)
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        assert term.item() == expected[name].item(), name
