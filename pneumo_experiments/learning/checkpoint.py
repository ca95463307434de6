"""What an interrupted training needs to go on, in files that appear whole or not at all."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from pneumo_experiments.errors import UserError
from pneumo_experiments.locks import LOCK, work_folder

LAST = "last.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one training: its last state, and the networks of its best epochs."""

    folder: Path

    def last(self) -> dict[str, Any] | None:
        """What was saved last, with the kept networks by epoch as ``networks``.

        None where there is nothing, or something of it cannot be read. What a killed process left besides is
        removed: it would pass for that of the same epoch, trained again.
        """
        last = self._load(LAST)
        if last is None or not isinstance(last.get("kept"), list):
            return None
        kept = last.pop("kept")
        self._remove_all_but(kept)
        networks = {epoch: self._load(_name(epoch)) for epoch in kept}
        return None if None in networks.values() else last | {"networks": networks}

    def save(self, last: dict[str, Any], kept: dict[int, dict[str, Any]]) -> None:
        """Replaces the last state and the kept networks; a kept one is written once.

        A disk that is full costs the checkpoint, not the training: it goes on with a warning.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for epoch, state in kept.items():
                if not (self.folder / _name(epoch)).exists():
                    self._write(_name(epoch), state)
            self._write(LAST, last | {"kept": list(kept)})
            self._remove_all_but(kept)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, where the disk is full
            reason = str(error).split("\n")[0]
            if isinstance(error, RuntimeError):
                reason = f"the disk may be full: {reason}"
            warnings.warn(
                f"{self.folder}: the checkpoint cannot be written ({reason}); the training goes on, but an"
                " interruption would lose it",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Forgets what was saved; the folder goes with its lock (see ``lock_checkpoints``)."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    path.unlink()

    def _load(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(torch.load(self.folder / name, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever damaged bytes make the reader raise
            warnings.warn(f"{self.folder / name}: cannot be read ({type(error).__name__})", stacklevel=2)
            return None

    def _remove_all_but(self, kept: Iterable[int]) -> None:
        names = {_name(epoch) for epoch in kept}
        for path in self.folder.glob("epoch-*.pt"):
            if path.name not in names:
                path.unlink()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        part = self.folder / f"{name}.part"
        try:
            torch.save(content, part)
            part.replace(self.folder / name)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def lock_checkpoints(checkpoints: Iterable[Checkpoint], patience: float = -1) -> Generator[None]:
    """Keeps a second training with the same settings waiting, and says so there.

    Raises UserError after ``patience`` seconds (below 0: never). Where a folder cannot be made the training
    goes on: with nothing saved, nothing is mixed.
    """
    waiting = "train: another training with the same settings is running; waiting until it ends"
    with ExitStack() as stack:
        for checkpoint in checkpoints:
            try:
                stack.enter_context(work_folder(checkpoint.folder, waiting, timeout_seconds=patience))
            except Timeout:
                raise UserError(
                    "train: another training with the same settings is running; wait until it ends"
                ) from None
            except OSError:
                continue  # told when there is something to save
        yield


def _name(epoch: int) -> str:
    return f"epoch-{epoch}.pt"
