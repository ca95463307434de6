"""Hides the passwords of addresses in what is shown or logged."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

SECRETS = re.compile(r"pass|pwd|secret|token|key$|odbc_connect", re.IGNORECASE)
QUERY = re.compile(r"([?&;])([^=&;]*)=([^&;]*)")


def hide_passwords(text: str) -> str:
    """An address, or a text that contains addresses, with ``***`` instead of each password."""
    if address := re.fullmatch(r"([\w+.-]+://)(.*)", text, re.DOTALL):
        return _hidden(address)
    return re.sub(r"([\w+.-]+:/+)(\S+)", _hidden, text)  # a file path keeps one slash of an address


def _hidden(address: re.Match[str]) -> str:
    # SQLAlchemy's own rendering shows what follows an @ in a password, and every secret of the query.
    scheme, rest = address.groups()
    login, at, location = rest.rpartition("@")
    if at and any(SECRETS.search(unquote_plus(name)) for _, name, _ in QUERY.findall(login)):
        return f"{scheme}***"  # the @ may be part of a password in the query, or the query of a password
    user, colon, _ = login.partition(":")
    if colon:
        login = f"{user}:***"

    def hide_value(pair: re.Match[str]) -> str:
        return f"{pair[1]}{pair[2]}=***" if SECRETS.search(unquote_plus(pair[2])) else pair[0]

    return f"{scheme}{login}{at}{QUERY.sub(hide_value, location)}"
