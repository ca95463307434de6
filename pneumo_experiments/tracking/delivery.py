"""Delivery to a store that may go away for a while: what it cannot take now is kept in a file, in order."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

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

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking import buffer
from pneumo_experiments.tracking.addresses import hide_passwords, printable
from pneumo_experiments.tracking.calls import CALLS
from pneumo_experiments.tracking.store import reach, tracking_uri

PAUSE_SECONDS = 30  # between attempts while the store is away: the training shall not wait for it
PAUSE_FACTOR = (
    10  # and so many times as long as an attempt took: a store that hangs costs a tenth of the time
)
FOLDER = Path("output")
# Access withdrawn, a timeout, too many requests; from 500 on it is the server's own fault.
PASSING_STATUSES = (401, 403, 408, 429)

log = logging.getLogger(__name__)


class StoreUnreachable(Exception):
    """The store cannot take it now."""


def is_outage(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, a locked database, a server in trouble.

    A page instead of MLflow's answer comes from what stands before the server, whatever its status.
    """
    if str(error).startswith("API request to endpoint"):
        return True
    if isinstance(error, MlflowException):  # also what MLflow makes of requests' and SQLAlchemy's errors
        status = error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:  # from an upload
        status = error.response.status_code
    else:
        return isinstance(error, requests.ConnectionError | requests.Timeout)
    return status in PASSING_STATUSES or status >= 500


@contextmanager
def log_outages() -> Generator[None]:
    """Makes a UserError of an outage that meets a call whose answer is needed at once."""
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        if not is_outage(error):
            raise
        raise UserError(
            f"MLFLOW_TRACKING_URI={tracking_uri()}: does not work at the moment ({_reason(error)});"
            " the same command again goes on when it does"
        ) from error


class Outbox:
    """Calls on their way to the store. What waits lies in ``calls.jsonl`` of the folder, a call per line.

    The file exists only while something waits. Files that calls name are copied into the folder; paths are
    relative to the folder above, which may be moved.
    """

    def __init__(self, folder: Path) -> None:
        """Takes up what an earlier process left in the folder."""
        self.folder = folder
        self.file = folder / buffer.FILE
        self._waiting, self.foreign, torn = buffer.read(folder, CALLS)  # foreign: lines that are no calls
        self._refused: list[buffer.Call] = []  # waited, and the store will never take them
        self._next_attempt = 0.0
        self._told = False
        self._lock = RLock()  # system metrics come from a thread of their own
        if torn:
            log.warning("%s: its last line is torn, by a kill: left out", self.file)
            self._write()
        if self.foreign:
            log.warning("%s: %d lines are no calls: left as they are", self.file, len(self.foreign))

    def __len__(self) -> int:
        """How many calls are missing in the store."""
        return len(self._refused) + len(self._waiting)

    def offer(self, call: str, **arguments: Any) -> str | None:
        """Makes a call of CALLS after all that waits; returns its answer.

        Raises Away where the store cannot take it, and the store's error where it refuses it.
        """
        with self._lock:
            self._flush()
            return self._attempt(call, arguments)

    def offer_sample(self, call: str, **arguments: Any) -> None:
        """Makes a call that may be lost, if nothing waits; never blocks the thread that delivers."""
        if not self._waiting and self._lock.acquire(blocking=False):
            try:
                self._attempt(call, arguments)
            except StoreUnreachable:
                pass
            finally:
                self._lock.release()

    def keep(self, call: str, **arguments: Any) -> None:
        """Writes a call to the file, to be made later."""
        with self._lock:
            self._waiting.append({"call": call} | arguments)
            buffer.append(self.folder, self._waiting[-1])
            if not self._told:
                self._told = True
                log.warning("%s takes nothing at the moment: kept in %s until it does", self.store, self.file)

    def deliver(self, call: str, **arguments: Any) -> None:
        """Makes a call now, or keeps it where the store is away."""
        try:
            self.offer(call, **arguments)
        except StoreUnreachable:
            self.keep(call, **arguments)

    def copy(self, path: Path) -> str:
        """A lasting copy of a file that a kept call names."""
        return buffer.copy(self.folder, path)

    def hurry(self) -> None:
        """Lets the next call be attempted at once, however short ago the store was away."""
        self._next_attempt = 0.0

    def flush(self) -> bool:
        """Makes the calls that wait, in order; whether nothing is missing after it."""
        with self._lock:
            try:
                self._flush()
            except StoreUnreachable:
                return False
            return not self._refused

    @property
    def store(self) -> str:
        """The store as messages name it."""
        return f"MLFLOW_TRACKING_URI={tracking_uri()}"

    def _flush(self) -> None:
        if not self._waiting:
            return
        before, made = len(self._waiting), list[buffer.Call]()
        try:
            while self._waiting:
                entry = self._waiting[0]
                name = entry["call"]
                try:
                    answer = self._attempt(name, buffer.arguments_of(self.folder, entry))
                    made.append(entry)
                    if answer is not None:
                        log.warning("%s: the %s that was kept is now logged as %s", self.store, name, answer)
                except StoreUnreachable:
                    raise
                except Exception as error:  # whatever it is, it must not end the work or hold up the rest
                    self._refused.append(entry)
                    log.warning("%s: refused %s that were kept (%s)", self.store, name, _reason(error))
                del self._waiting[0]
        finally:
            if len(self._waiting) < before:
                self._write()
            for entry in made:  # only now: an interruption before makes the calls again
                buffer.remove_copy(self.folder, entry)
        log.warning("%s answers again: delivered what was kept", self.store)
        self._told = False

    def _attempt(self, call: str, arguments: Mapping[str, Any]) -> str | None:
        if time.monotonic() < self._next_attempt:
            raise StoreUnreachable
        began = time.monotonic()
        try:
            reach(mlflow.get_tracking_uri())  # MLflow itself would wait for minutes
        except OSError as error:
            raise self._away(began) from error
        try:
            path = {name: value for name, value in arguments.items() if name == "path"}  # as the disk has it
            return CALLS[call](**printable(arguments) | path)
        except (MlflowException, requests.RequestException) as error:
            if not is_outage(error):
                raise
            raise self._away(began) from error

    def _away(self, began: float) -> StoreUnreachable:
        now = time.monotonic()
        self._next_attempt = now + max(PAUSE_SECONDS, PAUSE_FACTOR * (now - began))
        return StoreUnreachable()

    def _write(self) -> None:
        buffer.write(self.folder, [*self._refused, *self._waiting], self.foreign)


_current: Outbox | None = None


def current() -> Outbox:
    """The outbox of the active run and of its children."""
    assert _current is not None, "no run has been started"
    return _current


@contextmanager
def outbox(run_id: str) -> Generator[Outbox]:
    """The outbox of a run, or of the run around it; at the end of the outer one tells what is missing.

    A run that goes on takes up what its earlier process could not deliver.
    """
    global _current
    if _current is not None:
        yield _current
        return
    box = _current = Outbox(FOLDER / f"undelivered-{run_id}")
    try:
        yield box
    finally:
        _current = None
        if len(box):
            log.warning(
                "%s did not take everything of this run: %d calls wait in %s; when it answers again,"
                " deliver them with: python -m pneumo_experiments.tracking %s",
                *(box.store, len(box), box.file, box.file),
            )


def _reason(error: Exception) -> str:
    lines = str(error).split("\n")
    aside = lines[0].startswith("(raised as a result of")  # SQLAlchemy's, before the reason itself
    return hide_passwords(lines[1 if aside and len(lines) > 1 else 0])[:300]
