"""Delivers what a run could not: ``python -m pneumo_experiments.tracking <calls.jsonl that it named>``."""

from __future__ import annotations

import sys
from pathlib import Path

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.buffer import FILE
from pneumo_experiments.tracking.delivery import Outbox
from pneumo_experiments.tracking.store import open_store


def deliver(path: Path) -> None:
    """Makes the calls of a file that tracking.delivery wrote; the file is gone when all are made.

    Raises UserError where some are not, and where the file holds other lines, too.
    """
    if not path.is_file() or path.name != FILE:
        raise UserError(
            f"{path}: no such file of calls; a run that could not deliver everything names it at its end"
        )
    open_store()
    box = Outbox(path.absolute().parent)
    if not box.flush():
        raise UserError(f"{path}: {len(box)} calls are still missing in {box.store}; try again later")
    if box.foreign:
        raise UserError(f"{path}: {len(box.foreign)} lines are no calls; look at them: all else is delivered")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "Error: give one file: python -m pneumo_experiments.tracking output/undelivered-…/calls.jsonl"
        )
    try:
        deliver(Path(sys.argv[1]))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
