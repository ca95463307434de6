"""Which settings matter: PED-ANOVA importances of a study over seven of them, with their spread.

The data set is one that `preprocess` wrote, here of 600 radiographs with predicted masks at 64 px:

    python -m pneumo_experiments preprocess --dicom_dir DICOM_IMAGES --rle_csv PREDICTED_RLE_CSV \\
        --image_size 64 --dataset importance.h5
    python benchmarks/importance.py importance.h5 --trials 120 --epochs 4 --folds 2 --weights FILE

FILE: ImageNet weights of a ResNet-50 as a state dict, or auto, which downloads them. The trials are those of
`search`, at random unless `--sampler tpe`, none pruned; each seed has a study. The same command goes on with
studies that were interrupted, and higher `--trials` continue them. Prints Markdown: the importances, which
add up to 1, their mean and standard deviation over resamples of the trials, and the fraction of resamples in
which a setting is among the first three. Trials whose masks are all empty count less by 1 minus their best
Dice on positives; where there are many, train for longer.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from measure import machine
from optuna.trial import FrozenTrial, TrialState

from pneumo_experiments.search.report import loss_of

SEARCHED = (
    *("dice_weight", "dice_image_weight", "presence_weight", "learning_rate", "final_positive_fraction"),
    *("augment_strength", "ema"),
)
RESAMPLES, FIRST = 200, 3


def trials_of(chosen: argparse.Namespace, seed: int) -> list[FrozenTrial]:
    """The completed trials of a study with this seed, after those that were missing."""
    from pneumo_experiments.settings import Search
    from pneumo_experiments.stages.search import search

    storage, name = f"sqlite:///{chosen.study}", f"importance-{seed}"
    values: dict[str, Any] = {
        "dataset": chosen.dataset, "network": chosen.network, "weights": chosen.weights, "seed": seed,
        "batch_size": chosen.batch_size,
        "searched": ",".join(SEARCHED), "sampler": chosen.sampler, "study": name, "storage": storage,
        "trials": chosen.trials, "search_epochs": chosen.epochs, "search_images": chosen.images,
        "pruner": "none", "confirm": 0, "keep": 0, "tta": "none", "holdout": 0, "folds": chosen.folds,
        "search_warmup_epochs": chosen.warmup,
    }  # fmt: skip
    search(Search.of(**values))
    study = optuna.load_study(study_name=name, storage=storage)
    return study.get_trials(states=(TrialState.COMPLETE,))


def importances(trials: list[FrozenTrial]) -> list[float]:
    """PED-ANOVA importance of each searched setting."""
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    with warnings.catch_warnings():  # that low is good
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=list(SEARCHED), target=loss_of)
    return [found[name] for name in SEARCHED]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("dataset", type=Path)
    options.add_argument(
        "--study", type=Path, default=Path("importance.db"), help="SQLite file of the studies"
    )
    options.add_argument("--trials", type=int, default=120, help="of each seed")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--sampler", choices=["random", "tpe"], default="random")
    options.add_argument("--epochs", type=int, default=4, help="of each trial")
    options.add_argument("--images", type=int, default=0, help="training images of each trial; 0 takes all")
    options.add_argument("--warmup", type=int, default=0, help="epochs of the network that trials start from")
    options.add_argument("--folds", type=int, default=5, help="one of them validates")
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--network", default="fcn_resnet50")
    options.add_argument("--weights", default="auto", help="none, auto or a state dict to start from")
    chosen = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    trials = [trial for seed in range(chosen.seeds) for trial in trials_of(chosen, seed)]
    rng, size = np.random.default_rng(0), len(trials)
    drawn = np.array(
        [importances([trials[i] for i in rng.integers(size, size=size)]) for _ in range(RESAMPLES)]
    )
    leads = (np.argsort(-drawn, axis=1)[:, :FIRST, None] == np.arange(len(SEARCHED))).any(axis=1).mean(axis=0)
    empty = sum(bool(trial.user_attrs["is_all_empty"]) for trial in trials)
    best = min(trials, key=loss_of)
    print(
        f"\n{machine()}, {size} trials, {empty} of them all empty; best {best.values[0]:.4f} {best.params}\n"
    )
    print(f"| setting | importance | resamples: mean | standard deviation | among the first {FIRST} |")
    print("|---|---|---|---|---|")
    rows = zip(SEARCHED, importances(trials), drawn.mean(axis=0), drawn.std(axis=0), leads, strict=True)
    for name, whole, mean, deviation, leading in sorted(rows, key=lambda row: -row[1]):
        print(f"| `{name}` | {whole:.3f} | {mean:.3f} | {deviation:.3f} | {leading:.0%} |")


if __name__ == "__main__":
    main()
