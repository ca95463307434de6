"""The names of networks, and which of them need a library that is not always installed.

What the names mean is in ``learning/architectures.py``, which imports torch; a test compares both.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib.util import find_spec

TORCHVISION = (
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("fcn_resnet50_s4", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
)
# Decoders of segmentation_models_pytorch, and what it calls them; the encoder's name follows after a colon.
DECODERS = {"unet": "Unet", "unet++": "UnetPlusPlus", "fpn": "FPN", "deeplabv3+": "DeepLabV3Plus"}
# Those of segmentation_models_pytorch that work with most of its decoders and can be loaded without values.
# timm's have tu- before their names, which timm alone knows.
ENCODERS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", *(f"resnext101_32x{width}d" for width in (4, 8, 16, 32, 48))),
    *("senet154", *(f"se_resnet{depth}" for depth in (50, 101, 152))),
    *("se_resnext50_32x4d", "se_resnext101_32x4d"),
    *(f"efficientnet-b{size}" for size in range(8)),
    *("mobilenet_v2", *(f"mobileone_s{size}" for size in range(5))),
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"dpn{size}" for size in ("68", "68b", "92", "98", "107", "131")),
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
)
NAMES = (*TORCHVISION, *(f"{decoder}:{encoder}" for decoder in DECODERS for encoder in ENCODERS))
LIBRARY, EXTRA = "segmentation_models_pytorch", "smp"


def check_network(text: str) -> str:
    """The name of a network; ValueError, with the nearest names, if no network has it.

    Also if its library is not installed.
    """
    name = text.replace("-", "_")  # as in names of settings, a dash is an underscore
    text = name if name in TORCHVISION else text
    if not is_network(text):
        near = get_close_matches(text, NAMES, n=3, cutoff=0.3) or ["fcn_resnet50", "unet:resnet34"]
        raise ValueError(f"{text!r} is no network; the nearest are {', '.join(near)}")
    if libraries_of(text) and find_spec(LIBRARY) is None:
        raise ValueError(f"{text} needs {LIBRARY}; pip install 'pneumo-experiments[{EXTRA}]'")
    return text


def is_network(text: str) -> bool:
    """Whether a network has that name, installed or not; of timm's encoders only the form is checked."""
    decoder, _, encoder = text.partition(":")
    is_encoder = encoder in ENCODERS or re.fullmatch(r"tu-[\w.-]+", encoder) is not None
    return text in TORCHVISION or (decoder in DECODERS and is_encoder)


def has_aux_head(network: str) -> bool:
    """Whether a network has an auxiliary head, which ``aux_weight`` trains."""
    return ":" not in network and not network.startswith("lraspp")


def libraries_of(network: str) -> list[str]:
    """The libraries beyond the package's own dependencies that a network needs, by their names on PyPI."""
    return [LIBRARY.replace("_", "-")] if ":" in network else []
