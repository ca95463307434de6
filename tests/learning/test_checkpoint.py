"""The state that an interrupted training leaves, and what is read of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pneumo_experiments.learning.checkpoint import Checkpoint


def test_a_checkpoint_holds_the_given_networks_and_no_others(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep" / "one")
    assert checkpoint.last() is None
    checkpoint.save({"steps": 1}, {1: {"w": torch.ones(2)}})
    checkpoint.save({"steps": 2}, {1: {"w": torch.zeros(2)}, 2: {"w": torch.zeros(2)}})
    checkpoint.save({"steps": 3}, {2: {"w": torch.zeros(2)}})
    # What a process leaves that is killed before it wrote its last state.
    torch.save({"w": torch.zeros(2)}, checkpoint.folder / "epoch-3.pt")
    last = checkpoint.last()
    assert last is not None
    assert (last["steps"], [*last["networks"]]) == (3, [2])
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == ["epoch-2.pt", "last.pt"]
    checkpoint.clear()
    assert not list(checkpoint.folder.iterdir())  # the folder itself goes with its lock


def test_a_checkpoint_that_is_damaged_or_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "one")
    checkpoint.save({"steps": 1}, {})
    path = checkpoint.folder / "last.pt"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"last\.pt: cannot be read"):
        assert checkpoint.last() is None
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written .*the training continues"):
        Checkpoint(tmp_path / "file" / "one").save({"steps": 1}, {})
