"""Workers of a search whose trials sleep: real processes that start at once."""

from __future__ import annotations

from pathlib import Path

from command_server import Command, CommandServer
from conftest import ROOT
from helpers import environment
from tracking_server import wait_until

# What the workers that it starts itself find their modules in, too.
CODE = f"""
import os, sys

output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
sys.path.append({str(ROOT / "benchmarks")!r})
import sleeping_search
from pneumo_experiments.experiment import study_report

study_report.pictures = lambda study: {{}}  # they take seconds, and test_search.py looks at them
sleeping_search.main(sys.argv[1:])
"""


def start_worker(commands: CommandServer, folder: Path, uri: str, *words: object) -> Command:
    """Starts ``sleeping_search.py`` with these words in a folder, where ``log`` keeps its output."""
    variables = environment() | {"MLFLOW_TRACKING_URI": uri}
    return commands.start(*words, folder=folder, environment=variables, code=CODE)


def ended(worker: Command) -> int:
    """Waits for a worker; its exit code."""
    wait_until(lambda: worker.poll() is not None)
    return worker.communicate()[0]
