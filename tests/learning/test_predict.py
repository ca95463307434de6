"""Probabilities of one network or several, augmented and calibrated, and where they are computed."""

from __future__ import annotations

import itertools
import math
import platform
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_network import CPU, random_network, squares, tiny_member

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.calibration import Calibration, fit_calibration
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.network import PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Ensemble, Predictor, to_native
from pneumo_experiments.metrics.dice import auroc, calibration_error
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, make_ensemble
from pneumo_experiments.settings import Device

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def network(tiny: None) -> PneumothoraxNet:
    return build_network("tiny", "none", seed=0)


def test_predictions_do_not_depend_on_the_batch(network: PneumothoraxNet) -> None:
    images = squares(5).images.numpy()
    one, all_at_once = (list(Predictor(network, CPU).predict(images, batch_size)) for batch_size in (1, 5))
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_allclose(a.mask, b.mask, atol=1e-5)
        assert a.presence == pytest.approx(b.presence, abs=1e-5)


@pytest.mark.usefixtures("tiny")
def test_scale_adds_the_prediction_of_the_enlarged_image_brought_back() -> None:
    network, images = random_network(0), squares(3).images.numpy()
    (all_views,) = Predictor(network, CPU, tta="flip+scale").predict_batches(images)
    masks: list[torch.Tensor] = []
    presences: list[torch.Tensor] = []
    for side, flip in ((32, []), (32, [-1]), (40, []), (40, [-1])):
        inputs = torch.from_numpy(images)[:, None].float() / 255
        larger = torch.nn.functional.interpolate(inputs, size=side, mode="bilinear")
        with torch.inference_mode():
            output = network.eval()(larger.flip(flip))
        mask = torch.sigmoid(output.mask).flip(flip)
        masks.append(torch.nn.functional.interpolate(mask[:, None], size=32, mode="bilinear")[:, 0])
        presences.append(torch.sigmoid(output.presence))
    assert all_views.mask.shape == (3, 32, 32)
    torch.testing.assert_close(all_views.mask, torch.stack(masks).mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(all_views.presence, torch.stack(presences).mean(0), atol=1e-6, rtol=0)
    assert (masks[0] - masks[2]).abs().max() > 1e-3  # the larger image is another one to the network


def test_native_size_is_bilinear_between_pixel_centres() -> None:
    small = np.array([[0.0, 1.0]], np.float32)
    np.testing.assert_allclose(to_native(small, (1, 4)), [[0, 0.25, 0.75, 1]])


@pytest.mark.usefixtures("tiny")
def test_an_ensemble_predicts_the_mean_of_its_calibrated_members_in_any_order() -> None:
    images = squares(5).images.numpy()
    members = [Predictor(random_network(seed), CPU, tta="flip" if seed == 1 else "none") for seed in range(3)]
    plain, members[2] = members[2], replace(members[2], calibration=Calibration(0.5, -1))
    alone = [list(member.predict(images)) for member in members]
    for order in itertools.permutations(range(3)):
        together = Ensemble(tuple(members[place] for place in order)).predict(images, batch_size=2)
        for image, prediction in enumerate(together):
            mask = np.mean([each[image].mask.astype(np.float64) for each in alone], axis=0)
            np.testing.assert_allclose(prediction.mask, mask, atol=2e-7)
            presence = np.mean([each[image].presence for each in alone])
            assert prediction.presence == pytest.approx(presence, abs=2e-7)
        assert image == 4
    assert np.ptp([each[0].presence for each in alone]) > 0.01  # the mean is none of them
    before = list(plain.predict(images))  # calibration is of presence alone
    assert all(np.array_equal(one.mask, other.mask) for one, other in zip(alone[2], before, strict=True))
    odds = logit(np.array([each.presence for each in before])) * 0.5 - 1
    np.testing.assert_allclose([each.presence for each in alone[2]], sigmoid(odds), atol=1e-6)


# Calibration of presence: fitted, applied, and moved to another prevalence


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def logit(probability: np.ndarray | float) -> np.ndarray:
    exact = np.asarray(probability, np.float64)
    return np.log(exact / (1 - exact))


def applied(calibration: Calibration, presence: np.ndarray) -> np.ndarray:
    predictor = Predictor(torch.nn.Identity(), CPU, calibration=calibration)  # pyright: ignore
    return predictor.calibrated(torch.from_numpy(presence)).numpy()


def head(images: int, trained_at: float, used_at: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Presence of a perfect head, that of Bayes' rule at one prevalence, and truth at another."""
    rng = np.random.default_rng(seed)
    truth = rng.random(images) < used_at
    evidence = rng.normal(truth * 1.5, 1.0)  # so the log-likelihood ratio is 1.5 x - 1.5^2 / 2
    log_odds = 1.5 * evidence - 1.5**2 / 2 + logit(trained_at)
    return sigmoid(log_odds).astype(np.float32), truth


def error_of(presence: np.ndarray, truth: np.ndarray) -> float:
    return float(calibration_error(truth, presence, np.ones((1, len(truth))))[0])


def test_a_head_trained_on_more_positives_is_calibrated_on_images_that_did_not_fit_it() -> None:
    presence, truth = head(2000, 0.4, 0.22, seed=0)
    calibration = fit_calibration(presence, truth, 0.22)
    fresh, truth = head(5000, 0.4, 0.22, seed=1)
    after = applied(calibration, fresh)
    assert error_of(fresh, truth) >= 0.08
    assert error_of(after, truth) < 0.03
    assert after.mean() == pytest.approx(truth.mean(), abs=0.015)
    assert (np.diff(after[np.argsort(fresh)]) >= 0).all()
    ones = np.ones((1, len(truth)))
    assert auroc(truth, after, ones) == pytest.approx(auroc(truth, fresh, ones), abs=1e-6)


@pytest.mark.parametrize(("slope", "bias"), [(0.5, -1.2), (1.0, 0.0), (2.2, 0.7)])
def test_the_line_that_blurred_the_log_odds_is_found(slope: float, bias: float) -> None:
    rng = np.random.default_rng(2)
    true = rng.normal(-1.5, 2, 30_000)
    truth = rng.random(len(true)) < sigmoid(true)
    presence = sigmoid((true - bias) / slope).astype(np.float32)
    found = fit_calibration(presence, truth, float(truth.mean()))
    assert (found.slope, found.bias) == pytest.approx((slope, bias), abs=0.06)


def test_validation_images_of_another_prevalence_fit_the_same_line() -> None:
    alike, other = (fit_calibration(*head(40_000, 0.4, used, seed=3), 0.22) for used in (0.22, 0.5))
    assert (other.slope, other.bias) == pytest.approx((alike.slope, alike.bias), abs=0.07)
    assert other.bias == pytest.approx(logit(0.22) - logit(0.4), abs=0.07)  # Bayes' rule


@pytest.mark.parametrize(
    ("presence", "truth", "least", "most"),
    [
        ([0.1, 0.2, 0.9, 0.3, 0.05], [0, 0, 1, 0, 0], 0.05, 0.7),
        ([0.1, 0.2, 0.9, 0.3, 0.05], [0, 0, 0, 0, 0], 0.05, 0.6),
        ([0.1, 0.2, 0.9, 0.3, 0.05], [1, 1, 1, 1, 1], 0.05, 0.8),
        ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0], 0.03, 0.98),  # perfect separation, in exact 0 and 1
        ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1], 0.1, 0.7),  # the wrong way round: the order stays
        ([1, 1, 1, 1, 1], [0, 0, 0, 0, 0], 0.1, 0.4),
        ([0.5], [1], 0.2, 0.3),
    ],
)
def test_a_few_images_give_a_finite_line_and_no_certainty(
    presence: list[float], truth: list[int], least: float, most: float
) -> None:
    given = np.array(presence, np.float32)
    for prevalence in (0.22, 0.0, 1.0):
        found = fit_calibration(given, np.array(truth, bool), prevalence)
        assert 0 < found.slope < 2
        assert abs(found.bias) < 30
        after = applied(found, given)
        assert ((after > 0) & (after < 1)).all()
        if prevalence == 0.22:
            assert least <= after.min() <= after.max() <= most
            assert abs(after.mean() - 0.22) < 0.25


