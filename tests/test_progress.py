"""The checkpoint of a training, as another version may have left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pneumo_experiments.experiment.progress import read_checkpoint
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.learning.trainer import State


def test_a_checkpoint_of_another_version_is_not_used_and_gives_a_warning(tmp_path: Path) -> None:
    state = dict.fromkeys(State.__annotations__, 0)
    saved: dict[str, Any] = {"run_id": "a", "history": [], "dices": {}, "state": state}
    checkpoint = Checkpoint(tmp_path / "one")
    checkpoint.save(saved, {})
    assert read_checkpoint(checkpoint) == saved | {"networks": {}}
    others: list[dict[str, Any]] = [
        {name: value for name, value in saved.items() if name != "run_id"},
        {name: value for name, value in saved.items() if name != "state"},
        saved | {"unknown": 1},
        saved | {"state": state | {"unknown": 1}},
        saved | {"state": {name: value for name, value in state.items() if name != "scaler"}},
        saved | {"state": [1]},
    ]
    for other in others:
        checkpoint.save(other, {})
        with pytest.warns(UserWarning, match="another version; training starts over"):
            assert read_checkpoint(checkpoint) is None
    torch.save([1, 2], checkpoint.folder / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt: cannot be read"):
        assert read_checkpoint(checkpoint) is None
