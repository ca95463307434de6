"""One optimizer step at a time: gradients in pieces, mixed precision, learning rates and moving average."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import MovingAverage
from pneumo_experiments.learning.loader import Batch, count_batches
from pneumo_experiments.learning.loss import RunningMeans, criterion
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.settings import Recipe

POLYNOMIAL = 0.9  # the usual power for segmentation networks (Chen et al. 2017, DeepLab)


class State(TypedDict):
    """Everything that changes with a step, as tensors and numbers."""

    network: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    average: dict[str, Any] | None
    pretrained: list[str]
    steps: int
    micro_batch: int


class Trainer:
    """A network on its device, with its optimizer, learning rates, gradient scaler and moving average."""

    def __init__(self, predictor: Predictor, recipe: Recipe, steps: int, state: State | None = None) -> None:
        """``steps`` is the number of steps of the whole training, over which the learning rate changes.

        Raises UserError for a ``state`` of another network.
        """
        self.network, self.recipe, self.compute = predictor.network, recipe, predictor.compute
        device, network = self.compute.device, self.network
        network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        # Shapes hardly change from step to step: cuDNN may time its algorithms once and keep the fastest.
        torch.backends.cudnn.benchmark = device.type == "cuda"
        distributed.convert_sync_batchnorm(network, device)
        # The weights' file may be missing in some of the processes.
        loaded = state["pretrained"] if state else sorted(network.pretrained)
        network.pretrained = frozenset(distributed.broadcast(loaded))
        if network.aux_head is None:
            self.recipe = replace(recipe, loss=replace(recipe.loss, aux_weight=0.0))
        else:
            # Without a weight in the loss it is not computed, and DDP does not wait for its gradients.
            network.aux_head.requires_grad_(recipe.loss.aux_weight > 0)
        self._wrap()
        self.total_steps = steps
        self.micro_batch = recipe.batches.micro_batch or recipe.batches.batch_size
        self.optimizer = torch.optim.AdamW(parameter_groups(network, recipe), fused=device.type != "mps")
        self.schedule = self._schedule_after(0)
        # In every format: it skips steps without a finite gradient, and the host need not wait to know.
        init_scale = 2.0**16 if self.compute.precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(device.type, init_scale)
        self.average = MovingAverage(network, recipe.optimizer.ema) if recipe.optimizer.ema > 0 else None
        if state is not None:
            try:
                self._load(state)
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    "resume=true: the checkpoint does not fit the network"
                    f" ({' '.join(str(error).split())[:200]}); resume=false starts again"
                ) from error

    def _wrap(self) -> None:
        """Again after a change of what is trained: DDP knows the parameters that had gradients then."""
        self.ddp = distributed.wrap_ddp(self.network)
        self.forward = torch.compile(self.ddp) if self.recipe.network.compile else self.ddp

    def begin_epoch(self, number: int) -> None:
        """Puts the network into training mode; in the first ``freeze_epochs`` the backbone stays as it is."""
        settings, backbone = self.recipe.network, self.network.backbone
        self.network.train()
        is_frozen = number <= settings.freeze_epochs
        if is_frozen:
            backbone.eval()
        elif settings.freeze_bn:
            for module in backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                    module.eval()
        if any(parameter.requires_grad == is_frozen for parameter in backbone.parameters()):
            backbone.requires_grad_(not is_frozen)
            self._wrap()

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return self.schedule.last_epoch

    @property
    def learning_rate(self) -> float:
        """Of the next step, for layers without pretrained weights."""
        return self.recipe.optimizer.learning_rate * lr_factor(self.recipe, self.steps / self.total_steps)

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; the batch's loss terms, and the norm of its gradient, on the device.

        Without a finite gradient the network and its moving average stay as they were.
        """
        buffers = list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        while True:
            try:
                terms = self._backward(batch)
                break
            except RuntimeError as error:
                self._halve_micro_batch(error)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), self.recipe.optimizer.clip_norm or math.inf
        )
        self.scaler.step(self.optimizer)  # pyright: ignore[reportUnknownMemberType]
        # It halves its scale after each skipped step. Only fp16 needs a scale, which may grow again.
        self.scaler.update(None if self.compute.precision == "fp16" else 1.0)
        self.schedule.step()
        finite = torch.isfinite(norm)
        # Batch norm has taken the batch's statistics, which may be NaN and would stay so for good.
        for buffer, old in zip(buffers, before, strict=True):
            torch.where(finite, buffer, old, out=buffer)
        if self.average is not None:
            self.average.update(self.network, finite)
        return terms, norm

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the batch's mean loss, in equal pieces of at most ``micro_batch`` images."""
        self.optimizer.zero_grad(set_to_none=True)
        means = RunningMeans()
        pieces = _pieces(len(batch.images), batch.size, self.micro_batch)
        for rows in pieces:
            images = batch.images[rows].contiguous(memory_format=torch.channels_last)
            # Processes exchange gradients only in the last piece.
            with nullcontext() if rows is pieces[-1] else distributed.no_sync(self.ddp):
                try:
                    with self.compute.autocast():
                        output = self.forward(images)
                except ValueError as error:  # batch norm of DeepLab's pooled features
                    raise UserError(
                        f"batch_size={self.recipe.batches.batch_size}: {self.recipe.network.network}"
                        " cannot train on a single image; choose another batch_size or micro_batch"
                    ) from error
                terms = criterion(output, batch.targets[rows], batch.present[rows], self.recipe)
                # DDP averages gradients over the processes: the result must be that of the whole batch.
                loss = terms["total"] * (len(images) * distributed.world_size() / batch.size)
                if distributed.world_size() > 1:
                    # DDP waits for the gradient of every parameter, also of a head whose loss has no weight.
                    loss = loss + 0 * sum(logits.mean() for logits in output if logits is not None)
                self.scaler.scale(loss).backward()  # pyright: ignore[reportUnknownMemberType]
            means.add(terms, len(images))
        return means.tensors()

    def _halve_micro_batch(self, error: RuntimeError) -> None:
        """Halves ``micro_batch`` after the memory ran out; re-raises any other error."""
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise error
        if distributed.world_size() > 1:  # the other processes wait for this piece's gradients
            raise UserError(
                f"micro_batch={self.recipe.batches.micro_batch}: the memory ran out with"
                f" {self.micro_batch} images per process at once; set a smaller one and train again"
            ) from None
        if self.micro_batch == 1:
            raise UserError(
                "micro_batch=1: the memory is too small even for one image; choose a smaller image_size"
                " or network"
            ) from None
        self.micro_batch = -(-self.micro_batch // 2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.compute.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"the memory ran out: continuing with micro_batch={self.micro_batch} images at once;"
            f" a step still takes batch_size={self.recipe.batches.batch_size}",
            stacklevel=2,
        )

    def _schedule_after(self, steps: int) -> LambdaLR:
        # Of this object it must know nothing: in a circle, networks would stay in memory after a training.
        recipe, total = self.recipe, self.total_steps
        return LambdaLR(
            self.optimizer, lambda step: lr_factor(recipe, min(1.0, step / total)), last_epoch=steps - 1
        )

    def state(self) -> State:
        """Everything that changes with a step, as tensors and numbers."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "pretrained": sorted(self.network.pretrained),
            "steps": self.steps,
            "micro_batch": self.micro_batch,
        }

    def _load(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.schedule = self._schedule_after(state["steps"])
        self.micro_batch = min(self.micro_batch, state["micro_batch"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"] or {})
            self.average.steps = self.steps


def lr_factor(recipe: Recipe, done: float) -> float:
    """Fraction of the peak learning rate after the fraction ``done`` of all steps, both 0 to 1.

    A linear warm-up from 0.05 over the first ``warmup`` of the steps, then half a cosine down to zero
    (Smith & Topin 2018), or (1 - done)^0.9.
    """
    if done < recipe.optimizer.warmup:
        return 0.05 + 0.95 * done / recipe.optimizer.warmup
    decayed = (done - recipe.optimizer.warmup) / (1 - recipe.optimizer.warmup)
    if recipe.optimizer.schedule == "polynomial":
        return (1 - decayed) ** POLYNOMIAL
    return 0.5 * (1 + math.cos(math.pi * decayed))


def parameter_groups(network: PneumothoraxNet, recipe: Recipe) -> list[dict[str, Any]]:
    """At most four parameter groups, each with its peak learning rate as ``lr`` and its ``weight_decay``.

    Pretrained layers have a lower rate. Only kernels decay, not biases and the scales of batch norm (He et
    al. 2019, Bag of Tricks for Image Classification, section 3.1).
    """
    chosen = recipe.optimizer
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in network.named_parameters():
        peak = chosen.learning_rate * (chosen.pretrained_lr_scale if name in network.pretrained else 1)
        decay = chosen.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": same, "lr": peak, "weight_decay": decay} for (peak, decay), same in groups.items()]


def _pieces(count: int, batch_size: int, micro_batch: int) -> list[slice]:
    """Slices of this process's ``count`` images of a batch; the same number of slices in each process."""
    most = -(-batch_size // distributed.world_size())
    pieces = min(count_batches(most, micro_batch), batch_size // distributed.world_size())
    ends = [count * number // pieces for number in range(pieces + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
