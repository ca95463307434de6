"""Training as an iterator of epochs."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.averaging import MovingAverage
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.loader import Batch, InMemoryData, StreamedData, batches, count_batches
from pneumo_experiments.learning.loss import MASK_LOSSES, criterion
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.schedule import parameter_groups, rate
from pneumo_experiments.settings import Recipe

SKIPPED_AT_MOST = 0.1  # of an epoch's steps: beyond that the training has diverged


class State(TypedDict):
    """Everything that changes with a step, as tensors and numbers."""

    network: dict[str, Any]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    average: dict[str, Any] | None
    pretrained: list[str]
    steps: int
    micro_batch: int


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave; the network itself is changed in place."""

    number: int  # from 1
    network: PneumothoraxNet  # to judge and to keep: the moving average where there is one
    losses: dict[str, float]  # mean of each term over the images; "loss" is their weighted sum
    seconds: float
    images_per_second: float
    wait_share: float  # of the time, spent waiting for data
    skipped_steps: int  # whose gradients were not finite
    micro_batch: int  # images that passed the network at once
    state: Callable[[], State]  # all that ``fit`` needs to go on from here

    @property
    def speed(self) -> dict[str, float]:
        """How the time was spent, as metrics."""
        return {
            "seconds_per_epoch": self.seconds,
            "images_per_second": self.images_per_second,
            "wait_share": self.wait_share,
            "skipped_steps": self.skipped_steps,
            "micro_batch_used": self.micro_batch,
        }


