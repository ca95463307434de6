"""Who is the champion, who was it when, and why: aliases, and what tags and descriptions say about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments.registry import versions as registry
from pneumo_experiments.registry.versions import CHALLENGER, CHAMPION, Version

# Tags of the registered model, one for each move of the alias, named by its time. They outlast the versions.
MOVE_TAG = "champion."
SINCE_TAG, UNTIL_TAG = "champion_since", "champion_until"  # of a version: its last time as the champion
# Of the registered model, one for each decision: the identity of its images, and the version.
DECISION_TAG = "decision."
MAX_DESCRIPTION = 5000  # characters: PostgreSQL refuses more
MAX_REASON = 1000
UNKNOWN, NOW = "unknown", "now"
BY_OTHERS = "unknown: register has no note of this move"


@dataclass(frozen=True)
class Reign:
    """A time in which a version was the champion; times are UTC, ``unknown`` or ``now``."""

    number: str
    since: str
    until: str
    dice: str
    reason: str


def count_decision(name: str, number: str, identity: str) -> int:
    """Notes that a version is decided on these images; returns which decision on them it is, from 1.

    Called before the decision: of a process that is killed the note stays. A tag for each version, so that
    nothing is lost however many write. Versions decided without such a tag tell it by their own.
    """
    client: Any = MlflowClient()
    tag = f"{DECISION_TAG}{identity}."
    client.set_registered_model_tag(name, tag + number, datetime.now(UTC).isoformat(timespec="seconds"))
    noted = {key.removeprefix(tag) for key in client.get_registered_model(name).tags if key.startswith(tag)}
    return len(
        noted | {str(v.version) for v in registry.versions(client, name) if _is_decided(v.tags, identity)}
    )


def decide(name: str, number: str, decision: str, reason: str, tags: Mapping[str, str]) -> None:
    """Writes a decision about a version; ``champion`` and ``challenger`` move that alias, ``none`` none.

    The reason and ``tags`` about it become tags of the version. Raises UserError without aliases.
    """
    client: Any = MlflowClient()
    before = registry.champion_of(name)
    if decision != "none":
        registry.set_alias(name, decision, number)
    texts = {"decision": decision, "reason": reason[:MAX_REASON], **tags}
    for key, text in texts.items():
        client.set_model_version_tag(name, number, key, text)
    if decision == CHAMPION:
        _record_move(client, name, before, number, reason)


def move_champion(version: Version, reason: str) -> None:
    """Makes an existing version the champion, and tells the registered model's page about it."""
    before = registry.champion_of(version.name)
    registry.set_alias(version.name, CHAMPION, version.number)
    _record_move(_client(), version.name, before, version.number, reason)
    describe_champion(version.name, version.number, version.description)


def describe_version(name: str, number: str, card: str) -> None:
    """Sets the Markdown description of a version; it must fit in MAX_DESCRIPTION."""
    _client().update_model_version(name, number, description=card[:MAX_DESCRIPTION])


def describe_champion(name: str, number: str, card: str) -> None:
    """Sets the Markdown description of the registered model: that of its champion."""
    head = f"The champion is [version {number}](#/models/{name}/versions/{number}).\n\n"
    _client().update_registered_model(name, description=(head + card)[:MAX_DESCRIPTION])


def history(name: str) -> list[Reign]:
    """All champions in order; what was done by other means than register is said to be unknown."""
    client: Any = MlflowClient()
    moves, champion = _moves(client, name), registry.champion_of(name)
    reigns = list[Reign]()

    def add(number: str | None, since: str, until: str, reason: str) -> None:
        if number is not None:
            reigns.append(Reign(number, since, until, _dice(name, number), reason))

    for (since, move), (end, following) in zip(moves, [*moves[1:], (NOW, None)], strict=True):
        successor = champion.number if champion else None
        if following is not None:
            successor = following["replaced"]
        if successor == move["version"]:
            add(move["version"], since, end, move["reason"])
        else:  # the alias was gone or elsewhere when the next move, or this call, looked
            add(move["version"], since, UNKNOWN, move["reason"])
            add(successor, UNKNOWN, end, BY_OTHERS)
    if not moves and champion is not None:
        add(champion.number, UNKNOWN, NOW, BY_OTHERS)
    return reigns


def history_lines(reigns: Sequence[Reign]) -> list[str]:
    """The reigns as a table of text."""
    rows = [("version", "from", "until", "Dice", "why")]
    rows += [(each.number, each.since, each.until, each.dice, each.reason) for each in reigns]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(t.ljust(w) for t, w in zip(row[:4], widths, strict=True)), row[4]]) for row in rows]


def _client() -> Any:  # parts of it have no types
    return MlflowClient()


def _record_move(client: Any, name: str, before: Version | None, number: str, reason: str) -> None:
    """Tags the registered model, the new champion and the one before."""
    replaced = before.number if before else None
    since = _now_after([time for time, _ in _moves(client, name)])
    move = {"version": number, "replaced": replaced, "reason": reason[:MAX_REASON]}
    client.set_registered_model_tag(name, MOVE_TAG + since, json.dumps(move))
    client.set_model_version_tag(name, number, SINCE_TAG, since)
    with suppress(MlflowException):  # never was one before
        client.delete_model_version_tag(name, number, UNTIL_TAG)
    if replaced is not None and replaced != number:
        with suppress(MlflowException):  # deleted meanwhile
            client.set_model_version_tag(name, replaced, UNTIL_TAG, since)
    challenger = client.get_registered_model(name).aliases.get(CHALLENGER)
    if str(challenger) == number:
        registry.delete_alias(name, CHALLENGER)


def _moves(client: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Time and content of each move of the alias champion, in order."""
    moves = list[tuple[str, dict[str, Any]]]()
    for key, text in sorted(client.get_registered_model(name).tags.items()):
        if key.startswith(MOVE_TAG):
            with suppress(ValueError, TypeError, LookupError):  # somebody else's tag
                move = json.loads(text)
                before = None if move["replaced"] is None else str(move["replaced"])
                content = {"version": str(move["version"]), "replaced": before, "reason": str(move["reason"])}
                moves.append((key.removeprefix(MOVE_TAG), content))
    return moves


def _now_after(times: Sequence[str]) -> str:
    """The time, UTC, in milliseconds; after all of these, whatever the clocks of other machines say."""
    now = datetime.now(UTC)
    with suppress(ValueError):
        now = max(
            now, *(datetime.fromisoformat(time) + timedelta(milliseconds=1) for time in times[-1:]), now
        )
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _is_decided(tags: Mapping[str, str], identity: str) -> bool:
    """Whether a version with these tags was decided on the images of this identity."""
    return tags.get("identity") == identity and tags.get("decision") in (CHAMPION, CHALLENGER)


def _dice(name: str, number: str) -> str:
    version = registry.version_of(name, number)
    if version is None:
        return "deleted"
    try:
        return f"{float((version.tags or {})['dice']):.4f}"
    except (LookupError, ValueError):
        return UNKNOWN
