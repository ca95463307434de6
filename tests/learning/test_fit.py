"""Training, also when it is interrupted, runs out of memory or has NaN outputs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make, soak
from tiny_network import CPU, noise, squares, weights_of

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.settings import Device, Recipe

pytestmark = pytest.mark.usefixtures("tiny")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_training_ends_in_the_same_weights_bit_for_bit(ema: float, tmp_path: Path) -> None:
    recipe = make(Recipe, batch_size=4, augment=True, seed=3, ema=ema, learning_rate=1e-3)
    whole = build("tiny", "none", 0)
    epochs = list(fit(Predictor(whole, CPU), noise(6), recipe, 3))
    checkpoint = Checkpoint(tmp_path / "one")
    stopped = build("tiny", "none", 0)
    for epoch in fit(Predictor(stopped, CPU), noise(6), recipe, 3):
        if epoch.number == 2:
            checkpoint.save({"state": epoch.state()}, {})
            break
    torch.rand(5)  # the global generator in another state
    last = checkpoint.last()
    assert last is not None
    other = build("tiny", "none", 1)
    (final,) = list(fit(Predictor(other, CPU), noise(6), recipe, 3, state=last["state"]))
    assert final.number == 3
    assert final.losses == epochs[-1].losses
    assert_equal(weights_of(other), weights_of(whole))
    assert_equal(weights_of(final.network), weights_of(epochs[-1].network))


class Cramped(PneumothoraxNet):
    """A network on a device that holds no more than so many images."""

    room = 100

    def forward(self, images: torch.Tensor) -> Output:
        if self.training and len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


def test_when_memory_runs_out_fewer_images_pass_at_once_and_a_step_stays_a_step() -> None:
    network = Cramped("tiny")
    network.room = 2
    recipe = make(Recipe, batch_size=6, augment=False, positive_share=0)
    with pytest.warns(UserWarning, match="micro_batch=[32] images .*batch_size=6") as caught:
        (epoch,) = list(fit(Predictor(network, CPU), noise(6), recipe, 1))
    assert ["micro_batch=3 " in str(warning.message) for warning in caught] == [True, False]
    assert epoch.micro_batch == 2
    assert epoch.state()["steps"] == 1
    assert np.isfinite(epoch.losses["loss"])


def test_memory_too_small_for_one_image_is_an_error_that_says_what_to_do() -> None:
    network = Cramped("tiny")
    network.room = 0
    with pytest.raises(UserError, match=r"micro_batch=1: .*smaller image_size"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(fit(Predictor(network, CPU), noise(2), make(Recipe, batch_size=2, augment=False), 1))


class Still(PneumothoraxNet):
    """Batch norm that does not look at the batch, so that pieces of a batch give the whole one's gradient."""

    def train(self, mode: bool = True) -> Still:
        super().train(False)
        self.training = mode
        return self


def test_pieces_of_a_batch_add_up_to_its_step() -> None:
    ends: list[dict[str, torch.Tensor]] = []
    for micro_batch in (0, 2):
        torch.manual_seed(0)
        network = Still("tiny")
        # Terms that are means over images; the Dice of a batch is not the mean over its pieces.
        recipe = make(
            Recipe,
            batch_size=6,
            micro_batch=micro_batch,
            augment=False,
            dice_weight=0,
            learning_rate=1e-3,
            warmup=0,
        )
        list(fit(Predictor(network, CPU), noise(6), recipe, 1))
        ends.append(weights_of(network))
    moved = 0
    torch.manual_seed(0)
    start = weights_of(Still("tiny"))
    for name, tensor in ends[0].items():
        moved += not torch.equal(start[name], tensor)
        # Adam's first step is the sign of the gradient, where that is not zero but for rounding.
        assert (ends[1][name] - tensor).float().abs().mean() < 1e-4, name
    assert moved >= 10


