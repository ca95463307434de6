"""The submission file of the SIIM-ACR challenge."""

from __future__ import annotations

import csv
import hashlib
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from pneumo_experiments.errors import UserError, reason_of

HEADER = ("ImageId", "EncodedPixels")
EMPTY = "-1"


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write one row (image id, run lengths) per image; the number of rows. Blank run lengths become -1.

    The rows may be drawn lazily: the file appears only when the last one is written. ``refuse_to_replace``
    tells what may stand there before.
    """
    refuse_to_replace(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = part.open("x", newline="", encoding="utf-8")
    seen: set[str] = set()
    try:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        for image_id, run_lengths in rows:
            if image_id in seen:
                raise UserError(f"{image_id}: predicted twice; give each image one file of that name")
            seen.add(image_id)
            with _writing(path):
                writer.writerow((image_id, run_lengths.strip() or EMPTY))
        with _writing(path):
            stream.close()
            refuse_to_replace(path)  # something may have come meanwhile
            with _written(path).open("a", encoding="ascii") as digests:
                digests.write(_digest(part) + "\n")
            part.replace(path)
    finally:
        with suppress(OSError):
            stream.close()
        part.unlink(missing_ok=True)  # there only when something went wrong
    return len(seen)


def refuse_to_replace(path: Path) -> None:
    """Raises UserError where something stands at ``path`` that ``write_submission`` has not written.

    A table of labels looks like a submission. So a file beside each submission holds the digests of what was
    written there, and nothing else is ever replaced, nor a submission that was changed by hand.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'submission.csv'}")
    try:
        if path.exists() and not (
            path.is_file() and _digest(path) in _written(path).read_text("utf-8").split()
        ):
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(
            f"{path}: exists, and is not as score wrote it; remove it, or name another file"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be replaced; remove it, or name another file") from error


def _written(path: Path) -> Path:
    """Where the digests of what was written to ``path`` lie."""
    return path.with_name(f".{path.name}.sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({reason_of(error)}); make room, or name another file"
        ) from error
