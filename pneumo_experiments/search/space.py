"""The settings that a search may vary, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import (
    Leaf,
    Recipe,
    StudySettings,
    checked,
    flat,
    from_flat,
    leaves,
    read_yaml,
    renamed,
)
from pneumo_experiments.settings.networks import has_aux_head

Range = CategoricalDistribution | FloatDistribution | IntDistribution
Space = dict[str, Range]

# The ranges of the settings that ``searched`` may name. bce_weight is the reference of the other loss weights
# and is not searched: AdamW ignores a common scale of them all. A file, ``space``, may change these ranges,
# and give one to any other setting of the recipe.
SPACE: Space = {
    "dice_weight": FloatDistribution(0.1, 10, log=True),
    "dice_image_weight": FloatDistribution(0, 3),
    "focal_weight": FloatDistribution(0.1, 10, log=True),
    "lovasz_weight": FloatDistribution(0, 3),
    "presence_weight": FloatDistribution(0.02, 2, log=True),
    "learning_rate": FloatDistribution(3e-5, 3e-3, log=True),
    "weight_decay": FloatDistribution(1e-4, 0.3, log=True),
    "positive_fraction": FloatDistribution(0.3, 0.9),
    "final_positive_fraction": FloatDistribution(0.2, 0.6),
    "augment_strength": FloatDistribution(0, 2),
    "ema": CategoricalDistribution([0.0, 0.9, 0.99, 0.999]),
}
KEYS = {"low", "high", "log", "choices"}


def search_space(settings: StudySettings, recipe: Recipe) -> Space:
    """The range of each searched setting, in order.

    Raises UserError for a name without a range, for a file of ranges that cannot be used, and for a setting
    without effect.
    """
    ranges, names = SPACE | _read_ranges(settings.space), _searched(settings)
    if not names:
        raise UserError(f"searched: no setting is named; name some of {', '.join(ranges)}")
    for name in names:
        if name not in ranges:
            raise UserError(f"searched={name[:60]}: {_unknown(name, ranges)}")
    if "augment_strength" in names and recipe.batches.augment == "none":
        raise UserError("searched=augment_strength: without effect, since augment=none; set augment=mild")
    network = recipe.network.network
    if "aux_weight" in names and "network" not in names and not has_aux_head(network):
        raise UserError(
            f"searched=aux_weight: without effect, since {network} has no auxiliary head; leave it out, or"
            " take another network, such as fcn_resnet50"
        )
    return {name: ranges[name] for name in names}


def unsearched_ranges(settings: StudySettings) -> list[str]:
    """Names in the file of ranges that are not searched."""
    return [name for name in _read_ranges(settings.space) if name not in _searched(settings)]


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The trial's value of each searched setting."""
    values: dict[str, Any] = {}
    for name, range_ in space.items():
        if isinstance(range_, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, range_.choices)
        elif isinstance(range_, IntDistribution):
            values[name] = trial.suggest_int(name, range_.low, range_.high, log=range_.log)
        else:
            values[name] = trial.suggest_float(name, range_.low, range_.high, log=range_.log)
    return values


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values of settings, by flat name."""
    return from_flat(Recipe, flat(recipe) | values)


def within(values: dict[str, Any], space: Space) -> dict[str, Any]:
    """Those of the values that the space searches, each moved to the nearest end of its range.

    A choice that is not among the choices is left out, so that Optuna draws it.
    """
    inside: dict[str, Any] = {}
    for name, range_ in space.items():
        if name not in values:
            continue
        if isinstance(range_, CategoricalDistribution):
            if values[name] in range_.choices:
                inside[name] = values[name]
        else:
            inside[name] = min(max(values[name], range_.low), range_.high)
    return inside


def as_range_text(range_: Range) -> str:
    """A range in words: ``0.1 to 10, logarithmic``, or ``0.0 | 0.9``."""
    if isinstance(range_, CategoricalDistribution):
        return " | ".join(map(str, range_.choices))
    return f"{range_.low:g} to {range_.high:g}{', logarithmic' if range_.log else ''}"


def in_words(values: Mapping[str, Any]) -> str:
    """Settings as text: ``dice_weight 0.31, ema 0.9``."""
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value: Any) -> str:
    """A setting's value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _searched(settings: StudySettings) -> list[str]:
    names = {name.strip(): None for name in settings.searched.split(",") if name.strip()}
    return list(renamed(names))


def _read_ranges(path: Path | None) -> Space:
    known, ranges = {leaf.name: leaf for leaf in leaves(Recipe)}, Space()
    content = {} if path is None else read_yaml("space", path, "dice_weight: {low: 0.1, high: 3, log: true}")
    for name, range_ in content.items():
        if name not in known:
            raise UserError(f"space={path}: {_unknown(name, known)}")
        try:
            ranges[name] = _range_of(known[name], range_)
        except (TypeError, ValueError) as error:
            raise UserError(f"space={path}: {name}: {error}") from None
    return ranges


def _range_of(leaf: Leaf, content: object) -> Range:
    """Raises ValueError, with a message that follows the setting's name."""
    if not isinstance(content, dict):
        raise ValueError("write {low: …, high: …} or {choices: […]}")
    given = cast("dict[str, Any]", content)
    if unknown := given.keys() - KEYS:
        raise ValueError(f"no {', '.join(map(str, unknown))}; write low, high and log, or choices")
    if "choices" in given:
        choices = cast("list[Any]", given["choices"])
        if given.keys() != {"choices"} or not isinstance(given["choices"], list) or not choices:
            raise ValueError("write choices as a list, without low, high and log")
        return CategoricalDistribution([checked(leaf, value) for value in choices])
    if not {"low", "high"} <= given.keys() or leaf.type not in (int, float):
        raise ValueError("write choices" if leaf.type not in (int, float) else "write low and high")
    low, high, log = checked(leaf, given["low"]), checked(leaf, given["high"]), given.get("log", False)
    if not isinstance(log, bool):
        raise ValueError("write log as true or false")
    if low >= high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range cannot start at {low:g}; give a low above 0, or log: false")
    return IntDistribution(low, high, log) if leaf.type is int else FloatDistribution(low, high, log)


def _unknown(name: str, known: dict[str, Any]) -> str:
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"give one of {', '.join(known)}"
    return f"no setting {name[:60]!r} with a range; {hint}"
