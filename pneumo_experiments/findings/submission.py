"""The submission file of the SIIM-ACR challenge, and other tables with a row per image."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.files import write_atomically

HEADER = ("ImageId", "EncodedPixels")
EMPTY = "-1"


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Writes one row (image id, run lengths) per image; returns their number. Blank run lengths become -1.

    As ``write_table`` does it.
    """
    return write_table(path, HEADER, ((image_id, text.strip() or EMPTY) for image_id, text in rows))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """Writes a table with one row per image, the id first; returns their number.

    Rows are consumed one by one; the file appears when the last one is written. Raises UserError for a
    repeated image id, for a file that cannot be written, and as ``refuse_to_replace`` does.
    """
    refuse_to_replace(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        seen = _write_rows(path, temporary, header, rows)
        with _writing(path):
            refuse_to_replace(path)  # another process may have written it meanwhile
            with _digests_path(path).open("a", encoding="ascii") as digests:
                digests.write(_digest(temporary) + "\n")
    return seen


def _write_rows(path: Path, temporary: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    with _writing(path):
        stream = temporary.open("x", newline="", encoding="utf-8")
    seen: set[str] = set()
    try:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            if row[0] in seen:
                raise UserError(f"{row[0]}: predicted twice; give each image one file of that name")
            seen.add(row[0])
            with _writing(path):
                writer.writerow(row)
        with _writing(path):
            stream.close()
    finally:
        with suppress(OSError):
            stream.close()
    return len(seen)


def refuse_to_replace(path: Path) -> None:
    """Raises UserError when ``path`` holds anything that ``write_table`` did not write.

    A table of labels looks like a submission. So a file next to each submission holds the digests of what
    was written there; any other file, or a submission edited by hand, is never replaced.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'submission.csv'}")
    try:
        if path.exists() and not (
            path.is_file() and _digest(path) in _digests_path(path).read_text("utf-8").split()
        ):
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(
            f"{path}: exists, and is not as score wrote it; remove it, or name another file"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be replaced; remove it, or name another file") from error


def _digests_path(path: Path) -> Path:
    """The file with the digests of what was written to ``path``."""
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
