from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo_experiments.dataset.splits import assign_folds, audit, split
from pneumo_experiments.errors import UserError

# The 13 real images of the shared folder: one each of 13 patients.
FEW_AREAS = np.array([10133, 69274, 0, 0, 0, 0, 0, 2071, 29079, 2486, 9418, 5232, 0])
FEW_PATIENTS = [f"patient-{number}" for number in range(13)]


@pytest.fixture(scope="module")
def subset(real_labels: dict[str, tuple[str, int]]) -> tuple[list[str], np.ndarray]:
    patients, areas = zip(*real_labels.values(), strict=True)
    return list(patients), np.array(areas)


def assert_no_patient_twice(patients: list[str], parts: list[np.ndarray]) -> None:
    names = [{patients[index] for index in part} for part in parts]
    assert sum(map(len, names)) == len(set().union(*names))


@pytest.mark.parametrize(("folds", "seed"), [(2, 0), (5, 1), (10, 2)])
def test_real_folds_share_no_patient_and_have_equal_areas(
    subset: tuple[list[str], np.ndarray], folds: int, seed: int
) -> None:
    patients, areas = subset
    fold = assign_folds(patients, areas, folds, seed=seed)
    parts = [np.flatnonzero(fold == number) for number in range(folds)]
    assert_no_patient_twice(patients, parts)
    images = [len(part) for part in parts]
    positives = [np.count_nonzero(areas[part]) for part in parts]
    assert max(images) <= 1.01 * min(images)
    assert max(positives) <= 1.02 * min(positives)
    edges = np.quantile(areas[areas > 0], np.linspace(0, 1, 11))
    in_decile = np.array([np.histogram(areas[part][areas[part] > 0], edges)[0] for part in parts])
    assert (in_decile.max(axis=0) - in_decile.min(axis=0)).max() <= 3
    found = audit(patients, areas, fold)
    assert (found.shared_patients, found.separated_images, found.separated_share) == (0, 0, 0.0)
    assert [(facts.part, facts.images) for facts in found.parts] == list(enumerate(images))
    assert found.images == sum(images) == 12047
    assert sum(facts.patients for facts in found.parts) == len(set(patients)) == 6171
    assert [facts.positives for facts in found.parts] == positives
    assert sum(positives) == 2669
    if folds == 5:
        deciles = np.array([facts.area_deciles_px for facts in found.parts])
        assert np.abs(deciles / edges[1:-1] - 1).max() < 0.05


def test_an_audit_of_parts_without_positives_or_images_is_plain_json() -> None:
    part = {"images": 1, "patients": 1, "positives": 0, "area_deciles_px": []}
    nobody = {"shared_patients": 0, "separated_images": 0, "separated_share": 0.0}
    found = audit(["a", "b"], np.array([0, 0]), np.array([0, 1]))
    parts = [{"part": number} | part for number in range(2)]
    assert json.loads(json.dumps(found.as_dict())) == {"images": 2, "parts": parts} | nobody
    nothing = audit([], np.zeros(0), np.zeros(0, np.int64))
    assert (nothing.images, nothing.separated_share, nothing.parts) == (0, 0.0, ())
    with pytest.raises(ValueError, match="2 patients, 2 areas and 1 part numbers"):
        audit(["a", "b"], np.array([0, 1]), np.array([0]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(-2, 2)), max_size=25))
def test_an_audit_agrees_with_a_slow_count(images: list[tuple[int, int, int]]) -> None:
    patients = [str(patient) for patient, _, _ in images]
    areas, parts = np.array([[area, part] for _, area, part in images], int).reshape(-1, 2).T
    found = audit(patients, areas, parts)
    separated = [
        any(other == patient and elsewhere != part for other, _, elsewhere in images)
        for patient, _, part in images
    ]
    assert found.separated_images == sum(separated)
    assert found.shared_patients == len({p for p, apart in zip(patients, separated, strict=True) if apart})
    for facts in found.parts:
        inside = [(patient, area) for patient, area, part in images if part == facts.part]
        assert facts.images == len(inside)
        assert facts.patients == len({patient for patient, _ in inside})
        assert facts.positives == sum(area > 0 for _, area in inside)


