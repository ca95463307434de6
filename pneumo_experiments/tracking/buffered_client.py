"""Sends calls to a store that may be unreachable for a while: they are then buffered in a file, in order."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any

import mlflow
import requests
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import ServerUnreachable
from pneumo_experiments.files import write_atomically
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.mlflow_calls import CALLS
from pneumo_experiments.tracking.servers import is_outage, ping
from pneumo_experiments.tracking.store import SETTING, tracking_uri
from pneumo_experiments.words import printable

# Pause before the next attempt: at least so many seconds, and so many times as long as the failed attempt
# took. A store that hangs costs a training a tenth of its time.
RETRY_SECONDS, RETRY_FACTOR = 30, 10
FOLDER, FILE, COPIES = Path("output"), "calls.jsonl", "files"
WORTH_AN_ATTEMPT = ("model", "end")  # even right after a failed one

log = logging.getLogger(__name__)


class StoreUnreachable(Exception):
    """The call failed for now; it may succeed later."""


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
    """Sends calls of tracking.mlflow_calls to the store; the folder's ``calls.jsonl`` has the unsent ones.

    The file exists only while calls are buffered. The files that they name are copied to a folder beside it;
    their paths are relative to the file, so that all may be moved together.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the calls that an earlier process left."""
        self.folder, self.file = folder, folder / FILE
        self._waiting = list[str]()  # lines of the file
        self._refused = list[str]()  # lines that the store rejected, or that are damaged: sent no more
        self._next_attempt = 0.0
        self._is_outage_logged = False
        self._lock = RLock()  # system metrics come from their own thread
        if self.file.is_file():
            text = self.file.read_text(encoding="utf-8", errors="surrogateescape")
            *self._waiting, incomplete = text.split("\n")
            if incomplete:
                log.warning("%s: dropped its incomplete last line, left by a killed process", self.file)
                self._write()

    def __len__(self) -> int:
        """Number of calls that the store does not have."""
        return len(self._refused) + len(self._waiting)

    @property
    def store(self) -> str:
        """The store's address for messages."""
        return f"{SETTING}={tracking_uri()}"

    def send(self, call: str, **arguments: Any) -> str | None:
        """Sends a call of CALLS, after the buffered ones; returns its result.

        Raises StoreUnreachable if it may succeed later, else the store's own error.
        """
        with self._lock:
            if call in WORTH_AN_ATTEMPT:
                self._next_attempt = 0.0
            self._send_waiting()
            return self._attempt(call, arguments)

    def send_or_buffer(self, call: str, **arguments: Any) -> None:
        """Sends a call now, or buffers it, with a copy of its file, if the store is unreachable."""
        try:
            self.send(call, **arguments)
        except StoreUnreachable:
            if "path" in arguments:
                path = Path(arguments["path"])
                copy = self.folder / COPIES / str(time.time_ns()) / path.name
                copy.parent.mkdir(parents=True)
                shutil.copy(path, copy)
                arguments["path"] = str(copy.relative_to(self.folder))
            self.buffer(call, **arguments)

    def try_send(self, call: str, **arguments: Any) -> None:
        """Sends a call that may be lost; does nothing while calls are buffered or another thread sends."""
        if not self._waiting and self._lock.acquire(blocking=False):
            try:
                with suppress(StoreUnreachable):
                    self._attempt(call, arguments)
            finally:
                self._lock.release()

    def buffer(self, call: str, **arguments: Any) -> None:
        """Appends a call to the file, to be sent later; a path in it is relative to the folder."""
        line = json.dumps({"call": call} | arguments)
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._waiting.append(line)
            if not self._is_outage_logged:
                self._is_outage_logged = True
                log.warning("%s: tracking server unreachable: buffering to %s", self.store, self.file)

    def flush(self) -> bool:
        """Sends the buffered calls in order; returns whether the store has them all."""
        with self._lock, suppress(StoreUnreachable):
            self._send_waiting()
        return not len(self)

    def _send_waiting(self) -> None:
        if not (before := len(self._waiting)):
            return
        sent = list[Path]()
        try:
            while self._waiting:
                try:
                    call = json.loads(self._waiting[0])
                    name = call.pop("call")
                    if (result := self._attempt(name, call)) is not None:
                        log.warning("%s: the buffered %s is now logged as %s", self.store, name, result)
                    if (path := Path(call.get("path", ""))).parts[:1] == (COPIES,):
                        sent.append(self.folder / path)
                except StoreUnreachable:
                    raise
                except Exception as error:  # must neither end the training nor stop the other calls
                    line = self._waiting[0]
                    self._refused.append(line)
                    log.warning(
                        "%s: refused (%s), buffered: %.200s", self.store, _reason(error), printable(line)
                    )
                del self._waiting[0]
        finally:
            if len(self._waiting) < before:  # a process that is killed before sends these calls again
                self._write(sent)
        log.warning("%s: reachable again: sent the buffered calls", self.store)
        self._is_outage_logged = False

    def _attempt(self, call: str, arguments: Mapping[str, Any]) -> str | None:
        start = time.monotonic()
        if start < self._next_attempt:
            raise StoreUnreachable
        path, responds = {"path": str(self.folder / arguments["path"])} if "path" in arguments else {}, False
        try:
            ping(mlflow.get_tracking_uri())  # MLflow itself would wait for minutes
            responds = True
            return CALLS[call](**{**arguments, **path})
        except (MlflowException, OSError) as error:
            if responds and not is_outage(error):
                raise
            now = time.monotonic()
            self._next_attempt = now + max(RETRY_SECONDS, RETRY_FACTOR * (now - start))
            raise StoreUnreachable from error

    def _write(self, sent: Sequence[Path] = ()) -> None:
        """Rewrites the file; then removes these copies, and what is empty."""
        if lines := [*self._refused, *self._waiting]:
            with write_atomically(self.file) as temporary:
                text = "".join(f"{line}\n" for line in lines)
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        else:
            self.file.unlink(missing_ok=True)  # another process may have sent its calls
        for copy in sent:
            with suppress(OSError):
                copy.unlink()
        for folder in (*(copy.parent for copy in sent), self.folder / COPIES, self.folder):
            with suppress(OSError):  # files of other calls, or somebody's, are there as well
                folder.rmdir()


def _reason(error: Exception) -> str:
    lines = str(error).split("\n")
    is_preface = lines[0].startswith("(raised as a result of")  # SQLAlchemy's, before the reason itself
    return hide_passwords(lines[1 if is_preface and len(lines) > 1 else 0])[:300]
