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
        if not path.exists() and folder.is_dir() and any(folder.iterdir()) and not path.exists():
            raise UserError(f"{folder}: exists and was not created by this program; move or rename it")
        created = [folder, *(parent for parent in folder.parents if not parent.exists())]
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the other process has finished and removed the folder
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if timeout_seconds == 0:
                    raise
                if not waited:
                    print(wait_message)
                waited = True
                lock.acquire(timeout=timeout_seconds)
    inode = path.stat().st_ino  # no other file gets this number while the lock is open
    try:
        yield waited
    finally:
        with suppress(OSError):
            if path.stat().st_ino == inode and [*folder.iterdir()] == [path]:
                path.unlink()
                for empty in created:
                    empty.rmdir()
        lock.release()