def test_a_real_split_keeps_the_holdout_whatever_the_fold(subset: tuple[list[str], np.ndarray]) -> None:
    patients, areas = subset
    splits = [split(patients, areas, holdout=0.2, folds=5, fold=fold, seed=3) for fold in range(5)]
    holdout = splits[0].holdout
    assert len(holdout) == pytest.approx(0.2 * len(areas), rel=0.01)
    assert np.count_nonzero(areas[holdout]) == pytest.approx(0.2 * np.count_nonzero(areas), rel=0.02)
    positive, of_all = areas[holdout], np.median(areas[areas > 0])
    assert np.median(positive[positive > 0]) == pytest.approx(of_all, rel=0.05)
    for parts in splits:
        assert np.array_equal(parts.holdout, holdout)
        assert_no_patient_twice(patients, [parts.train, parts.validation, parts.holdout])
    validated = np.concatenate([parts.validation for parts in splits])
    assert np.array_equal(np.sort(np.concatenate([validated, holdout])), np.arange(len(areas)))
    other_folds = split(patients, areas, holdout=0.2, folds=3, fold=2, seed=3)
    assert np.array_equal(other_folds.holdout, holdout)


def test_a_seed_gives_the_same_folds_and_another_seed_others() -> None:
    patients = [f"p{number}" for number in range(100)]
    areas = np.random.default_rng(0).integers(-500, 1000, 100).clip(0)
    first = assign_folds(patients, areas, 5, seed=1)
    assert np.array_equal(assign_folds(patients, areas, 5, seed=1), first)
    assert not np.array_equal(assign_folds(patients, areas, 5, seed=2), first)
    order = np.random.default_rng(1).permutation(100)
    shuffled = assign_folds([patients[index] for index in order], areas[order], 5, seed=1)
    assert np.array_equal(shuffled, first[order])


@pytest.mark.parametrize(("holdout", "folds"), [(0.2, 5), (0.2, 2), (0.1, 4), (0.4, 3), (0.0, 5)])
def test_13_images_leave_no_part_without_a_positive(holdout: float, folds: int) -> None:
    for fold, seed in product(range(folds), range(5)):
        parts = split(FEW_PATIENTS, FEW_AREAS, holdout=holdout, folds=folds, fold=fold, seed=seed)
        indices = [parts.train, parts.validation] + [parts.holdout] * (holdout > 0)
        assert all(np.count_nonzero(FEW_AREAS[part]) for part in indices)
        assert np.array_equal(np.sort(np.concatenate(indices)), np.arange(13))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=40), st.integers(2, 5))
def test_any_data_set_with_enough_patients_fills_every_fold(
    images: list[tuple[int, int]], folds: int
) -> None:
    patients = [str(patient) for patient, _ in images]
    areas = np.array([area for _, area in images])
    if len(set(patients)) < folds:
        with pytest.raises(UserError):
            assign_folds(patients, areas, folds, seed=0)
        return
    fold = assign_folds(patients, areas, folds, seed=0)
    assert set(fold.tolist()) == set(range(folds))
    assert_no_patient_twice(patients, [np.flatnonzero(fold == number) for number in range(folds)])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"fold": 5}, r"fold=5: does not exist; set fold from 0 to 4"),
        ({"fold": -1}, r"fold=-1: does not exist"),
        ({"holdout": 1.0}, r"holdout=1: out of range"),
        ({"holdout": -0.1}, r"holdout=-0\.1: out of range"),
        ({"holdout": 0.001}, r"holdout=0\.001: less than one patient"),
        ({"folds": 1}, r"folds=1: training and validation need a fold each"),
        ({"folds": 13}, r"folds=13 and a holdout: needs 14 patients, the data set has 13"),
        ({"folds": 14, "holdout": 0.0}, r"folds=14: needs 14 patients, the data set has 13; .*patients_csv"),
    ],
)
def test_a_split_that_cannot_be_is_one_line_with_the_remedy(wish: dict[str, float], message: str) -> None:
    settings = {"holdout": 0.2, "folds": 5, "fold": 0, "seed": 0} | wish
    with pytest.raises(UserError, match=message):
        split(FEW_PATIENTS, FEW_AREAS, **settings)
