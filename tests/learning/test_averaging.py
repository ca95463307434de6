"""Means of weights: over the steps, and of the best epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make
from tiny_network import CPU, noise, random_network, weights_of
from torch.optim.swa_utils import update_bn

from pneumo_experiments.learning import averaging
from pneumo_experiments.learning.averaging import MovingAverage, mean_state, update_batch_norm
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import build
from pneumo_experiments.settings import Recipe

pytestmark = pytest.mark.usefixtures("tiny")


def test_the_moving_average_follows_the_weights_as_its_formula_says() -> None:
    network = build("tiny", "none", 0)
    average = MovingAverage(network, 0.5)
    name = "presence_head.bias"
    expected = float(network.presence_head.bias.detach())
    for step in range(1, 5):
        with torch.no_grad():
            network.presence_head.bias.fill_(step)
        average.update(network, torch.tensor(True))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.network.state_dict()[name]) == pytest.approx(expected, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def test_the_mean_of_states_is_that_of_each_tensor() -> None:
    states: list[dict[str, Any]] = [
        {"w": torch.tensor([1.0, 5.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([3.0, 7.0]), "n": torch.tensor(9)},
    ]
    mean = mean_state(states)
    assert mean["w"].tolist() == [2.0, 6.0]
    assert mean["n"] == 3
    assert states[0]["w"].tolist() == [1.0, 5.0]


@pytest.mark.parametrize("limit", [1000, 20])
def test_batch_statistics_are_torch_s_own_of_plain_images(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "STATISTICS_IMAGES", limit)
    data, network, reference = noise(40), random_network(0), random_network(0)
    before, seen = weights_of(network), list[int]()
    # Another average than the mean over images: of 40 images, in batches of 14, 13 and 13.
    update_batch_norm(network, data, make(Recipe, batch_size=2, positive_share=1.0), CPU, seen.append)
    assert seen == [14, 13, 13][: 3 if limit == 1000 else 2]
    plain = make(Recipe, batch_size=16, positive_share=0.0, augment=False)
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    drawn = [batch.images for batch in batches(data, plain, 1, 1, CPU.device)]
    update_bn(drawn[: len(seen)], reference)
    after, expected = weights_of(network), weights_of(reference)
    statistics = [name for name in before if "running_" in name and "aux" not in name]
    assert len(statistics) == 4
    for name, tensor in after.items():
        if name in statistics:
            assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-6), name
            assert not torch.allclose(tensor, before[name], rtol=0.01)
        elif "num_batches" not in name:
            assert torch.equal(tensor, before[name]), name
    assert {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
