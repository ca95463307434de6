"""How far a training has come, in memory and as the checkpoint from which it resumes."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.trainer import State
from pneumo_experiments.metrics.thresholds import ThresholdCounts
from pneumo_experiments.settings import Train, weight_shaping
from pneumo_experiments.training.loop import EpochResult

EPOCH_DICE = "epoch/dice"
VERSION = 3  # of checkpoints: increase when an earlier one would continue as another training


@dataclass
class TrainingState:
    """How far a training has come: what its checkpoint holds, but for ``counts``.

    The dicts have the best epochs by number, the best first.
    """

    run_id: str = ""
    """the run that has its metrics"""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """metrics of each epoch"""
    dices: dict[int, float] = field(default_factory=dict[int, float])
    networks: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    """state dicts, in host memory"""
    trainer: State | None = None
    """from which training continues"""
    followed: dict[str, int] = field(default_factory=dict[str, int])
    """positions of the validation images that are drawn after each epoch, by name"""
    counts: dict[int, ThresholdCounts] = field(default_factory=dict[int, ThresholdCounts])
    """of the validation images; an epoch before an interruption is predicted again"""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> TrainingState | None:
        """What was saved last; None without a checkpoint of this version that can be read."""
        last = checkpoint.last()
        if last is None:
            return None
        if last.get("version") != VERSION:
            warnings.warn(
                f"{checkpoint.folder}: written by another version; training starts over", stacklevel=2
            )
            return None
        names = ("run_id", "history", "dices", "networks", "state", "followed")
        return cls(*(last[name] for name in names))

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes everything that continuing after the latest epoch needs."""
        last = {"version": VERSION, "run_id": self.run_id, "history": self.history, "dices": self.dices}
        checkpoint.save(last | {"state": self.trainer, "followed": self.followed}, self.networks)

    def add(self, result: EpochResult, best_k: int) -> None:
        """Keeps the epoch's network if it is among the best; of equal ones the later."""
        number = result.epoch.number
        self.history.append(result.metrics)
        self.trainer = result.epoch.state()
        self.dices[number] = result.scores.dice
        best = sorted(self.dices, key=lambda epoch: (self.dices[epoch], epoch), reverse=True)[:best_k]
        if number in best:
            # In host memory, as after resuming: the device needs its own.
            state = result.epoch.network.state_dict()
            self.networks[number] = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self.counts[number] = result.evaluation.counts
        self.dices = {epoch: self.dices[epoch] for epoch in best}
        self.networks = {epoch: self.networks[epoch] for epoch in best}
        self.counts = {epoch: self.counts[epoch] for epoch in best if epoch in self.counts}

    @property
    def learned(self) -> list[dict[str, float]]:
        """Metrics from the first epoch on that finds something; of all epochs if there is nothing to find."""
        return list(dropwhile(lambda metrics: metrics.get("epoch/dice_positive") == 0, self.history))

    def is_stuck(self, patience: int) -> bool:
        """Whether so many epochs of ``learned`` brought no better Dice; never for a patience of 0."""
        dices = [metrics[EPOCH_DICE] for metrics in self.learned]
        return bool(dices) and 0 < patience < len(dices) - dices.index(max(dices))


def checkpoint_of(settings: Train, fingerprint: str) -> Checkpoint:
    """Where a training with these settings on the data set with this fingerprint keeps its checkpoint."""
    key = json.dumps([fingerprint, weight_shaping(settings)], sort_keys=True)
    return Checkpoint(settings.schedule.checkpoints / hashlib.sha256(key.encode()).hexdigest()[:16])
