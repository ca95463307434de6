"""The training loss: a weighted sum of named terms, in float32 whatever format the network computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.distributed import all_reduce_means, all_reduce_sum
from pneumo_experiments.learning.network import Output
from pneumo_experiments.settings import Recipe


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of mask logits (n, S, S) and a soft mask in [0, 1]."""
    return functional.binary_cross_entropy_with_logits(_at_least_float32(logits), _at_least_float32(target))


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 minus the soft Dice over the whole batch; 0 when prediction and truth are empty.

    Milletari et al. 2016, V-Net, with the plain sums of Sudre et al. 2017 in the denominator:
    1 - (2 Σpt + 1) / (Σp + Σt + 1) over all pixels of the batch, of all processes.
    """
    intersection, predicted, truth = all_reduce_means(_dice_sums(logits, target, (0, 1, 2)), len(logits))
    return 1 - (2 * intersection + 1) / (predicted + truth + 1)


def soft_dice_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of 1 minus the soft Dice; small findings weigh as much as large ones.

    The formula of ``soft_dice`` with sums over each image, as in the contest's metric: for an empty truth it
    is 0 when the prediction is empty and A / (A + 1), near 1, when it holds A pixels.
    """
    intersection, predicted, truth = _dice_sums(logits, target, (1, 2))
    return (1 - (2 * intersection + 1) / (predicted + truth + 1)).mean()


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean cross-entropy weighted by |target - probability|^gamma.

    Lin et al. 2017, Focal Loss; for soft targets as in Li et al. 2020, Quality Focal Loss.
    """
    logits, target = _at_least_float32(logits), _at_least_float32(target)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((target - torch.sigmoid(logits)).abs() ** gamma * cross_entropy).mean()


def lovasz_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of the Lovász hinge; 0 where every pixel is right by a logit of 1 or more.

    Berman, Rannen Triki & Blaschko 2018, The Lovász-Softmax loss, algorithm 1. A pixel is positive when at
    least half of it is annotated. Images without a finding count too: with the paper's 0/0 = 1 one false
    pixel costs the whole Jaccard index, so their loss is the largest hinge error. Without them the term
    would ignore healthy lungs, which are most images.
    """
    truth = target.flatten(1) >= 0.5
    margin = _at_least_float32(logits).flatten(1)
    errors, order = torch.where(truth, 1 - margin, 1 + margin).sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    # The Jaccard index once the k worst pixels are wrong, counted in integers: exact at any size.
    intersection = truth.sum(1, keepdim=True) - truth.cumsum(1)
    union = truth.sum(1, keepdim=True) + (~truth).cumsum(1)
    jaccard = intersection.to(errors.dtype) / union
    # The cost of each further wrong pixel. Before the first the index is 1, with or without a finding.
    cost = torch.cat([torch.ones_like(jaccard[:, :1]), jaccard[:, :-1]], dim=1) - jaccard
    return (torch.relu(errors) * cost).sum(1).mean()


MASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_weight": bce,
    "dice_weight": soft_dice,
    "dice_image_weight": soft_dice_per_image,
    "focal_weight": focal,
    "lovasz_weight": lovasz_hinge,
}


def criterion(output: Output, target: Tensor, present: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Unweighted loss terms of a batch, and their weighted sum as ``total``; a weight of 0 omits a term.

    ``target`` (n, S, S) is a soft mask, ``present`` (n,) is 1 for images with a pneumothorax.
    ``aux`` is the weighted sum of the mask losses of the auxiliary head.
    """
    loss, zero = recipe.loss, _at_least_float32(target.new_zeros(()))

    def mask_terms(logits: Tensor) -> dict[str, Tensor]:
        return {name: term(logits, target) for name, term in MASK_LOSSES.items() if getattr(loss, name) > 0}

    def weighted(terms: dict[str, Tensor]) -> Tensor:
        return sum((getattr(loss, name) * term for name, term in terms.items()), zero)

    terms = mask_terms(output.mask)
    if loss.aux_weight > 0:
        assert output.aux is not None  # a network that is trained with this recipe computes it
        terms["aux_weight"] = weighted(mask_terms(output.aux))
    if loss.presence_weight > 0:
        terms["presence_weight"] = bce(output.presence, present)
    return {"total": weighted(terms)} | {name.removesuffix("_weight"): terms[name] for name in terms}


class RunningMeans:
    """Means of loss terms over images, kept on the device: reading each step's would make the host wait."""

    def __init__(self) -> None:
        self._sums, self._images = dict[str, Tensor](), 0

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Adds terms that are means over ``images`` images; a term that is not finite counts as 0."""
        self._images += images
        for name, term in terms.items():
            term = torch.nan_to_num(term.detach(), posinf=0.0, neginf=0.0) * images
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def tensors(self) -> dict[str, Tensor]:
        """Means over this process's images, on the device."""
        return {name: total / self._images for name, total in self._sums.items()}

    def numbers(self) -> dict[str, float]:
        """Means over the images of all processes; waits for the device."""
        sums = torch.stack([*self._sums.values()])
        totals = all_reduce_sum(torch.cat([sums, sums.new_full((1,), self._images)]))
        means = cast("list[float]", (totals[:-1] / totals[-1]).tolist())  # pyright: ignore[reportUnknownMemberType]
        return dict(zip(self._sums, means, strict=True))


def _dice_sums(logits: Tensor, target: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Σpt, Σp and Σt (3, …) over dimensions of probabilities and soft masks (n, S, S).

    The Dice losses add one pixel to both sides of the fraction, so that an empty truth has a gradient
    towards an empty prediction.
    """
    probability, target = torch.sigmoid(_at_least_float32(logits)), _at_least_float32(target)
    return torch.stack([(probability * target).sum(dim), probability.sum(dim), target.sum(dim)])


def _at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: in fp16 the sum over an image overflows."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
