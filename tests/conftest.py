"""What several tests need: the real data where it lies, and a small sample."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import IS_SOAK, ROOT, Call, collect_rarely, do_not_wait_for_the_disk, ended, read_migrations_once

if TYPE_CHECKING:
    from command_server import CommandServer
    from database_server import DatabaseServer

# Of two workers, none shall begin one of these when the other has nothing left: the longest files go first.
# stages/test_bombs is the very first: it measures memory, and no other test has left processes yet.
LONGEST_FIRST = (
    *("stages/bombs", "stages/search", "registry/promotion", "stages/main", "stages/register"),
    *("stages/train", "stages/elsewhere", "stages/mistakes", "serving/service", "tracking/outage"),
    *("learning/simulated_cuda", "search/kills", "tracking/runs", "stages/preprocess"),
    *("dataset/decoder_pool", "learning/network", "stages/at_once", "stages/full_disk", "stages/faults"),
    *("learning/architectures", "dataset/shards", "stages/kills"),
    *("evaluation/load_models", "evaluation/given_thresholds", "stages/hostile_values"),
)


def pytest_configure(config: pytest.Config) -> None:
    from cpu_seconds import CpuSeconds
    from hypothesis import settings

    settings.register_profile("suite", max_examples=100 if IS_SOAK else 25)
    settings.load_profile("suite")
    config.pluginmanager.register(CpuSeconds())
    do_not_wait_for_the_disk()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(f"{item.path.parent.name}/{item.path.stem[5:]}", len(rank)))


def pytest_collection_finish() -> None:
    read_migrations_once()
    collect_rarely()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton reports what is never freed, after pytest's last line


@contextmanager
def tiny_networks() -> Iterator[None]:
    """Lets ``network="tiny"`` name the network of tiny_network.py, until the end of the block."""
    from tiny_network import add_tiny_network

    from pneumo_experiments.learning.network import NETWORKS

    before = dict(NETWORKS)
    add_tiny_network()
    yield
    NETWORKS.clear()
    NETWORKS.update(before)


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """Lets ``network="tiny"`` name the network of tiny_network.py."""
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def tiny_default(tiny: None) -> None:
    """Puts that network in the place of the default one, for tests that start commands with default names."""
    from tiny_network import replace_default_network

    replace_default_network()


@pytest.fixture
def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are built start as copies of one: to draw their values takes longer than all else."""
    from tiny_network import fresh

    from pneumo_experiments.learning import network

    monkeypatch.setattr(network, "PneumothoraxNet", lambda name: copy.deepcopy(fresh(name)))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search draws none: they take seconds, and are the point of few tests."""
    from pneumo_experiments.search import report as study_report

    monkeypatch.setattr(study_report, "pictures", lambda study: {})


@pytest.fixture(scope="module")
def no_layout() -> Iterator[None]:
    """Charts are drawn with labels where they fall: to place them takes half of the time of a score."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        yield


@pytest.fixture(scope="module")
def no_charts() -> Iterator[None]:
    """Charts stay blank: to draw them takes half of the time of a score, and a third of a training's."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda self, renderer: None)
        yield


@pytest.fixture(scope="module")
def no_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models are logged without this package, whose many files take a while to copy."""
    from pneumo_experiments.tracking import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "PACKAGE", tmp_path_factory.mktemp("code"))
        yield


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line with these words, in this process; how it ends."""
    return partial(ended, patch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of all workers of the session."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder with what ``make(folder)`` writes into it; the first worker that needs it does."""
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            folder.mkdir()
            make(folder)
            lock.write("made")
    return folder


def make_store(folder: Path) -> None:
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # for the artifacts
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()


@pytest.fixture(scope="session")
def empty_store(shared: Path) -> Path:
    """Database of a store without runs; to create one takes seconds, to copy it none."""
    return make_once(shared / "store", make_store) / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Iterator[Path]:
    """The working directory: an empty folder with a store of its own."""
    from helpers import store_in

    with store_in(tmp_path, empty_store) as folder:
        yield folder


@pytest.fixture(scope="session")
def dataset(shared: Path) -> Path:
    """Data set of 24 synthetic radiographs of 32 x 32 pixels; beside it, in ``sample``, their files."""
    from samples import stored_sample

    return make_once(shared / "data", partial(stored_sample, images=24, image_size=32)) / "d.h5"


@pytest.fixture(scope="session")
def small_dataset(shared: Path) -> Path:
    """Data set of 24 images of 16 x 16 pixels, of small radiographs, which takes less time to score."""
    from samples import write

    def make(folder: Path) -> None:
        write(folder / "d.h5", count=24, pixel_dtype="uint8")

    return make_once(shared / "small", make) / "d.h5"


@pytest.fixture(scope="session")
def trained_store(shared: Path, empty_store: Path, small_dataset: Path) -> Path:
    """Database of a store with one model: the tiny network under the default one's name, trained an epoch."""
    from helpers import make as settings_of
    from helpers import store_in
    from tiny_network import replace_default_network

    from pneumo_experiments.settings import Train
    from pneumo_experiments.stages.train import train

    short = {"weights": "none", "epochs": 1, "threshold_trials": 0, "overlays": 0, "device": "cpu"}

    def make(folder: Path) -> None:
        with store_in(folder, empty_store), tiny_networks():
            replace_default_network()
            train(settings_of(Train, dataset=small_dataset, **short))

    return make_once(shared / "trained", make) / "mlflow.db"


@pytest.fixture(scope="session")
def database() -> Iterator[DatabaseServer]:
    from database_server import DatabaseServer

    server = DatabaseServer()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def commands(shared: Path) -> Iterator[CommandServer]:
    """Starts commands in processes of their own that need no time for imports."""
    from command_server import command_server

    with command_server(shared) as server:
        yield server


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real SIIM radiographs and labels; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("PNEUMO_REAL_DATA") or ROOT.parent / "shared" / "siim")
    if not (folder / "known_areas.csv").is_file():
        pytest.skip(f"no real radiographs: PNEUMO_REAL_DATA names no folder with known_areas.csv ({folder})")
    return folder


@pytest.fixture(scope="session")
def real_labels(real_data: Path) -> dict[str, tuple[str, int]]:
    """NIH patient and area of the 12,047 real images (overlaps count twice, which is near enough)."""
    from pneumo_experiments.dataset.annotations import read_annotations, read_patients

    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    patients = read_patients(real_data / "labels" / "patients.csv.gz")
    areas = {name: sum(map(int, " ".join(texts).split()[1::2])) for name, texts in annotations.items()}
    return {name: (patients[name], areas[name]) for name in sorted(areas)}
