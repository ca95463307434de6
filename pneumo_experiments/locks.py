"""Folders that one process at a time works in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pneumo_experiments.errors import UserError

LOCK = ".lock"


@contextmanager
def work_folder(folder: Path, waiting: str, *, patience: float = -1) -> Generator[bool]:
    """Makes the folder and holds it; a second process prints ``waiting``, and waits until the first is done.

    Yields whether it had to wait. The lock is a file in the folder and goes with it: the block may remove or
    rename the folder. Where nothing but the lock is left at the end, the folder is removed. Of a process that
    was killed the system lets go. Raises Timeout after ``patience`` seconds (below 0: never), OSError where
    the folder cannot be made, UserError where one of that name holds files without a lock: it is not ours.
    """
    path = folder / LOCK
    lock, waited, made = FileLock(path), False, list[Path]()
    while not lock.is_locked:
        if not path.exists() and folder.is_dir() and any(folder.iterdir()) and not path.exists():
            raise UserError(f"{folder}: is in the way, and not left by this program; move it or rename it")
        made = [folder, *(parent for parent in folder.parents if not parent.exists())]
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the process before is done, and has removed the folder
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if patience == 0:
                    raise
                if not waited:
                    print(waiting)
                waited = True
                lock.acquire(timeout=patience)
    ours = path.stat().st_ino  # no other file gets this number as long as the lock is open
    try:
        yield waited
    finally:
        with suppress(OSError):
            if path.stat().st_ino == ours and [*folder.iterdir()] == [path]:
                path.unlink()
                for empty in made:
                    empty.rmdir()
        lock.release()
