"""The training loss: a weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.learning.network import Output
from pneumo_experiments.settings import Recipe


def bce(logits: Tensor, share: Tensor) -> Tensor:
    """Mean binary cross-entropy of mask logits (n, S, S) and annotated shares in [0, 1]."""
    return functional.binary_cross_entropy_with_logits(logits, share)


def soft_dice(logits: Tensor, share: Tensor) -> Tensor:
    """1 minus the Dice of probabilities over the whole batch; 0 when batch and truth are empty.

    Milletari et al. 2016, V-Net, with the plain sums of Sudre et al. 2017 in the denominator.
    """
    probability = torch.sigmoid(logits)
    # One pixel is added on both sides: an empty truth then asks for an empty prediction.
    return 1 - (2 * (probability * share).sum() + 1) / (probability.sum() + share.sum() + 1)


def focal(logits: Tensor, share: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean cross-entropy weighted by |share - probability|^gamma.

    Lin et al. 2017, Focal Loss; for shares between 0 and 1 as in Li et al. 2020, Quality Focal Loss.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, share, reduction="none")
    return ((share - torch.sigmoid(logits)).abs() ** gamma * cross_entropy).mean()


MASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_weight": bce,
    "dice_weight": soft_dice,
    "focal_weight": focal,
}


def criterion(output: Output, share: Tensor, present: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Loss terms of a batch, unweighted, and their weighted sum as ``loss``.

    ``share`` (n, S, S) holds annotated shares, ``present`` (n,) is 1 where there is a pneumothorax.
    """
    weights = {name: getattr(recipe, name) for name in MASK_LOSSES if getattr(recipe, name) > 0}
    terms = {
        f"loss_{name.removesuffix('_weight')}": MASK_LOSSES[name](output.mask, share) for name in weights
    }
    total = sum(
        (weight * term for weight, term in zip(weights.values(), terms.values(), strict=True)),
        share.new_zeros(()),
    )
    if recipe.aux_weight > 0:
        aux = sum(
            (weight * MASK_LOSSES[name](output.aux, share) for name, weight in weights.items()),
            share.new_zeros(()),
        )
        terms["loss_aux"] = aux
        total = total + recipe.aux_weight * aux
    if recipe.presence_weight > 0:
        presence = functional.binary_cross_entropy_with_logits(output.presence, present)
        terms["loss_presence"] = presence
        total = total + recipe.presence_weight * presence
    return {"loss": total, **terms}
