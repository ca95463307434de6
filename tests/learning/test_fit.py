"""Training: its steps, means of weights and saved state; also when it is interrupted or out of memory."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make, soak
from tiny_network import CPU, noise, random_network, squares, weights_of
from torch import nn
from torch.optim.swa_utils import update_bn

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import averaging
from pneumo_experiments.learning.averaging import MovingAverage, mean_state, update_batch_norm
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import ComputeConfig, choose_compute
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import Trainer, lr_factor, parameter_groups
from pneumo_experiments.settings import Device, Recipe

pytestmark = pytest.mark.usefixtures("tiny")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_training_ends_in_the_same_weights_bit_for_bit(ema: float, tmp_path: Path) -> None:
    whims = {"augment": "mild", "freeze_epochs": 2, "crop": 24} if ema else {"augment": "mild"}
    recipe = make(Recipe, batch_size=4, seed=3, ema=ema, learning_rate=1e-3, **whims)
    whole = build_network("tiny", "none", 0)
    epochs = list(fit(Predictor(whole, CPU), noise(6), recipe, 3))
    checkpoint = Checkpoint(tmp_path / "one")
    stopped = build_network("tiny", "none", 0)
    for epoch in fit(Predictor(stopped, CPU), noise(6), recipe, 3):
        if epoch.number == 2:
            checkpoint.save({"state": epoch.state()}, {})
            break
    torch.rand(5)  # the global generator in another state
    last = checkpoint.last()
    assert last is not None
    other = build_network("tiny", "none", 1)
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
    recipe = make(Recipe, batch_size=6, augment=False, positive_fraction=0)
    with pytest.warns(UserWarning, match="micro_batch=[32] images .*batch_size=6") as caught:
        (epoch,) = list(fit(Predictor(network, CPU), noise(6), recipe, 1))
    assert ["micro_batch=3 " in str(warning.message) for warning in caught] == [True, False]
    assert epoch.micro_batch == 2
    assert epoch.state()["steps"] == 1
    assert np.isfinite(epoch.losses["total"])
    network.room = 0  # none for a single image
    with pytest.raises(UserError, match=r"micro_batch=1: .*smaller image_size"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(fit(Predictor(network, CPU), noise(6), recipe, 1))


class Still(PneumothoraxNet):
    """Batch norm that does not look at the batch, so that pieces of a batch give the whole one's gradient."""

    def train(self, mode: bool = True) -> Still:
        super().train(False)
        self.training = mode
        return self


def test_pieces_of_a_batch_add_up_to_its_step() -> None:
    # Terms that are means over images; the Dice of a batch is not the mean over its pieces.
    values = {"batch_size": 6, "augment": False, "dice_weight": 0, "learning_rate": 1e-3, "warmup": 0}
    torch.manual_seed(0)
    start, ends = Still("tiny"), list[dict[str, torch.Tensor]]()
    for micro_batch in (0, 2):
        network = copy.deepcopy(start)
        list(fit(Predictor(network, CPU), noise(6), make(Recipe, micro_batch=micro_batch, **values), 1))
        ends.append(weights_of(network))
    before = weights_of(start)
    for name, tensor in ends[0].items():
        # Adam's first step is the sign of the gradient, where that is not zero but for rounding.
        assert (ends[1][name] - tensor).float().abs().mean() < 1e-4, name
    assert sum(not torch.equal(before[name], tensor) for name, tensor in ends[0].items()) >= 10


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


def test_steps_without_a_finite_gradient_are_skipped_and_counted_and_many_end_the_training() -> None:
    torch.manual_seed(0)
    network, recipe = SometimesNan("tiny"), make(Recipe, batch_size=2, augment=False, positive_fraction=0)
    network.bad = frozenset([3, 14, 15, 16, 17])
    (epoch,) = fit(Predictor(network, CPU), noise(24), recipe, 1)
    assert epoch.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in network.parameters())
    assert all(np.isfinite(value) for value in epoch.losses.values())
    with pytest.raises(UserError, match=r"4 of 6 steps of epoch 1 .* diverged; try a tenth"):
        list(fit(Predictor(network, CPU), noise(12), recipe, 1))


