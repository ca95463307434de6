"""Which of several processes does what one alone should do: report on a study, train a trial again."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.study import Study

from pneumo_experiments import tracking
from pneumo_experiments.search.storage import GRACE_SECONDS, HEARTBEAT_SECONDS

# Attributes of a study
CLAIM = "claim."  # and a task: the tags of the process that does it
ALIVE = "alive."  # and a process: when it was last seen, in seconds since 1970; 0 when it has left
SETTLE_SECONDS = 1.0  # in which another process that claimed at the same time has written its claim


@contextmanager
def heartbeat(study: Study) -> Generator[None]:
    """Within it, other processes of the study see that this one is alive; at the end its claims are free."""
    key, stop = _alive_key(tracking.process_tags()), Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(StorageInternalError):  # the next one follows soon
                study.set_user_attr(key, time.time())

    study.set_user_attr(key, time.time())
    thread = Thread(target=beat, name="search-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(StorageInternalError):
            study.set_user_attr(key, 0.0)


def claim(study: Study, task: str) -> bool:
    """Whether this process, within ``heartbeat``, does a task: it has claimed it, or can do so now.

    Of two that claim at once the later one has it, unless its claim takes more than SETTLE_SECONDS to be
    written: then both do the task.
    """
    key, mine = CLAIM + task, tracking.process_tags()
    attributes = study.user_attrs
    holder = attributes.get(key)
    if holder == mine:
        return True
    if holder is not None and _is_alive(_alive_key(holder), attributes) and not tracking.has_ended(holder):
        return False
    study.set_user_attr(key, mine)
    attributes = study.user_attrs
    others = [name for name in attributes if name.startswith(ALIVE) and name != _alive_key(mine)]
    if any(_is_alive(name, attributes) for name in others):
        time.sleep(SETTLE_SECONDS)
    return study.user_attrs[key] == mine


def holder(study: Study, task: str) -> dict[str, str] | None:
    """The tags of the process that has claimed a task; None if none has."""
    return study.user_attrs.get(CLAIM + task)


def _is_alive(key: str, attributes: Mapping[str, Any]) -> bool:
    return time.time() - attributes.get(key, 0.0) < GRACE_SECONDS


def _alive_key(process: Mapping[str, str]) -> str:
    return ALIVE + "/".join(process.values())
