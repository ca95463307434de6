"""Averages and differences of network weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import InMemoryData, StreamedData, batches, count_batches
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.settings import Recipe

STATISTICS_IMAGES = 1000  # a mean over them is off by 3% (1 / sqrt(1000)) of their standard deviation
AT_ONCE = 16  # images in one forward pass of a process: as many as when predicting


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


@torch.no_grad()
def update_batch_norm(
    network: PneumothoraxNet,
    data: InMemoryData | StreamedData,
    recipe: Recipe,
    compute: ComputeConfig,
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Gives batch norm the statistics that the network's own weights have on training images, in place.

    For averaged weights (Izmailov et al. 2018, section 3.2). Like torch's ``update_bn`` a mean over batches,
    but of images as they are in use: not augmented, drawn from all alike, without dropout. About 1,000 at
    most, the same for the same seed. The host does not wait for the device. All processes of a group take
    part, and end with the same. ``progress`` is called as by ``fit``.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    momenta, at_once = [norm.momentum for norm in norms], AT_ONCE * distributed.world_size()
    plain = replace(recipe.batches, augment="none", crop=0, balance="image", positive_fraction=0.0)
    plain = replace(plain, batch_size=at_once)
    drawn = batches(data, replace(recipe, batches=plain), 1, 1, compute.device)
    network.eval()
    for number, batch in enumerate(islice(drawn, count_batches(STATISTICS_IMAGES, at_once)), start=1):
        for norm in norms:
            norm.train().momentum = 1 / number
        with compute.autocast():
            network(batch.images.contiguous(memory_format=torch.channels_last))
        progress(batch.size)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def largest_difference(first: PneumothoraxNet, second: PneumothoraxNet) -> float:
    """Largest absolute difference of two networks' weights; infinity for NaN or other shapes."""
    ours, theirs = first.state_dict(), second.state_dict()
    if {name: each.shape for name, each in ours.items()} != {n: each.shape for n, each in theirs.items()}:
        return math.inf
    differences = [(ours[name].cpu().double() - theirs[name].cpu().double()).abs() for name in ours]
    return max(float(each.nan_to_num(nan=math.inf).max()) for each in differences)


def _floats(network: PneumothoraxNet) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
