"""A network with heads for mask, auxiliary mask and presence, and how it starts."""

from __future__ import annotations

import logging
import math
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.architectures import NETWORKS as NETWORKS
from pneumo_experiments.learning.architectures import architecture_of
from pneumo_experiments.learning.pretrained import (
    download_encoder,
    download_weights,
    load_weights,
    logit_layers,
    read_weights,
)

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Logits of a batch, always float32: ``mask`` and ``aux`` (n, S, S), ``presence`` (n,).

    ``aux`` is None unless the auxiliary head is trained: nothing else uses it.
    """

    mask: Tensor
    aux: Tensor | None
    presence: Tensor


class PneumothoraxNet(nn.Module):
    """A segmentation network with one mask logit per pixel and one presence logit per image.

    ``pretrained`` holds the names (of named_parameters) of the parameters that ``build_network`` loaded,
    ``source`` their origin and file name (or none), ``source_sha256`` the file's digest, ``training_images``
    the digests of the images that trained them, where they are a model's. Raises UserError for a name that no
    network has, and if its library is missing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        parts = architecture_of(network).make()
        self.backbone, self.mask_head, self.aux_head = parts.backbone, parts.mask_head, parts.aux_head
        self.deep, self.merges, self.multiple = parts.deep, parts.merges, parts.multiple
        # A pneumothorax fills a few percent of the image: pool the maximum as well as the mean.
        self.presence_head = nn.Linear(2 * parts.channels, 1)
        self.pretrained: frozenset[str] = frozenset()
        self.source = self.source_sha256 = "none"
        self.training_images = frozenset[str]()
        # ImageNet's mean and standard deviation of its three channels, which most pretrained weights expect:
        # not all of timm's; DPNs of segmentation_models_pytorch expect the same within a twentieth.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        # Most pixels are healthy: start at a probability of 5% instead of 50%. LRASPP adds two layers.
        start = {name.partition(".")[0]: math.log(0.05 / 0.95) for name, _ in logit_layers(self)}
        for name, layer in logit_layers(self):
            assert layer.bias is not None
            nn.init.constant_(layer.bias, start.pop(name.partition(".")[0], 0.0))
        nn.init.zeros_(self.presence_head.weight)
        for module in self.backbone.modules():
            # Residual blocks start as the identity: from random weights, training then takes a hundred
            # steps instead of many hundreds (Goyal et al. 2017, section 5.1).
            if isinstance(module, models.resnet.Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, models.resnet.BasicBlock):
                nn.init.zeros_(module.bn2.weight)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, nn.BatchNorm2d):
                # MobileNet's and EfficientNet's 0.01 are of trainings of a million steps; ours have hundreds.
                module.momentum = 0.1

    def forward(self, images: Tensor) -> Output:
        """Logits of images (n, 1, S, S) with values in [0, 1]."""
        size, images = images.shape[-2:], _padded(images, self.multiple)
        # One channel broadcast to three: folding them into the first layer saves no measurable time.
        features: Any = self.backbone((images - self.mean) / self.std)
        deep: Tensor = features[self.deep]
        pooled = torch.cat([deep.mean(dim=(2, 3)), deep.amax(dim=(2, 3))], dim=1)
        mask = _upsampled(self.mask_head(features if self.merges else deep), images.shape[-2:], size)
        aux_head = self._trained_aux_head
        aux = aux_head and _upsampled(aux_head(features["aux"]), images.shape[-2:], size)
        return Output(mask, aux, self.presence_head(pooled).float()[:, 0])

    @property
    def _trained_aux_head(self) -> nn.Module | None:
        """The auxiliary head if its output is needed; a training whose loss leaves it out freezes it."""
        head = self.aux_head if self.training else None
        return head if head and all(weight.requires_grad for weight in head.parameters()) else None


def _padded(images: Tensor, multiple: int) -> Tensor:
    """Images (n, 1, H, W) whose edges are repeated at bottom and right, until the sides are multiples."""
    down, right = (-side % multiple for side in images.shape[-2:])
    return functional.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


def _upsampled(logits: Tensor, padded: torch.Size, size: torch.Size) -> Tensor:
    """Logits (n, 1, h, w) in float32, interpolated bilinearly to the padded image and cut to (n, *size)."""
    logits = logits.float()
    if logits.shape[-2:] != padded:
        logits = functional.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
    return logits[:, 0] if padded == size else logits[:, 0, : size[0], : size[1]]


def build_network(network: str = "fcn_resnet50", weights: str = "auto", seed: int = 0) -> PneumothoraxNet:
    """A network for training; ``weights`` is auto, imagenet, coco, none or a file with a state dict.

    A file may hold the state dict of this network, of the one that torchvision or
    segmentation_models_pytorch has (its last layers are loaded if they have one class) or of its backbone;
    also within a checkpoint, and with ``module.``, ``encoder.`` and such before the names, or be a
    safetensors file. Raises UserError when the weights cannot be downloaded or read safely, or do not fit,
    and for a name that no network has.

    >>> network = build_network("fcn_resnet50", weights="none", seed=0)
    >>> output = network(torch.zeros(2, 1, 64, 64))
    >>> output.mask.shape, output.presence.shape
    (torch.Size([2, 64, 64]), torch.Size([2]))
    """
    kind = architecture_of(network)
    # Layers are initialised from torch's global generator.
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    net = PneumothoraxNet(network)
    if weights == "none":
        return net
    name = "imagenet" if weights == "auto" else weights
    pretrained = {"imagenet": kind.imagenet, "coco": kind.coco}
    if name == "coco" and kind.coco is None:
        raise UserError(f"weights=coco: there are none of {network}; give imagenet, none or a file")
    if name in pretrained:
        address = pretrained[name]
        try:
            loaded = download_encoder(network) if address is None else download_weights(address)
        except (OSError, RuntimeError, HTTPException) as error:  # no network, time-out, full disk; wrong hash
            reason = " ".join(str(error).split())[:300]
            if weights == "auto":
                _warn_of_random_weights(reason)
                return net
            raise UserError(
                f"weights={weights}: cannot download them ({reason});"
                " weights=none starts from random values, weights=FILE from a state dict"
            ) from error
        loaded = loaded._replace(source=f"{name} {loaded.source}")
    elif not (path := Path(weights)).is_file():
        raise UserError(
            f"weights={path}: no such file; give auto, imagenet, coco, none, a file with a state dict or a"
            " models:/ address"
        )
    else:
        loaded = read_weights(path)
    net.pretrained = load_weights(net, loaded)
    net.source, net.source_sha256 = loaded.source, loaded.sha256
    return net


@cache  # once, however many networks a process builds
def _warn_of_random_weights(reason: str) -> None:
    log.warning(
        "ImageNet weights cannot be downloaded (%s): starting from random values,"
        " which needs many more epochs; weights=FILE takes a state dict",
        reason,
    )