def test_what_trained_leaves_the_memory_at_once() -> None:
    """In a circle it would stay until Python looks for circles, which a GPU that is full does not cause."""
    gc.disable()
    try:
        network = build_network("tiny", "none", 0)
        recipe = make(Recipe, batch_size=4, ema=0.9, learning_rate=1e-3)
        (epoch,) = fit(Predictor(network, CPU), noise(6), recipe, 1)
        left = [weakref.ref(network), weakref.ref(epoch.network), weakref.ref(next(network.parameters()))]
        assert left[0]() is not left[1]()
        del network, epoch
        assert [each() for each in left] == [None, None, None]
    finally:
        gc.enable()


def test_pretrained_layers_learn_at_their_own_rate() -> None:
    network = build_network("tiny", "none", 0)
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
    recipe = make(
        Recipe, batch_size=8, learning_rate=learning_rate, augment=False, positive_fraction=0, seed=1
    )
    network = build_network(name, "none", recipe.seed)
    compute = CPU if name == "tiny" else choose_compute(Device())
    epochs = list(fit(Predictor(network, compute), squares(16), recipe, count))
    assert [epoch.number for epoch in epochs] == list(range(1, count + 1))
    assert epochs[-1].losses["total"] < 0.7 * epochs[0].losses["total"]
    unseen = squares(8, seed=5)
    actual = [p.mask for p in Predictor(network, compute).predict(unseen.images.numpy())]
    pairs = list(zip(actual, unseen.targets.numpy(), strict=True))
    inside = np.mean([mask[target > 0].mean() for mask, target in pairs if target.any()])
    outside = np.mean([mask[target == 0].mean() for mask, target in pairs])
    assert inside > outside + 0.2


# One step, and the learning rates of all


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_without_a_finite_gradient_changes_nothing(precision: str) -> None:
    network = build_network("tiny", "none", 0)
    recipe = make(Recipe, batch_size=2, learning_rate=1e-2, ema=0.5, augment=False)
    trainer = Trainer(Predictor(network, ComputeConfig(CPU.device, precision)), recipe, 400)
    (batch,) = batches(noise(2), recipe, 1, 1, CPU.device)
    bad_batch = replace(batch, images=batch.images * float("inf"))
    trainer.step(batch)
    assert trainer.average is not None
    before, average = weights_of(network), weights_of(trainer.average.network)
    for _ in range(3):
        assert not trainer.step(bad_batch)[1].isfinite()
        assert trainer.scaler.get_scale() == 1  # halved 150 times, the smallest float32 is 0
    for after, start in ((weights_of(network), before), (weights_of(trainer.average.network), average)):
        assert all(torch.equal(after[name], start[name]) for name in start)  # batch statistics, too
    assert trainer.step(batch)[1].isfinite()
    for after, start in ((weights_of(network), before), (weights_of(trainer.average.network), average)):
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        assert not torch.equal(after["mask_head.0.weight"], start["mask_head.0.weight"])
        assert not torch.equal(after["mask_head.1.running_mean"], start["mask_head.1.running_mean"])


def test_a_frozen_backbone_stays_as_it_is_for_so_many_epochs() -> None:
    network = random_network(0)
    before = weights_of(network)
    recipe = make(Recipe, batch_size=4, augment="none", freeze_epochs=2)
    kept = {name for name in before if name.startswith("backbone.")}
    assert any("running_mean" in name for name in kept)
    for epoch in fit(Predictor(network, CPU), noise(8), recipe, 3):
        now = weights_of(network)
        changed = {name for name in before if not torch.equal(now[name], before[name])}
        assert {"mask_head.4.weight", "presence_head.weight"} <= changed
        assert (kept <= changed) if epoch.number == 3 else not (kept & changed)


