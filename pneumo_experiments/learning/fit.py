"""Training as an iterator of epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.learning.loader import InMemoryData, StreamedData, batches, count_batches
from pneumo_experiments.learning.loss import MASK_LOSSES, RunningMeans
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.learning.trainer import State, Trainer
from pneumo_experiments.settings import Recipe

NORM = "gradient_norm"
MAX_SKIPPED_FRACTION = 0.1  # of an epoch's steps: beyond that the training has diverged


@dataclass(frozen=True)
class Epoch:
    """Results of one pass over the training images; the network itself is changed in place."""

    number: int  # from 1
    network: PneumothoraxNet  # to validate and save: the moving average where there is one
    losses: dict[str, float]  # mean of each term over the images; "total" is their weighted sum
    seconds: float
    images_per_second: float
    wait_fraction: float  # of the time, spent waiting for data
    skipped_steps: int  # whose gradients were not finite
    gradient_norm: float  # mean over the steps, before clipping; 0 for a skipped one
    learning_rate: float  # after the epoch, for layers without pretrained weights
    micro_batch: int  # images in one forward pass
    state: Callable[[], State]  # from which ``fit`` continues

    def as_metrics(self) -> dict[str, float]:
        """Losses, what the optimiser did, and speed, by name."""
        skipped = {"optimizer/skipped_steps": self.skipped_steps} if self.skipped_steps else {}
        return {f"loss/{name}": value for name, value in self.losses.items()} | {
            "optimizer/learning_rate": self.learning_rate,
            "optimizer/gradient_norm": self.gradient_norm,
            **skipped,
            "speed/seconds_per_epoch": self.seconds,
            "speed/images_per_second": self.images_per_second,
            "speed/wait_fraction": self.wait_fraction,
        }


def fit(
    predictor: Predictor,
    data: InMemoryData | StreamedData,
    recipe: Recipe,
    epochs: int,
    progress: Callable[[int], None] = lambda images: None,
    state: State | None = None,
) -> Iterator[Epoch]:
    """Trains the predictor's network in place and yields after each epoch; the caller may stop at any time.

    AdamW under the recipe's schedule over all epochs. From the ``state`` of an epoch it continues with the
    next one, and on a CPU ends in the same weights as without the interruption. ``progress`` is called with
    the number of images after each batch. Raises UserError when no loss has a weight, when too many steps
    have no finite gradient, and when the memory is too small for a single image.
    """
    weights = (*MASK_LOSSES, "presence_weight")
    if not any(getattr(recipe.loss, name) > 0 for name in weights):
        raise UserError(f"{', '.join(weights)}: all are 0, so nothing is learned; set one above 0")
    steps_per_epoch = count_batches(len(data), recipe.batches.batch_size)
    if len(data) // steps_per_epoch < distributed.world_size():
        raise UserError(
            f"batch_size={recipe.batches.batch_size}: fewer images than the"
            f" {distributed.world_size()} processes; give at least one to each"
        )
    network, device = predictor.network, predictor.compute.device
    trainer = Trainer(predictor, recipe, epochs * steps_per_epoch, state)
    for number in range(1 + trainer.steps // steps_per_epoch, epochs + 1):
        # Dropout draws from torch's global generator: seeded for each epoch, it need not be saved.
        seed = (recipe.seed * 1_000_003 + number) * distributed.world_size() + distributed.rank()
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        trainer.begin_epoch(number)
        means, skipped, waited = RunningMeans(), torch.zeros((), device=device), 0.0
        start = requested = time.perf_counter()
        for batch in batches(data, recipe, number, epochs, device):
            waited += time.perf_counter() - requested
            terms, norm = trainer.step(batch)
            means.add(terms | {NORM: norm}, len(batch.images))
            skipped += ~torch.isfinite(norm)
            progress(batch.size)
            requested = time.perf_counter()
        losses, skipped_steps = means.numbers(), int(skipped)  # waits until the device is done
        seconds = time.perf_counter() - start
        too_many = skipped_steps > MAX_SKIPPED_FRACTION * steps_per_epoch and skipped_steps > 1
        if too_many or skipped_steps == steps_per_epoch:
            raise UserError(
                f"learning_rate={recipe.optimizer.learning_rate}: {skipped_steps} of {steps_per_epoch}"
                f" steps of epoch {number} had no finite gradient: training diverged; try a tenth of the"
                " learning_rate"
            )
        yield Epoch(
            number=number,
            network=trainer.average.network if trainer.average else network,
            losses={name: value for name, value in losses.items() if name != NORM},
            seconds=seconds,
            images_per_second=len(data) / seconds,
            wait_fraction=waited / seconds,
            skipped_steps=skipped_steps,
            gradient_norm=losses[NORM],
            learning_rate=trainer.learning_rate,
            micro_batch=trainer.micro_batch,
            state=trainer.state,
        )
