"""Networks with a decoder, light ones, and FCN with a stride of 4: shapes, start, weights, names."""

from __future__ import annotations

import copy
import hashlib
import math
import runpy
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import ROOT, make
from tiny_network import CPU, fresh, squares
from torchvision import models
from torchvision.models import segmentation

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import update_batch_norm
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import Trainer
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.settings import Recipe, networks
from pneumo_experiments.settings.networks import ENCODERS, LIBRARY, check_network, has_aux_head, libraries_of

pytestmark = pytest.mark.usefixtures("draw_once")

# Pixels of the image, in a row, for each value of the mask head.
STRIDES = {
    "fcn_resnet50_s4": 4,
    "deeplabv3_mobilenet_v3_large": 16,
    "lraspp_mobilenet_v3_large": 8,
    "unet:resnet18": 1,
    "unet++:resnet18": 1,
    "fpn:resnet18": 4,
    "deeplabv3+:resnet18": 4,
    "unet:tu-resnet18": 1,
}
NEW = tuple(STRIDES)
COUNTING = runpy.run_path(str(ROOT / "benchmarks" / "networks.py"))


@cache
def lively(network: str) -> PneumothoraxNet:
    """In evaluation, with other values than those of the start, so that outputs differ between images."""
    net = copy.deepcopy(fresh(network)).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or name.startswith("presence_head"):
                parameter.add_(torch.rand(parameter.shape) * 0.2)
    return net


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# Shapes


