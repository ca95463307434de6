"""Processes that start from any program, also from a user's script."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_main() -> Generator[None]:
    """Processes that multiprocessing spawns in the block do not import the main program.

    They need this package alone, and would run a script that has no ``if __name__ == "__main__":`` again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def environment(values: Mapping[str, str]) -> Generator[None]:
    """Within it, variables of the environment have these values, which processes that start there inherit."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
