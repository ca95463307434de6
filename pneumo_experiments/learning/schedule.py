"""Learning rates over the steps, and learning rate and weight decay of each parameter."""

from __future__ import annotations

import math
from typing import Any

from torch.nn import Parameter

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
    """At most four parameter groups, each with its peak learning rate as ``lr`` and its ``weight_decay``.

    Pretrained layers have a lower rate. Only kernels decay, not biases and the scales of batch norm (He et
    al. 2019, Bag of Tricks for Image Classification, section 3.1).
    """
    chosen = recipe.optimizer
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in network.named_parameters():
        peak = chosen.learning_rate * (chosen.pretrained_lr_scale if name in network.pretrained else 1)
        decay = chosen.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": same, "lr": peak, "weight_decay": decay} for (peak, decay), same in groups.items()]
