"""torchvision's segmentation networks with a head for presence, and their pretrained weights."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import socket
from collections.abc import Callable
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.errors import UserError


class Architecture(NamedTuple):
    """torchvision's function for a network and its pretrained weights: backbone alone, and nearly all."""

    make: Callable[..., Any]
    imagenet: models.WeightsEnum
    coco: models.WeightsEnum


zoo: Any = models  # whose types are incomplete
NETWORKS = {
    f"{head}_{backbone}": Architecture(
        partial(zoo.get_model, f"{head}_{backbone}"),
        zoo.get_model_weights(backbone)["IMAGENET1K_V2"],
        zoo.get_model_weights(f"{head}_{backbone}")["COCO_WITH_VOC_LABELS_V1"],
    )
    for head in ("fcn", "deeplabv3")
    for backbone in ("resnet50", "resnet101")
}
# The layers with one output per class, at the end of torchvision's heads.
LAST_LAYERS = ("mask_head.4.", "aux_head.4.")
DOWNLOAD_TIMEOUT_SECONDS = 20
# Where checkpoints of Lightning, timm, torchvision's references and others have the state dict.
CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict")

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Logits of a batch, always float32: ``mask`` and ``aux`` (n, S, S), ``presence`` (n,).

    ``aux`` is None unless the auxiliary head is trained: nothing else uses it.
    """

    mask: Tensor
    aux: Tensor | None
    presence: Tensor


class PneumothoraxNet(nn.Module):
    """A torchvision segmentation network with one mask logit per pixel and one presence logit per image.

    ``pretrained`` holds the names (of named_parameters) of the parameters that ``build_network`` loaded,
    ``source`` their origin and file name (or none), ``source_sha256`` the file's digest, ``training_images``
    the digests of the images that trained them, where they are a model's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        model = NETWORKS[network].make(weights=None, weights_backbone=None, num_classes=1, aux_loss=True)
        self.backbone = model.backbone
        self.mask_head: nn.Sequential = model.classifier
        self.aux_head: nn.Sequential = model.aux_classifier
        # A pneumothorax fills a few percent of the image: pool the maximum as well as the mean.
        self.presence_head = nn.Linear(2 * 2048, 1)
        self.pretrained: frozenset[str] = frozenset()
        self.source = self.source_sha256 = "none"
        self.training_images = frozenset[str]()
        # ImageNet's mean and standard deviation of its three channels, which pretrained weights expect.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        for head in (self.mask_head, self.aux_head):
            bias = cast("nn.Conv2d", head[-1]).bias
            assert bias is not None
            # Most pixels are healthy: start at a probability of 5% instead of 50%.
            nn.init.constant_(bias, math.log(0.05 / 0.95))
        nn.init.zeros_(self.presence_head.weight)
        for module in self.backbone.modules():
            if isinstance(module, models.resnet.Bottleneck):
                # Residual blocks start as the identity: from random weights, training then takes a hundred
                # steps instead of many hundreds (Goyal et al. 2017, section 5.1).
                nn.init.zeros_(cast(nn.BatchNorm2d, module.bn3).weight)

    def forward(self, images: Tensor) -> Output:
        """Logits of images (n, 1, S, S) with values in [0, 1]."""
        size = images.shape[-2:]
        # One channel broadcast to three: folding them into the first layer saves no measurable time.
        features = cast("dict[str, Tensor]", self.backbone((images - self.mean) / self.std))
        deep = features["out"]
        pooled = torch.cat([deep.mean(dim=(2, 3)), deep.amax(dim=(2, 3))], dim=1)
        mask = _upsampled(self.mask_head(deep), size)
        aux = _upsampled(self.aux_head(features["aux"]), size) if self._trains_aux else None
        return Output(mask, aux, self.presence_head(pooled).float()[:, 0])

    @property
    def _trains_aux(self) -> bool:
        """Whether the auxiliary head's output is needed; a training whose loss leaves it out freezes it."""
        return self.training and all(weight.requires_grad for weight in self.aux_head.parameters())


