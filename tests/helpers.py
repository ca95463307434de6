"""What several test modules use."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from pneumo_experiments import cli
from pneumo_experiments.settings import Settings, as_texts, flat, from_flat

# Before torch is imported, here and in the processes that tests start: two test files run side by side, and
# threads of both would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
IS_SOAK = int(os.environ.get("PNEUMO_KILLS") or 0) >= 10
# For slow tests whose faults a quicker test catches as well, or nearly.
soak = pytest.mark.skipif(not IS_SOAK, reason="make soak")


def do_not_wait_for_the_disk() -> None:
    """SQLite returns before the disk has its pages, of which a killed process loses none."""
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def _(connection: object, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")


def collect_rarely() -> None:
    """Half a million objects of imported modules stay: the garbage collection need not visit them often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def read_migrations_once() -> None:
    """MLflow and Optuna read all their migrations for each store that a process opens."""
    from mlflow.store.db import utils

    utils._get_latest_schema_revision = functools.cache(utils._get_latest_schema_revision)
    utils._get_latest_schema_revision()
    with suppress(ImportError):  # a private name
        from optuna.storages._rdb.storage import _VersionManager

        make, made = _VersionManager._create_alembic_script, list[Any]()

        def make_once(self: _VersionManager) -> Any:
            made[:] = made or [make(self)]
            return made[0]

        _VersionManager._create_alembic_script = make_once


def make(kind: type[Settings], **values: Any) -> Settings:
    """Settings of an entry point or a group, from values by flat name."""
    assert values.keys() <= flat(kind()).keys(), values.keys() - flat(kind()).keys()
    return from_flat(kind, values)


def changed(settings: Settings, **values: Any) -> Settings:
    """The same settings with other values, by flat name."""
    return make(type(settings), **(flat(settings) | values))


def words_of(settings: Settings) -> list[str]:
    """What gives the command line these settings."""
    return [word for name, text in as_texts(settings).items() for word in (f"--{name}", text)]


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line with which a mistake must have ended it."""
        assert (self.code, self.err.count("\n"), self.err[:7]) == (2, 1, "Error: "), self
        return self.err[7:-1]


Call = Callable[[list[str]], End]


def from_here(text: str) -> str:
    """A text whose paths below the working directory are relative."""
    return text.replace(f"{Path.cwd()}/", "")


def ended(words: list[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> End:
    """How the command line ends; paths in what it says are relative unless absolute ones are given."""
    capsys.readouterr()  # what was said before
    patch.setattr("sys.argv", ["pneumo_experiments", *words])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    if not any(f"{Path.cwd()}/" in word for word in words):
        out, err = from_here(out), from_here(err)
    return End(stop.value.code, out, err)


def before_each_step(patch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Calls ``act`` with the number of each step that an optimizer is about to make, from 1."""
    import torch

    numbers, step = count(1), torch.optim.AdamW.step

    def acting(self: torch.optim.AdamW, *given: Any, **options: Any) -> Any:
        act(next(numbers))
        return step(self, *given, **options)

    patch.setattr(torch.optim.AdamW, "step", acting)


@contextmanager
def interrupted_before_step(number: int) -> Iterator[None]:
    """Whatever trains in the block is interrupted before that step, and must be."""

    def interrupt(reached: int) -> None:
        if reached == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_each_step(patch, interrupt)
        yield


# The command line of a process that sends itself a signal. Before its own words stands when: such as
# "SIGKILL torch.optim.AdamW.step=4,torch.save=1", when the fourth step was reached, and then a first file is
# saved. A file of torch's is then half written.
STRUCK = """
import os, pkgutil, signal, sys
from pneumo_experiments import cli

number = signal.Signals[sys.argv.pop(1)]
moments = [moment.split("=") for moment in sys.argv.pop(1).split(",")]

def watch(place, calls):
    owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    whole, left = getattr(owner, name), [None] * int(calls)

    def struck(*args, **options):
        is_the_moment = len(left) == 1
        del left[:1]
        if is_the_moment and moments:
            watch(*moments.pop(0))
        elif is_the_moment:
            if place == "torch.save":
                whole(*args, **options)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), number)
        return whole(*args, **options)

    setattr(owner, name, struck)

watch(*moments.pop(0))
cli.main()
"""


def few_radiographs(sample: Path, folder: Path, count: int, copies: int = 1) -> dict[str, Path]:
    """Settings that name so many radiographs of a sample, in a folder of their own; copies are renamed."""
    folder.mkdir()
    prefixes = [f"{number}-" for number in range(copies)] if copies > 1 else [""]
    header, *rows = (sample / "train-rle.csv").read_text().splitlines()
    table = [header, *(prefix + row for prefix in prefixes for row in rows)]
    (folder / "train-rle.csv").write_text("\n".join(table))
    for file in sorted(sample.rglob("*.dcm"))[:count]:
        for prefix in prefixes:
            (folder / f"{prefix}{file.name}").hardlink_to(file)
    return {"dicom_dir": folder, "rle_csv": folder / "train-rle.csv"}


BIN = Path(sys.executable).parent  # where mlflow is


def environment() -> dict[str, str]:
    """For a process that tests start: of MLflow's variables none, the package and the tests on the path."""
    return _without_mlflow() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def environment_of_mlflow(uri: str) -> dict[str, str]:
    """For MLflow's own commands: the store and where Python is; they have to find the package themselves."""
    return _without_mlflow() | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": uri,
    }


def _without_mlflow() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true"}


def copy_store(database: Path, folder: Path, artifacts: str = "") -> Path:
    """Copies the database of a store into a folder; where new artifacts go, by default there as well."""
    path = Path(shutil.copy(database, folder))
    with closing(sqlite3.connect(path)) as copied, copied:
        place = artifacts or str(folder / "mlruns" / "0")
        copied.execute("UPDATE experiments SET artifact_location = ?", [place])
    return path


@contextmanager
def store_in(folder: Path, database: Path) -> Iterator[Path]:
    """Works in a folder with a store of its own, a copy of that database; yields the folder."""
    copy_store(database, folder)
    with working_in(folder, store_address(folder)):
        yield folder


def store_address(folder: Path) -> str:
    """The address of the store in a folder."""
    return f"sqlite:///{folder / 'mlflow.db'}"


@contextmanager
def working_in(folder: Path, uri: str) -> Iterator[None]:
    """Works in a folder, with the store of that address and nothing else of MLflow in the environment."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # as tracking does when it is imported
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        if not uri.startswith("sqlite"):  # ours is a second experiment there
            patch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]
        yield
    mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]


def children(parent: int) -> list[psutil.Process]:
    """Of this process id, for a hundredth of what psutil takes, which looks at all processes."""
    found = list[psutil.Process]()
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError, psutil.NoSuchProcess):  # one has just ended
            found += [psutil.Process(int(pid)) for pid in file.read_text().split()]
    return found


def decoders(parent: int = 0) -> list[psutil.Process]:
    """The decoder processes of a process, by default of this one, at work or idle."""
    found = list[psutil.Process]()
    for child in children(parent or os.getpid()):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "decoder_pool" in " ".join(child.cmdline()):
                found.append(child)
    return found
