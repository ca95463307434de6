"""Several processes that train one network together."""

from __future__ import annotations

import pickle
import signal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from helpers import changed, environment, make, soak
from tiny_network import CPU, add_tiny_network, noise, random_network, weights_of
from torch import nn

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import update_batch_norm
from pneumo_experiments.learning.fit import fit
from pneumo_experiments.learning.launch import launch
from pneumo_experiments.learning.network import build_network
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.settings import Recipe

if TYPE_CHECKING:  # its imports take seconds, in each new process
    from command_server import CommandServer

# Odd batches, so that one process has more images than the other.
RECIPE = make(Recipe, batch_size=5, learning_rate=1e-3, augment="strong", ema=0.9, seed=1, freeze_epochs=1)


def trained(recipe: Recipe) -> dict[str, Any]:
    """Losses of each epoch and the last weights, of however many processes run this."""
    add_tiny_network()
    network = build_network("tiny", "none", 0)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process draws its own
    epochs = list(fit(Predictor(network, CPU), noise(10), recipe, 3))
    weights = {name: tensor.numpy() for name, tensor in weights_of(epochs[-1].network).items()}
    network = random_network(0)
    distributed.convert_sync_batchnorm(network, CPU.device)
    update_batch_norm(network, noise(37), recipe, CPU)
    own = torch.cat([tensor for name, tensor in network.state_dict().items() if "running_" in name])
    statistics = distributed.all_gather_rows(own[None].numpy(), distributed.world_size())
    return {"losses": [epoch.losses for epoch in epochs], "weights": weights, "statistics": statistics}


def loss_of_presence() -> float:
    """Loss of an epoch of a tiny network whose mask heads get no gradient."""
    add_tiny_network()
    weights = {"bce_weight": 0, "dice_weight": 0, "focal_weight": 0, "aux_weight": 0}
    recipe = make(Recipe, batch_size=2, augment=False, **weights)
    (epoch,) = fit(Predictor(build_network("tiny", "none", 0), CPU), noise(4), recipe, 1)
    return epoch.losses["total"]


def random_rows() -> torch.Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100


def reduced(values: torch.Tensor) -> dict[str, Any]:
    """What the functions of learning.distributed return for rows divided between the processes."""
    rows = values[distributed.rank() :: distributed.world_size()].clone().requires_grad_()
    norm = distributed.SyncBatchNormOnCPU(values.shape[1]).train()
    norm(rows[..., None, None]).pow(3).sum().backward()
    assert rows.grad is not None and norm.running_var is not None
    given = {"a": values, "b": [1, "x", None]} if distributed.is_main_process() else None
    return {
        "rows": distributed.all_gather_rows(rows.detach().numpy(), len(values)).tolist(),
        "gradient": distributed.all_gather_rows(rows.grad.numpy(), len(values)).tolist(),
        "variance": norm.running_var.tolist(),
        "shared": distributed.broadcast(given)["b"],
        "tensor": distributed.broadcast(given)["a"].tolist(),
    }


class Together(NamedTuple):
    """What two processes computed; they start once, which takes seconds."""

    training: dict[str, Any]
    loss_of_presence: float
    reductions: dict[str, Any]
    failure: str  # of one of two other processes


def work_together() -> tuple[Any, ...]:
    return (trained(changed(RECIPE, micro_batch=2)), loss_of_presence(), reduced(random_rows()))


# Forks two processes that need import nothing; a new process that starts two new ones is tested below.
FORKED = """
import pickle, sys
from functools import partial
from pathlib import Path
from pneumo_experiments.learning import launch
from learning.test_distributed import failure_of, work_together

launch.LaunchConfig = partial(launch.LaunchConfig, start_method="fork")
Path(sys.argv[1]).write_bytes(pickle.dumps((*launch.launch(2, work_together), failure_of("mistake"))))
"""


@pytest.fixture(scope="module")
def together(commands: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    code, said = commands.start("result", folder=folder, environment=environment(), code=FORKED).communicate()
    assert code == 0, said
    return Together(*pickle.loads((folder / "result").read_bytes()))


@pytest.mark.usefixtures("tiny")
def test_two_processes_learn_what_one_does_with_the_same_batches(together: Together) -> None:
    # Two and three images at once, in one process or by one and two, and one and one, in two.
    one, two = trained(changed(RECIPE, micro_batch=3)), together.training
    for alone, divided in zip(one["losses"], two["losses"], strict=True):
        print({name: (round(alone[name], 5), round(divided[name], 5)) for name in alone})
        assert divided == pytest.approx(alone, abs=1e-3)
    for name, weight in one["weights"].items():
        if "running_mean" in name:
            assert two["weights"][name] == pytest.approx(weight, rel=0.02, abs=0.02), name
    # Of each process; in one the batches hold 13, 12 and 12 images, in two 19 and 18.
    first, second = two["statistics"]
    assert (first == second).all()
    assert first == pytest.approx(one["statistics"][0], rel=0.02, abs=0.02)


def test_processes_do_not_wait_for_heads_whose_losses_have_no_weight(together: Together) -> None:
    assert 0 < together.loss_of_presence < 10


def test_synchronised_batch_normalisation_is_that_of_all_rows(together: Together) -> None:
    values, result = random_rows(), together.reductions
    assert result["rows"] == values.tolist()
    assert result["shared"] == [1, "x", None]
    assert result["tensor"] == values.tolist()
    alone, norm = values.clone().requires_grad_(), nn.BatchNorm2d(3).train()
    norm(alone[..., None, None]).pow(3).sum().backward()
    assert alone.grad is not None and norm.running_var is not None
    assert torch.tensor(result["gradient"]) == pytest.approx(alone.grad, abs=1e-3)
    assert result["variance"] == pytest.approx(norm.running_var.tolist(), rel=1e-4)


def test_on_gpus_torch_s_own_layers_keep_parameters_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    network = build_network("fcn_resnet50", "none", 0)
    before = dict(network.named_parameters())
    names = list(network.state_dict())
    layers = [type(module) for module in network.modules()].count(nn.BatchNorm2d)
    distributed.convert_sync_batchnorm(network, torch.device("cuda"))
    assert list(network.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(nn.SyncBatchNorm) == layers > 50
    assert nn.BatchNorm2d not in kinds


def fail(kind: str) -> None:
    """One process fails while the other waits for it."""
    if distributed.rank() == 1:
        if kind == "mistake":
            raise UserError("epochs: none left")
        raise ZeroDivisionError(kind)
    torch.distributed.barrier()


def failure_of(kind: str) -> str:
    with pytest.raises((UserError, RuntimeError)) as caught:
        launch(2, fail, kind)
    return repr(caught.value)


def test_the_mistake_of_one_process_ends_all_and_is_reported(together: Together) -> None:
    assert together.failure == "UserError('epochs: none left')"


@soak  # it starts Python and imports torch three times
def test_the_failure_of_one_process_ends_all_and_is_reported() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match=r"(?s)process 1 failed: .*in fail.*ZeroDivisionError: a bug"):
        launch(2, fail, "a bug")
    assert signal.getsignal(signal.SIGTERM) is handler
