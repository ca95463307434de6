"""The learning rate over the steps of a training, and the groups of its parameters."""

from __future__ import annotations

import pytest
from helpers import make
from torch import nn

from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.schedule import lr_factor, parameter_groups
from pneumo_experiments.settings import Recipe


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    recipe = make(Recipe, warmup=0.2, schedule="cosine")
    assert lr_factor(recipe, 0) == pytest.approx(0.05)
    assert lr_factor(recipe, 0.2) == pytest.approx(1)
    assert lr_factor(recipe, 0.6) == pytest.approx(0.5)
    assert lr_factor(recipe, 1) == pytest.approx(0, abs=1e-9)
    polynomial = make(Recipe, warmup=0, schedule="polynomial")
    assert [lr_factor(polynomial, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])


@pytest.mark.usefixtures("tiny")
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
