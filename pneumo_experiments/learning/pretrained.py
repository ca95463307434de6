"""Weights that a network starts from: downloaded or read, brought to its names, and loaded."""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.architectures import UNUSED
from pneumo_experiments.settings.networks import LIBRARY

DOWNLOAD_TIMEOUT_SECONDS = 20
HUB_FILE = "model.safetensors"
# Where checkpoints of Lightning, timm, torchvision's references and others have the state dict.
CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict")
# The names of modules in torchvision's networks, and in those of segmentation_models_pytorch.
MODULES = {
    "classifier": "mask_head",
    "aux_classifier": "aux_head",
    "encoder": "backbone",
    "decoder": "mask_head.decoder",
    "segmentation_head.0": "mask_head.last",
}
# How the backbone is called in a segmentation network, and what shows that it is one.
WITHIN = {"backbone.": ("mask_head.", "classifier.0.", "classifier.cbr."), "encoder.": ("decoder.",)}
CLASSES = ("fc.", "_fc.", "classifier.", "head.", "last_linear.")  # of a network that classifies images

log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """A state dict, what errors call it, the name by which it is recorded, and its digest.

    ``mean`` and ``std`` of the images that it was trained on, by channel; empty: ImageNet's, or in the state.
    """

    state: dict[str, Tensor]
    given: str
    source: str
    sha256: str
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


def read_weights(path: Path) -> Weights:
    """The weights in a file. Raises UserError for a file that cannot be read safely."""
    state = _read(path)
    with path.open("rb") as file:
        return Weights(state, str(path), path.name, hashlib.file_digest(file, "sha256").hexdigest())


def download_weights(weights: models.WeightsEnum) -> Weights:
    """Weights of torchvision, from torch's cache or downloaded; OSError and RuntimeError if that fails.

    Not load_state_dict_from_url: there a failed download and a damaged file raise the same errors, and only
    the first may fall back to random values.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = path.stem.rsplit("-", 1)[1]  # torchvision's file names end with the start of the SHA-256
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), checksum)
        finally:
            socket.setdefaulttimeout(before)
    return read_weights(path)


def download_encoder(network: str) -> Weights:
    """Those of the encoder of a network of segmentation_models_pytorch; raises the same."""
    encoder, encoders = network.partition(":")[2], import_module(f"{LIBRARY}.encoders")
    if encoder.startswith("tu-"):
        # timm changes their names while it loads them.
        config = import_module("timm").get_pretrained_cfg(encoder.removeprefix("tu-"))
        if config is None or not (repository := config.hf_hub_id):
            raise OSError("timm has no weights of it")
        _require_hub(repository, None)
        state, digest = encoders.get_encoder(encoder, weights=True).state_dict(), hashlib.sha256()
        for tensor in state.values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return Weights(state, encoder, repository, digest.hexdigest(), config.mean, config.std)
    known = encoders.encoders[encoder]["pretrained_settings"]
    place = known.get("imagenet") or next(iter(known.values()))
    _require_hub(place["repo_id"], place["revision"])
    hub = import_module("huggingface_hub")
    path = hub.hf_hub_download(place["repo_id"], HUB_FILE, revision=place["revision"])
    return read_weights(Path(path))._replace(source=place["repo_id"])


def _require_hub(repository: str, revision: str | None) -> None:
    """Raises OSError unless the hub or its cache has the weights; a download would try for half a minute."""
    hub: Any = import_module("huggingface_hub")
    if hub.try_to_load_from_cache(repository, HUB_FILE, revision=revision):
        return
    try:
        url = hub.hf_hub_url(repository, HUB_FILE, revision=revision)
        hub.get_hf_file_metadata(url, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    except Exception as error:  # of the library that the hub's client uses
        raise OSError(str(error) or type(error).__name__) from error


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


def _renamed(state: dict[str, Tensor], first: str, second: str) -> dict[str, Tensor]:
    """The tensors under the names of this package's network, whose backbone's first kernels are given.

    They may lie below a prefix; what lies beside is left out. Of a network that classifies images only the
    backbone is kept. Two kernels, since blocks of a backbone have a conv1, too.
    """
    for part, heads in (*WITHIN.items(), ("", ("",))):
        prefixes = [name.removesuffix(part + first) for name in state if name.endswith(part + first)]
        matches = [
            prefix
            for prefix in prefixes
            if (prefix == "" or prefix.endswith("."))
            and prefix + part + second in state
            and any(name.startswith(tuple(prefix + head for head in heads)) for name in state)
        ]
        if matches:
            return _inside(state, min(matches, key=len), bool(part))
    return state


def _inside(state: dict[str, Tensor], prefix: str, is_whole: bool) -> dict[str, Tensor]:
    """The tensors below a prefix, of a segmentation network or of its backbone alone, under own names."""
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith((prefix, *CLASSES))]
    if outside:
        log.warning("weights: %d tensors outside %s are not used", len(outside), prefix)
    renamed: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        if is_whole:
            module = next((each for each in MODULES if name.startswith(f"{each}.")), "")
            renamed[MODULES.get(module, "") + name.removeprefix(module)] = tensor
        elif not name.startswith(CLASSES):
            renamed[f"backbone.{name}"] = tensor
    unused = tuple(f"backbone.{part}." for part in UNUSED)
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(unused)}


def logit_layers(net: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The layers of the heads that give logits of pixels, and their names."""
    named = cast("Iterator[tuple[str, nn.Module]]", net.named_modules())
    return [
        (name, module)
        for name, module in named
        if name.startswith(("mask_head.", "aux_head."))
        and isinstance(module, nn.Conv2d)
        and module.out_channels == 1
    ]


def load_weights(net: nn.Module, weights: Weights) -> frozenset[str]:
    """Loads the tensors that belong to a network; returns the names of its parameters among them.

    Each stage of the backbone and each head of which the file has anything must be complete: a partly loaded
    network would train badly. A stage that is not in the file is named in a warning.
    """
    expected = net.state_dict()
    backbone = {name: tensor for name, tensor in expected.items() if name.startswith("backbone.")}
    kernels = [name.removeprefix("backbone.") for name, tensor in backbone.items() if tensor.ndim == 4]
    state = _renamed(weights.state, *kernels[:2])
    # The last layers of others have other classes: this network keeps its own.
    prefixes = tuple(f"{name}." for name, _ in logit_layers(net))
    last = {name for name in state if name in expected and name.startswith(prefixes)}
    skipped = {name for name in last if state[name].shape != expected[name].shape}
    loaded = {name: tensor for name, tensor in state.items() if name not in skipped}
    complete = {_stage(next(iter(backbone))), *map(_stage, loaded)}
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
                f"weights={weights.given}: {len(names)} tensors are {mismatch}, the first is {names[0]};"
                " choose the network that they belong to"
            )
    net.load_state_dict(loaded, strict=False)
    for name, values in (("mean", weights.mean), ("std", weights.std)):
        if values:
            net.get_buffer(name).copy_(torch.tensor(values).view(1, -1, 1, 1))
    if absent := [stage for stage in dict.fromkeys(map(_stage, backbone)) if stage not in complete]:
        names = ", ".join(absent)
        log.warning("weights=%s: has no %s, which start from random values", weights.source, names)
    return frozenset(name for name, _ in net.named_parameters() if name in loaded)


def _stage(name: str) -> str:
    """The head or a named part of it, or the stage of the backbone, that a tensor belongs to."""
    first, *rest = name.split(".")
    return first if not rest or (first != "backbone" and rest[0].isdigit()) else f"{first}.{rest[0]}"
