"""Averages and differences of network weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pneumo_experiments.learning.network import PneumothoraxNet


class MovingAverage:
    """An exponential moving average of a network's weights and batch statistics.

    The decay rises as (1 + steps) / (10 + steps) up to its value, so that the random start fades quickly
    (as in TensorFlow's ExponentialMovingAverage). Not AveragedModel: its step counter would make the host
    wait for the device at every step, its first update copies the weights, and it averages skipped steps.
    """

    def __init__(self, network: PneumothoraxNet, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, network: PneumothoraxNet, finite: Tensor) -> None:
        """Updates the average after an optimizer step, without waiting for the device.

        ``finite`` () is False on the device if the step was skipped: then the average stays as it was.
        """
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        average = _floats(self.network)
        current = [torch.where(finite, new, old) for new, old in zip(_floats(network), average, strict=True)]
        get_ema_multi_avg_fn(decay)(average, current, self.steps)


def mean_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of n >= 1 state dicts; integer counters are taken from the first."""
    mean = dict(states[0])
    for name, value in mean.items():
        if value.is_floating_point():
            mean[name] = torch.stack([state[name].float() for state in states]).mean(dim=0).to(value.dtype)
    return mean


def largest_difference(first: PneumothoraxNet, second: PneumothoraxNet) -> float:
    """Largest absolute difference of two networks' weights; infinity for NaN or other shapes."""
    ours, theirs = first.state_dict(), second.state_dict()
    if {name: each.shape for name, each in ours.items()} != {n: each.shape for n, each in theirs.items()}:
        return math.inf
    differences = [(ours[name].cpu().double() - theirs[name].cpu().double()).abs() for name in ours]
    return max(float(each.nan_to_num(nan=math.inf).max()) for each in differences)


def _floats(network: PneumothoraxNet) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
