"""Workers of a search whose trials sleep: real processes that start at once."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pneumo_experiments.search import report as study_report
from pneumo_experiments.settings import Search
from pneumo_experiments.stages.search import run_study

if TYPE_CHECKING:  # a worker that another starts needs none of the tests' own modules
    from command_server import Command, CommandServer

CODE = "import sleeping_workers; sleeping_workers.main()"


def start_worker(commands: CommandServer, folder: Path, uri: str, *words: object) -> Command:
    """Starts a search of ``sleeping_search.py`` with these words in a folder; ``log`` keeps its output."""
    from helpers import environment

    variables = environment() | {"MLFLOW_TRACKING_URI": uri}
    return commands.start(*words, folder=folder, environment=variables, code=CODE)


def ended(worker: Command) -> int:
    """Waits for a worker; its exit code."""
    from tracking_server import wait_until

    wait_until(lambda: worker.poll() is not None)
    return worker.communicate()[0]


def main() -> None:
    """What a worker does."""
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cast("TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)  # who waits for a line sees it
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # for the workers that it starts as well
    import sleeping_search

    sleeping_search.search = search
    sleeping_search.main(sys.argv[1:])


def search(settings: Search) -> None:
    """A search without pictures: they take seconds, and test_search.py looks at them."""
    import sleeping_search

    study_report.pictures = lambda study: {}
    training = sleeping_search.settings_of(sys.argv[1:])[1]
    run_study(settings, sleeping_search.FINGERPRINT, lambda settings: training, search)
