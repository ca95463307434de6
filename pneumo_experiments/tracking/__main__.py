"""Sends the calls that a run buffered: ``python -m pneumo_experiments.tracking output/…/calls.jsonl``."""

from __future__ import annotations

import sys
from pathlib import Path

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.buffered_client import FILE, BufferedClient
from pneumo_experiments.tracking.store import open_store


def send_buffered(path: Path) -> None:
    """Sends the calls of a ``calls.jsonl`` to the store, and removes the file.

    Raises UserError if some of them cannot be sent: these stay in the file.
    """
    if not path.is_file() or path.name != FILE:
        raise UserError(f"{path}: no such {FILE}; the last line of a run with undelivered calls names it")
    open_store()
    client = BufferedClient(path.absolute().parent)
    if not client.flush():
        raise UserError(f"{path}: {len(client)} calls are still missing in {client.store}; try again later")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "Error: give one file: python -m pneumo_experiments.tracking output/undelivered-…/calls.jsonl"
        )
    try:
        send_buffered(Path(sys.argv[1]))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
