"""A network with the interface of torchvision's and some ten thousand parameters, for tests of loops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pneumo_experiments.learning.network import NETWORKS

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


class Tiny(nn.Module):
    """The parts of a torchvision segmentation network."""

    def __init__(self, **unused: Any) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_classifier = Backbone(), _head(CHANNELS), _head(4)


def _head(channels: int) -> nn.Sequential:
    first = nn.Conv2d(channels, 4, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 1, 1))


TINY = NETWORKS["fcn_resnet50"]._replace(make=Tiny)  # pyright: ignore[reportArgumentType]


def add_tiny_network() -> None:
    """Lets ``network="tiny"`` name it, in this process; tests take the fixture ``tiny`` instead."""
    NETWORKS["tiny"] = TINY
