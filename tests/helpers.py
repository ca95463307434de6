"""What several test modules use."""

from __future__ import annotations

from typing import Any

from pneumo_experiments.settings import Settings, flat, from_flat


def make(kind: type[Settings], **values: Any) -> Settings:
    """Settings of an entry point or a group, from values by flat name."""
    assert values.keys() <= flat(kind()).keys(), values.keys() - flat(kind()).keys()
    return from_flat(kind, values)


def changed(settings: Settings, **values: Any) -> Settings:
    """The same settings with other values, by flat name."""
    return make(type(settings), **(flat(settings) | values))
