"""The training loss: a weighted sum of named terms, in float32 whatever the network computes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.distributed import all_reduce_means
from pneumo_experiments.learning.network import Output
from pneumo_experiments.settings import Recipe


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of mask logits (n, S, S) and annotated shares in [0, 1]."""
    return functional.binary_cross_entropy_with_logits(_wide(logits), _wide(target))


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 minus the Dice of probabilities over the whole batch; 0 when batch and truth are empty.

    Milletari et al. 2016, V-Net, with the plain sums of Sudre et al. 2017 in the denominator:
    1 - (2 Σpt + 1) / (Σp + Σt + 1) over all pixels of the batch, in a group of processes over all of theirs.
    """
    both, probable, true = all_reduce_means(_sums(logits, target, (0, 1, 2)), len(logits))
    return 1 - (2 * both + 1) / (probable + true + 1)


def soft_dice_per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of 1 minus the Dice of probabilities; small findings count as much as large.

    ``soft_dice``'s formula with the sums over each image, as the contest's metric takes them: an empty
    truth gives 0 when the prediction is empty and A / (A + 1), near 1, when it holds A pixels.
    """
    both, probable, true = _sums(logits, target, (1, 2))
    return (1 - (2 * both + 1) / (probable + true + 1)).mean()


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean cross-entropy weighted by |share - probability|^gamma.

    Lin et al. 2017, Focal Loss; for shares between 0 and 1 as in Li et al. 2020, Quality Focal Loss.
    """
    logits, target = _wide(logits), _wide(target)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((target - torch.sigmoid(logits)).abs() ** gamma * cross_entropy).mean()


def lovasz_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of the Lovász hinge; 0 where every pixel is right by a logit of 1 or more.

    Berman, Rannen Triki & Blaschko 2018, The Lovász-Softmax loss, algorithm 1. A pixel is true where at
    least half of it is annotated. Images without a finding count too: with the paper's 0/0 = 1 one false
    pixel costs the whole Jaccard index, so theirs is the largest hinge error. Left out, the term would
    teach nothing about healthy lungs, which are most images.
    """
    truth = target.flatten(1) >= 0.5
    margin = _wide(logits).flatten(1)
    errors, order = torch.where(truth, 1 - margin, 1 + margin).sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    # The Jaccard index once the k worst pixels are wrong, counted in integers: exact at any size.
    intersection = truth.sum(1, keepdim=True) - truth.cumsum(1)
    union = truth.sum(1, keepdim=True) + (~truth).cumsum(1)
    jaccard = intersection.to(errors.dtype) / union
    # What each further wrong pixel costs. Before the first the index is 1, with or without a finding.
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
    """Loss terms of a batch, unweighted, and their weighted sum as ``loss``; a weight of 0 leaves one out.

    ``target`` (n, S, S) holds annotated shares, ``present`` (n,) is 1 where there is a pneumothorax.
    ``loss_aux`` is the weighted sum of the mask's terms for the auxiliary head.
    """
    weights = {name: getattr(recipe.loss, name) for name in MASK_LOSSES if getattr(recipe.loss, name) > 0}
    terms = {
        f"loss_{name.removesuffix('_weight')}": MASK_LOSSES[name](output.mask, target) for name in weights
    }
    total = sum(
        (weight * term for weight, term in zip(weights.values(), terms.values(), strict=True)),
        _wide(target.new_zeros(())),
    )
    if recipe.loss.aux_weight > 0:
        aux = sum(
            (weight * MASK_LOSSES[name](output.aux, target) for name, weight in weights.items()),
            _wide(target.new_zeros(())),
        )
        terms["loss_aux"] = aux
        total = total + recipe.loss.aux_weight * aux
    if recipe.loss.presence_weight > 0:
        presence = bce(output.presence, present)
        terms["loss_presence"] = presence
        total = total + recipe.loss.presence_weight * presence
    return {"loss": total, **terms}


def _sums(logits: Tensor, target: Tensor, over: tuple[int, ...]) -> Tensor:
    """Sums (3, …) of Σpt, Σp and Σt over those dimensions of probabilities and shares (n, S, S).

    Their Dice takes one pixel more on both sides: an empty truth then asks for an empty prediction.
    """
    probability, target = torch.sigmoid(_wide(logits)), _wide(target)
    return torch.stack([(probability * target).sum(over), probability.sum(over), target.sum(over)])


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: in half of its bits the sum over an image overflows."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
