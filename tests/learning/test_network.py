"""The networks, their start values and the weights they can start from."""

from __future__ import annotations

import copy
import hashlib
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import soak
from safetensors.torch import save_file
from tiny_network import fresh
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torchvision import models
from torchvision.models import segmentation

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet, build_network
from pneumo_experiments.settings.networks import TORCHVISION

pytestmark = pytest.mark.usefixtures("draw_once")

ARCHITECTURES = ("fcn_resnet50", "deeplabv3_resnet50")  # the 101s differ from these in depth alone
SLOW = pytest.mark.parametrize("network", ["fcn_resnet50", pytest.param("deeplabv3_resnet50", marks=soak)])
State = dict[Any, Tensor]
# A dark, a medium and a bright image of noise.
PIXELS = torch.rand(3, 1, 32, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [0.1, 0.5, 1.0]
).view(3, 1, 1, 1)


def lively(network: str) -> PneumothoraxNet:
    """A copy without the zeros of the start, whose outputs differ much between pixels and images."""
    net = copy.deepcopy(fresh(network))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bn3.weight") or name == "presence_head.weight":
                parameter.copy_(0.1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif name.endswith("head.4.weight"):
                parameter.mul_(100)
    return net


@cache
def torchvision_shapes(name: str, **options: object) -> dict[str, torch.Size]:
    """Names and shapes of the state dict of torchvision's own network, without its memory."""
    make = getattr(segmentation, name, None) or getattr(models, name)
    if make.__module__.startswith("torchvision.models.segmentation"):
        options = {"weights_backbone": None, **options}
    with torch.device("meta"):
        return {key: value.shape for key, value in make(weights=None, **options).state_dict().items()}


def constants(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A state dict in which every tensor has its own value throughout: a file of it is small."""
    return {
        name: torch.tensor(0.5 + n / 1000).expand(shape) for n, (name, shape) in enumerate(shapes.items())
    }


def resnet(name: str = "resnet50") -> State:
    return constants(torchvision_shapes(name))


def holds(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.float(), expected.to(actual.dtype).float())


def in_the_cache(home: Path, url: str, state: object) -> Path:
    """Puts a state dict where torch keeps what it downloaded from there."""
    path = home / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads, and no way to fill it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    return tmp_path / "torch"


# The table


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        # What torchvision's pages say of the weights for 21 classes, less 20 classes in both last layers,
        # and with the presence head.
        ("fcn_resnet50", 35_322_218 - 20 * (512 + 1) - 20 * (256 + 1) + 4097),
        ("fcn_resnet101", 54_314_346 - 20 * (512 + 1) - 20 * (256 + 1) + 4097),
        ("deeplabv3_resnet50", 42_004_074 - 20 * (256 + 1) - 20 * (256 + 1) + 4097),
        ("deeplabv3_resnet101", 60_996_202 - 20 * (256 + 1) - 20 * (256 + 1) + 4097),
    ],
)
def test_each_network_has_torchvisions_parameters_and_the_documented_outputs(
    network: str, parameters: int
) -> None:
    with torch.device("meta"):
        net = PneumothoraxNet(network)
        output = net(torch.empty(2, 1, 64, 40))
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert output.mask.shape == output.aux.shape == (2, 64, 40)
    assert output.presence.shape == (2,)
    assert {logits.dtype for logits in output} == {torch.float32}


def test_the_table_has_the_weights_of_every_network_of_torchvision() -> None:
    assert tuple(NETWORKS) == TORCHVISION
    for name, kind in NETWORKS.items():
        family, backbone = name.removesuffix("_s4").split("_", 1)
        assert f"/{backbone}-" in kind.imagenet.url
        assert f"/{family}_{backbone}" in kind.coco.url


@SLOW
def test_the_loss_of_all_outputs_gives_every_parameter_a_gradient(network: str) -> None:
    net = lively(network).train()
    output = net(PIXELS)  # three images: of two, batch normalisation of pooled values keeps only their order
    generator = torch.Generator().manual_seed(2)
    targets = [torch.randint(2, logits.shape, generator=generator).float() for logits in output]
    torch.stack([bce(*pair) for pair in zip(output, targets, strict=True)]).sum().backward()
    without_gradient = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without_gradient == []


def test_the_names_of_saved_weights_stay_what_they_were() -> None:
    state = fresh("fcn_resnet50").state_dict()
    heads = [name for name in state if not name.startswith("backbone.")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{head}.1.{value}" for head in ("mask_head", "aux_head") for value in norm}
    expected |= {f"{head}.{end}" for head in ("mask_head", "aux_head") for end in ("0.weight", "4.weight")}
    expected |= {"mask_head.4.bias", "aux_head.4.bias", "presence_head.weight", "presence_head.bias"}
    assert set(heads) == expected | {"mean", "std"}
    backbone = {name.removeprefix("backbone.") for name in state if name.startswith("backbone.")}
    assert backbone == {name for name in torchvision_shapes("resnet50") if not name.startswith("fc.")}


# The auxiliary head


def test_the_auxiliary_head_is_computed_only_where_it_is_trained() -> None:
    called = list[str]()
    with torch.device("meta"):  # shapes alone
        net = PneumothoraxNet("fcn_resnet50")
        net.aux_head.register_forward_hook(lambda *_: called.append("aux_head"))
        assert net.eval()(torch.empty(2, 1, 32, 32)).aux is None
        net.train().aux_head.requires_grad_(False)
        assert net(torch.empty(2, 1, 32, 32)).aux is None
        assert not called
        net.aux_head.requires_grad_(True)
        assert net(torch.empty(2, 1, 32, 32)).aux is not None
    assert called == ["aux_head"]


# The start from random values


@SLOW
def test_random_residual_blocks_start_as_identity_and_pixels_as_healthy(network: str) -> None:
    net = copy.deepcopy(fresh(network)).eval()
    assert net.pretrained == frozenset()
    block = net.backbone["layer3"][2]
    features = torch.rand(1, 1024, 4, 4)
    assert torch.equal(block(features), features)
    with torch.no_grad():
        for head in (net.mask_head, net.aux_head):
            head[-1].weight.zero_()
        output = net.train()(PIXELS)
    for logits in (output.mask, output.aux):
        torch.testing.assert_close(torch.sigmoid(logits), torch.full_like(logits, 0.05))
    assert output.presence.unique().numel() == 1  # it does not depend on the image yet


# Pretrained weights


@pytest.mark.parametrize("network", ARCHITECTURES)
def test_the_output_is_torchvisions_for_the_image_in_three_channels(network: str) -> None:
    net = lively(network).eval()
    with torch.device("meta"):
        theirs = getattr(segmentation, network)(
            weights=None, weights_backbone=None, num_classes=1, aux_loss=True
        )
    parts = {"backbone": net.backbone, "classifier": net.mask_head, "aux_classifier": net.aux_head}
    state = {f"{part}.{name}": t for part in parts for name, t in parts[part].state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    scale = NETWORKS[network].coco.transforms()
    thrice = torch.stack([(PIXELS[:, 0] - m) / s for m, s in zip(scale.mean, scale.std, strict=True)], dim=1)
    net.training = True  # for the auxiliary head; all layers stay in evaluation
    with torch.inference_mode():
        expected, actual = theirs.eval()(thrice), net(PIXELS)
    assert expected["out"].std() > 0.01
    torch.testing.assert_close(actual.mask, expected["out"][:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.aux, expected["aux"][:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["imagenet", "auto"])
def test_imagenet_weights_replace_only_the_backbone_initialisation(weights: str, torch_home: Path) -> None:
    state = resnet()
    in_the_cache(torch_home, models.ResNet50_Weights.IMAGENET1K_V2.url, state)
    net = build_network("fcn_resnet50", weights, seed=0)
    ours = net.backbone.state_dict()
    assert all(holds(ours[name], state[name]) for name in ours)
    assert ours["layer1.0.bn3.weight"].min() > 0.5  # no longer the identity
    assert net.pretrained == {f"backbone.{name}" for name, _ in net.backbone.named_parameters()}
    drawn = fresh("fcn_resnet50").state_dict()
    heads = [name for name in drawn if not name.startswith("backbone.")]
    assert all(torch.equal(net.state_dict()[name], drawn[name]) for name in heads)
    assert net.source == "imagenet resnet50-11ad3fa6.pth"


@pytest.mark.parametrize("network", ARCHITECTURES)
def test_coco_weights_fill_all_but_the_last_layers_and_the_presence_head(
    network: str, torch_home: Path
) -> None:
    state = constants(torchvision_shapes(network, num_classes=21, aux_loss=True))
    in_the_cache(torch_home, NETWORKS[network].coco.url, state)
    net = build_network(network, "coco", seed=0)
    last = {"mask_head.4.weight", "mask_head.4.bias", "aux_head.4.weight", "aux_head.4.bias"}
    own = last | {"presence_head.weight", "presence_head.bias"}
    assert net.pretrained == {name for name, _ in net.named_parameters()} - own
    drawn = fresh(network).state_dict()
    assert all(torch.equal(net.state_dict()[name], drawn[name]) for name in own)
    assert net.aux_head[-1].bias.item() == pytest.approx(math.log(0.05 / 0.95))
    ours = {"backbone": net.backbone, "classifier": net.mask_head, "aux_classifier": net.aux_head}
    compared = 0
    for part, module in ours.items():
        for name, tensor in module.state_dict().items():
            if not name.startswith("4.") or part == "backbone":
                assert holds(tensor, state[f"{part}.{name}"]), (part, name)
                compared += 1
    assert compared == len(state) - 4


@pytest.mark.parametrize("weights", ["imagenet", "coco"])
def test_weights_that_cannot_be_downloaded_are_an_error_that_says_what_to_do(
    weights: str, torch_home: Path
) -> None:
    with pytest.raises(UserError, match=rf"^weights={weights}: cannot .*weights=none .*weights=FILE.*$"):
        build_network("fcn_resnet50", weights, seed=0)
    assert [path for path in torch_home.rglob("*") if path.is_file()] == []


def test_auto_weights_continue_without_a_connection_and_warn(
    torch_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = build_network("fcn_resnet50", "auto", seed=0)
    assert "random values, which needs many more epochs" in caplog.text
    assert (net.source, net.source_sha256) == ("none", "none")
    assert net.pretrained == frozenset()
    assert torch.equal(net.mask_head[0].weight, fresh("fcn_resnet50").mask_head[0].weight)


def test_a_damaged_download_is_named(torch_home: Path) -> None:
    path = in_the_cache(torch_home, models.ResNet50_Weights.IMAGENET1K_V2.url, {})
    path.write_bytes(b"half a down")
    with pytest.raises(UserError, match=rf"{path.name}: .* delete it"):
        build_network("fcn_resnet50", "auto", seed=0)


# Weights from a file


def test_saved_weights_of_a_network_come_back_whole(tmp_path: Path) -> None:
    state = constants({n: value.shape for n, value in fresh("deeplabv3_resnet50").state_dict().items()})
    torch.save(state, tmp_path / "weights.pt")
    net = build_network("deeplabv3_resnet50", str(tmp_path / "weights.pt"), seed=9)
    assert all(holds(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert net.pretrained == {name for name, _ in net.named_parameters()}
    assert copy.deepcopy(net).pretrained == net.pretrained
    assert net.source == "weights.pt"  # not its folder, which may be called after somebody
    assert net.source_sha256 == hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()


def test_a_safetensors_file_is_read_number_by_number(tmp_path: Path) -> None:
    """Half precision is widened."""
    state, path = resnet(), tmp_path / "model.safetensors"
    state["conv1.weight"] = torch.linspace(-1, 1, state["conv1.weight"].numel()).view(64, 3, 7, 7).half()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
    net = build_network("fcn_resnet50", str(path), seed=0)
    assert torch.equal(net.backbone["conv1"].weight, state["conv1.weight"].float())
    assert holds(net.backbone["layer4"][2].bn3.weight, state["layer4.2.bn3.weight"])
    assert net.source == "model.safetensors"
    for damaged in (path.read_bytes()[:-1], b"", b"\xff" * 100, path.read_bytes()[:500]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a state dict that can be read safely"):
            build_network("fcn_resnet50", str(path), seed=0)


@pytest.mark.parametrize(
    ("prefix", "key", "old"),
    [
        ("", "", False),
        ("", "", True),
        ("_orig_mod.", "model", False),
        ("net.module.encoder.", "model_state_dict", False),
        ("backbone.", "model/state_dict", True),
        ("", "state_dict", False),
    ],
)
def test_a_backbone_is_found_in_a_checkpoint_and_below_a_prefix(
    prefix: str, key: str, old: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = resnet()
    if old:  # torch before 0.4.1 counted no batches, and a backbone may come without its classifier
        names = [name for name in state if not name.endswith("num_batches_tracked")]
        state = {name: state[name] for name in names if not name.startswith("fc.")}
    written = {prefix + name: tensor for name, tensor in state.items()}
    if prefix:
        written["decoder.conv1.weight"] = torch.ones(3)
    for name in reversed(key.split("/") if key else []):
        written = {name: written, "epoch": 7, "hyper_parameters": {"lr": 1e-3}}
    torch.save(written, tmp_path / "w.pt")
    net = build_network("fcn_resnet50", str(tmp_path / "w.pt"), seed=0)
    assert holds(net.backbone["conv1"].weight, state["conv1.weight"])
    assert holds(net.backbone["layer4"][2].bn3.weight, state["layer4.2.bn3.weight"])
    assert torch.equal(net.mask_head[0].weight, fresh("fcn_resnet50").mask_head[0].weight)
    assert net.pretrained == {f"backbone.{name}" for name, _ in net.backbone.named_parameters()}
    warning = [f"weights: 1 tensors outside {prefix} are not used"] if prefix else []
    assert [record.getMessage() for record in caplog.records] == warning


def test_a_backbone_without_its_last_stage_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = resnet()
    torch.save({n: t for n, t in state.items() if not n.startswith(("layer4.", "fc."))}, tmp_path / "w.pt")
    net = build_network("fcn_resnet50", str(tmp_path / "w.pt"), seed=0)
    assert holds(net.backbone["layer3"][5].conv3.weight, state["layer3.5.conv3.weight"])
    assert torch.equal(
        net.backbone["layer4"][2].conv3.weight, fresh("fcn_resnet50").backbone["layer4"][2].conv3.weight
    )
    assert not any(name.startswith("backbone.layer4") for name in net.pretrained)
    (record,) = caplog.records
    assert record.getMessage() == "weights=w.pt: has no backbone.layer4, which start from random values"


def test_a_file_without_auxiliary_head_leaves_that_as_it_was_initialised(tmp_path: Path) -> None:
    state = constants(torchvision_shapes("fcn_resnet50", num_classes=1, aux_loss=False))
    torch.save(state, tmp_path / "weights.pt")
    net = build_network("fcn_resnet50", str(tmp_path / "weights.pt"), seed=0)
    assert holds(net.mask_head[4].weight, state["classifier.4.weight"])  # one class, as ours
    assert torch.equal(net.aux_head[0].weight, fresh("fcn_resnet50").aux_head[0].weight)
    assert {name.partition(".")[0] for name in net.pretrained} == {"backbone", "mask_head"}


def with_bias(bias: Tensor) -> Callable[[State], State]:
    return lambda state: state | {"bn1.bias": bias}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda _: None, "no such file; give auto, imagenet, coco, none, a file"),
        (lambda _: b"no weights", "not a state dict that can be read safely"),
        # Needs unpickling of a class: refused, never run.
        (
            lambda state: {"state_dict": state, "hyper_parameters": Namespace(lr=1)},
            "not a state dict that .* safely, for it holds argparse.Namespace, whose code is not run",
        ),
        (lambda _: [torch.zeros(2)], "holds no state dict"),
        (lambda state: {"best": state, "epoch": 3}, "holds no state dict"),
        (lambda state: state | {1: torch.ones(2)}, "holds no state dict"),
        (lambda state: {n: t.to("meta") for n, t in state.items()}, "holds no state dict"),
        (with_bias(torch.ones(64).to_sparse()), "(holds no|not a) state dict"),
        (with_bias(torch.ones(64).bool()), "holds no state dict"),
        (with_bias(torch.full((64,), math.nan)), "bn1.bias has values that are no numb"),
        (
            lambda _: {"fc.weight": torch.zeros(2)},
            r"1 tensors are missing, .* backbone\.conv1\.weight; choose",
        ),
        (
            lambda state: {name: state[name] for name in state if name != "layer2.1.conv2.weight"},
            r"1 tensors are missing, the first is backbone\.layer2\.1\.conv2\.weight",
        ),
        (lambda _: resnet("resnet101"), r"unknown here, the first is backbone\.layer3\.6\.conv1\.weight"),
        (lambda _: resnet("wide_resnet50_2"), r"another shape, .* backbone\.layer1\.0\.conv1\.weight"),
        (
            lambda _: constants(torchvision_shapes("deeplabv3_resnet50", num_classes=21)),
            r"tensors are missing, the first is mask_head\.0\.weight",
        ),
    ],
)
def test_a_wrong_weights_file_is_named_with_what_is_wrong(
    change: Callable[[State], Any], complaint: str, tmp_path: Path
) -> None:
    path, content = tmp_path / "weights.pt", change(resnet())
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"^weights=.*weights\.pt: .*{complaint}") as caught:
        build_network("fcn_resnet50", str(path), seed=0)
    assert "\n" not in str(caught.value)
