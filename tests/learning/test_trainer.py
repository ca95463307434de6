"""One step of the optimiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import make
from tiny_network import CPU, noise, weights_of

from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.trainer import Trainer
from pneumo_experiments.settings import Recipe

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_without_a_finite_gradient_changes_nothing(precision: str) -> None:
    network = build("tiny", "none", 0)
    recipe = make(Recipe, batch_size=2, learning_rate=1e-2, ema=0.5, augment=False)
    trainer = Trainer(network, recipe, 400, ComputeConfig(CPU.device, precision))
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
    trainer = Trainer(network, recipe, 2, CPU)
    for batch in batches(noise(4), recipe, 1, 1, CPU.device):
        terms, finite = trainer.step(batch)
        assert finite
        assert "loss_aux" not in terms
    after = weights_of(network.aux_head)
    assert all(torch.equal(after[name], before[name]) for name in before)  # its batch statistics, too
    assert not torch.equal(weights_of(network.mask_head)["1.running_mean"], batch_norm)
