"""torchvision's networks with two answers: where the pneumothorax is, and whether there is one."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import logging
import math
import socket
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet50_Weights, ResNet101_Weights, WeightsEnum
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation import (
    FCN,
    DeepLabV3,
    DeepLabV3_ResNet50_Weights,
    DeepLabV3_ResNet101_Weights,
    FCN_ResNet50_Weights,
    FCN_ResNet101_Weights,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
    fcn_resnet50,
    fcn_resnet101,
)

from pneumo_experiments.errors import UserError


class Kind(NamedTuple):
    """How torchvision makes a network, and the weights that it offers: of the backbone, and of nearly all."""

    make: Callable[..., FCN | DeepLabV3]
    imagenet: WeightsEnum
    coco: WeightsEnum


NETWORKS: dict[str, Kind] = {
    "fcn_resnet50": Kind(
        fcn_resnet50, ResNet50_Weights.IMAGENET1K_V2, FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    ),
    "fcn_resnet101": Kind(
        fcn_resnet101, ResNet101_Weights.IMAGENET1K_V2, FCN_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
    ),
    "deeplabv3_resnet50": Kind(
        deeplabv3_resnet50, ResNet50_Weights.IMAGENET1K_V2, DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    ),
    "deeplabv3_resnet101": Kind(
        deeplabv3_resnet101,
        ResNet101_Weights.IMAGENET1K_V2,
        DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1,
    ),
}
# The layers with as many outputs as there are classes; torchvision's heads all end so.
LAST_LAYERS = ("mask_head.4.", "aux_head.4.")
DOWNLOAD_TIMEOUT_SECONDS = 20

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Logits of a batch: ``mask`` and ``aux`` (n, S, S), ``presence`` (n,), always float32."""

    mask: Tensor
    aux: Tensor
    presence: Tensor


