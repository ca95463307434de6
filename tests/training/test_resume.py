"""How far a training has come, and its checkpoint as another version may have left it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.training.resume import VERSION, TrainingState


def test_a_checkpoint_of_another_version_is_not_used_and_gives_a_warning(tmp_path: Path) -> None:
    checkpoint, state = Checkpoint(tmp_path / "one"), TrainingState("a", [{"loss": 1.0}], {1: 0.5})
    state.save(checkpoint)
    assert TrainingState.load(checkpoint) == state
    saved = torch.load(checkpoint.folder / "last.pt", weights_only=True)
    for other in ({**saved, "version": VERSION - 1}, {name: saved[name] for name in ("run_id", "kept")}):
        torch.save(other, checkpoint.folder / "last.pt")
        with pytest.warns(UserWarning, match="another version; training starts over"):
            assert TrainingState.load(checkpoint) is None
    torch.save([1, 2], checkpoint.folder / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt: cannot be read"):
        assert TrainingState.load(checkpoint) is None


def test_patience_does_not_count_the_epochs_before_something_is_found() -> None:
    def is_stuck(patience: int, *epochs: tuple[float, float | None]) -> bool:
        """With these values of Dice and, unless None, of Dice on positives."""
        history = [
            {"epoch/dice": dice} | ({} if on is None else {"epoch/dice_positive": on}) for dice, on in epochs
        ]
        return TrainingState("a", history).is_stuck(patience)

    empty = (0.78, 0.0)
    assert not is_stuck(1, *[empty] * 9)
    assert not is_stuck(2, *[empty] * 9, (0.79, 0.1), (0.785, 0.2))
    assert not is_stuck(2, *[empty] * 9, (0.79, 0.1), (0.785, 0.2), (0.791, 0.1))
    assert is_stuck(2, *[empty] * 9, (0.79, 0.1), (0.785, 0.2), (0.79, 0.1))
    assert is_stuck(2, (0.79, 0.1), empty, empty)  # it has lost what it had found
    assert is_stuck(1, *[(1.0, None)] * 2)  # nothing to find
    assert not is_stuck(0, (0.79, 0.1), *[empty] * 9)
