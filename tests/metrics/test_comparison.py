"""Comparisons on the same images: of two models, against a slow bootstrap, and of the trials of a study."""

from __future__ import annotations

import random

import numpy as np
import optuna
import pytest
from optuna.trial import create_trial

from pneumo_experiments.metrics.comparison import certainty, compare, required_probability
from pneumo_experiments.search.storage import AS_GIVEN
from pneumo_experiments.search.study import PATIENT_DICE, TrainingResult, best_trials, set_confirmation
from pneumo_experiments.search.winner import SEED_SD, better_than, choose_winner, probability_better
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
    numbers = rng.integers(15, size=60)
    patients = [f"p{number}" for number in numbers]
    baseline = rng.uniform(0.2, 1, 60)
    # Images of a patient differ alike: they count as little more than one.
    dices = np.clip(baseline + rng.normal(0.02, 0.1, 15)[numbers] + rng.normal(0, 0.02, 60), 0, 1)
    comparison = compare(dices, baseline, patients)
    slow = slow_differences(dices.tolist(), baseline.tolist(), patients)
    assert comparison.difference == pytest.approx(float((dices - baseline).mean()))
    assert comparison.low == pytest.approx(slow[100], abs=0.004)
    assert comparison.high == pytest.approx(slow[3900], abs=0.004)
    assert comparison.probability_better == pytest.approx(np.mean(np.array(slow) > 0), abs=0.03)


def test_the_reverse_comparison_has_the_opposite_signs() -> None:
    rng = np.random.default_rng(1)
    first, second, patients = rng.uniform(size=30), rng.uniform(size=30), [str(i % 11) for i in range(30)]
    there, back = compare(first, second, patients), compare(second, first, patients)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.probability_better == pytest.approx(1 - back.probability_better)
    same = compare(first, first, patients)
    assert (same.difference, same.low, same.high, same.probability_better) == (0, 0, 0, 0.5)


def test_beyond_what_resamples_tell_the_t_distribution_does() -> None:
    for patients, t, above in [(11, 2.764, 0.01), (21, 3.552, 0.001), (6, 4.032, 0.005)]:
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


# Settings, by trainings of a study


def test_the_probability_that_settings_are_better_is_that_of_a_bootstrap_and_of_two_seeds() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(size=400)
    dices = reference + rng.normal(0.008, 0.1, 400)
    drawn = compare(dices, reference, [str(patient) for patient in range(400)]).resamples
    seeds = rng.normal(0, SEED_SD, (2, 1000))
    both = np.mean(drawn[:, None] + (seeds[0] - seeds[1]) > 0)
    assert probability_better(dices, reference) == pytest.approx(both, abs=0.02)
    assert probability_better(dices, reference) < np.mean(drawn > 0) - 0.01
    assert probability_better(reference, reference) == 0.5


def test_the_more_are_compared_the_surer_each_must_be() -> None:
    reference = np.zeros(2)
    others = {number: np.full(2, 0.0065) for number in range(1, 4)}  # better with a probability of 0.982
    assert better_than(reference, {1: others[1]}) == {1: 0.0065}
    assert better_than(reference, others) == {}
    assert better_than(reference, others | {4: np.full(2, 0.02)}) == {4: 0.02}
    assert better_than(reference, {}) == {}


def study_of(*dices: float, marked: bool = True, **violations: dict[int, float]) -> optuna.Study:
    """A study, the first of whose trials has the settings as given; each patient adds its Dice."""
    study = optuna.create_study(direction="maximize")
    for number, dice in enumerate(dices):
        attributes = {PATIENT_DICE: [dice, dice]} if marked else {}
        attributes |= {AS_GIVEN: True} if marked and not number else {}
        constraints = {name: values.get(number, 0.0) for name, values in violations.items()}
        study.add_trial(create_trial(value=dice, user_attrs=attributes, constraints=constraints))
    return study


def winner_of(
    study: optuna.Study, *dices: float | None, **violations: dict[int, float]
) -> tuple[int, float, str]:
    """The number of the winner, its value and its line; the Dice are those of second trainings."""
    for number, dice in enumerate(dices):
        if dice is not None:
            constraints = {name: values.get(number, 0.0) for name, values in violations.items()}
            set_confirmation(study, number, TrainingResult(dice, [dice, dice], constraints))
    winner = choose_winner(study)
    assert winner
    return winner.trial.number, winner.value, winner.line


def test_without_second_trainings_the_first_ones_must_be_better_beyond_noise() -> None:
    given = "0, the settings as given, cross-fitted Dice 0.5000 (not confirmed)"
    assert winner_of(study_of(0.5, 0.505)) == (0, 0.5, given)
    assert winner_of(study_of(0.5, 0.52, 0.53)) == (2, 0.53, "2, cross-fitted Dice 0.5300 (not confirmed)")
    assert choose_winner(study_of()) is None


def test_a_study_that_did_not_mark_the_settings_as_given_ends_with_the_best_mean() -> None:
    def old() -> optuna.Study:
        return study_of(0.5, 0.7, 0.6, 0.65, marked=False)

    assert winner_of(old())[:2] == (1, 0.7)
    assert winner_of(old(), 0.1, 0.3, 0.44)[:2] == (2, pytest.approx(0.52))
    assert winner_of(old(), 0.1, 0.3, 0.44, false_alarms={2: 0.2})[0] == 1


def test_the_value_is_that_of_the_second_training_though_that_of_the_settings_as_given_failed() -> None:
    study = study_of(0.5, 0.6)
    set_confirmation(study, 0, "diverged")
    assert winner_of(study, None, 0.4) == (1, 0.4, "1, cross-fitted Dice 0.4000")


def test_what_violates_a_constraint_in_either_training_does_not_win() -> None:
    dices = (0.5, 0.6, 0.7, 0.8)
    assert winner_of(study_of(*dices), *dices)[0] == 3
    assert winner_of(study_of(*dices, all_empty={3: 0.1}), *dices)[0] == 2
    assert winner_of(study_of(*dices), *dices, all_empty={3: 0.1}, false_alarms={2: 0.01})[0] == 1
    assert winner_of(study_of(*dices, all_empty=dict.fromkeys(range(4), 0.9)))[0] == 0
    # The limit of false alarms holds for the settings as given, too: then another needs no gain.
    worse = (0.5, 0.4, 0.3)
    assert winner_of(study_of(*worse, all_empty={0: 0.9}))[0] == 0
    assert winner_of(study_of(*worse, false_alarms={0: 0.01, 1: 0.01}))[0] == 2


def test_trials_rank_by_their_violation_and_then_by_dice() -> None:
    study = study_of(0.9, 0.5, 0.95, 0.8, all_empty={0: 0.3, 2: 0.2}, false_alarms={2: 0.2, 1: -0.1})
    assert [trial.number for trial in best_trials(study)] == [3, 1, 0, 2]
    assert study.best_trial.number == 3  # Optuna ranks those that violate nothing likewise
