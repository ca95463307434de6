"""Imports of torchvision without torch's compiler: nothing here compiles, and to import it takes a second.

torchvision needs of it one function, for an operation that no network here has.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


class _Placeholder(ModuleType):
    """Stands for a module until something of it is used that it lacks: then the real one is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        _remove_placeholders()
        return getattr(import_module(self.__name__), name)


def _is_compile_supported(device_type: str) -> bool:
    """Torch's function of that name, imported when it is called."""
    return bool(import_module(UTILS).is_compile_supported(device_type))


@contextmanager
def without_compiler() -> Generator[None]:
    """Imports in the block find placeholders for torch's compiler, unless it is imported already."""
    if COMPILER not in sys.modules:
        utils: Any = _Placeholder(UTILS)
        utils.is_compile_supported = _is_compile_supported
        sys.modules.update({COMPILER: _Placeholder(COMPILER), UTILS: utils})
    try:
        yield
    finally:
        _remove_placeholders()


def _remove_placeholders() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), _Placeholder):
            del sys.modules[name]