@pytest.mark.parametrize("network", NEW)
def test_outputs_have_the_image_s_size_and_features_the_documented_stride(network: str) -> None:
    grids = list[tuple[int, ...]]()
    with torch.device("meta"):
        net = PneumothoraxNet(network)
        net.mask_head.register_forward_hook(lambda _, inputs, output: grids.append(tuple(output.shape)))
        output = net(torch.empty(2, 1, 64, 96))
        odd = net(torch.empty(2, 1, 50, 67))
    assert output.mask.shape == (2, 64, 96)
    assert odd.mask.shape == (2, 50, 67)  # a size that no encoder can halve five times
    assert output.presence.shape == odd.presence.shape == (2,)
    assert grids[0] == (2, 1, 64 // STRIDES[network], 96 // STRIDES[network])
    assert (output.aux is None) == (net.aux_head is None) == (not has_aux_head(network))


def test_a_size_that_cannot_be_halved_is_answered_as_the_image_with_its_edge_repeated() -> None:
    net, images = lively("unet:resnet18"), noise(2, 1, 40, 33)
    whole = np.pad(images.numpy(), ((0, 0), (0, 0), (0, 24), (0, 31)), mode="edge")
    with torch.inference_mode():
        output, expected = net(images), net(torch.from_numpy(whole))
    torch.testing.assert_close(output.mask, expected.mask[:, :40, :33])
    torch.testing.assert_close(output.presence, expected.presence)
    assert output.mask.std() > 0.01


@pytest.mark.parametrize("network", ["unet:resnet18", "lraspp_mobilenet_v3_large"])
def test_the_mask_is_that_of_the_library_s_own_network(network: str) -> None:
    net = lively(network)
    state = {name: tensor for name, tensor in net.state_dict().items() if name not in ("mean", "std")}
    state = {n.replace("mask_head.last.", "segmentation_head.0."): t for n, t in state.items()}
    if network.startswith("unet"):
        theirs: Any = smp.Unet("resnet18", encoder_weights=None)
        names = {"backbone.": "encoder.", "mask_head.decoder.": "decoder."}
    else:
        theirs = segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=1)
        names = {"mask_head.": "classifier."}
    for ours, other in names.items():
        state = {n.replace(ours, other, 1): t for n, t in state.items()}
    theirs.load_state_dict({n: t for n, t in state.items() if not n.startswith("presence_head")})
    images = noise(2, 1, 64, 64)
    with torch.inference_mode():
        found = theirs.eval()((images - net.mean) / net.std)
        expected = found if network.startswith("unet") else found["out"]
        torch.testing.assert_close(net(images).mask, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_presence_sees_the_mean_and_the_maximum_of_the_deepest_features() -> None:
    net, images = lively("unet:resnet18"), noise(2, 1, 64, 64)
    with torch.inference_mode():
        deep = net.backbone((images - net.mean) / net.std)[-1].numpy()
        pooled = np.concatenate([deep.mean((2, 3)), deep.max((2, 3))], axis=1)
        head = net.presence_head
        expected = pooled @ head.weight[0].numpy() + head.bias.numpy()
        np.testing.assert_allclose(net(images).presence, expected, rtol=1e-4, atol=1e-5)


def test_the_stride_four_head_merges_the_first_stage_and_the_last() -> None:
    net = lively("fcn_resnet50_s4")
    with torch.inference_mode():
        found: Any = net.backbone(noise(1, 3, 64, 64))
    assert (found["low"].shape[1:], found["out"].shape[1:]) == ((256, 16, 16), (2048, 8, 8))
    features = {name: tensor.clone().requires_grad_() for name, tensor in found.items()}
    logit = net.mask_head(features)[0, 0, 8, 8]
    low, deep = torch.autograd.grad(logit, [features["low"], features["out"]])
    assert deep.abs().max() > 0
    # A logit sees a 3 x 3 neighbourhood of the first stage: it can draw a rim of few pixels.
    seen = low[0].abs().sum(0).nonzero()
    assert seen.min(0).values.tolist() == [7, 7]
    assert seen.max(0).values.tolist() == [9, 9]


@pytest.mark.parametrize("network", ["fcn_resnet50_s4", "lraspp_mobilenet_v3_large", "unet:resnet34"])
def test_the_table_in_the_docs_is_what_the_script_counts(network: str) -> None:
    row = COUNTING["row"](network, 384)
    assert row.replace("|  |", "| |") in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


# The start


@pytest.mark.parametrize("network", NEW)
def test_pixels_start_as_healthy_and_presence_does_not_depend_on_the_image(network: str) -> None:
    net = copy.deepcopy(fresh(network))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("mask_head") and parameter.ndim == 4 and len(parameter) == 1:
                parameter.zero_()  # the last layers
        output = net(noise(3, 1, 64, 64))
    torch.testing.assert_close(torch.sigmoid(output.mask), torch.full_like(output.mask, 0.05))
    assert output.presence.unique().numel() == 1
    assert {norm.momentum for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {0.1}


def test_random_residual_blocks_start_as_the_identity() -> None:
    block, features = copy.deepcopy(fresh("fpn:resnet18").backbone.layer3[1]).eval(), torch.rand(1, 256, 4, 4)
    with torch.inference_mode():
        assert torch.equal(block(features), features)


def test_a_decoder_learns_eight_images_by_heart_from_random_values() -> None:
    plain = {"batch_size": 8, "augment": False, "positive_fraction": 0.0, "final_positive_fraction": 0.0}
    network = "unet:tu-test_resnet"  # the smallest encoder of timm
    recipe = make(Recipe, network=network, weights="none", learning_rate=1e-2, **plain)
    data, steps = squares(8, 32), 15
    trainer = Trainer(Predictor(build_network(network, "none", 0), CPU), recipe, steps)
    batch = next(batches(data, recipe, 1, 1, CPU.device))
    losses = [float(trainer.step(batch)[0]["total"]) for _ in range(steps)]
    assert losses[-1] < losses[0] / 3
    update_batch_norm(trainer.network, data, recipe, CPU)  # a few steps are too few for running statistics
    found = list(Predictor(trainer.network, CPU).predict(data.images.numpy()))
    assert [one.presence > 0.5 for one in found] == list(data.present)
    masks, truths = np.stack([one.mask for one in found]) > 0.5, data.targets.numpy() > 127
    assert dice(truths.reshape(8, -1), masks.reshape(8, -1)) > 0.85


# Training without an auxiliary head


def test_the_auxiliary_loss_is_left_out_where_there_is_no_such_head() -> None:
    recipe = make(Recipe, network="unet:resnet18", batch_size=2, augment=False)
    assert recipe.loss.aux_weight > 0
    trainer = Trainer(Predictor(build_network("unet:resnet18", "none", 0), CPU), recipe, 1)
    terms, norm = trainer.step(next(batches(squares(2), recipe, 1, 1, CPU.device)))
    assert "aux" not in terms
    assert torch.isfinite(norm)
    assert all(parameter.grad is not None for parameter in trainer.network.parameters())


def test_layers_with_their_own_kind_of_batch_norm_are_refused_in_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with torch.device("meta"):
        for network, is_refused in (("unet:tu-efficientnet_b0", True), ("unet:tu-resnet18", False)):
            net = PneumothoraxNet(network)
            if is_refused:  # torch would replace it by one without activation
                with pytest.raises(UserError, match=r"processes=2: the network has BatchNormAct2d, which"):
                    distributed.convert_sync_batchnorm(net, torch.device("cpu"))
            else:
                distributed.convert_sync_batchnorm(net, torch.device("cpu"))


# Pretrained weights


@pytest.mark.parametrize(
    ("network", "backbone", "below"),
    [("unet:resnet18", "resnet18", ""), ("lraspp_mobilenet_v3_large", "mobilenet_v3_large", "features.")],
)
def test_torchvisions_weights_fit_the_backbone_of_the_same_name(
    network: str, backbone: str, below: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = models.get_model(backbone, weights=None).state_dict()
    torch.save(state, tmp_path / "w.pth")
    net = build_network(network, str(tmp_path / "w.pth"), seed=0)
    ours = net.backbone.state_dict()
    assert {below + name for name in ours} == {n for n in state if not n.startswith(("fc.", "classifier."))}
    assert all(torch.equal(ours[name], state[below + name]) for name in ours)
    assert net.pretrained == {f"backbone.{name}" for name, _ in net.backbone.named_parameters()}
    assert not caplog.records


@pytest.mark.parametrize("is_whole", [False, True])
def test_an_efficientnet_comes_without_the_layers_that_no_decoder_reads(
    is_whole: bool, tmp_path: Path
) -> None:
    theirs = smp.Unet("efficientnet-b0", encoder_weights=None)
    state = (theirs if is_whole else theirs.encoder).state_dict()
    assert any("_conv_head" in name for name in state)
    torch.save(state, tmp_path / "e.pt")
    net = build_network("unet:efficientnet-b0", str(tmp_path / "e.pt"), seed=0).train()
    assert torch.equal(net.backbone._blocks[3]._bn1.weight, theirs.encoder._blocks[3]._bn1.weight)
    output = net(noise(2, 1, 32, 32))
    (output.mask.sum() + output.presence.sum()).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_network_of_the_library_is_loaded_whole_but_for_a_last_layer_with_more_classes(
    prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    theirs = smp.FPN("resnet18", encoder_weights=None, classes=1 if prefix else 3).state_dict()
    torch.save({"state_dict": {prefix + name: t for name, t in theirs.items()}}, tmp_path / "f.ckpt")
    net = build_network("fpn:resnet18", str(tmp_path / "f.ckpt"), seed=0)
    assert torch.equal(net.backbone.conv1.weight, theirs["encoder.conv1.weight"])
    assert torch.equal(net.mask_head.decoder.p5.weight, theirs["decoder.p5.weight"])
    last = {"mask_head.last.weight", "mask_head.last.bias"}
    own = {name for name, _ in net.named_parameters()} - net.pretrained
    assert own == {"presence_head.weight", "presence_head.bias"} | (set() if prefix else last)
    bias = theirs["segmentation_head.0.bias"].item() if prefix else math.log(0.05 / 0.95)
    assert net.mask_head.last.bias.item() == pytest.approx(bias)


def test_torchvisions_fcn_fills_all_of_stride_four_but_its_new_layers(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    state = {n: torch.tensor(0.5).expand(t.shape) for n, t in shapes.state_dict().items()}
    torch.save(state, tmp_path / "fcn.pth")
    net = build_network("fcn_resnet50_s4", str(tmp_path / "fcn.pth"), seed=0)
    own = {name for name, _ in net.named_parameters()} - net.pretrained
    parts = {".".join(name.split(".")[:2]) for name in own}
    assert parts == {
        *("mask_head.4", "mask_head.low", "mask_head.merge", "aux_head.4"),
        *("presence_head.weight", "presence_head.bias"),
    }
    assert bool((net.mask_head[0].weight == 0.5).all())


def test_weights_of_an_encoder_come_from_the_library_s_cache_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^weights=imagenet: cannot download them .*weights=FILE[^\n]*$"):
        build_network("unet:resnet18", "imagenet", seed=0)
    with pytest.raises(UserError, match=r"^weights=coco: there are none of unet:resnet18; give"):
        build_network("unet:resnet18", "coco", seed=0)
    net = build_network("unet:resnet18", "auto", seed=0)
    assert (net.source, net.pretrained) == ("none", frozenset())
    place = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    folder = tmp_path / f"models--{place['repo_id'].replace('/', '--')}" / "snapshots" / place["revision"]
    folder.mkdir(parents=True)
    state = models.resnet18(weights=None).state_dict()
    save_file({n: t for n, t in state.items() if not n.startswith("fc.")}, folder / "model.safetensors")
    net = build_network("unet:resnet18", "auto", seed=0)
    assert torch.equal(net.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert net.source == f"imagenet {place['repo_id']}"
    assert net.source_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_pretrained_encoders_of_timm_see_images_scaled_as_in_their_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, revision = tmp_path / "models--timm--tf_mobilenetv3_small_minimal_100.in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    theirs: Any = timm.create_model("tf_mobilenetv3_small_minimal_100", pretrained=False)
    save_file(theirs.state_dict(), repository / "snapshots" / revision / "model.safetensors")
    net = build_network("unet:tu-tf_mobilenetv3_small_minimal_100", "imagenet", seed=0).eval()
    assert torch.equal(net.backbone.model.conv_stem.weight, theirs.conv_stem.weight)
    image, seen = noise(1, 1, 32, 32), list[torch.Tensor]()
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(image)
    torch.save(net.state_dict(), tmp_path / "own.pt")  # as a later stage reads it, and a served model
    again = build_network("unet:tu-tf_mobilenetv3_small_minimal_100", str(tmp_path / "own.pt"), seed=0).eval()
    again.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    again(image)
    for each in seen:  # not ImageNet's mean and deviation
        torch.testing.assert_close(each, (image.expand(1, 3, 32, 32) - 0.5) / 0.5)


# Names


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("unet", "unet:"),
        ("unet:", "unet:"),
        ("unet:resnet35", "unet:resnet34"),
        ("une:resnet34", "unet:resnet34"),
        ("deeplabv3:resnet50", "deeplabv3+:resnet50"),
        ("deeplabv3plus:resnet50", "deeplabv3+:resnet50"),
        ("fcn_resnet", "fcn_resnet50"),
        ("unet:timm-efficientnet-b0", "unet:efficientnet-b0"),
        ("unet:tu-", "unet:"),
        ("unet:tu-../x", "unet:"),
        ("Ω", "fcn_resnet50"),
    ],
)
def test_a_name_that_no_network_has_is_answered_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"is no network; the nearest are ") as caught:
        check_network(text)
    assert nearest in str(caught.value).partition("nearest are ")[2]
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"is no network; the nearest are "):
        PneumothoraxNet(text)


def test_names_of_networks_are_those_that_the_libraries_know() -> None:
    assert set(ENCODERS) <= set(smp.encoders.get_encoder_names())
    for decoder, kind in networks.DECODERS.items():
        assert hasattr(smp, kind), decoder
    assert check_network("fcn-resnet50-s4") == "fcn_resnet50_s4"
    assert check_network("unet++:efficientnet-b0") == "unet++:efficientnet-b0"
    assert libraries_of("fcn_resnet50_s4") == []
    assert libraries_of("fpn:resnet18") == ["segmentation-models-pytorch"]


@pytest.mark.parametrize("network", ["deeplabv3+:densenet121", "unet:tu-no_such_model"])
def test_an_encoder_that_does_not_go_with_the_decoder_is_one_line(network: str) -> None:
    with pytest.raises(UserError, match=r"^network=\S+: segmentation_\w+ cannot build it \(.+\)") as caught:
        build_network(network, "none", 0)
    assert "\n" not in str(caught.value)


def test_a_network_whose_library_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, None)
    for name in ("unet:resnet34", "fpn:tu-resnet18"):
        with pytest.raises(UserError) as caught:
            build_network(name, "none", 0)
        assert str(caught.value) == (
            f"network: {name} needs segmentation_models_pytorch; pip install 'pneumo-experiments[smp]'"
        )
    assert check_network("lraspp_mobilenet_v3_large") == "lraspp_mobilenet_v3_large"
