"""Checks within seconds whether the server at an address responds; MLflow itself would retry for minutes."""

from __future__ import annotations

import socket
import time
from threading import Thread

import requests
from sqlalchemy import NullPool, create_engine

from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.addresses import (
    check_address,
    database_server,
    scheme_of,
    with_driver,
)

PING_SECONDS = 5
CONNECT_SECONDS = 15
# What to install for the database drivers whose package has another name than their module.
DRIVER_PACKAGES = {
    "psycopg": "pneumo-experiments[postgres]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}


def ping(address: str) -> None:
    """Raises OSError if no HTTP or database server responds at the address."""
    if scheme_of(address) in ("http", "https"):
        requests.head(address, timeout=PING_SECONDS)  # any response will do
    elif server := database_server(address):
        socket.create_connection(server, timeout=PING_SECONDS).close()


def connect(address: str) -> None:
    """Opens a database and closes it.

    Raises TimeoutError if a server accepts the connection but does not respond, else the driver's error.
    """
    errors = list[Exception]()

    def try_to_connect() -> None:
        try:
            create_engine(with_driver(address), poolclass=NullPool).connect().close()
        except Exception as error:
            errors.append(error)

    # Not every driver has a timeout: its thread is abandoned.
    thread = Thread(target=try_to_connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError(f"the database server does not respond within {CONNECT_SECONDS} s")


def wait_for_server(setting: str, address: str, seconds: float = 300) -> None:
    """Waits until the server at an address responds; raises ServerUnreachable after so many seconds."""
    start, is_waiting = time.monotonic(), False
    while True:
        try:
            check_server(setting, address)
            return
        except ServerUnreachable as error:
            if time.monotonic() - start > seconds:
                raise
            if not is_waiting:
                print(f"{error}; waiting for it")
            is_waiting = True
            time.sleep(2)


def check_server(setting: str, address: str) -> None:
    """Raises UserError if the address is ambiguous, no server responds there, or a database cannot be opened.

    It is ServerUnreachable where no server responds.
    Any other address, such as a path or an SQLite file, is not opened.
    """
    shown = f"{setting}={hide_passwords(address)}"
    check_address(setting, address)
    try:
        ping(address)
        if database_server(address):
            connect(address)
    except ModuleNotFoundError as error:
        package = DRIVER_PACKAGES.get(error.name or "", error.name)
        raise UserError(f"{shown}: no driver for this database; run: pip install '{package}'") from error
    except OSError as error:  # also requests' exceptions
        raise ServerUnreachable(f"{shown}: no server responds there; start it, or name another") from error
    except Exception as error:  # SQLAlchemy and its drivers: errors of many kinds
        reason = hide_passwords(str(error).split("\n")[0])
        raise UserError(f"{shown}: the database cannot be opened ({reason}); name another") from error
