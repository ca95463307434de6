"""Probabilities of one network or several, with and without test-time augmentation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_network import CPU, random_network, squares

from pneumo_experiments.learning.network import PneumothoraxNet, build
from pneumo_experiments.learning.predict import Ensemble, Predictor, to_native


@pytest.fixture(scope="module")
def network(tiny: None) -> PneumothoraxNet:
    return build("tiny", "none", seed=0)


def test_predictions_do_not_depend_on_the_batch(network: PneumothoraxNet) -> None:
    images = squares(5).images.numpy()
    one, all_at_once = (list(Predictor(network, CPU).predict(images, batch_size)) for batch_size in (1, 5))
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_allclose(a.mask, b.mask, atol=1e-5)
        assert a.presence == pytest.approx(b.presence, abs=1e-5)


def test_flip_averaging_is_symmetric(network: PneumothoraxNet) -> None:
    images = squares(2).images.numpy()
    predictor = Predictor(network, CPU, tta="flip")
    (a, _), (b, _) = list(predictor.predict(images)), list(predictor.predict(images[:, :, ::-1]))
    np.testing.assert_allclose(a.mask, b.mask[:, ::-1], atol=1e-5)
    assert a.presence == pytest.approx(b.presence, abs=1e-5)
    plain = next(Predictor(network, CPU).predict(images))
    assert np.abs(plain.mask - a.mask).max() > 1e-4


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
def test_an_ensemble_predicts_the_mean_of_its_members_in_any_order() -> None:
    images = squares(5).images.numpy()
    members = [Predictor(random_network(seed), CPU, tta="flip" if seed == 1 else "none") for seed in range(3)]
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
