"""Learning rates: over the steps, and of pretrained and new layers."""

from __future__ import annotations

import math
from typing import Any

from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.settings import Recipe

POLYNOMIAL = 0.9  # the power that segmentation networks are usually trained with (Chen et al. 2017, DeepLab)


def rate(recipe: Recipe, done: float) -> float:
    """Share of the peak learning rate when ``done`` (0 to 1) of all steps are behind.

    A linear rise from 0.05 over the share ``warmup`` of all steps, then down to zero by half a cosine
    (Smith & Topin 2018), or as (1 - done)^0.9.
    """
    if done < recipe.optimizer.warmup:
        return 0.05 + 0.95 * done / recipe.optimizer.warmup
    fallen = (done - recipe.optimizer.warmup) / (1 - recipe.optimizer.warmup)
    if recipe.optimizer.schedule == "polynomial":
        return (1 - fallen) ** POLYNOMIAL
    return 0.5 * (1 + math.cos(math.pi * fallen))


def parameter_groups(network: PneumothoraxNet, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters with their peak learning rates; pretrained layers keep more of what they know."""
    lower = recipe.optimizer.learning_rate * recipe.optimizer.pretrained_lr_scale
    known = [p for name, p in network.named_parameters() if name in network.pretrained]
    new = [p for name, p in network.named_parameters() if name not in network.pretrained]
    start = rate(recipe, 0)
    peaks = ((known, lower), (new, recipe.optimizer.learning_rate))
    return [{"params": params, "lr": peak * start, "peak": peak} for params, peak in peaks if params]