class PneumothoraxNet(nn.Module):
    """A torchvision segmentation network with one mask logit per pixel and one presence logit per image.

    ``pretrained`` names the parameters, as named_parameters does, that ``build`` loaded and did not draw,
    ``source`` says from where (none, or where and the file's name), with the SHA-256 of the file.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        parts = NETWORKS[network].make(weights=None, weights_backbone=None, num_classes=1, aux_loss=True)
        self.backbone = parts.backbone
        self.mask_head = cast("nn.Sequential", parts.classifier)
        self.aux_head = cast("nn.Sequential", parts.aux_classifier)
        # A pneumothorax fills a few percent of the picture, so the pooled maximum counts beside the mean.
        self.presence_head = nn.Linear(2 * 2048, 1)
        self.pretrained: frozenset[str] = frozenset()
        self.source = self.source_sha256 = "none"
        # ImageNet's mean and standard deviation over its three channels: what pretrained weights expect.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        for head in (self.mask_head, self.aux_head):
            bias = cast("nn.Conv2d", head[-1]).bias
            assert bias is not None
            # Most pixels are healthy: start from 5% instead of 50%.
            nn.init.constant_(bias, math.log(0.05 / 0.95))
        nn.init.zeros_(self.presence_head.weight)
        for module in self.backbone.modules():
            if isinstance(module, Bottleneck):
                # Each residual block starts as identity: from random weights the network then learns within
                # a hundred steps instead of many hundreds (Goyal et al. 2017, section 5.1).
                nn.init.zeros_(cast(nn.BatchNorm2d, module.bn3).weight)

    def forward(self, grey: Tensor) -> Output:
        """Logits of grey images (n, 1, S, S) with values in [0, 1]."""
        size = grey.shape[-2:]
        # One grey in three channels: folding them into the first layer saves nothing that can be measured.
        features = cast("dict[str, Tensor]", self.backbone((grey - self.mean) / self.std))
        deep = features["out"]
        pooled = torch.cat([deep.mean(dim=(2, 3)), deep.amax(dim=(2, 3))], dim=1)
        mask, aux = (
            functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[:, 0]
            for logits in (self.mask_head(deep), self.aux_head(features["aux"]))
        )
        return Output(mask, aux, self.presence_head(pooled).float()[:, 0])


def build(network: str, weights: str, seed: int) -> PneumothoraxNet:
    """A network for training; ``weights`` is auto, imagenet, coco, none or a file with a state dict.

    A file may hold the state dict of this network, of torchvision's segmentation network of the same name
    (its last layers are taken where they too have one class) or of its ResNet. Raises UserError where the
    weights cannot be downloaded, read safely or do not fit.
    """
    torch.manual_seed(seed)  # layers take their start values from torch's global generator
    net = PneumothoraxNet(network)
    if weights == "none":
        return net
    offered = {"imagenet": NETWORKS[network].imagenet, "coco": NETWORKS[network].coco}
    name = "imagenet" if weights == "auto" else weights
    path = Path(weights)
    if name in offered:
        try:
            path = _download(offered[name])
        except (OSError, RuntimeError, HTTPException) as error:  # no network, time-out, full disk; damage
            if weights == "auto":
                log.warning(
                    "ImageNet weights cannot be downloaded (%s): starting from random values,"
                    " which needs many more epochs; weights=FILE takes a state dict",
                    error,
                )
                return net
            raise UserError(
                f"weights={weights}: cannot download them ({error});"
                " weights=none starts from random values, weights=FILE from a state dict"
            ) from error
    elif not path.is_file():
        raise UserError(
            f"weights={path}: no such file; give auto, imagenet, coco, none or a file with a state dict"
        )
    net.pretrained = _fill(net, _our_names(_read(path)), path)
    net.source = f"{name} {path.name}" if name in offered else path.name
    with path.open("rb") as file:
        net.source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return net


def _download(source: WeightsEnum) -> Path:
    """Where torchvision's file lies in torch's cache; downloaded and checked if it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = path.stem.rsplit("-", 1)[1]  # torchvision's names end with the start of their SHA-256
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        try:
            torch.hub.download_url_to_file(source.url, str(path), checksum)
        finally:
            socket.setdefaulttimeout(before)
    return path


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; whatever the file holds beside tensors is never run."""
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the reader raise, the file is the culprit
        raise UserError(
            f"weights={path}: not a state dict that torch.load can read safely;"
            " save one with torch.save(model.state_dict(), …), or delete it if it is a damaged download"
        ) from error
    held = cast("dict[str, object]", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(held):
        raise UserError(
            f"weights={path}: holds no state dict; save one with torch.save(model.state_dict(), …)"
        )
    return tensors


def _our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of this network; those of a ResNet without its classifier."""
    if "conv1.weight" in state:
        return {f"backbone.{name}": state[name] for name in state if not name.startswith("fc.")}
    heads = {"classifier": "mask_head", "aux_classifier": "aux_head"}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, dot, rest = name.partition(".")
        renamed[heads.get(part, part) + dot + rest] = tensor
    return renamed


def _fill(net: PneumothoraxNet, state: dict[str, Tensor], path: Path) -> frozenset[str]:
    """Loads tensors that bear this network's names; gives the names of the parameters among them.

    The backbone must be there whole, and each head of which there is anything: a network that is half
    loaded would train badly and tell nobody.
    """
    ours = net.state_dict()
    # torchvision's last layers have a class for each kind of thing in its pictures: there ours stay.
    left = {n for n in ours if n.startswith(LAST_LAYERS) and n in state and state[n].shape != ours[n].shape}
    taken = {name: tensor for name, tensor in state.items() if name not in left}
    parts = {"backbone", *(name.partition(".")[0] for name in taken)}
    counters = "num_batches_tracked"  # not in files of before 2018, and of no use
    wanted = {n for n in ours if n.partition(".")[0] in parts and not n.endswith(counters)} - left
    wrong = {
        "missing": [name for name in ours if name in wanted and name not in taken],
        "unknown here": [name for name in taken if name not in ours],
        "of another shape": [n for n in taken if n in ours and taken[n].shape != ours[n].shape],
    }
    for what, names in wrong.items():
        if names:
            raise UserError(
                f"weights={path}: {len(names)} tensors are {what}, the first is {names[0]};"
                " choose the network they were made for"
            )
    net.load_state_dict(taken, strict=False)
    return frozenset(name for name, _ in net.named_parameters() if name in taken)
