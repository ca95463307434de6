"""Runs the command line in processes forked from one that has imported everything, which saves seconds.

Only the start differs from ``python -m pneumo_experiments``: each command is a process of its own, with its
own environment, folder and signals. All pytest processes of a session use one server.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cpu_seconds
import sqlalchemy.orm
from helpers import ROOT, collect_rarely, do_not_wait_for_the_disk, read_migrations_once
from matplotlib.figure import Figure
from mlflow.utils import requirements_utils

from pneumo_experiments import figures
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.search import report as study_report
from pneumo_experiments.settings import Device

SERVE = "import command_server, sys; command_server.serve(*sys.argv[1:])"
IMPORTS = (
    *("tiny_network", "pneumo_experiments.learning.trainer", "pneumo_experiments.stages.main"),
    *("alembic.command", "git", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store"),
    *("mlflow.store.model_registry.sqlalchemy_store", "sqlalchemy.dialects.sqlite"),
    *("mlflow.cli", "mlflow.server.fastapi_app", "uvicorn", "pandas", "psycopg"),
    *("optuna.importance", "optuna.visualization.matplotlib"),
    *("PIL.PngImagePlugin", "torch._dynamo"),  # torch's optimisers load it
)


# Stands for `python` on the PATH of `mlflow run`, whose commands are `python -m pneumo_experiments …`: runs
# them with the tiny network in the place of the default one.
PYTHON = """\
#!{executable} -SE
import json, os, socket, sys

read_end, write_end = os.pipe()
request = dict(words=sys.argv[3:], folder=os.getcwd(), tiny=True, code="", max_file_bytes=None)
content = json.dumps(request | dict(environment=dict(os.environ))).encode()
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [len(content).to_bytes(8)], [0, 1, write_end])
connection.sendall(content)
os.close(write_end)
with open(read_end) as ended:
    code, seconds = [*ended][-1].split()
with open(sys.argv[0] + ".seconds", "a") as file:
    file.write(seconds + "\\n")
sys.exit(int(code) % 256)
"""


@dataclass
class Command:
    """A command that runs or has ended, much like a ``Popen`` whose stderr goes to stdout."""

    pid: int
    stdin: IO[str]
    stdout: IO[str]
    _ended: IO[str]
    _code: list[int] = field(default_factory=list[int])

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one killed it; None while the command runs."""
        os.set_blocking(self._ended.fileno(), False)
        return self._read_code()

    def wait(self) -> int:
        """The exit code; also -9 when the process that started the command was killed, and no one knows."""
        os.set_blocking(self._ended.fileno(), True)
        code = self._read_code()
        return -signal.SIGKILL if code is None else code

    def communicate(self) -> tuple[int, str]:
        """Waits until it has ended; the exit code, and the rest of its output."""
        self.stdin.close()
        with self.stdout, self._ended:
            said = self.stdout.read()
            return self.wait(), said

    def send_signal(self, number: int) -> None:
        """As that of subprocess.Popen: nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _read_code(self) -> int | None:
        if not self._code and (line := self._ended.readline()):
            code, seconds = line.split()
            self._code.append(int(code))
            cpu_seconds.count_command(float(seconds))
        return self._code[0] if self._code else None


class CommandServer:
    """Starts commands, over a connection to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def start(
        self,
        *words: object,
        folder: Path,
        environment: dict[str, str],
        tiny: bool = False,
        max_file_bytes: int | None = None,
        code: str = "",
    ) -> Command:
        """Starts it in the folder, as the leader of a process group.

        ``tiny`` makes the network of tiny_network.py known and gives it the default one's name; charts stay
        blank. With ``max_file_bytes`` no file can grow beyond so many bytes. ``code`` runs in
        place of the command line, with the words as its arguments.
        """
        (read_in, write_in), (read_out, write_out), (read_end, write_end) = os.pipe(), os.pipe(), os.pipe()
        request = {"words": [*map(str, words)], "folder": str(folder), "tiny": tiny, "code": code}
        request |= {"environment": environment, "max_file_bytes": max_file_bytes}
        content, theirs = json.dumps(request).encode(), (read_in, write_out, write_end)
        socket.send_fds(self._connection, [len(content).to_bytes(8)], theirs)
        self._connection.sendall(content)
        for descriptor in theirs:
            os.close(descriptor)
        stdin, ended = os.fdopen(write_in, "w", buffering=1), os.fdopen(read_end)
        if not code:
            stdin.close()  # the command line reads nothing
        return Command(int(ended.readline()), stdin, os.fdopen(read_out), ended)

    def write_python(self, folder: Path) -> None:
        """Writes ``python``, which starts what ``mlflow run`` asks for.

        ``python.seconds`` will hold the CPU seconds of that.
        """
        address = self._connection.getpeername()
        (folder / "python").write_text(PYTHON.format(executable=sys.executable, address=address))
        (folder / "python").chmod(0o755)