def fit(
    network: PneumothoraxNet,
    examples: InMemoryData | StreamedData,
    recipe: Recipe,
    epochs: int,
    compute: ComputeConfig,
    progress: Callable[[int], None] = lambda images: None,
    state: State | None = None,
) -> Iterator[Epoch]:
    """Trains the network in place and yields after each epoch; the caller may stop at any time.

    AdamW under the recipe's schedule over all epochs. From the ``state`` of an epoch it goes on with the
    next one, and on a CPU ends in the same weights as if it had never stopped. ``progress`` is called with
    the number of images after each batch. Raises UserError when no loss has a weight, when too many steps
    give no finite gradient, and when a single image is too much for the memory.
    """
    weights = (*MASK_LOSSES, "presence_weight")
    if not any(getattr(recipe.loss, name) > 0 for name in weights):
        raise UserError(f"{', '.join(weights)}: all are 0, so nothing is learned; set one above 0")
    network.to(device=compute.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # Shapes hardly change from step to step: cuDNN may time its algorithms once and keep the fastest.
    torch.backends.cudnn.benchmark = compute.device.type == "cuda"
    distributed.convert_sync_batchnorm(network, compute.device)
    # Not every process may have found the weights' file.
    network.pretrained = frozenset(distributed.broadcast(sorted(network.pretrained)))
    steps = count_batches(len(examples), recipe.batches.batch_size)
    if len(examples) // steps < distributed.world_size():
        raise UserError(
            f"batch_size={recipe.batches.batch_size}: fewer images than the"
            f" {distributed.world_size()} processes; give each one"
        )
    if state is not None:
        network.pretrained = frozenset(state["pretrained"])
    trainer = _Trainer(network, recipe, epochs * steps, compute)
    if state is not None:
        try:
            trainer.load(state)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"resume=true: the checkpoint does not fit the network ({reason}); resume=false starts anew"
            ) from error
    for number in range(1 + trainer.steps // steps, epochs + 1):
        # Dropout draws from torch's own generator: each epoch starts it anew, so that it needs no keeping.
        torch.manual_seed((recipe.seed * 1_000_003 + number) * distributed.world_size() + distributed.rank())
        network.train()
        sums, skipped, waited = RunningMeans(), torch.zeros((), device=compute.device), 0.0
        start = asked = time.perf_counter()
        for batch in batches(examples, recipe, number, epochs, compute.device):
            waited += time.perf_counter() - asked
            terms, finite = trainer.step(batch)
            sums.add(terms, len(batch.images))
            skipped += ~finite
            progress(batch.size)
            asked = time.perf_counter()
        losses, skipped_steps = sums.means(), int(skipped)  # waits until the device is done
        seconds = time.perf_counter() - start
        if (skipped_steps > SKIPPED_AT_MOST * steps and skipped_steps > 1) or skipped_steps == steps:
            raise UserError(
                f"learning_rate={recipe.optimizer.learning_rate}: {skipped_steps} of {steps} steps of epoch"
                f" {number} gave no finite gradient; try a tenth of it"
            )
        yield Epoch(
            number=number,
            network=trainer.average.network if trainer.average else network,
            losses=losses,
            seconds=seconds,
            images_per_second=len(examples) / seconds,
            wait_share=waited / seconds,
            skipped_steps=skipped_steps,
            micro_batch=trainer.micro_batch,
            state=trainer.state,
        )


class _Trainer:
    """A network with its optimiser, schedule, scaler and moving average; takes one step at a time."""

    def __init__(self, network: PneumothoraxNet, recipe: Recipe, steps: int, compute: ComputeConfig) -> None:
        self.network, self.recipe, self.compute = network, recipe, compute
        self.together = distributed.wrap_ddp(network)
        self.forward = torch.compile(self.together) if recipe.network.compile else self.together
        self.all_steps, self.steps = steps, 0
        self.micro_batch = recipe.batches.micro_batch or recipe.batches.batch_size
        self.optimiser = torch.optim.AdamW(
            parameter_groups(network, recipe),
            lr=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            fused=compute.device.type != "mps",
        )
        # Whatever the format: it leaves out steps without a finite gradient, and nobody waits for the answer.
        self.scaler = torch.amp.GradScaler(
            compute.device.type,
            init_scale=2.0**16 if compute.precision == "fp16" else 1.0,
        )
        self.average = MovingAverage(network, recipe.optimizer.ema) if recipe.optimizer.ema > 0 else None

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; the batch's loss terms, and whether its gradient was finite, on the device."""
        while True:
            try:
                terms = self._backward(batch)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                self._shrink(error)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), self.recipe.optimizer.clip_norm or math.inf
        )
        self.scaler.step(self.optimiser)
        # It halves its scale after each step left out. Only fp16 needs a scale, and lets it grow again.
        self.scaler.update(None if self.compute.precision == "fp16" else 1.0)
        self.steps += 1
        self._set_rate()
        if self.average is not None:
            self.average.update(self.network)
        return terms, torch.isfinite(norm)

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the batch's mean loss, in equal pieces of at most ``micro_batch`` images."""
        self.optimiser.zero_grad(set_to_none=True)
        sums = RunningMeans()
        pieces = _pieces(len(batch.images), batch.size, self.micro_batch)
        for some in pieces:
            images = batch.images[some].contiguous(memory_format=torch.channels_last)
            # Until the last piece each process adds up its own gradients.
            with nullcontext() if some is pieces[-1] else distributed.no_sync(self.together):
                try:
                    with self.compute.autocast():
                        output = self.forward(images)
                except ValueError as error:  # batch norm of DeepLab's pooled features
                    raise UserError(
                        f"batch_size={self.recipe.batches.batch_size}: a single image passed"
                        f" {self.recipe.network.network}, which needs two at once; choose another batch_size"
                        " or micro_batch"
                    ) from error
                terms = criterion(output, batch.targets[some], batch.present[some], self.recipe)
                # The processes' gradients are averaged: their mean shall be that of the whole batch.
                target = len(images) * distributed.world_size() / batch.size
                loss = terms["loss"] * target
                if (
                    distributed.world_size() > 1
                ):  # they wait for a gradient of each layer, also of a head without weight
                    loss = loss + 0 * sum(answer.mean() for answer in output)
                self.scaler.scale(loss).backward()
            sums.add(terms, len(images))
        return sums.tensors()

    def _shrink(self, error: RuntimeError) -> None:
        """Half the images at once after the memory ran out; raises what is another error."""
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise error
        if distributed.world_size() > 1:  # the others are waiting for this piece's sums
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
        self.optimiser.zero_grad(set_to_none=True)
        if self.compute.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"the memory ran out: {self.micro_batch} images pass the network at once from now on;"
            f" a step still takes batch_size={self.recipe.batches.batch_size}",
            stacklevel=2,
        )

    def _set_rate(self) -> None:
        target = rate(self.recipe, min(1.0, self.steps / self.all_steps))
        for params in self.optimiser.param_groups:
            params["lr"] = params["peak"] * target

    def state(self) -> State:
        """Everything that changes with a step, as tensors and numbers."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "pretrained": sorted(self.network.pretrained),
            "steps": self.steps,
            "micro_batch": self.micro_batch,
        }

    def load(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps, self.micro_batch = state["steps"], min(self.micro_batch, state["micro_batch"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"] or {})
            self.average.steps = self.steps


class RunningMeans:
    """Sums of loss terms over images, kept on the device: reading each step's would make it wait."""

    def __init__(self) -> None:
        self._sums, self._images = dict[str, Tensor](), 0

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Terms are means over so many images; one that is not finite counts as 0."""
        self._images += images
        for name, term in terms.items():
            term = torch.nan_to_num(term.detach(), posinf=0.0, neginf=0.0) * images
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def tensors(self) -> dict[str, Tensor]:
        """Means over the images."""
        return {name: total / self._images for name, total in self._sums.items()}

    def means(self) -> dict[str, float]:
        """Means over the images of all processes as numbers; waits for the device."""
        sums = torch.stack([*self._sums.values()])
        totals = distributed.all_reduce_sum(torch.cat([sums, sums.new_full((1,), self._images)]))
        means = cast("list[float]", (totals[:-1] / totals[-1]).tolist())
        return dict(zip(self._sums, means, strict=True))


def _pieces(count: int, size: int, micro_batch: int) -> list[slice]:
    """Slices of ``count`` images: as many in each process that takes a part of a batch of ``size``."""
    most = -(-size // distributed.world_size())
    pieces = min(count_batches(most, micro_batch), size // distributed.world_size())
    ends = [count * number // pieces for number in range(pieces + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
