"""Training that is interrupted, runs out of memory, has NaN outputs, or averages weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make
from tiny_network import CPU, noise, weights_of

from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.progress import read_checkpoint
from pneumo_experiments.learning.averaging import MovingAverage, mean_state
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.fit import Epoch, fit
from pneumo_experiments.learning.loader import batches
from pneumo_experiments.learning.network import Output, PneumothoraxNet, build
from pneumo_experiments.learning.trainer import State, Trainer
from pneumo_experiments.settings import Recipe

pytestmark = pytest.mark.usefixtures("tiny")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_training_ends_in_the_same_weights_bit_for_bit(ema: float, tmp_path: Path) -> None:
    recipe = make(Recipe, batch_size=4, augment=True, seed=3, ema=ema, learning_rate=1e-3)
    whole = build("tiny", "none", 0)
    epochs = list(fit(whole, noise(6), recipe, 3, CPU))
    checkpoint = Checkpoint(tmp_path / "one")
    stopped = build("tiny", "none", 0)
    for epoch in fit(stopped, noise(6), recipe, 3, CPU):
        if epoch.number == 2:
            checkpoint.save({"state": epoch.state()}, {})
            break
    torch.rand(5)  # the global generator in another state
    last = checkpoint.last()
    assert last is not None
    other = build("tiny", "none", 1)
    (final,) = list(fit(other, noise(6), recipe, 3, CPU, state=last["state"]))
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
        (epoch,) = list(fit(network, noise(6), recipe, 1, CPU))
    assert ["micro_batch=3 " in str(warning.message) for warning in caught] == [True, False]
    assert epoch.micro_batch == 2
    assert epoch.state()["steps"] == 1
    assert np.isfinite(epoch.losses["loss"])


def test_memory_too_small_for_one_image_is_an_error_that_says_what_to_do() -> None:
    network = Cramped("tiny")
    network.room = 0
    with pytest.raises(UserError, match=r"micro_batch=1: .*smaller image_size"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(fit(network, noise(2), make(Recipe, batch_size=2, augment=False), 1, CPU))


class Still(PneumothoraxNet):
    """Batch norm that does not look at the batch, so that pieces of a batch give the whole one's gradient."""

    def train(self, mode: bool = True) -> Still:
        super().train(False)
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
        list(fit(network, noise(6), recipe, 1, CPU))
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
    epoch = next(iter(fit(network, noise(24), recipe, 1, CPU)))
    assert epoch.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in network.parameters())
    assert all(np.isfinite(value) for value in epoch.losses.values())


def test_too_many_steps_without_a_finite_gradient_end_the_training_with_advice() -> None:
    network = SometimesNan("tiny")
    network.bad = frozenset(range(2, 6))
    with pytest.raises(UserError, match=r"4 of 6 steps of epoch 1 .* diverged; try a tenth"):
        list(fit(network, noise(12), make(Recipe, batch_size=2, augment=False, positive_share=0), 1, CPU))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_skipped_steps_do_not_shrink_the_gradient_scale(precision: str) -> None:
    network = build("tiny", "none", 0)
    trainer = Trainer(
        network, make(Recipe, batch_size=2, learning_rate=1e-2), 400, ComputeConfig(CPU.device, precision)
    )
    (batch,) = batches(noise(2), make(Recipe, batch_size=2, augment=False), 1, 1, CPU.device)
    nan_batch = replace(batch, images=batch.images * float("nan"))
    trainer.step(batch)
    before = weights_of(network.mask_head)
    for _ in range(200):  # halved so often, the smallest float32 is 0
        assert not trainer.step(nan_batch)[1]
    network.load_state_dict({n: t.nan_to_num(0.0) for n, t in network.state_dict().items()})  # batch norm's
    assert trainer.step(batch)[1]
    after = weights_of(network.mask_head)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_the_moving_average_follows_the_weights_as_its_formula_says() -> None:
    network = build("tiny", "none", 0)
    average = MovingAverage(network, 0.5)
    name = "presence_head.bias"
    expected = float(network.presence_head.bias.detach())
    for step in range(1, 5):
        with torch.no_grad():
            network.presence_head.bias.fill_(step)
        average.update(network)
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


def test_a_checkpoint_of_another_version_is_not_used_and_gives_a_warning(tmp_path: Path) -> None:
    state = dict.fromkeys(State.__annotations__, 0)
    saved: dict[str, Any] = {"run_id": "a", "history": [], "dices": {}, "state": state}
    checkpoint = Checkpoint(tmp_path / "one")
    checkpoint.save(saved, {})
    assert read_checkpoint(checkpoint) == saved | {"networks": {}}
    others: list[dict[str, Any]] = [
        {name: value for name, value in saved.items() if name != "run_id"},
        {name: value for name, value in saved.items() if name != "state"},
        saved | {"unknown": 1},
        saved | {"state": state | {"unknown": 1}},
        saved | {"state": {name: value for name, value in state.items() if name != "scaler"}},
        saved | {"state": [1]},
    ]
    for other in others:
        checkpoint.save(other, {})
        with pytest.warns(UserWarning, match="another version; training starts over"):
            assert read_checkpoint(checkpoint) is None
    torch.save([1, 2], checkpoint.folder / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt: cannot be read"):
        assert read_checkpoint(checkpoint) is None


def test_pretrained_layers_learn_at_their_own_rate() -> None:
    network = build("fcn_resnet50", "none", 0)
    before = weights_of(network)
    network.pretrained = frozenset(name for name, _ in network.named_parameters() if "backbone" in name)
    recipe = make(Recipe, batch_size=4, augment=False, pretrained_lr_scale=0, weight_decay=0.01)
    epoch: Epoch = next(iter(fit(network, noise(4), recipe, 1, CPU)))
    after = copy.deepcopy(epoch.network).state_dict()
    assert torch.equal(after["backbone.layer4.0.conv1.weight"], before["backbone.layer4.0.conv1.weight"])
    assert not torch.equal(after["mask_head.0.weight"], before["mask_head.0.weight"])