def test_presence_of_0_and_1_and_between_neighbouring_floats_stays_in_order() -> None:
    rng, tiny = np.random.default_rng(0), np.float32(1e-30)
    starts = np.concatenate([[0, 1 - 2.0**-22], rng.random(200), 10 ** rng.uniform(-9, 0, 200)])
    runs = (starts.astype(np.float32).view(np.int32)[:, None] + np.arange(60, dtype=np.int32)).view(
        np.float32
    )
    presence = np.sort(np.append(runs.clip(0, 1).ravel(), [0, tiny, 1]).astype(np.float32))
    for calibration in (Calibration(0.3, -3), Calibration(5, 2), Calibration(1, 0.1)):
        after = applied(calibration, presence)
        assert after.dtype == np.float32
        assert after.min() >= 0 and after.max() <= 1
        assert (np.diff(after) >= 0).all()
        inside = (presence > 1e-7) & (presence < 0.9999)
        expected = sigmoid(logit(presence[inside]) * calibration.slope + calibration.bias)
        np.testing.assert_allclose(after[inside], expected, atol=2e-6)
    assert np.array_equal(applied(Calibration(), presence), presence)
    assert np.isnan(applied(Calibration(2, 1), np.array([np.nan], np.float32)))  # so divergence is noticed


@pytest.mark.usefixtures("tiny")
def test_another_prevalence_multiplies_the_odds_of_presence() -> None:
    images, old = squares(3).images.numpy(), Detector((tiny_member(0),), 32, Thresholds(), "a")
    own = replace(old, prevalence=0.2)
    before, after = (
        logit(np.array([p.presence for p in one.predictor.predict(images)]))
        for one in (own, own.at_prevalence(0.05))
    )
    np.testing.assert_allclose(after - before, math.log((0.05 / 0.95) / (0.2 / 0.8)), atol=1e-5)
    assert own.at_prevalence(None) == own
    assert own.at_prevalence(0.05).thresholds == own.thresholds
    for prevalence in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match=f"prevalence={prevalence}: needs a fraction between 0 and 1"):
            own.at_prevalence(prevalence)
    for unknown in (None, 0.0, 1.0, float("nan"), 1.5):
        with pytest.raises(UserError, match=rf"prevalence=0\.05: .*this one holds {unknown}$"):
            replace(own, prevalence=unknown).at_prevalence(0.05)
    assert make_ensemble([own, own]).prevalence == 0.2
    assert make_ensemble([own, old]).prevalence is None


# The device and the number format that a setting names


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is available")
    with pytest.raises(UserError, match="device=cuda"):
        choose_compute(Device(device="cuda"))


def test_what_was_trained_in_fp16_computes_in_fp32_on_a_cpu_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_compute(Device(device="cpu"), "fp16").precision == "fp32"
    assert "using fp32" in caplog.text
    assert choose_compute(Device(device="cpu", precision="bf16"), "fp16").precision == "bf16"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_cpu_uses_freed_memory_again_without_asking_the_system() -> None:
    choose_compute(Device(device="cpu", precision="fp32"))
    pages = 2**25 // resource.getpagesize()
    new_pages: list[int] = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25, dtype=torch.uint8)  # 32 MB, for which glibc otherwise asks each time
        new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(new_pages) < pages / 10  # not the first ones: the freed places must fit