@contextmanager
def command_server(folder: Path) -> Iterator[CommandServer]:
    """Connects to the server whose socket lies in the folder; whoever comes first starts it."""
    address, connection, process = str(folder / "commands"), socket.socket(socket.AF_UNIX), None
    with connection:
        with (folder / "commands.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                connection.connect(address)
            except (FileNotFoundError, ConnectionRefusedError):
                process = _start(address)
                connection.connect(address)
        yield CommandServer(connection)
    if process is not None:
        before = os.times()
        process.wait()
        after = os.times()  # with all that the server did, also for tests of others
        own = after.children_user + after.children_system - before.children_user - before.children_system
        cpu_seconds.count_command(-own)


def _start(address: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, "-c", SERVE, address]
        return subprocess.Popen(command, stdin=listener, env=environment)


def serve(address: str) -> None:
    """Forks for each request, until all connections are closed; the socket that takes them is stdin."""
    for name in IMPORTS:
        importlib.import_module(name)
    do_not_wait_for_the_disk()
    read_migrations_once()
    sqlalchemy.orm.configure_mappers()  # takes MLflow's first client a second
    figures.learning_curves([{"loss/total": 0.0}], 0)  # a process's first picture takes a second as well
    requirements_utils._init_modules_to_packages_map()  # as the first model that a process logs does
    choose_compute(Device(device="cpu"))  # which times formats, once in a process
    collect_rarely()  # a process that ends would visit, and so copy, all of this
    listener = socket.socket(fileno=os.dup(0))
    connections = [listener.accept()[0]]
    while connections:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
            elif not _fork(ready):
                connections.remove(ready)
        if not connections:
            Path(address).unlink()
            if select.select([listener], [], [], 0)[0]:  # who has found it just before
                connections.append(listener.accept()[0])
    _reap()
    os._exit(0)


def _fork(connection: socket.socket) -> bool:
    """Starts the command that is requested; False when the connection was closed."""
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    if not length:
        connection.close()
        return False
    content = connection.recv(int.from_bytes(length), socket.MSG_WAITALL)
    if os.fork() == 0:
        _keep(json.loads(content), *descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    _reap()
    return True


def _reap() -> None:
    """Lets go of keepers that have ended; their CPU time counts from now on."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(request: dict[str, Any], given: int, out: int, ended: int) -> None:
    """Forks the command and reports its process id, then its exit code and CPU seconds."""
    child = os.fork()
    if child == 0:
        os.close(ended)
        _run(request, given, out)
    os.close(given)
    os.close(out)
    os.write(ended, f"{child}\n".encode())
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    os.write(ended, f"{os.waitstatus_to_exitcode(status)} {seconds:.2f}\n".encode())
    os._exit(0)


def _run(request: dict[str, Any], given: int, out: int) -> None:
    from tiny_network import add_tiny_network, replace_default_network

    from pneumo_experiments import cli

    os.setsid()
    for source, target in ((given, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(given)
    os.close(out)
    sys.stdin = os.fdopen(0)
    for number, name in ((1, "stdout"), (2, "stderr")):  # a stream remembers what its file can
        stream = os.fdopen(number, "w")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if (most := request["max_file_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if request["tiny"]:
        add_tiny_network()
        replace_default_network()
        study_report.pictures = lambda study: {}
        Figure.draw = lambda self, renderer: None
    sys.argv = ["pneumo_experiments", *request["words"]]
    if request["code"]:
        sys.exit(exec(request["code"], {"__name__": "__main__"}))
    cli.main()
