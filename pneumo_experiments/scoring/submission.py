"""The submission file of the SIIM-ACR challenge."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from pneumo_experiments.errors import UserError

HEADER = ("ImageId", "EncodedPixels")
EMPTY = "-1"


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write one row (image id, run lengths) per image; the number of rows. Blank run lengths become -1.

    The rows may be drawn lazily: the file appears only when the last one is written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'submission.csv'}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = part.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    seen: set[str] = set()
    try:
        with stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(HEADER)
            for image_id, run_lengths in rows:
                if image_id in seen:
                    raise UserError(f"{image_id}: predicted twice; give each image one file of that name")
                seen.add(image_id)
                writer.writerow((image_id, run_lengths.strip() or EMPTY))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # there only when something went wrong
    return len(seen)
