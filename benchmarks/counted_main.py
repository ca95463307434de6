"""Runs the entry point main and counts the floating-point work of its networks; benchmarks/demo.py starts it.

python benchmarks/counted_main.py COUNTS.json --config demo …
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from measure import ROOT  # noqa: F401  puts the package on the path

steps = ["else"]  # the innermost step that runs
rows: dict[str, dict[str, float]] = {}
flop_of: dict[tuple[Any, ...], int] = {}  # of one call; later ones with the same key do the same work


def step(owner: Any, function: str, name: str) -> None:
    """What runs inside the function belongs to the step of that name."""
    original: Callable[..., Any] = getattr(owner, function)

    @wraps(original)
    def inside(*arguments: Any, **named: Any) -> Any:
        steps.append(name)
        try:
            return original(*arguments, **named)
        finally:
            steps.pop()

    setattr(owner, function, inside)


def counted(owner: Any, function: str, kind: str, describe: Callable[..., tuple[Any, ...]]) -> None:
    """Adds the work of each call to the step's row; ``describe`` gives the number of images and a key."""
    from torch.utils.flop_counter import FlopCounterMode

    original: Callable[..., Any] = getattr(owner, function)

    @wraps(original)
    def inside(*arguments: Any) -> Any:
        images, *rest = describe(*arguments)
        key = (kind, images, *rest)
        start = time.perf_counter()
        if key in flop_of:
            result = original(*arguments)
        else:
            with FlopCounterMode(display=False) as counter:
                result = original(*arguments)
            flop_of[key] = counter.get_total_flops()
        row = rows.setdefault(f"{steps[-1]}: {kind}", dict.fromkeys(("flop", "seconds", "images"), 0.0))
        row["flop"] += flop_of[key]
        row["seconds"] += time.perf_counter() - start
        row["images"] += images
        return result

    setattr(owner, function, inside)


def main() -> None:
    """Runs main with the arguments that follow the file's name."""
    # Not at the top: each process that writes or reads radiographs imports this file.
    from pneumo_experiments import cli
    from pneumo_experiments.learning.predict import Predictor
    from pneumo_experiments.learning.trainer import Trainer
    from pneumo_experiments.search.trial import Trials
    from pneumo_experiments.search.trial_training import TrialTraining
    from pneumo_experiments.stages import main as chain
    from pneumo_experiments.stages import train

    path = Path(sys.argv[1])
    step(TrialTraining, "_warm_up", "warm-up of the search")
    step(Trials, "_train", "trials")
    step(train, "_train", "train")
    for function in ("score", "register"):
        step(chain, function, function)
    counted(
        Trainer,
        "step",
        "learning",
        lambda trainer, batch: (
            len(batch.images),
            batch.images.shape[-1],
            trainer.recipe.network.network,
            trainer.recipe.loss.aux_weight > 0,
        ),
    )
    counted(
        Predictor,
        "mean_of_views",
        "predicting",
        lambda predictor, inputs: (len(inputs), inputs.shape[-1], predictor.tta),
    )
    sys.argv[1:] = ["main", *sys.argv[2:]]
    try:
        cli.main()
    finally:
        path.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
