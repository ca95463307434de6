"""Addresses of stores and artifacts: the files and servers that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from mlflow.utils.file_utils import local_file_uri_to_path  # pyright: ignore[reportUnknownVariableType]
from mlflow.utils.uri import is_local_uri  # pyright: ignore[reportUnknownVariableType]
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def scheme_of(address: str) -> str:
    """``http``, ``sqlite``, ``postgresql`` … without the driver; "" for a path."""
    scheme = address.partition("://")[0].partition("+")[0].lower() if "://" in address else ""
    return "postgresql" if scheme == "postgres" else scheme  # as libpq reads it


def with_driver(address: str) -> str:
    """The address as every SQLAlchemy opens it, with the driver psycopg for a PostgreSQL that names none.

    SQLAlchemy 2.0 would take psycopg2, and 2.1 takes psycopg.
    """
    scheme, _, rest = address.partition("://")
    names_driver = "+" in scheme
    return (
        f"postgresql+psycopg://{rest}" if scheme_of(address) == "postgresql" and not names_driver else address
    )


def database_file(address: str) -> Path | None:
    """The file of an SQLite database; None for any other address."""
    name = make_url(address).database if scheme_of(address) == "sqlite" else None
    return Path(name).resolve() if name and name != ":memory:" else None


def local_path(address: str) -> Path | None:
    """The local path that MLflow uses, reading ``%20`` as a space even in a path; None if not local."""
    return Path(local_file_uri_to_path(address)) if is_local_uri(address) else None


def is_misread_by_mlflow(address: str) -> bool:
    """Whether MLflow would keep the files of a local address in another folder."""
    decoded = unquote(address)
    changes = decoded != address and not urlsplit(address).scheme
    return is_local_uri(address) and ("\ufffd" in decoded or changes)


def database_server(address: str) -> tuple[str, int] | None:
    """Host and port of a database server; None for any other address."""
    scheme = scheme_of(address)
    if scheme not in DATABASE_PORTS or not (url := make_url(address)).host:
        return None
    return url.host, url.port or DATABASE_PORTS[scheme]


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


def escape_surrogates(value: Any) -> Any:
    r"""Text that every store accepts, also in lists and dicts: a byte that is not UTF-8 becomes ``\udcff``.

    Python keeps such bytes of file names as lone surrogates, which no codec can encode.
    """
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {
                escape_surrogates(name): escape_surrogates(each)
                for name, each in cast("dict[Any, Any]", value).items()
            }
        case list() | tuple():
            return [escape_surrogates(each) for each in cast("list[Any]", value)]
        case _:
            return value
