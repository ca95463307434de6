"""Work folders that one process at a time may use."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pneumo_experiments.errors import UserError

LOCK = ".lock"


@contextmanager
def work_folder(folder: Path, wait_message: str, *, timeout_seconds: float = -1) -> Generator[bool]:
    """Creates and locks the folder; a second process prints ``wait_message`` and waits for the first.

    Yields whether it had to wait. The lock is a file in the folder: the block may remove or rename the
    folder. A folder that is empty at the end is removed. The system releases the lock of a killed process.
    Raises Timeout after ``timeout_seconds`` (below 0: never), OSError if the folder cannot be created,
    UserError if a folder of that name holds files but no lock: this program did not create it.
    """
    path = folder / LOCK
    lock, waited, created = FileLock(path), False, list[Path]()
    while not lock.is_locked:
        if folder.is_dir() and (files := [*folder.iterdir()]) and path not in files:
            raise UserError(f"{folder}: exists and was not created by this program; move or rename it")
        created = [folder, *(parent for parent in folder.parents if not parent.exists())]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout_seconds if waited else 0)
        except Timeout:
            if waited or timeout_seconds == 0:
                raise
            print(wait_message)
            waited = True
        except FileNotFoundError:
            pass  # the other process has finished and removed the folder
    try:
        yield waited
    finally:
        with suppress(OSError):  # the block has removed the folder, or others use its parents
            if [*folder.iterdir()] == [path]:
                path.unlink()
                for empty in created:
                    empty.rmdir()
        lock.release()
