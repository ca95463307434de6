"""The comparison of two models on the same images, against an independent slow bootstrap."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pneumo_experiments.scoring.comparison import certainty, compare, required_probability
from pneumo_experiments.settings import Registry


def slow_differences(dices: list[float], baseline: list[float], patients: list[str]) -> list[float]:
    """Differences of the means in 4,000 resamples of the patients, one image at a time."""
    draw = random.Random(5)
    names = sorted(set(patients))
    differences: list[float] = []
    for _ in range(4000):
        total, count = 0.0, 0
        for name in draw.choices(names, k=len(names)):
            for image, patient in enumerate(patients):
                if patient == name:
                    total += dices[image] - baseline[image]
                    count += 1
        differences.append(total / count)
    return sorted(differences)


def test_interval_and_probability_are_those_of_a_slow_bootstrap_over_patients() -> None:
    rng = np.random.default_rng(3)
    patients = [f"p{number}" for number in rng.integers(15, size=60)]
    baseline = rng.uniform(0.2, 1, 60)
    dices = np.clip(baseline + rng.normal(0.02, 0.1, 60), 0, 1)
    comparison = compare(dices, baseline, patients)
    slow = slow_differences(dices.tolist(), baseline.tolist(), patients)
    assert comparison.difference == pytest.approx(float((dices - baseline).mean()))
    assert comparison.low == pytest.approx(slow[100], abs=0.004)
    assert comparison.high == pytest.approx(slow[3900], abs=0.004)
    assert comparison.probability_better == pytest.approx(np.mean(np.array(slow) > 0), abs=0.03)


def test_what_is_hard_for_both_models_cancels_out() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.uniform(0, 0.9, 40)  # images differ much, the models by a constant
    comparison = compare(baseline + 0.05, baseline, [str(image) for image in range(40)])
    assert (comparison.low, comparison.high) == pytest.approx((0.05, 0.05))
    assert comparison.probability_better == 1


def test_equal_models_are_better_with_a_probability_of_one_half() -> None:
    dices = np.array([0.1, 0.7, 1.0])
    comparison = compare(dices, dices, ["a", "b", "c"])
    assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
    assert comparison.probability_better == 0.5


def test_the_reverse_comparison_has_the_opposite_signs() -> None:
    rng = np.random.default_rng(1)
    first, second, patients = rng.uniform(size=30), rng.uniform(size=30), [str(i % 11) for i in range(30)]
    there, back = compare(first, second, patients), compare(second, first, patients)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.probability_better == pytest.approx(1 - back.probability_better)


def test_images_of_one_patient_count_as_one_observation() -> None:
    rng = np.random.default_rng(2)
    differences = np.repeat(rng.normal(0, 0.1, 12), 10)  # ten equal images of each patient
    grouped = compare(0.5 + differences, np.full(120, 0.5), [str(i // 10) for i in range(120)])
    single = compare(0.5 + differences, np.full(120, 0.5), [str(i) for i in range(120)])
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


def test_beyond_what_resamples_tell_the_t_distribution_does() -> None:
    for patients, t, above in (
        (11, 2.764, 0.01),
        (21, 3.552, 0.001),
        (6, 4.032, 0.005),
    ):  # of a printed table
        resamples = np.array([t + 1, t - 1])  # all above 0, with a standard deviation of 1
        assert 1 - certainty(t, resamples, patients) == pytest.approx(above, rel=0.04)
        assert certainty(-t, -resamples, patients) == pytest.approx(above, rel=0.04)
    rng = np.random.default_rng(4)
    differences = rng.normal(size=400)
    differences = 0.05 * (4.5 / 20 + (differences - differences.mean()) / differences.std())  # 4.5 errors
    found = compare(0.5 + differences, np.full(400, 0.5), [str(image) for image in range(400)])
    assert (found.resamples > 0).all()
    assert 1 - found.probability_better == pytest.approx(4.5e-6, rel=0.25)  # of t with 399 degrees


def test_a_difference_that_six_patients_make_is_less_sure_than_its_resamples_say() -> None:
    gains, names = (np.arange(100) < 6).astype(float), [str(image) for image in range(100)]
    found = compare(gains, np.zeros(100), names)
    assert np.mean(found.resamples > 0) == pytest.approx(1 - 0.94**100, abs=0.001)  # six coins say 0.984
    assert found.probability_better == pytest.approx(0.9738, abs=0.001)  # t = 6 / (6 * 0.94)**0.5, 5 degrees
    assert compare(-gains, np.zeros(100), names).probability_better == pytest.approx(0.0262, abs=0.001)
    assert compare(gains * (np.arange(100) < 1), np.zeros(100), names).probability_better == 0.5


def test_all_decisions_together_err_at_most_once_in_twenty() -> None:
    level = Registry().min_probability
    assert [required_probability(level, k) for k in (1, 2, 10)] == pytest.approx([0.97, 0.9925, 0.9997])
    assert required_probability(level, 2, 5) == pytest.approx(1 - 0.03 / 20)
    assert 0.049 < sum(1 - required_probability(level, k) for k in range(1, 5000)) < 0.05


def test_values_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 1 and 2"):
        compare(np.zeros(2), np.zeros(1), ["a", "b"])
