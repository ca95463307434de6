"""The processes that train one network together, each with a device of its own.

Without torchrun there is one process, and every function here gives back what it was given.
"""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
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
    """Joins the group that torchrun's environment describes; none where there is none or it is joined.

    Gloo carries what lies in the host's memory, NCCL what lies on NVIDIA devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def world_size() -> int:
    """Number of processes, on all machines."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and tells what happens."""
    return rank() == 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def local_device(kind: str) -> torch.device:
    """The device of this process, with its index, as the tensors that lie there name it.

    Raises UserError where there are fewer devices than processes.
    """
    if kind == "cpu":
        return torch.device(kind)
    if kind != "cuda" or world_size() == 1:
        return torch.device(kind, torch.cuda.current_device() if kind == "cuda" else 0)
    count = torch.cuda.device_count()
    if local_world_size() > count:
        raise UserError(f"processes={local_world_size()}: each needs a GPU, and here are only {count}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes of equal-shaped tensors, without gradient."""
    tensor = tensor.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value: Any) -> Any:
    """The first process's tensors, numbers and texts, on the CPU of all; what others give is ignored."""
    if world_size() == 1:
        return value
    file = io.BytesIO()
    torch.save(value, file)
    packed = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    length = torch.tensor([len(packed)])
    distributed.broadcast(length, 0)
    if not is_main_process():
        packed = torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(packed, 0)
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def all_gather_rows(rows: Rows, count: int) -> Rows:
    """All ``count`` rows (count, …), of which each process gives those from its rank on in steps of size."""
    if world_size() == 1:
        return rows
    padded = torch.zeros((-(-count // world_size()), *rows.shape[1:]), dtype=torch.from_numpy(rows).dtype)
    padded[: len(rows)] = torch.from_numpy(rows)
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(parts, padded)
    return cast("Rows", torch.stack(parts, dim=1).flatten(0, 1)[:count].numpy())


def convert_sync_batchnorm(network: nn.Module, device: torch.device) -> None:
    """Lets batch normalisation see the images of all processes, in place."""
    if world_size() == 1:
        return
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                fast = device.type == "cuda"  # torch's own is for GPUs alone
                taker = (
                    nn.SyncBatchNorm(child.num_features) if fast else SyncBatchNormOnCPU(child.num_features)
                )
                taker.load_state_dict(child.state_dict())
                taker.eps, taker.momentum = child.eps, child.momentum
                setattr(parent, name, taker.to(device))


def wrap_ddp(network: nn.Module) -> nn.Module:
    """The network with gradients that are the mean over the processes; every layer must get one."""
    if world_size() == 1:
        return network
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # what shall replace broadcast_buffers is new in torch 2.15
        return DistributedDataParallel(
            network,
            broadcast_buffers=False,  # synchronised batch normalisation keeps them equal
            gradient_as_bucket_view=True,
        )


def no_sync(network: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients of a network that ``wrap_ddp`` made are not exchanged."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


class SyncBatchNormOnCPU(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015) over the images of all processes."""

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
    """Sum over the processes; a gradient comes from all of them, too."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])


def all_reduce_means(sums: Tensor, images: int) -> Tensor:
    """Sums over this process's images, as sums over those of all; for a loss that is no mean of images.

    The gradient is this process's part, as many times larger as all images are more: gradients of means
    are weighted by this process's share of the images, these must not be.
    """
    if world_size() == 1:
        return sums
    count = sums.new_full((1,), images)  # new_tensor would make the host wait for the device
    totals = all_reduce_sum(torch.cat([sums, count]))
    grown = sums * (totals[-1] / images)
    return grown + (totals[:-1] - grown).detach()
