"""Trials on the terminal, as rows of a table while they come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from pneumo_experiments.search.space import Space
from pneumo_experiments.search.trial_training import TrialScores


def print_row(
    space: Space, title: str, values: dict[str, Any], scores: TrialScores, seconds: float, state: str
) -> None:
    """Prints a finished trial as a row of a table."""
    cells = [f"{_short(values[name]):>{max(len(name), 8)}}" for name in space]
    empty = "  all empty" if scores.empty_loss else ""
    tqdm.write(
        f"  {title:<11}{scores.dice:>8.4f}{scores.dice_positive:>14.4f}  {'  '.join(cells)}"
        f"  {seconds:>7.1f} s  {state}{empty}"
    )


def print_header(space: Space) -> None:
    """Prints the head of the table."""
    names = "  ".join(f"{name:>8}" for name in space)
    print(f"  {'':<11}{'Dice':>8}{'on positives':>14}  {names}  {'time':>9}")


def in_words(values: Mapping[str, Any]) -> str:
    """Settings as text: ``dice_weight 0.31, ema 0.9``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