def _upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits (n, 1, h, w) in float32, interpolated bilinearly to (n, *size)."""
    return functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def build_network(network: str = "fcn_resnet50", weights: str = "auto", seed: int = 0) -> PneumothoraxNet:
    """A network for training; ``weights`` is auto, imagenet, coco, none or a file with a state dict.

    A file may hold the state dict of this network, of torchvision's segmentation network of the same name
    (its last layers are loaded if they have one class) or of its ResNet; also within a checkpoint, and with
    ``module.``, ``encoder.`` and such before the names, or be a safetensors file. Raises UserError when the
    weights cannot be downloaded or read safely, or do not fit, and for a network that is not in NETWORKS.

    >>> network = build_network("fcn_resnet50", weights="none", seed=0)
    >>> output = network(torch.zeros(2, 1, 64, 64))
    >>> output.mask.shape, output.presence.shape
    (torch.Size([2, 64, 64]), torch.Size([2]))
    """
    if network not in NETWORKS:
        raise UserError(f"network={network}: is none of {', '.join(NETWORKS)}")
    # Layers are initialised from torch's global generator.
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    net = PneumothoraxNet(network)
    if weights == "none":
        return net
    pretrained = {"imagenet": NETWORKS[network].imagenet, "coco": NETWORKS[network].coco}
    name = "imagenet" if weights == "auto" else weights
    path = Path(weights)
    if name in pretrained:
        try:
            path = _download(pretrained[name])
        except (OSError, RuntimeError, HTTPException) as error:  # no network, time-out, full disk; wrong hash
            if weights == "auto":
                _warn_of_random_weights(str(error))
                return net
            raise UserError(
                f"weights={weights}: cannot download them ({error});"
                " weights=none starts from random values, weights=FILE from a state dict"
            ) from error
    elif not path.is_file():
        raise UserError(
            f"weights={path}: no such file; give auto, imagenet, coco, none, a file with a state dict or a"
            " models:/ address"
        )
    net.pretrained = _load(net, _rename(_read(path)), path)
    net.source = f"{name} {path.name}" if name in pretrained else path.name
    with path.open("rb") as file:
        net.source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return net


def _download(source: models.WeightsEnum) -> Path:
    """The path of torchvision's file in torch's cache; downloaded and checked if it is missing.

    Not load_state_dict_from_url: there a failed download and a damaged file raise the same errors, and only
    the first may fall back to random values.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = path.stem.rsplit("-", 1)[1]  # torchvision's file names end with the start of the SHA-256
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        try:
            torch.hub.download_url_to_file(source.url, str(path), checksum)
        finally:
            socket.setdefaulttimeout(before)
    return path


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; code in the file is never run."""
    try:
        if path.suffix.lower() == ".safetensors":
            # A served model need not have it.
            from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many types
        refused = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        culprit = f", for it holds {refused[1]}, whose code is not run" if refused else ""
        raise UserError(
            f"weights={path}: not a state dict that can be read safely{culprit};"
            " save one with torch.save(model.state_dict(), …), or delete it if it is a damaged download"
        ) from error
    values = cast("dict[str, object]", state) if isinstance(state, dict) else {}
    for key in CHECKPOINT_KEYS * 2:  # one may hold another
        if isinstance(values.get(key), dict):
            values = cast("dict[str, object]", values[key])
    tensors = {
        name: value for name, value in values.items() if isinstance(value, Tensor) and _is_weight(name, value)
    }
    if not tensors or len(tensors) < len(values):
        raise UserError(
            f"weights={path}: holds no state dict; save one with torch.save(model.state_dict(), …)"
        )
    if infinite := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(
            f"weights={path}: {infinite[0]} has values that are no numbers, such as NaN; take weights of an"
            " earlier epoch"
        )
    return tensors


def _is_weight(name: object, value: Tensor) -> bool:
    """Whether an entry of a state dict has a name, and numbers that a network can have."""
    is_plain = value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and is_plain and not value.is_complex() and value.dtype != torch.bool


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's tensors under the names of this network; a ResNet's without its classifier."""
    state = _without_prefix(state)
    if "conv1.weight" in state:
        return {f"backbone.{name}": state[name] for name in state if not name.startswith("fc.")}
    heads = {"classifier": "mask_head", "aux_classifier": "aux_head"}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, dot, rest = name.partition(".")
        renamed[heads.get(module, module) + dot + rest] = tensor
    return renamed


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the segmentation network or ResNet that a larger model has below a prefix."""
    for first in ("backbone.conv1.weight", "conv1.weight"):
        second = first.replace("conv1", "layer1.0.conv1")  # blocks have a conv1 too
        prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
        matches = [prefix for prefix in prefixes if prefix + second in state]
        if first != "conv1.weight":  # a ResNet may be called backbone, too
            heads = ("mask_head.0.", "classifier.0.")
            matches = [p for p in matches if any(n.startswith((p + heads[0], p + heads[1])) for n in state)]
        if matches:
            prefix = min(matches, key=len)
            inside = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
            if left := len(state) - len(inside):
                log.warning("weights: %d tensors outside %s are not used", left, prefix)
            return inside
    return state


@cache  # once, however many networks a process builds
def _warn_of_random_weights(reason: str) -> None:
    log.warning(
        "ImageNet weights cannot be downloaded (%s): starting from random values,"
        " which needs many more epochs; weights=FILE takes a state dict",
        reason,
    )


def _load(net: PneumothoraxNet, state: dict[str, Tensor], path: Path) -> frozenset[str]:
    """Loads tensors with this network's names; returns the names of the parameters among them.

    Each stage of the backbone and each head of which the file has anything must be complete: a partly loaded
    network would train badly. A stage that is not in the file is named in a warning.
    """
    expected = net.state_dict()
    # torchvision's last layers have other classes: this network keeps its own.
    last = {name for name in state if name in expected and name.startswith(LAST_LAYERS)}
    skipped = {name for name in last if state[name].shape != expected[name].shape}
    loaded = {name: tensor for name, tensor in state.items() if name not in skipped}
    complete = {"backbone.conv1", *map(_stage, loaded)}
    counters = "num_batches_tracked"  # missing in files from before 2018, and unused
    required = {n for n in expected if _stage(n) in complete and not n.endswith(counters)} - skipped
    mismatches = {
        "missing": [name for name in expected if name in required and name not in loaded],
        "unknown here": [name for name in loaded if name not in expected],
        "of another shape": [n for n in loaded if n in expected and loaded[n].shape != expected[n].shape],
    }
    for mismatch, names in mismatches.items():
        if names:
            raise UserError(
                f"weights={path}: {len(names)} tensors are {mismatch}, the first is {names[0]};"
                " choose the network that they belong to"
            )
    net.load_state_dict(loaded, strict=False)
    stages = {_stage(name): None for name in expected if name.startswith("backbone.")}
    if absent := [stage for stage in stages if stage not in complete]:
        log.warning("weights=%s: has no %s, which start from random values", path.name, ", ".join(absent))
    return frozenset(name for name, _ in net.named_parameters() if name in loaded)


def _stage(name: str) -> str:
    """The head, or the stage of the backbone, that a tensor belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])
