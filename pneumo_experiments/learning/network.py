"""torchvision's FCN-ResNet with two answers: where the pneumothorax is, and whether there is one."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet50_Weights, ResNet101_Weights
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation import FCN, fcn_resnet50, fcn_resnet101

from pneumo_experiments.errors import UserError

NETWORKS: dict[str, Callable[..., FCN]] = {
    "fcn_resnet50": fcn_resnet50,
    "fcn_resnet101": fcn_resnet101,
}
IMAGENET = {
    "fcn_resnet50": ResNet50_Weights.IMAGENET1K_V2,
    "fcn_resnet101": ResNet101_Weights.IMAGENET1K_V2,
}
DOWNLOAD_TIMEOUT_SECONDS = 20

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Logits of a batch: ``mask`` and ``aux`` (n, S, S), ``presence`` (n,), always float32."""

    mask: Tensor
    aux: Tensor
    presence: Tensor


class PneumothoraxNet(nn.Module):
    """FCN-ResNet with one mask logit per pixel and one presence logit per image."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        fcn = NETWORKS[network](weights=None, weights_backbone=None, num_classes=1, aux_loss=True)
        self.backbone = fcn.backbone
        self.mask_head = fcn.classifier
        self.aux_head = cast("nn.Module", fcn.aux_classifier)
        # A pneumothorax fills a few percent of the picture, so the pooled maximum counts beside the mean.
        self.presence_head = nn.Linear(2 * 2048, 1)
        # ImageNet's mean and standard deviation over its three channels: what pretrained weights expect.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        for head in (self.mask_head, self.aux_head):
            last = list(head.modules())[-1]
            assert isinstance(last, nn.Conv2d) and last.bias is not None
            # Most pixels are healthy: start from 5% instead of 50%.
            nn.init.constant_(last.bias, math.log(0.05 / 0.95))
        nn.init.zeros_(self.presence_head.weight)
        for module in self.backbone.modules():
            if isinstance(module, Bottleneck):
                # Each residual block starts as identity: from random weights the network then learns within
                # a hundred steps instead of many hundreds (Goyal et al. 2017, section 5.1).
                nn.init.zeros_(cast(nn.BatchNorm2d, module.bn3).weight)

    def forward(self, grey: Tensor) -> Output:
        """Logits of grey images (n, 1, S, S) with values in [0, 1]."""
        size = grey.shape[-2:]
        features = cast("dict[str, Tensor]", self.backbone((grey - self.mean) / self.std))
        deep = features["out"]
        pooled = torch.cat([deep.mean(dim=(2, 3)), deep.amax(dim=(2, 3))], dim=1)
        mask, aux = (
            functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[:, 0]
            for logits in (self.mask_head(deep), self.aux_head(features["aux"]))
        )
        return Output(mask, aux, self.presence_head(pooled).float()[:, 0])


def build(network: str, weights: str, seed: int) -> PneumothoraxNet:
    """A network for training; ``weights`` is auto, imagenet, none or a file with a state dict.

    Raises UserError where the weights cannot be downloaded or do not fit.
    """
    torch.manual_seed(seed)  # layers take their start values from torch's global generator
    net = PneumothoraxNet(network)
    if weights in ("auto", "imagenet"):
        try:
            state = _imagenet(network)
        except (OSError, RuntimeError) as error:  # no network, time-out, full disk; a damaged download
            mend = "weights=none starts from random values, weights=FILE from a state dict"
            if weights == "imagenet":
                raise UserError(f"weights=imagenet: cannot download them ({error}); {mend}") from error
            log.warning(
                "ImageNet weights cannot be downloaded (%s): starting from random values,"
                " which needs many more epochs; weights=FILE takes a state dict",
                error,
            )
        else:
            net.backbone.load_state_dict(state, strict=False)
    elif weights != "none":
        _load_file(net, Path(weights))
    return net


def _imagenet(network: str) -> dict[str, Tensor]:
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        return dict(IMAGENET[network].get_state_dict(progress=True, check_hash=True))
    finally:
        socket.setdefaulttimeout(before)


def _load_file(net: PneumothoraxNet, path: Path) -> None:
    """Loads a state dict of this network or of a torchvision ResNet backbone."""
    if not path.is_file():
        raise UserError(
            f"weights={path}: no such file; give auto, imagenet, none or a file with a state dict"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the reader raise, the file is the culprit
        raise UserError(f"weights={path}: not a state dict that torch.load can read safely") from error
    if not isinstance(state, (dict, OrderedDict)):
        raise UserError(
            f"weights={path}: holds no state dict; save one with torch.save(model.state_dict(), …)"
        )
    tensors = cast("dict[str, Tensor]", state)
    target = net if "presence_head.weight" in tensors else net.backbone
    try:
        missing = cast("list[str]", target.load_state_dict(tensors, strict=False).missing_keys)
    except RuntimeError as error:
        raise UserError(
            f"weights={path}: shapes differ from the network's; choose the network they were made for"
        ) from error
    if missing:
        raise UserError(f"weights={path}: {len(missing)} tensors are missing, the first is {missing[0]}")
