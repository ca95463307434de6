"""Addresses of stores and artifacts: the files behind them, and what must not be shown of them."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit

from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from pneumo_experiments.errors import UserError

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SECRETS = re.compile(r"pass|pwd|secret|token|key$|odbc_connect", re.IGNORECASE)
QUERY = re.compile(r"([?&;])([^=&;]*)=([^&;]*)")


def kind_of(address: str) -> str:
    """``http``, ``sqlite``, ``postgresql`` … without the name of a driver; "" for a path."""
    return address.partition("://")[0].partition("+")[0].lower() if "://" in address else ""


def database_file(address: str) -> Path | None:
    """The file of an SQLite database; None for any other address."""
    name = make_url(address).database if kind_of(address) == "sqlite" else None
    return Path(name).resolve() if name and name != ":memory:" else None


def local_path(address: str) -> Path | None:
    """Where MLflow keeps what it calls so: in a path, too, it reads ``%20`` as a space. None if elsewhere."""
    return Path(local_file_uri_to_path(address)) if is_local_uri(address) else None


def is_misread_by_mlflow(address: str) -> bool:
    """Whether MLflow keeps the files of a local address in another folder than meant."""
    read = unquote(address)
    return is_local_uri(address) and ("\ufffd" in read or (read != address and not urlsplit(address).scheme))


def server_of(address: str) -> tuple[str, int] | None:
    """Host and port of a database server; None for any other address."""
    kind = kind_of(address)
    if kind not in DATABASE_PORTS or not (url := make_url(address)).host:
        return None
    return url.host, url.port or DATABASE_PORTS[kind]


def check_address(setting: str, address: str) -> None:
    """Raises UserError where the address falls apart in other places than meant.

    A piece of a password would pass for a host, and every message would show it.
    """
    try:
        host = make_url(address).host or ""
        # Others than SQLAlchemy end the password at the last @, but the host at the first / or ?.
        lost = (
            "@" in urlsplit(address)._replace(netloc="").geturl() if kind_of(address)[:4] == "http" else False
        )
        broken = lost or (kind_of(address) in DATABASE_PORTS and "@" in host)
    except ArgumentError:  # no address of a server
        return
    except ValueError:  # no number after the last colon
        broken = True
    if broken:
        raise UserError(
            f"{setting}={hide_passwords(address)}: cannot be read; write @ / : ? # of a password as"
            " %40 %2F %3A %3F %23"
        )


def hide_passwords(text: str) -> str:
    """An address, or a text with addresses in it, with ``***`` for each password."""
    if re.match(r"[\w+.-]+://", text):
        return _hidden(text)
    return re.sub(r"[\w+.-]+://\S+", lambda found: _hidden(found[0]), text)


def _hidden(address: str) -> str:
    # SQLAlchemy's rendering would show what follows an @ in a password, and every secret of the query.
    kind, _, rest = address.partition("://")
    login, at, place = rest.rpartition("@")
    if at and any(SECRETS.search(unquote_plus(name)) for _, name, _ in QUERY.findall(login)):
        return f"{kind}://***"  # is this @ part of a password in the query? Is the query part of a password?
    user, colon, _ = login.partition(":")
    if colon:
        login = f"{user}:***"

    def pair(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}=***" if SECRETS.search(unquote_plus(found[2])) else found[0]

    return f"{kind}://{login}{at}{QUERY.sub(pair, place)}"


def printable(value: Any) -> Any:
    r"""Texts that every store takes, also in lists and dicts: a byte that is no UTF-8 becomes ``\udcff``.

    Python keeps such bytes of file names as halves of characters, which nothing can write.
    """
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {printable(name): printable(each) for name, each in value.items()}
        case list() | tuple():
            return [printable(each) for each in value]
        case _:
            return value
