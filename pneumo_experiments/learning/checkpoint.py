"""Checkpoints: the state from which an interrupted training continues, in files written atomically."""

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
from pneumo_experiments.files import SUFFIX, write_atomically
from pneumo_experiments.locks import LOCK, work_folder

LAST = "last.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one training: its latest state, and the networks of its best epochs."""

    folder: Path

    def last(self) -> dict[str, Any] | None:
        """The latest saved state, with the networks of the best epochs as ``networks`` {epoch: state dict}.

        None when nothing was saved or a file cannot be read. Other networks, left by a killed process, are
        removed: they could be mistaken for those of the same epoch, trained again.
        """
        last = _load(self.folder / LAST)
        if last is None or not isinstance(last.get("kept"), list):
            return None
        epochs = last.pop("kept")
        self._remove_all_but(epochs)
        networks = {epoch: _load(self.network_file(epoch)) for epoch in epochs}
        return None if None in networks.values() else last | {"networks": networks}

    def save(self, last: dict[str, Any], networks: dict[int, dict[str, Any]]) -> None:
        """Replaces the latest state and the networks of the best epochs; each network is written once.

        A full disk costs the checkpoint, not the training: it continues with a warning.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for epoch, state in networks.items():
                if not (path := self.network_file(epoch)).exists():
                    _write(path, state)
            _write(self.folder / LAST, last | {"kept": list(networks)})
            self._remove_all_but(networks)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            reason = str(error).split("\n")[0]
            if isinstance(error, RuntimeError):
                reason = f"the disk may be full: {reason}"
            warnings.warn(
                f"{self.folder}: the checkpoint cannot be written ({reason}); the training continues, but an"
                " interruption would lose it",
                stacklevel=2,
            )

    def network_file(self, epoch: int) -> Path:
        """Where the network of one of the best epochs is saved, as a state dict."""
        return self.folder / f"epoch-{epoch}.pt"

    def clear(self) -> None:
        """Deletes what was saved; the folder itself is removed with its lock (see ``lock_checkpoints``)."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    path.unlink()

    def _remove_all_but(self, epochs: Iterable[int]) -> None:
        kept = {*map(self.network_file, epochs)}
        for path in {*self.folder.glob("epoch-*.pt"), *self.folder.glob(f"*{SUFFIX}")} - kept:
            path.unlink()


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes raise errors of many types
        warnings.warn(f"{path}: cannot be read ({type(error).__name__})", stacklevel=2)
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as temporary:
        torch.save(content, temporary)


@contextmanager
def lock_checkpoints(checkpoints: Iterable[Checkpoint], patience: float = -1) -> Generator[None]:
    """Makes a second training with the same settings wait, and print that it waits.

    Raises UserError after ``patience`` seconds (negative: never). A folder that cannot be created is not
    locked: nothing is saved there, so nothing can be mixed up.
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
                continue  # reported on the first save
        yield
