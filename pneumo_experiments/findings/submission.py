"""The submission file of the SIIM-ACR challenge, and other tables with a row per image."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from pneumo_experiments.dataset.rle import EMPTY
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically, writing

HEADER = ("ImageId", "EncodedPixels")


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes one row (image id, run lengths) per image, as ``write_table`` does it; blanks become -1."""
    write_table(path, HEADER, ((image_id, text.strip() or EMPTY) for image_id, text in rows))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a table. It appears complete or not at all, and the rows are drawn once it can be written.

    Raises UserError for a file that cannot be written, and as ``check_overwrite`` does.
    """
    check_overwrite(path)
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        with writing(str(path)):
            temporary.touch(exist_ok=False)
        table = [header, *rows]
        with writing(str(path)):
            with temporary.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream, lineterminator="\n").writerows(table)
            check_overwrite(path)  # another process may have written it meanwhile
            with _digests_path(path).open("a", encoding="ascii") as digests:
                digests.write(_digest(temporary) + "\n")


def check_overwrite(path: Path) -> None:
    """Raises UserError when ``path`` holds anything that ``write_table`` did not write.

    A table of labels looks like a submission. So a file next to each table holds the digests of what was
    written there; any other file, or a table edited by hand, is never replaced.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'submission.csv'}")
    with suppress(OSError, ValueError):
        if not path.exists() or (
            path.is_file() and _digest(path) in _digests_path(path).read_text("utf-8").split()
        ):
            return
    raise UserError(f"{path}: exists, and is not as score wrote it; remove it, or name another file")


def _digests_path(path: Path) -> Path:
    """The file with the digests of what was written to ``path``."""
    return path.with_name(f".{path.name}.sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
