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
def test_skipped_steps_do_not_shrink_the_gradient_scale(precision: str) -> None:
    network = build("tiny", "none", 0)
    trainer = Trainer(
        network, make(Recipe, batch_size=2, learning_rate=1e-2), 400, ComputeConfig(CPU.device, precision)
    )
    (batch,) = batches(noise(2), make(Recipe, batch_size=2, augment=False), 1, 1, CPU.device)
    nan_batch = replace(batch, images=batch.images * float("nan"))
    trainer.step(batch)
    before = weights_of(network.mask_head)
    for _ in range(3):
        assert not trainer.step(nan_batch)[1]
        assert trainer.scaler.get_scale() == 1  # halved 150 times, the smallest float32 is 0
    network.load_state_dict({n: t.nan_to_num(0.0) for n, t in network.state_dict().items()})  # batch norm's
    assert trainer.step(batch)[1]
    after = weights_of(network.mask_head)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not torch.equal(after["0.weight"], before["0.weight"])


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
