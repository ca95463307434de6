"""Distributed training: processes that train one network together, each on its own device.

Without torchrun there is one process, and every function here returns its argument unchanged.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.autograd.function import Function, FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from pneumo_experiments.errors import UserError

Rows = TypeVar("Rows", bound=NDArray[np.generic])


def init_process_group() -> None:
    """Joins the process group that torchrun's environment describes; does nothing without one.

    Gloo exchanges tensors in host memory, NCCL those on NVIDIA devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def world_size() -> int:
    """Number of processes, on all hosts."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process (rank 0) writes files and reports progress."""
    return rank() == 0


def local_world_size() -> int:
    """Number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def local_device(kind: str) -> torch.device:
    """The device of this process, with its index, as in ``tensor.device``.

    Raises UserError when there are fewer GPUs than processes.
    """
    if kind == "cpu":
        return torch.device(kind)
    if kind != "cuda" or world_size() == 1:
        return torch.device(kind, torch.cuda.current_device() if kind == "cuda" else 0)
    count = torch.cuda.device_count()
    if local_world_size() > count:
        raise UserError(f"processes={local_world_size()}: each needs a GPU, but there are only {count}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of equal-shaped tensors over the processes, without gradient."""
    tensor = tensor.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value: Any) -> Any:
    """The first process's value, in all processes; other processes' values are ignored.

    Tensors in it must be on the CPU. It is unpickled: safe only because all processes are this program's.
    """
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def all_gather_rows(rows: Rows, count: int) -> Rows:
    """All rows (count, …), given by each process as ``rows[rank::world_size]`` of them."""
    if world_size() == 1:
        return rows
    own = torch.from_numpy(rows)  # pyright: ignore[reportUnknownMemberType]
    padded = torch.zeros((-(-count // world_size()), *rows.shape[1:]), dtype=own.dtype)
    padded[: len(rows)] = own
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(gathered, padded)
    return cast("Rows", torch.stack(gathered, dim=1).flatten(0, 1)[:count].numpy())


def convert_sync_batchnorm(network: nn.Module, device: torch.device) -> None:
    """Makes batch normalisation use the images of all processes; changes the network in place.

    Raises UserError for a network whose batch normalisation does more than that, as that of some encoders of
    timm, which also has the activation.
    """
    if world_size() == 1:
        return
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    if other := [type(each).__name__ for each in norms if type(each) is not nn.BatchNorm2d]:
        raise UserError(
            f"processes={world_size()}: the network has {other[0]}, which cannot be computed over all images"
            " of a group; train in one process, or choose another network"
        )
    if device.type == "cuda":  # the only device that torch's own supports
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # pyright: ignore[reportUnknownMemberType]
        return
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                layer = SyncBatchNormOnCPU(child.num_features, child.eps, child.momentum)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer)


def wrap_ddp(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over the processes; every parameter must get one."""
    if world_size() == 1:
        return network
    # The replacement of broadcast_buffers is new in torch 2.15.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(
            network,
            broadcast_buffers=False,  # synchronised batch normalisation keeps buffers equal
            gradient_as_bucket_view=True,
        )


def no_sync(network: nn.Module) -> AbstractContextManager[None]:
    """A context in which a network from ``wrap_ddp`` does not exchange gradients."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


class SyncBatchNormOnCPU(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015) over the images of all processes, on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        values = input.float()
        local = torch.full((1,), values.numel() / values.shape[1])
        count = all_reduce_sum(local)
        mean = _AllReduceSum.apply(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _AllReduceSum.apply((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class _AllReduceSum(Function):
    """Sum over the processes, with gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])


def all_reduce_means(sums: Tensor, images: int) -> Tensor:
    """Sums over this process's images, turned into sums over all images; for a loss that is not a mean.

    The training weights gradients by this process's fraction of the images, which is right for means only.
    So the gradient here is scaled up by the inverse of that fraction.
    """
    if world_size() == 1:
        return sums
    count = sums.new_full((1,), images)  # new_tensor would make the host wait for the device
    totals = all_reduce_sum(torch.cat([sums, count]))
    scaled = sums * (totals[-1] / images)
    return scaled + (totals[:-1] - scaled).detach()
