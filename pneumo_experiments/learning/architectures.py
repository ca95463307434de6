"""The networks: what each name means, as modules, and where pretrained weights of it are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]
from torchvision.models.segmentation.fcn import FCNHead  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings.networks import DECODERS, LIBRARY, check_network

Features = Mapping[str, Tensor] | Sequence[Tensor]


class Parts(NamedTuple):
    """The modules of a network.

    ``backbone`` makes of images (n, 3, S, S) features by name or in a list. Of these ``deep`` names the
    deepest, with so many ``channels``. ``mask_head`` makes of them, or of all if it ``merges``, logits
    (n, 1, s, s); ``aux_head`` of those called aux. The sides of images must be multiples of ``multiple``.
    """

    backbone: nn.Module
    mask_head: nn.Module
    aux_head: nn.Module | None
    channels: int
    deep: str | int = "out"
    merges: bool = False
    multiple: int = 1


class Architecture(NamedTuple):
    """A function that makes the modules from random values, and torchvision's pretrained weights for them.

    Those of the backbone alone, and of nearly all. None: none, or those of the encoder's own library.
    """

    make: Callable[[], Parts]
    imagenet: models.WeightsEnum | None = None
    coco: models.WeightsEnum | None = None


class StrideFourHead(FCNHead):
    """FCN's head, with one logit for each 4 x 4 pixels instead of 8 x 8.

    Before the last layers it merges the features of the first stage, reduced to 48 channels, as DeepLabV3+
    does (Chen et al. 2018, section 3.1). Its first layers are FCN's, whose weights fit.
    """

    def __init__(self) -> None:
        super().__init__(2048, 1)
        self[4] = nn.Conv2d(256, 1, 1)
        self.low = _convolution(256, 48, 1)
        self.merge = _convolution(512 + 48, 256, 3)

    def forward(self, input: Mapping[str, Tensor]) -> Tensor:
        low, deep = self.low(input["low"]), self[2](self[1](self[0](input["out"])))
        deep = functional.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self[4](self[3](self.merge(torch.cat([deep, low], dim=1))))


class DecoderHead(nn.Module):
    """A decoder and the layer with one output."""

    def __init__(self, decoder: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.decoder, self.last = decoder, last

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.last(self.decoder(features))


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


zoo: Any = models  # whose types are incomplete


def _torchvision(name: str, channels: int = 2048) -> Parts:
    options = {"weights": None, "weights_backbone": None, "num_classes": 1}
    model = zoo.get_model(name, aux_loss=True, **options)
    return Parts(model.backbone, model.classifier, model.aux_classifier, channels)


def _lraspp(name: str) -> Parts:
    model = zoo.get_model(name, weights=None, weights_backbone=None, num_classes=1)
    return Parts(model.backbone, model.classifier, None, 960, deep="high", merges=True)


def _stride_four(name: str) -> Parts:
    parts = _torchvision(name)
    backbone: Any = parts.backbone
    backbone.return_layers = {"layer1": "low", **backbone.return_layers}
    return parts._replace(mask_head=StrideFourHead(), merges=True)


def _architecture(make: Callable[[str], Parts], name: str, backbone: str) -> Architecture:
    coco = zoo.get_model_weights(name)["COCO_WITH_VOC_LABELS_V1"]
    return Architecture(partial(make, name), zoo.get_model_weights(backbone)["IMAGENET1K_V2"], coco)


_narrow, _mobilenet = partial(_torchvision, channels=960), "mobilenet_v3_large"
NETWORKS = {
    "fcn_resnet50": _architecture(_torchvision, "fcn_resnet50", "resnet50"),
    "fcn_resnet101": _architecture(_torchvision, "fcn_resnet101", "resnet101"),
    "deeplabv3_resnet50": _architecture(_torchvision, "deeplabv3_resnet50", "resnet50"),
    "deeplabv3_resnet101": _architecture(_torchvision, "deeplabv3_resnet101", "resnet101"),
    "fcn_resnet50_s4": _architecture(_stride_four, "fcn_resnet50", "resnet50"),
    "deeplabv3_mobilenet_v3_large": _architecture(_narrow, f"deeplabv3_{_mobilenet}", _mobilenet),
    "lraspp_mobilenet_v3_large": _architecture(_lraspp, f"lraspp_{_mobilenet}", _mobilenet),
}
UNUSED = ("_conv_head", "_bn1")  # EfficientNet's last layers, which no decoder reads


def architecture_of(network: str) -> Architecture:
    """What a name means. Raises UserError for one that no network has, and if its library is missing."""
    if network in NETWORKS:
        return NETWORKS[network]
    try:
        decoder, _, encoder = check_network(network).partition(":")
    except ValueError as error:
        raise UserError(f"network: {error}") from None
    return Architecture(partial(_with_decoder, decoder, encoder))


def _with_decoder(decoder: str, encoder: str) -> Parts:
    """Raises UserError for an encoder that does not exist or does not go with the decoder."""
    library: Any = import_module(LIBRARY)  # takes two seconds
    try:
        model = getattr(library, DECODERS[decoder])(encoder_name=encoder, encoder_weights=None)
    except (ValueError, RuntimeError, LookupError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"network={decoder}:{encoder}: {LIBRARY} cannot build it ({reason}); choose another encoder"
        ) from error
    for unused in UNUSED:  # a group of processes waits for the gradient of every parameter
        if hasattr(model.encoder, unused):
            setattr(model.encoder, unused, nn.Identity())
    # Its activation and its upsampling to the image's size are this package's.
    head = DecoderHead(model.decoder, model.segmentation_head[0])
    channels = model.encoder.out_channels[-1]
    return Parts(model.encoder, head, None, channels, deep=-1, merges=True, multiple=32)
