"""One step of the optimiser, and the learning rates of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import make
from tiny_network import CPU, noise, weights_of
from torch import nn

from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import Trainer, lr_factor, parameter_groups
from pneumo_experiments.settings import Recipe

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_without_a_finite_gradient_changes_nothing(precision: str) -> None:
    network = build("tiny", "none", 0)
    recipe = make(Recipe, batch_size=2, learning_rate=1e-2, ema=0.5, augment=False)
    trainer = Trainer(Predictor(network, ComputeConfig(CPU.device, precision)), recipe, 400)
    (batch,) = batches(noise(2), recipe, 1, 1, CPU.device)
    bad_batch = replace(batch, images=batch.images * float("inf"))
    trainer.step(batch)
    assert trainer.average is not None
    before, average = weights_of(network), weights_of(trainer.average.network)
    for _ in range(3):
        assert not trainer.step(bad_batch)[1]
        assert trainer.scaler.get_scale() == 1  # halved 150 times, the smallest float32 is 0
    for after, start in ((weights_of(network), before), (weights_of(trainer.average.network), average)):
        assert all(torch.equal(after[name], start[name]) for name in start)  # batch statistics, too
    assert trainer.step(batch)[1]
    for after, start in ((weights_of(network), before), (weights_of(trainer.average.network), average)):
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        assert not torch.equal(after["mask_head.0.weight"], start["mask_head.0.weight"])
        assert not torch.equal(after["mask_head.1.running_mean"], start["mask_head.1.running_mean"])


def test_without_a_weight_in_the_loss_the_auxiliary_head_stays_as_it_is() -> None:
    network = build("tiny", "none", 0)
    before, batch_norm = weights_of(network.aux_head), weights_of(network.mask_head)["1.running_mean"]
    recipe = make(Recipe, batch_size=2, augment=False, aux_weight=0.0, weight_decay=1.0)
    trainer = Trainer(Predictor(network, CPU), recipe, 2)
    for batch in batches(noise(4), recipe, 1, 1, CPU.device):
        terms, finite = trainer.step(batch)
        assert finite
        assert "loss_aux" not in terms
    after = weights_of(network.aux_head)
    assert all(torch.equal(after[name], before[name]) for name in before)  # its batch statistics, too
    assert not torch.equal(weights_of(network.mask_head)["1.running_mean"], batch_norm)


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    recipe = make(Recipe, warmup=0.2, schedule="cosine")
    assert lr_factor(recipe, 0) == pytest.approx(0.05)
    assert lr_factor(recipe, 0.2) == pytest.approx(1)
    assert lr_factor(recipe, 0.6) == pytest.approx(0.5)
    assert lr_factor(recipe, 1) == pytest.approx(0, abs=1e-9)
    polynomial = make(Recipe, warmup=0, schedule="polynomial")
    assert [lr_factor(polynomial, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])


@pytest.mark.parametrize("count", [2, 4])
def test_only_kernels_decay_and_each_parameter_has_the_rate_of_its_layer(count: int) -> None:
    network = build("tiny", "none", 0)
    if count == 4:
        network.pretrained = frozenset(n for n, _ in network.named_parameters() if n.startswith("backbone."))
    recipe = make(Recipe, learning_rate=1e-2, pretrained_lr_scale=0.1, weight_decay=0.3)
    groups = parameter_groups(network, recipe)
    assert len(groups) == count
    chosen = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    assert len(chosen) == sum(len(group["params"]) for group in groups)
    for name, module in network.named_modules():
        rate = pytest.approx(1e-3 if name.startswith("backbone.") and count == 4 else 1e-2)
        for own, parameter in module.named_parameters(recurse=False):
            decays = own == "weight" and not isinstance(module, nn.BatchNorm2d)
            assert chosen.pop(id(parameter)) == (rate, 0.3 if decays else 0), f"{name}.{own}"
    assert not chosen