def test_frozen_batch_normalisation_keeps_its_statistics_and_learns_its_scales() -> None:
    network = random_network(0)
    before = weights_of(network)
    recipe = make(Recipe, batch_size=4, augment="none", freeze_bn=True, learning_rate=1e-2)
    list(fit(Predictor(network, CPU), noise(8), recipe, 1))
    now = weights_of(network)
    changed = {name for name in before if not torch.equal(now[name], before[name])}
    statistics = {name for name in before if "running_" in name and name.startswith("backbone.")}
    assert statistics and not statistics & changed
    scales = {name.replace("running_mean", "weight") for name in statistics if "running_mean" in name}
    assert scales <= changed
    assert any("running_" in name for name in changed)  # those of the heads go on


def test_without_a_weight_in_the_loss_the_auxiliary_head_stays_as_it_is() -> None:
    network = build_network("tiny", "none", 0)
    before, batch_norm = weights_of(network.aux_head), weights_of(network.mask_head)["1.running_mean"]
    recipe = make(Recipe, batch_size=2, augment=False, aux_weight=0.0, weight_decay=1.0)
    trainer = Trainer(Predictor(network, CPU), recipe, 2)
    for batch in batches(noise(4), recipe, 1, 1, CPU.device):
        terms, norm = trainer.step(batch)
        assert norm.isfinite()
        assert "aux" not in terms
    after = weights_of(network.aux_head)
    assert all(torch.equal(after[name], before[name]) for name in before)  # its batch statistics, too
    assert not torch.equal(weights_of(network.mask_head)["1.running_mean"], batch_norm)


def test_the_rate_rises_for_a_fifth_and_ends_near_zero() -> None:
    recipe = make(Recipe, warmup=0.2, schedule="cosine")
    assert lr_factor(recipe, 0) == pytest.approx(0.05)
    assert lr_factor(recipe, 0.2) == pytest.approx(1)
    assert lr_factor(recipe, 0.6) == pytest.approx(0.5)
    assert lr_factor(recipe, 1) == pytest.approx(0, abs=1e-9)
    polynomial = make(Recipe, warmup=0, schedule="polynomial")
    assert [lr_factor(polynomial, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])


@pytest.mark.parametrize("count", [2, 4])
def test_only_kernels_decay_and_each_parameter_has_the_rate_of_its_layer(count: int) -> None:
    network = build_network("tiny", "none", 0)
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


# Means of weights: over the steps, and of the best epochs


def test_the_moving_average_follows_the_weights_as_its_formula_says() -> None:
    network = build_network("tiny", "none", 0)
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
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[0].momentum = 0.25
    # Another average than the mean over images: of 40 images, in batches of 14, 13 and 13.
    update_batch_norm(
        network, data, make(Recipe, batch_size=2, positive_fraction=1.0, crop=16), CPU, seen.append
    )
    assert seen == [14, 13, 13][: 3 if limit == 1000 else 2]
    plain = make(Recipe, batch_size=16, positive_fraction=0.0, augment=False)
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
    assert [norm.momentum for norm in norms] == [0.25] + [0.1] * (len(norms) - 1)


# The state that an interrupted training leaves


def test_a_checkpoint_holds_the_given_networks_and_no_others(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep" / "one")
    assert checkpoint.last() is None
    checkpoint.save({"steps": 1}, {1: {"w": torch.ones(2)}})
    checkpoint.save({"steps": 2}, {1: {"w": torch.zeros(2)}, 2: {"w": torch.zeros(2)}})
    checkpoint.save({"steps": 3}, {2: {"w": torch.zeros(2)}})
    # What a process leaves that is killed before it wrote its last state.
    torch.save({"w": torch.zeros(2)}, checkpoint.folder / "epoch-3.pt")
    last = checkpoint.last()
    assert last is not None
    assert (last["steps"], [*last["networks"]]) == (3, [2])
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == ["epoch-2.pt", "last.pt"]
    checkpoint.clear()
    assert not list(checkpoint.folder.iterdir())  # the folder itself goes with its lock


def test_a_checkpoint_that_is_damaged_or_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "one")
    checkpoint.save({"steps": 1}, {})
    path = checkpoint.folder / "last.pt"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"last\.pt: cannot be read"):
        assert checkpoint.last() is None
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written .*the training continues"):
        Checkpoint(tmp_path / "file" / "one").save({"steps": 1}, {})
