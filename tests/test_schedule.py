"""The learning rate over the steps of a training."""

from __future__ import annotations

import pytest
from helpers import make

from pneumo_experiments.learning.schedule import lr_factor
from pneumo_experiments.settings import Recipe


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    recipe = make(Recipe, warmup=0.2, schedule="cosine")
    assert lr_factor(recipe, 0) == pytest.approx(0.05)
    assert lr_factor(recipe, 0.2) == pytest.approx(1)
    assert lr_factor(recipe, 0.6) == pytest.approx(0.5)
    assert lr_factor(recipe, 1) == pytest.approx(0, abs=1e-9)
    polynomial = make(Recipe, warmup=0, schedule="polynomial")
    assert [lr_factor(polynomial, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])
