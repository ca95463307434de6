"""Writes files so that they appear complete or not at all."""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from pneumo_experiments.errors import UserError, reason_of

SUFFIX = ".part"  # of temporary files


@contextmanager
def write_atomically(path: Path, folder: Path | None = None) -> Generator[Path]:
    """Yields the path of a temporary file for the block to write; it then replaces ``path``.

    The temporary file is in ``folder``, which must be on the file system of ``path``, or beside ``path``. Its
    name is unique and ends in ``.part``. If the block raises, it is removed and ``path`` stays as it was.
    Only kill -9 leaves a temporary file behind.
    """
    temporary = (folder or path.parent) / f"{path.name}.{uuid.uuid4().hex[:8]}{SUFFIX}"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def writing(place: str) -> Generator[None]:
    """Turns an OSError of the block into a UserError that names the place, such as ``findings=folder``."""
    try:
        yield
    except OSError as error:
        reason = reason_of(error)
        raise UserError(
            f"{place}: cannot be written ({reason}); make room or choose another place"
        ) from error


def file_name(name: str) -> str:
    """The name as part of a file name on any system, at most 100 characters."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
