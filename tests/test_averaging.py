"""Means of weights: over the steps, and of the best epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pneumo_experiments.learning.averaging import MovingAverage, mean_state
from pneumo_experiments.learning.network import build

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
