"""Addresses of stores and artifacts: the files and servers that they name, and whether a server responds."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path  # pyright: ignore[reportUnknownVariableType]
from mlflow.utils.uri import is_local_uri  # pyright: ignore[reportUnknownVariableType]
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError

from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.passwords import hide_passwords

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PING_SECONDS = 5
CONNECT_SECONDS = 15
# Unauthorized, forbidden, timeout, too many requests; from 500 on it is a server error.
TEMPORARY_STATUSES = (401, 403, 408, 429)
# What to install for the database drivers whose package has another name than their module.
DRIVER_PACKAGES = {
    "psycopg": "pneumo-experiments[postgres]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}


def is_outage(error: Exception) -> bool:
    """Whether the same call may succeed later: no response, a locked database, a server error.

    A response that is not MLflow's comes from a proxy before the server, whatever its status.
    """
    if str(error).startswith("API request to endpoint"):
        return True
    if isinstance(error, MlflowException):  # also what MLflow makes of requests' and SQLAlchemy's errors
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:  # from an upload
        status = error.response.status_code
    else:
        return isinstance(error, requests.ConnectionError | requests.Timeout)
    return status in TEMPORARY_STATUSES or status >= 500


def if_exists(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call of MLflow answers; None if what it is about does not exist. An outage is raised."""
    try:
        return call(*arguments, **options)
    except MlflowException as error:
        if is_outage(error):
            raise
        return None


def scheme_of(address: str) -> str:
    """``http``, ``sqlite``, ``postgresql`` … without the driver; "" for a path."""
    scheme = address.partition("://")[0].partition("+")[0].lower() if "://" in address else ""
    return "postgresql" if scheme == "postgres" else scheme  # as libpq reads it


def with_driver(address: str) -> str:
    """The address as every SQLAlchemy opens it, with the driver psycopg for a PostgreSQL that names none.

    SQLAlchemy 2.0 would take psycopg2, and 2.1 takes psycopg.
    """
    scheme, _, rest = address.partition("://")
    is_incomplete = scheme_of(address) == "postgresql" and "+" not in scheme
    return f"postgresql+psycopg://{rest}" if is_incomplete else address


def database_file(address: str) -> Path | None:
    """The file of an SQLite database; None for any other address."""
    name = make_url(address).database if scheme_of(address) == "sqlite" else None
    return Path(name).resolve() if name and name != ":memory:" else None


def database_server(address: str) -> tuple[str, int] | None:
    """Host and port of a database server; None for any other address."""
    scheme = scheme_of(address)
    if scheme not in DATABASE_PORTS or not (url := make_url(address)).host:
        return None
    return url.host, url.port or DATABASE_PORTS[scheme]


def local_path(address: str) -> Path | None:
    """The local path that MLflow uses, reading ``%20`` as a space even in a path; None if not local."""
    return Path(local_file_uri_to_path(address)) if is_local_uri(address) else None


def is_misread_by_mlflow(address: str) -> bool:
    """Whether MLflow would keep the files of a local address in another folder."""
    decoded = unquote(address)
    changes = decoded != address and not urlsplit(address).scheme
    return is_local_uri(address) and ("\ufffd" in decoded or changes)


def check_address(setting: str, address: str) -> None:
    """Raises UserError if unquoted characters of a password make the address ambiguous.

    Part of the password would be taken for the host, and every message would show it.
    """
    try:
        host = make_url(address).host or ""
        if scheme_of(address) in ("http", "https"):
            # Unlike SQLAlchemy, HTTP clients end the host at the first / or ?, also in a password.
            is_ambiguous = "@" in urlsplit(address)._replace(netloc="").geturl()
        else:
            is_ambiguous = scheme_of(address) in DATABASE_PORTS and "@" in host
    except ArgumentError:  # not the address of a server
        return
    except ValueError:  # the port is not a number
        is_ambiguous = True
    if is_ambiguous:
        raise UserError(
            f"{setting}={hide_passwords(address)}: ambiguous; write @ / : ? # of a password as"
            " %40 %2F %3A %3F %23"
        )


def ping(address: str) -> None:
    """Raises OSError within seconds if no server responds there; MLflow itself would retry for minutes."""
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
