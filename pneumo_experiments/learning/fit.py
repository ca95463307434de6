"""Training as an iterator of epochs."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import Machine
from pneumo_experiments.learning.loader import Examples, batches, count_batches
from pneumo_experiments.learning.loss import MASK_LOSSES, criterion
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.settings import Recipe

CLIP_NORM = 5.0


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave; the network itself is changed in place."""

    number: int  # from 1
    losses: dict[str, float]  # mean of each term over the images; "loss" is their weighted sum
    seconds: float
    images_per_second: float


def fit(
    network: PneumothoraxNet,
    examples: Examples,
    recipe: Recipe,
    epochs: int,
    machine: Machine,
    progress: Callable[[int], None] = lambda images: None,
) -> Iterator[Epoch]:
    """Trains the network in place and yields after each epoch; the caller may stop at any time.

    AdamW with one learning-rate cycle over all epochs. ``progress`` is called
    with the number of images after each batch. Raises UserError when no loss has a weight and when the
    loss is no longer finite.
    """
    weights = (*MASK_LOSSES, "presence_weight")
    if not any(getattr(recipe, name) > 0 for name in weights):
        raise UserError(f"{', '.join(weights)}: all are 0, so nothing is learned; set one above 0")
    device = machine.device
    network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimiser = torch.optim.AdamW(
        network.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type != "mps",
    )
    steps = epochs * count_batches(len(examples), recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step / steps))
    scaler = torch.amp.GradScaler(device.type, enabled=machine.precision == "fp16")

    for number in range(1, epochs + 1):
        network.train()
        start = time.perf_counter()
        sums: dict[str, torch.Tensor] = {}
        for batch in batches(examples, recipe, number, device):
            images = batch.images.contiguous(memory_format=torch.channels_last)
            with machine.autocast():
                output = network(images)
            terms = criterion(output, batch.shares, batch.present, recipe)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(terms["loss"]).backward()
            scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
            for name, term in terms.items():
                # Summed on the device: reading each step's loss would make the device wait.
                sums[name] = sums.get(name, torch.zeros((), device=device)) + term.detach() * len(images)
            progress(len(images))
        losses = {name: float(total) / len(examples) for name, total in sums.items()}
        seconds = time.perf_counter() - start
        if not torch.isfinite(torch.tensor(losses["loss"])):
            raise UserError(
                f"learning_rate={recipe.learning_rate}: the loss is no longer finite in epoch {number};"
                " try a tenth of it"
            )
        yield Epoch(number, losses, seconds, len(examples) / seconds)


def one_cycle(done: float) -> float:
    """Share of the peak learning rate when ``done`` (0 to 1) of all steps are behind.

    A linear rise over the first fifth, then half a cosine down to zero (Smith & Topin 2018).
    """
    rise = 0.2
    if done < rise:
        return 0.05 + 0.95 * done / rise
    return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
