"""Learning rates: over the steps, and of pretrained and new layers."""

from __future__ import annotations

import math
from typing import Any

from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.settings import Recipe

POLYNOMIAL = 0.9  # the usual power for segmentation networks (Chen et al. 2017, DeepLab)


def lr_factor(recipe: Recipe, done: float) -> float:
    """Fraction of the peak learning rate after the fraction ``done`` of all steps, both 0 to 1.

    A linear warm-up from 0.05 over the first ``warmup`` of the steps, then half a cosine down to zero
    (Smith & Topin 2018), or (1 - done)^0.9.
    """
    if done < recipe.optimizer.warmup:
        return 0.05 + 0.95 * done / recipe.optimizer.warmup
    decayed = (done - recipe.optimizer.warmup) / (1 - recipe.optimizer.warmup)
    if recipe.optimizer.schedule == "polynomial":
        return (1 - decayed) ** POLYNOMIAL
    return 0.5 * (1 + math.cos(math.pi * decayed))


def parameter_groups(network: PneumothoraxNet, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups with their peak learning rates as ``lr``; pretrained layers have a lower one."""
    lower = recipe.optimizer.learning_rate * recipe.optimizer.pretrained_lr_scale
    pretrained = [p for name, p in network.named_parameters() if name in network.pretrained]
    new = [p for name, p in network.named_parameters() if name not in network.pretrained]
    groups = ((pretrained, lower), (new, recipe.optimizer.learning_rate))
    return [{"params": params, "lr": peak} for params, peak in groups if params]
