"""Where this process logs: the client of its run, or nowhere in a helper process."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from pneumo_experiments.tracking.buffered_client import FOLDER, BufferedClient

_client: ContextVar[BufferedClient | None] = ContextVar("client", default=None)
_is_enabled: ContextVar[bool] = ContextVar("is_enabled", default=True)

log = logging.getLogger(__name__)


@contextmanager
def disabled() -> Generator[None]:
    """Within it, runs and log functions do nothing: for a process that helps another one, which logs."""
    token = _is_enabled.set(False)
    try:
        yield
    finally:
        _is_enabled.reset(token)


def is_enabled() -> bool:
    """False within ``disabled``."""
    return _is_enabled.get()


def active_client() -> BufferedClient:
    """The client of the active run, shared with its children."""
    client = _client.get()
    assert client is not None, "no run is active"
    return client


@contextmanager
def client_of(run_id: str) -> Generator[BufferedClient]:
    """Opens the client of a run, or the one of the run around it; at the end warns of unsent calls.

    A resumed run also sends the calls that its earlier process left.
    """
    outer = _client.get()
    if outer is not None:
        yield outer
        return
    client = BufferedClient((FOLDER / f"undelivered-{run_id}").absolute())
    token = _client.set(client)
    try:
        yield client
    finally:
        _client.reset(token)
        if len(client):
            log.warning(
                "%s: %d calls of this run are undelivered, buffered in %s; when the server is reachable,"
                " send them with: python -m pneumo_experiments.tracking %s",
                *(client.store, len(client), client.file, shlex.quote(str(client.file))),
            )
