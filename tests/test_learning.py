"""The network, its loss, its batches and its training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.augment import augment
from pneumo_experiments.learning.device import Machine, choose_machine
from pneumo_experiments.learning.fit import fit, one_cycle
from pneumo_experiments.learning.loader import Examples, batches, draw
from pneumo_experiments.learning.loss import bce, criterion, focal, soft_dice
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.settings import Device, Recipe

CPU = Machine(torch.device("cpu"), "fp32")
LOGIT = math.log(3)  # of probability 0.75


@pytest.fixture(scope="module")
def network() -> PneumothoraxNet:
    return build("fcn_resnet50", "none", seed=0)


def squares(count: int, side: int = 32, seed: int = 0) -> Examples:
    """Grey noise; every other image has a bright square, which is the mask."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 100, (count, side, side), dtype=np.uint8)
    shares = np.zeros_like(images)
    for i in range(0, count, 2):
        x, y = rng.integers(0, side // 2, 2)
        images[i, y : y + side // 2, x : x + side // 2] += 120
        shares[i, y : y + side // 2, x : x + side // 2] = 255
    return Examples(images, shares, shares.any(axis=(1, 2)))


# Losses: values by hand


def test_cross_entropy_of_a_quarter_missed_is_the_logarithm() -> None:
    logits, share = torch.full((1, 2, 2), LOGIT), torch.ones(1, 2, 2)
    assert bce(logits, share).item() == pytest.approx(-math.log(0.75))
    assert focal(logits, share).item() == pytest.approx(0.25**2 * -math.log(0.75))


def test_cross_entropy_of_a_half_annotated_pixel_takes_both_sides() -> None:
    logits, share = torch.full((1, 1, 1), LOGIT), torch.full((1, 1, 1), 0.5)
    assert bce(logits, share).item() == pytest.approx(-0.5 * math.log(0.75) - 0.5 * math.log(0.25))


def test_soft_dice_counts_the_whole_batch() -> None:
    logits = torch.full((2, 2, 2), LOGIT)
    share = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)
    assert soft_dice(logits, share).item() == pytest.approx(1 - (2 * 3 + 1) / (6 + 4 + 1))


def test_soft_dice_of_an_empty_prediction_of_an_empty_truth_is_zero() -> None:
    assert soft_dice(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    generator = torch.Generator().manual_seed(1)
    mask, aux = torch.randn(2, 3, 4, 4, generator=generator)
    output = Output(mask, aux, torch.tensor([0.3, -1.0, 2.0]))
    share, present = (torch.rand(3, 4, 4, generator=generator) > 0.5).float(), torch.tensor([1.0, 0.0, 1.0])
    recipe = Recipe(bce_weight=0.5, dice_weight=2.0, focal_weight=3.0, aux_weight=0.4, presence_weight=0.7)
    terms = criterion(output, share, present, recipe)
    aux_loss = 0.5 * bce(aux, share) + 2 * soft_dice(aux, share) + 3 * focal(aux, share)
    expected = 0.5 * terms["loss_bce"] + 2 * terms["loss_dice"] + 3 * terms["loss_focal"]
    expected = expected + 0.4 * aux_loss + 0.7 * terms["loss_presence"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    output = Output(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1))
    recipe = Recipe(focal_weight=0, aux_weight=0, presence_weight=0)
    terms = criterion(output, torch.ones(1, 2, 2), torch.ones(1), recipe)
    assert set(terms) == {"loss", "loss_bce", "loss_dice"}
    assert terms["loss"].item() == pytest.approx((terms["loss_bce"] + terms["loss_dice"]).item())


# Batches


def test_augmentation_moves_image_and_share_alike() -> None:
    x = torch.zeros(8, 1, 64, 64)
    x[:, :, 20:44, 10:30] = 1.0
    moved, shares = augment(x, x[:, 0], torch.Generator().manual_seed(0))
    assert not torch.equal(shares, x[:, 0])
    bright = (moved[:, 0] > 0.5).float()  # contrast and brightness change greys, not places
    overlap = (bright * shares).sum((1, 2)) / torch.maximum(bright, shares).sum((1, 2))
    assert overlap.min() > 0.9


def test_augmentation_of_one_seed_is_one_change() -> None:
    x = torch.rand(2, 1, 16, 16)
    first, second, other = (augment(x, x[:, 0], torch.Generator().manual_seed(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_epoch_has_the_asked_share_of_positives_and_repeats_evenly() -> None:
    present = np.arange(100) < 10
    order = draw(present, 0.6, np.random.default_rng(0))
    assert len(order) == 100
    assert present[order].sum() == 60
    assert set(np.bincount(order, minlength=100)[:10]) == {6}


@pytest.mark.parametrize("present", [np.zeros(7, np.bool_), np.ones(7, np.bool_), np.arange(7) < 3])
def test_share_zero_or_a_missing_class_takes_every_image_once(present: np.ndarray) -> None:
    share = 0.0 if 0 < present.sum() < 7 else 0.5
    assert sorted(draw(present, share, np.random.default_rng(0))) == list(range(7))


def test_batches_give_greys_and_shares_from_zero_to_one() -> None:
    examples = squares(6)
    recipe = Recipe(augment=False, positive_share=0, batch_size=4)
    seen = list(batches(examples, recipe, 1, CPU.device))
    assert [len(batch.images) for batch in seen] == [3, 3]
    assert {batch.images.shape for batch in seen} == {(3, 1, 32, 32)}
    total = sum(float(batch.images.double().sum()) for batch in seen)
    assert total == pytest.approx(examples.images.sum() / 255)
    assert sum(float(batch.present.sum()) for batch in seen) == 3


# Network


def test_the_network_answers_for_each_pixel_and_each_image(network: PneumothoraxNet) -> None:
    network.eval()
    with torch.inference_mode():
        output = network(torch.rand(2, 1, 40, 48))
    assert output.mask.shape == output.aux.shape == (2, 40, 48)
    assert output.presence.shape == (2,)


def test_a_seed_gives_the_same_start_weights() -> None:
    first, second, other = (build("fcn_resnet50", "none", seed).mask_head[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_saved_weights_come_back_from_a_file(network: PneumothoraxNet, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    again = build("fcn_resnet50", str(tmp_path / "weights.pt"), seed=9)
    assert torch.equal(again.mask_head[0].weight, network.mask_head[0].weight)


def test_a_backbone_file_fills_the_backbone_alone(network: PneumothoraxNet, tmp_path: Path) -> None:
    torch.save(network.backbone.state_dict(), tmp_path / "backbone.pt")
    again = build("fcn_resnet50", str(tmp_path / "backbone.pt"), seed=9)
    assert torch.equal(again.backbone["conv1"].weight, network.backbone["conv1"].weight)
    assert not torch.equal(again.mask_head[0].weight, network.mask_head[0].weight)


@pytest.mark.parametrize("kind", ["missing", "text", "pickle", "foreign"])
def test_a_wrong_weights_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    if kind == "text":
        path.write_text("no weights")
    elif kind == "pickle":
        torch.save({"path": Path()}, path)  # needs unpickling of a class: refused, never run
    elif kind == "foreign":
        torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"weights\.pt"):
        build("fcn_resnet50", str(path), seed=0)


def test_weights_that_cannot_be_downloaded_are_an_error_with_a_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match=r"weights=imagenet: .*weights=none"):
        build("fcn_resnet50", "imagenet", seed=0)


def test_auto_weights_go_on_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    build("fcn_resnet50", "auto", seed=0)
    assert "random values" in caplog.text


# Training and prediction


def test_training_finds_bright_squares() -> None:
    recipe = Recipe(batch_size=8, learning_rate=1e-3, augment=False, positive_share=0, seed=1)
    network = build("fcn_resnet50", "none", recipe.seed)
    machine = choose_machine(Device())
    epochs = list(fit(network, squares(16), recipe, 12, machine))
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert epochs[-1].losses["loss"] < 0.7 * epochs[0].losses["loss"]
    unseen = squares(8, seed=5)
    found = [p.mask for p in Predictor(network, machine).predict(unseen.images)]
    inside = np.mean(
        [mask[share > 0].mean() for mask, share in zip(found, unseen.shares, strict=True) if share.any()]
    )
    outside = np.mean([mask[share == 0].mean() for mask, share in zip(found, unseen.shares, strict=True)])
    assert inside > outside + 0.2


def test_one_seed_trains_to_the_same_weights() -> None:
    recipe = Recipe(batch_size=4, augment=True, seed=3)
    ends: list[torch.Tensor] = []
    for _ in range(2):
        network = build("fcn_resnet50", "none", recipe.seed)
        list(fit(network, squares(4), recipe, 1, CPU))
        ends.append(network.mask_head[0].weight.detach().clone())
    assert torch.equal(*ends)


def test_a_loss_that_is_not_finite_ends_with_advice() -> None:
    recipe = Recipe(batch_size=4, learning_rate=1e30, augment=False)
    network = build("fcn_resnet50", "none", 0)
    with pytest.raises(UserError, match="learning_rate=1e\\+30"):
        list(fit(network, squares(4), recipe, 3, CPU))


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    assert one_cycle(0) == pytest.approx(0.05)
    assert one_cycle(0.2) == pytest.approx(1)
    assert one_cycle(0.6) == pytest.approx(0.5)
    assert one_cycle(1) == pytest.approx(0, abs=1e-9)


def test_predictions_do_not_depend_on_the_batch(network: PneumothoraxNet) -> None:
    images = squares(5).images
    one, all_at_once = (list(Predictor(network, CPU).predict(images, batch_size)) for batch_size in (1, 5))
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_allclose(a.mask, b.mask, atol=1e-5)
        assert a.presence == pytest.approx(b.presence, abs=1e-5)


def test_the_mirrored_mean_treats_both_sides_alike(network: PneumothoraxNet) -> None:
    images = squares(2).images
    predictor = Predictor(network, CPU, mirror=True)
    (a, _), (b, _) = list(predictor.predict(images)), list(predictor.predict(images[:, :, ::-1]))
    np.testing.assert_allclose(a.mask, b.mask[:, ::-1], atol=1e-5)
    assert a.presence == pytest.approx(b.presence, abs=1e-5)
    plain = next(Predictor(network, CPU).predict(images))
    assert np.abs(plain.mask - a.mask).max() > 1e-4


def test_native_size_is_bilinear_between_pixel_centres() -> None:
    small = np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_allclose(to_native(small, (1, 4)), [[0, 0.25, 0.75, 1]])


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="device=cuda"):
        choose_machine(replace(Device(), device="cuda"))