class SometimesNan(PneumothoraxNet):
    """Outputs NaN in some training steps."""

    calls = 0
    bad = frozenset[int]()

    def forward(self, images: torch.Tensor) -> Output:
        output = super().forward(images)
        if self.training:
            self.calls += 1
            if self.calls in self.bad:
                return Output(output.mask * float("nan"), output.aux, output.presence)
        return output


def test_a_step_without_a_finite_gradient_is_skipped_and_counted() -> None:
    torch.manual_seed(0)
    network = SometimesNan("tiny")
    network.bad = frozenset([3])
    recipe = make(Recipe, batch_size=2, augment=False, positive_share=0)
    epoch = next(iter(fit(Predictor(network, CPU), noise(24), recipe, 1)))
    assert epoch.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in network.parameters())
    assert all(np.isfinite(value) for value in epoch.losses.values())


def test_too_many_steps_without_a_finite_gradient_end_the_training_with_advice() -> None:
    network = SometimesNan("tiny")
    network.bad = frozenset(range(2, 6))
    with pytest.raises(UserError, match=r"4 of 6 steps of epoch 1 .* diverged; try a tenth"):
        recipe = make(Recipe, batch_size=2, augment=False, positive_share=0)
        list(fit(Predictor(network, CPU), noise(12), recipe, 1))


def test_pretrained_layers_learn_at_their_own_rate() -> None:
    network = build("tiny", "none", 0)
    before = weights_of(network)
    network.pretrained = frozenset(name for name, _ in network.named_parameters() if "backbone" in name)
    recipe = make(Recipe, batch_size=4, augment=False, pretrained_lr_scale=0, weight_decay=0.01)
    epoch: Epoch = next(iter(fit(Predictor(network, CPU), noise(4), recipe, 1)))
    after = copy.deepcopy(epoch.network).state_dict()
    assert torch.equal(after["backbone.widen.weight"], before["backbone.widen.weight"])
    assert not torch.equal(after["mask_head.0.weight"], before["mask_head.0.weight"])


@pytest.mark.parametrize(
    ("name", "count", "learning_rate"),
    [("tiny", 40, 3e-2), pytest.param("fcn_resnet50", 9, 1e-3, marks=soak)],
)
def test_training_learns_to_segment_bright_squares(name: str, count: int, learning_rate: float) -> None:
    recipe = make(Recipe, batch_size=8, learning_rate=learning_rate, augment=False, positive_share=0, seed=1)
    network = build(name, "none", recipe.seed)
    compute = CPU if name == "tiny" else choose_compute(Device())
    epochs = list(fit(Predictor(network, compute), squares(16), recipe, count))
    assert [epoch.number for epoch in epochs] == list(range(1, count + 1))
    assert epochs[-1].losses["loss"] < 0.7 * epochs[0].losses["loss"]
    unseen = squares(8, seed=5)
    actual = [p.mask for p in Predictor(network, compute).predict(unseen.images.numpy())]
    pairs = list(zip(actual, unseen.targets.numpy(), strict=True))
    inside = np.mean([mask[target > 0].mean() for mask, target in pairs if target.any()])
    outside = np.mean([mask[target == 0].mean() for mask, target in pairs])
    assert inside > outside + 0.2


@pytest.mark.usefixtures("tiny")
def test_one_seed_trains_to_the_same_weights() -> None:
    recipe = make(Recipe, batch_size=4, augment=True, seed=3)
    ends: list[torch.Tensor] = []
    for _ in range(2):
        network = build("tiny", "none", recipe.seed)
        list(fit(Predictor(network, CPU), squares(4), recipe, 1))
        ends.append(network.mask_head[0].weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.usefixtures("tiny")
def test_a_loss_that_is_not_finite_ends_with_advice() -> None:
    recipe = make(Recipe, batch_size=4, learning_rate=1e30, augment=False)
    network = build("tiny", "none", 0)
    with pytest.raises(UserError, match="learning_rate=1e\\+30"):
        list(fit(Predictor(network, CPU), squares(4), recipe, 3))
