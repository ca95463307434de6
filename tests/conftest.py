"""What several tests need: the real data where it lies, and a small sample."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported, here and in the processes that tests start: two test files run side by side, and
# threads of both would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``network="tiny"`` name the network of tiny_network.py."""
    from tiny_network import TINY

    from pneumo_experiments.learning.network import NETWORKS

    monkeypatch.setitem(NETWORKS, "tiny", TINY)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real SIIM radiographs and labels; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("PNEUMO_REAL_DATA") or ROOT.parent / "shared" / "siim")
    if not (folder / "known_areas.csv").is_file():
        pytest.skip(f"no real radiographs: PNEUMO_REAL_DATA names no folder with known_areas.csv ({folder})")
    return folder
