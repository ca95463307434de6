"""Sends calls to a store that may be unreachable for a while: they are then buffered in a file, in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import mlflow
import requests
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import ServerUnreachable
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking import buffer_file
from pneumo_experiments.tracking.addresses import escape_surrogates
from pneumo_experiments.tracking.calls import CALLS
from pneumo_experiments.tracking.servers import ping
from pneumo_experiments.tracking.store import SETTING, tracking_uri

# Pause before the next attempt: at least so many seconds, and so many times as long as the failed attempt
# took. A store that hangs costs a training a tenth of its time.
RETRY_SECONDS, RETRY_FACTOR = 30, 10
FOLDER = Path("output")
# Unauthorized, forbidden, timeout, too many requests; from 500 on it is a server error.
TEMPORARY_STATUSES = (401, 403, 408, 429)

log = logging.getLogger(__name__)


class StoreUnreachable(Exception):
    """The call failed for now; it may succeed later."""


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


@contextmanager
def outages_as_user_errors() -> Generator[None]:
    """Raises ServerUnreachable for an outage in calls that cannot be buffered: their result is needed."""
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        if not is_outage(error):
            raise
        raise ServerUnreachable(
            f"{SETTING}={tracking_uri()}: unreachable ({_reason(error)});"
            " run the same command again when it works"
        ) from error


class BufferedClient:
    """Sends calls to the store; unsent ones are buffered in ``calls.jsonl`` of the folder, one per line.

    The file exists only while calls are buffered. Files that calls name are copied into the folder; their
    paths are relative to its parent, so that both may be moved.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the calls that an earlier process left in the folder."""
        self.folder = folder
        self.file = folder / buffer_file.FILE
        self._buffered, self.invalid_lines, is_incomplete = buffer_file.read(folder, CALLS)
        self._refused: list[buffer_file.Call] = []  # buffered calls that the store rejected: sent no more
        self._next_attempt = 0.0
        self._is_outage_logged = False
        self._lock = RLock()  # system metrics come from their own thread
        if is_incomplete:
            log.warning("%s: dropped its incomplete last line, left by a killed process", self.file)
            self._write()
        if self.invalid_lines:
            log.warning("%s: %d invalid lines: left unchanged", self.file, len(self.invalid_lines))

    def __len__(self) -> int:
        """Number of calls that the store does not have."""
        return len(self._refused) + len(self._buffered)

    def send(self, call: str, **arguments: Any) -> str | None:
        """Sends a call of CALLS, after the buffered ones; returns its result.

        Raises StoreUnreachable if it may succeed later, else the store's own error.
        """
        with self._lock:
            self._flush()
            return self._attempt(call, arguments)

    def try_send(self, call: str, **arguments: Any) -> None:
        """Sends a call that may be lost; does nothing while calls are buffered or another thread sends."""
        if not self._buffered and self._lock.acquire(blocking=False):
            try:
                self._attempt(call, arguments)
            except StoreUnreachable:
                pass
            finally:
                self._lock.release()

    def buffer(self, call: str, **arguments: Any) -> None:
        """Appends a call to the file, to be sent later."""
        with self._lock:
            self._buffered.append({"call": call} | arguments)
            buffer_file.append(self.folder, self._buffered[-1])
            if not self._is_outage_logged:
                self._is_outage_logged = True
                log.warning("%s: tracking server unreachable: buffering to %s", self.store, self.file)

    def send_or_buffer(self, call: str, **arguments: Any) -> None:
        """Sends a call now, or buffers it if the store is unreachable."""
        try:
            self.send(call, **arguments)
        except StoreUnreachable:
            self.buffer(call, **arguments)

    def copy(self, path: Path) -> str:
        """Copies a file that a buffered call names; returns the path for that call."""
        return buffer_file.copy(self.folder, path)

    def skip_pause(self) -> None:
        """Makes the next call an attempt, even right after a failed one."""
        self._next_attempt = 0.0

    def flush(self) -> bool:
        """Sends the buffered calls in order; returns whether the store has them all."""
        with self._lock:
            try:
                self._flush()
            except StoreUnreachable:
                return False
            return not self._refused

    @property
    def store(self) -> str:
        """The store's address for messages."""
        return f"{SETTING}={tracking_uri()}"

    def _flush(self) -> None:
        if not self._buffered:
            return
        before, sent = len(self._buffered), list[buffer_file.Call]()
        try:
            while self._buffered:
                entry = self._buffered[0]
                name = entry["call"]
                try:
                    result = self._attempt(name, buffer_file.arguments_of(self.folder, entry))
                    sent.append(entry)
                    if result is not None:
                        log.warning("%s: the buffered %s is now logged as %s", self.store, name, result)
                except StoreUnreachable:
                    raise
                except Exception as error:  # must neither end the training nor stop the other calls
                    self._refused.append(entry)
                    log.warning("%s: refused buffered %s (%s)", self.store, name, _reason(error))
                del self._buffered[0]
        finally:
            if len(self._buffered) < before:
                self._write()
            for entry in sent:  # not earlier: after an interruption the calls are sent again
                buffer_file.remove_copy(self.folder, entry)
        log.warning("%s: reachable again: sent the buffered calls", self.store)
        self._is_outage_logged = False

    def _attempt(self, call: str, arguments: Mapping[str, Any]) -> str | None:
        if time.monotonic() < self._next_attempt:
            raise StoreUnreachable
        start = time.monotonic()
        try:
            ping(mlflow.get_tracking_uri())  # MLflow itself would wait for minutes
        except OSError as error:
            raise self._unreachable(start) from error
        try:
            path = {name: value for name, value in arguments.items() if name == "path"}  # must stay as it is
            return CALLS[call](**escape_surrogates(arguments) | path)
        except (MlflowException, requests.RequestException) as error:
            if not is_outage(error):
                raise
            raise self._unreachable(start) from error

    def _unreachable(self, start: float) -> StoreUnreachable:
        now = time.monotonic()
        self._next_attempt = now + max(RETRY_SECONDS, RETRY_FACTOR * (now - start))
        return StoreUnreachable()

    def _write(self) -> None:
        buffer_file.write(self.folder, [*self._refused, *self._buffered], self.invalid_lines)


def _reason(error: Exception) -> str:
    lines = str(error).split("\n")
    is_preface = lines[0].startswith("(raised as a result of")  # SQLAlchemy's, before the reason itself
    return hide_passwords(lines[1 if is_preface and len(lines) > 1 else 0])[:300]
