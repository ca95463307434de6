"""The entry points on a simulated GPU; test_simulated_cuda.py runs this file in a process of its own.

``PNEUMO_REAL_CUDA=1`` takes the machine's own GPU instead: benchmarks/gpu.sh runs some of it so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
import simulated_cuda
import torch
from dicom_files import dicom_bytes
from helpers import make, soak
from samples import stored_sample
from simulated_cuda import count_syncs
from tiny_network import add_tiny_network, random_network
from tracked import last_run

simulated_cuda.install()
add_tiny_network()

from pneumo_experiments import tracking  # noqa: E402
from pneumo_experiments.dataset.decoder_pool import File  # noqa: E402
from pneumo_experiments.dataset.hdf5 import Dataset  # noqa: E402  # torch is frame for its devices from now on
from pneumo_experiments.evaluation.subset import Subset  # noqa: E402
from pneumo_experiments.learning import distributed  # noqa: E402
from pneumo_experiments.learning.averaging import update_batch_norm  # noqa: E402
from pneumo_experiments.learning.calibration import Calibration  # noqa: E402
from pneumo_experiments.learning.device import ComputeConfig, choose_compute  # noqa: E402
from pneumo_experiments.learning.fit import fit  # noqa: E402
from pneumo_experiments.learning.loader import Batch, StreamedData  # noqa: E402
from pneumo_experiments.learning.loss import RunningMeans  # noqa: E402
from pneumo_experiments.learning.network import PneumothoraxNet, build_network  # noqa: E402
from pneumo_experiments.learning.predict import Predictor  # noqa: E402
from pneumo_experiments.learning.trainer import Trainer  # noqa: E402
from pneumo_experiments.metrics.thresholds import Thresholds  # noqa: E402
from pneumo_experiments.serving import Detector, Finding, TrainedNetwork  # noqa: E402
from pneumo_experiments.settings import Device, Recipe, Score, Search, Train, flat  # noqa: E402
from pneumo_experiments.stages.score import score  # noqa: E402
from pneumo_experiments.stages.search import search  # noqa: E402
from pneumo_experiments.stages.train import train  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")

STORAGE = "sqlite:///optuna.db"
CACHES = ("device", "host", "stream")


@pytest.fixture(scope="session")
def shared(shared: Path) -> Path:
    """The folder of the session that has started this one, whose data set and store are used again."""
    return Path(os.environ.get("PNEUMO_SHARED", shared))


@pytest.fixture
def settings(small_dataset: Path, store: Path) -> Train:
    """Short trainings of the tiny network."""
    return make(
        Train,
        dataset=small_dataset,
        network="tiny",
        weights="none",
        epochs=1,
        threshold_trials=0,
        overlays=0,
        batch_size=12,
    )


def test_a_training_ends_in_a_model_that_scores_submits_and_predicts_dicom_bytes(
    settings: Train,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.backends.cudnn.benchmark = False
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    tracking.warn_without_gpu_metrics.cache_clear()
    trained = train(settings)
    logged = last_run().data.params
    used = [logged[f"{name}_used"] for name in ("device", "precision", "cache")]
    assert used == ["cuda:0", "bf16", "device"]
    assert 0 <= trained.scores.dice <= 1
    assert torch.backends.cudnn.benchmark
    if not simulated_cuda.IS_REAL:
        assert "no GPU use among the system metrics: `nvidia-ml-py` is not installed" in caplog.text
    model = trained.model
    result = score(Score(dataset=settings.dataset, model=model, subset="all", overlays=2))
    assert result.scores is not None and result.scores.images == 24
    files = sorted((dataset.parent / "sample" / "dicom-images-train").rglob("*.dcm"))[:3]
    (tmp_path / "few").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "few")
    submitted = score(Score(model=model, dicom_dir=tmp_path / "few"))
    assert submitted.submission is not None
    assert len(submitted.submission.read_text().splitlines()) == 1 + len(files)
    frame = pd.DataFrame({"image_id": [f.stem for f in files], "dicom": [f.read_bytes() for f in files]})
    predictions = mlflow.pyfunc.load_model(model).predict(frame)
    assert predictions["error"].tolist() == [""] * 3
    assert predictions["presence"].between(0, 1).all()


@soak  # on a CPU it is tested always
def test_a_search_runs_its_trials(settings: Train, no_pictures: None) -> None:
    names = ("dataset", "network", "weights", "batch_size")
    shared = {name: flat(settings)[name] for name in names}
    result = search(make(Search, **shared, search_epochs=1, trials=2, confirm=0, keep=1, holdout=0, folds=2))
    assert result.recipe.loss.aux_weight == settings.recipe.loss.aux_weight
    study = optuna.load_study(study_name=optuna.get_all_study_names(STORAGE)[0], storage=STORAGE)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert result.recipe.loss.dice_weight == study.trials[result.trial].params["dice_weight"]


@pytest.mark.parametrize("min_area_px", [0, 20_000])
def test_masks_of_a_folder_are_those_of_the_host_to_the_last_pixel(min_area_px: int, dataset: Path) -> None:
    paths = sorted((dataset.parent / "sample" / "dicom-images-train").rglob("*.dcm"))[:5]
    files: list[File] = [(path.stem, path.read_bytes()) for path in paths]
    rng = np.random.default_rng(0)
    odd = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 90), (90, 40), (40, 90))]
    files[3:3] = [(f"odd-{number}", dicom_bytes(pixels)) for number, pixels in enumerate(odd)]
    files.insert(5, ("broken", b"no radiograph"))
    network = random_network(0)
    thresholds = Thresholds(0.0, 0.5, min_area_px, 0.5)
    found: dict[str, list[Finding]] = {}
    for name in ("cpu", "cuda"):
        compute = choose_compute(make(Device, device=name, precision="fp32"))
        predictor = Predictor(network, compute, "flip", Calibration(0.6, -1))
        detector = Detector((TrainedNetwork(predictor, {}),), 64, thresholds, "")
        presences = [
            finding.presence for finding in detector.detect_each(files) if finding.presence is not None
        ]
        # Half of the images are empty by presence alone.
        middle = float(np.median(presences))
        detector = replace(detector, thresholds=replace(thresholds, presence_threshold=middle))
        found[name] = list(detector.detect_each(files))
    masks = {name: [f.mask for f in found[name] if f.mask is not None] for name in found}
    assert [f.image_id for f in found["cuda"]] == [f.image_id for f in found["cpu"]] == [i for i, _ in files]
    assert [f.error for f in found["cuda"]] == [f.error for f in found["cpu"]]
    assert all(np.array_equal(*pair) for pair in zip(masks["cpu"], masks["cuda"], strict=True))
    assert len(masks["cpu"]) == len(files) - 1
    assert 2 <= sum(mask.any() for mask in masks["cpu"]) <= 6


# Of the real networks, which differ only in torchvision's layers, in fp16: without a CPU's help, bf16 takes
# three times as long.
STEPS = [pytest.param("tiny", "fp32", marks=soak), ("tiny", "bf16"), ("tiny", "fp16")]
STEPS += [pytest.param(f"{name}_resnet50", "fp16", marks=soak) for name in ("fcn", "deeplabv3")]


@pytest.mark.parametrize(("network", "precision"), STEPS)
def test_the_host_waits_for_nothing_in_a_step(network: str, precision: str) -> None:
    device = choose_compute(Device()).device
    net = PneumothoraxNet(network).to(device, memory_format=torch.channels_last)
    recipe = make(
        Recipe,
        network=network,
        ema=0.9,
        lovasz_weight=1.0,
        dice_image_weight=1.0,
        focal_weight=1.0,
        micro_batch=2,  # DeepLab cannot train on one image
    )
    trainer = Trainer(Predictor(net, ComputeConfig(device, precision)), recipe, 10)
    drawn = torch.Generator().manual_seed(0)
    images, targets = (torch.rand(4, 32, 32, generator=drawn) for _ in range(2))
    batch = Batch(images[:, None].cuda(), (targets > 0.9).float().cuda(), torch.ones(4).cuda(), 4)
    trainer.step(batch)  # the optimiser makes its state
    with count_syncs() as waits:
        _, norm = trainer.step(batch)
        assert not waits, waits
    assert bool(norm.isfinite())


@pytest.mark.parametrize("cache", CACHES)
def test_in_an_epoch_the_host_waits_only_for_its_sums(small_dataset: Path, cache: str) -> None:
    values = {"batch_size": 12, "ema": 0.9, "augment": "strong", "mask_smoothing": 2}
    recipe, compute = make(Recipe, network="tiny", **values), choose_compute(Device())
    with Dataset.open(small_dataset) as opened:
        present = np.array([entry.area_px > 0 for entry in opened.entries])
        rows = np.arange(len(present))
        data = StreamedData(opened, rows, present)
        if cache != "stream":
            data = data.load(str(compute.device) if cache == "device" else "cpu")
        epochs = fit(Predictor(build_network("tiny", "none", 0), compute), data, recipe, 2)
        next(epochs)
        with count_syncs() as waits:
            epoch = next(epochs)
            recorded = dict(waits)
        with count_syncs() as waits:
            update_batch_norm(epoch.network, data, recipe, compute)
            assert not waits, waits
    assert epoch.skipped_steps == 0
    assert sorted(name.rpartition(":")[0] for name in recorded) == [
        "_local_scalar_dense learning/fit.py",  # the number of skipped steps
        "device to host learning/loss.py",  # the losses
    ], recorded
    assert set(recorded.values()) == {1}, recorded


@pytest.mark.parametrize("cache", ["auto", "stream"])
def test_the_host_waits_once_for_all_predictions_of_a_validation(small_dataset: Path, cache: str) -> None:
    with Dataset.open(small_dataset) as opened:
        subset = Subset(opened, np.arange(len(opened))).in_memory(cache)
        assert (subset.pixels is None) == (cache == "stream")
        compute, line = choose_compute(Device()), Calibration(0.5, -1)
        predictor = Predictor(build_network("tiny", "none", 0), compute, "flip", line)
        subset.count(predictor)
        with count_syncs() as waits:
            counts = subset.count(predictor)
            recorded = dict(waits)
        assert len(counts) == 24
        assert counts.truth_area.tolist() == [entry.area_px for entry in opened.entries]
    expected = ["device to host learning/threshold_counts.py"]
    assert [name.rpartition(":")[0] for name in recorded] == expected, recorded
    assert set(recorded.values()) == {1}


@soak  # each way is trained above, but for compile=true, which is not simulated
def test_the_benchmark_s_check_tries_every_way_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("train")
    path = stored_sample(tmp_path, images=benchmark.SAMPLE, image_size=32)
    benchmark.check(
        path, choose_compute(Device()), make(Recipe, network="tiny", weights="none", batch_size=4), 2
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0) == "processes=2: not checked, it needs two GPUs"
    failed = [line for line in lines if ": ok, " not in line]
    assert [line.partition(":")[0] for line in failed] in ([], ["compile=true"]), failed  # not simulated
    ways = [f"cache={cache} precision={format}" for cache in CACHES for format in ("bf16", "fp16", "fp32")]
    ways += ["ema=0.9 micro_batch", "interrupted and resumed", "validation", "compile=true"]
    assert [line.partition(":")[0] for line in lines] == ways


def test_the_rows_of_gpu_sh_are_of_both_caches(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("train")
    monkeypatch.setattr(benchmark, "SAMPLE", 24)
    monkeypatch.setattr(benchmark, "flops_per_image", lambda *_: 1.0)  # the meta device is not simulated
    path = Path(shutil.copy(small_dataset, tmp_path / "16.h5"))
    arguments = argparse.Namespace(dry_run=True, compile=False, processes=1)
    benchmark.print_rows("tiny", path, arguments, choose_compute(Device()))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    ends = [(row[benchmark.COLUMNS.index("cache")], row[-2:]) for row in rows]
    assert ends == [("device", ["3.0", "ok"]), ("host", ["3.0", "ok"])]  # GB, as the simulated device says


def test_sums_over_processes_wait_for_nothing_but_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(tensor: torch.Tensor) -> None:
        tensor *= 2

    # Two processes that are equal; torch has no way to join simulated devices.
    replacements: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "get_rank": lambda: 0,
        "all_reduce": doubled,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    values = torch.arange(3.0).cuda()
    with count_syncs() as waits:
        sums = distributed.all_reduce_means(values, 4)
        assert not waits, waits
    assert sums.tolist() == [0, 2, 4]
    terms = RunningMeans()
    terms.add({"loss": values.sum()}, 4)
    with count_syncs() as waits:
        assert terms.numbers() == {"loss": 3.0}
        assert [name.rpartition(" ")[0] for name in waits] == ["device to host"], waits
