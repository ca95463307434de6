"""A network with the interface of torchvision's and some ten thousand parameters, for tests of loops."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from helpers import make
from torch import Tensor, nn

from pneumo_experiments.learning.architectures import Parts
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import InMemoryData
from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet

if TYPE_CHECKING:
    from pneumo_experiments.serving import TrainedNetwork


CPU = ComputeConfig(torch.device("cpu"), "fp32")
DEFAULT = "fcn_resnet50"
CHANNELS = 2048  # of torchvision's last layer, which the presence head pools


class Backbone(nn.Module):
    """Features of images (n, 3, S, S): one for each 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.ReLU())
        self.widen = nn.Conv2d(4, CHANNELS, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        aux = self.stem(images)
        return {"out": self.widen(aux), "aux": aux}


def tiny() -> Parts:
    return Parts(Backbone(), _head(CHANNELS), _head(4), CHANNELS)


def _head(channels: int) -> nn.Sequential:
    first = nn.Conv2d(channels, 4, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 1, 1))


TINY = NETWORKS[DEFAULT]._replace(make=tiny)


@cache
def fresh(network: str) -> PneumothoraxNet:
    """Any network from random values; tests that change one take a copy."""
    torch.manual_seed(0)
    return PneumothoraxNet(network)


def add_tiny_network() -> None:
    """Lets ``network="tiny"`` name it, in this process; tests take the fixture ``tiny`` instead."""
    NETWORKS["tiny"] = TINY


def replace_default_network() -> None:
    """Gives it the default network's name, in this process: the command line accepts no other names."""
    NETWORKS[DEFAULT] = TINY


def random_network(seed: int) -> PneumothoraxNet:
    """A tiny network whose outputs differ between images, and from those of another seed."""
    generator = torch.Generator().manual_seed(seed)
    built = PneumothoraxNet("tiny")  # add_tiny_network comes first
    with torch.no_grad():
        for parameter in built.parameters():
            inputs = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    return built


def tiny_member(seed: int, **values: Any) -> TrainedNetwork:
    """One that predicts with the tiny network of that seed, with the settings of its training."""
    from pneumo_experiments.learning.predict import Predictor
    from pneumo_experiments.serving import TrainedNetwork  # which imports much, and is not what workers need
    from pneumo_experiments.settings import Train, as_config

    settings = make(Train, network="tiny", **values)
    return TrainedNetwork(
        Predictor(random_network(seed), CPU, settings.recipe.network.tta), as_config(settings)
    )


def noise(count: int, side: int = 32) -> InMemoryData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, side, side), dtype=torch.uint8, generator=generator)
    targets = torch.zeros_like(images)
    targets[::2, 8:20, 8:20] = 255
    return InMemoryData(images, targets, targets.numpy().any(axis=(1, 2)))


def squares(count: int, side: int = 32, seed: int = 0) -> InMemoryData:
    """Noise; every other image has a bright square, which is the mask."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 100, (count, side, side), dtype=np.uint8)
    targets = np.zeros_like(images)
    for i in range(0, count, 2):
        x, y = rng.integers(0, side // 2, 2)
        images[i, y : y + side // 2, x : x + side // 2] += 120
        targets[i, y : y + side // 2, x : x + side // 2] = 255
    return InMemoryData(torch.from_numpy(images), torch.from_numpy(targets), targets.any(axis=(1, 2)))


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
