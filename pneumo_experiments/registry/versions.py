"""The registered model: its versions, who of them is the champion, who was it when, and why.

Aliases say who is; tags and descriptions say the rest, and outlast what they tell of.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking import model_info
from pneumo_experiments.tracking.servers import if_exists, is_outage

CHAMPION, CHALLENGER, NONE = "champion", "challenger", "none"  # aliases, and neither
PROJECT_TAG, PROJECT = "project", "pneumo_experiments"  # of our registered models
# Tags of the registered model: one for each move of the alias champion, named by its time, and one for each
# decision, named by the identity of its images and the version.
MOVE_TAG, DECISION_TAG = "champion.", "decision."
MEMBERS_TAG = "members"  # of an ensemble's version: the ids of its logged models, and its thresholds
MAX_DESCRIPTION = 5000  # characters: PostgreSQL refuses more
MAX_REASON = 1000
UNKNOWN, NOW = "unknown", "now"
BY_OTHERS = "unknown: register has no note of this move"


@dataclass(frozen=True)
class Version:
    """A registered version, and whether it holds the alias champion."""

    name: str
    number: str
    tags: Mapping[str, str]
    champion: bool = False
    source: str = ""
    description: str = ""

    @property
    def reason(self) -> str:
        """Why it was made the champion, or not."""
        return self.tags.get("reason", "")

    def is_decided_on(self, identity: str) -> bool:
        """Whether the images of this identity decided whether it becomes the champion."""
        decided = self.tags.get("decision") in (CHAMPION, CHALLENGER)
        return decided and self.tags.get("identity") == identity

    @property
    def model_id(self) -> str | None:
        """Id of its logged model; None for the version of a folder."""
        return self.source.removeprefix("models:/") if self.source.startswith("models:/m-") else None


@dataclass(frozen=True)
class ChampionPeriod:
    """A time in which a version was the champion; times are UTC, ``unknown`` or ``now``."""

    number: str
    since: str
    until: str
    dice: str
    reason: str


@contextmanager
def refusals(setting: str, remedy: str) -> Generator[None]:
    """Raises UserError for what the store refuses; an outage stays MLflow's error."""
    try:
        yield
    except MlflowException as error:
        if is_outage(error):
            raise
        reason = str(error).split("\n")[0][:300]
        raise UserError(f"{setting} ({reason}); {remedy}") from error


def claim(name: str) -> None:
    """Creates the registered model unless it exists; raises UserError for a name that is taken or refused."""
    with refusals(f"name={name}: cannot be registered", "use letters and digits"):
        try:
            _client().create_registered_model(name, tags={PROJECT_TAG: PROJECT})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if not is_ours(name):  # also one of MLflow's prompts
                raise UserError(
                    f"name={name}: is a registered model of another project; choose another name, such as"
                    f" name={name}-2, or give it the tag {PROJECT_TAG}={PROJECT} if it is yours"
                ) from error


def is_ours(name: str) -> bool:
    """Whether there is a registered model of this project with the name."""
    model = if_exists(_client().get_registered_model, name)
    return model is not None and model.tags.get(PROJECT_TAG) == PROJECT


def require_ours(name: str) -> None:
    """Raises UserError unless there is a registered model of this project with the name."""
    if not is_ours(name):
        raise UserError(f"name={name}: no such registered model of this project; register makes one")


@contextmanager
def registering(address: str, name: str) -> Generator[Version]:
    """Registers a new version, and yields it for the block to decide about it.

    Raises UserError for what the store refuses, here and in the block: see ``deciding``.
    """
    model_id = model_info(address).model_id
    claim(name)
    # By model id: a runs:/ address would register the run's last model.
    source = f"models:/{model_id}" if model_id else address
    silence = redirect_stderr(StringIO())  # it would say that the model exists already, which claim made
    with refusals(f"name={name}: cannot be registered", "use letters and digits"), silence:
        new = mlflow.register_model(source, name)  # pyright: ignore[reportUnknownMemberType]
    with deciding(_version(new)) as version:
        yield version


@contextmanager
def deciding(version: Version) -> Generator[Version]:
    """Yields a version for the block to decide about it.

    Raises UserError for what the store refuses in the block: an alias, a change of a version that was deleted
    meanwhile.
    """
    remedy = "register again, or with promote=never in a store without aliases"
    with refusals(f"name={version.name}: version {version.number} cannot be decided", remedy):
        yield version


def champion_of(name: str) -> Version | None:
    """The version with the alias champion; None if there is no such alias or registered model."""
    found = if_exists(_client().get_model_version_by_alias, name, CHAMPION)
    return None if found is None else _version(found)


def version_of(name: str, number: str) -> Version | None:
    """A version by number; None if it does not exist or was deleted."""
    found = if_exists(_client().get_model_version, name, number)
    return None if found is None else _version(found)


def version_with(name: str, members: str) -> Version | None:
    """The latest version of a logged model, by its id, or with these noted ``members``; None without one."""
    numbers = [
        int(each.number) for each in _versions(name) if members in (each.model_id, each.tags.get(MEMBERS_TAG))
    ]
    return version_of(name, str(max(numbers))) if numbers else None


def note_members(version: Version, members: str) -> None:
    """Notes what a version is the ensemble of, for ``version_with``."""
    _client().set_model_version_tag(version.name, version.number, MEMBERS_TAG, members)


def count_decision(version: Version, identity: str) -> int:
    """Notes that a version is decided on these images; returns which decision on them it is, from 1.

    Called before the decision: of a process that is killed the note stays. A tag for each version, so that
    nothing is lost however many write, and another one when it is compared with another champion. Versions
    decided without such a tag tell it by their own.
    """
    client, name, tag = _client(), version.name, f"{DECISION_TAG}{identity}."
    now = datetime.now(UTC).isoformat(timespec="seconds")
    again = f".after.{version.tags.get('compared_with')}" if version.is_decided_on(identity) else ""
    client.set_registered_model_tag(name, tag + version.number + again, now)
    noted = {key.removeprefix(tag) for key in client.get_registered_model(name).tags if key.startswith(tag)}
    return len(noted | {each.number for each in _versions(name) if each.is_decided_on(identity)})


def _versions(name: str) -> list[Version]:
    """All versions of a registered model."""
    quote = '"' if "'" in name else "'"
    return [_version(each) for each in _client().search_model_versions(f"name = {quote}{name}{quote}")]


def decide(version: Version, alias: str, tags: Mapping[str, str]) -> None:
    """Writes a decision: moves the alias, unless it is none, and sets tags, among them ``reason``."""
    if alias == CHAMPION:
        make_champion(version, tags["reason"])
    elif alias != NONE:
        _set_alias(version, alias)
    for key, text in {"decision": alias, **tags}.items():
        _client().set_model_version_tag(version.name, version.number, key, text[:MAX_REASON])


def make_champion(version: Version, reason: str) -> None:
    """Moves the alias champion to a version, and notes that in a tag of the registered model."""
    client, name, number = _client(), version.name, version.number
    before = champion_of(name)
    _set_alias(version, CHAMPION)
    since, replaced = datetime.now(UTC), before.number if before else None
    if moves := _moves(name):  # after all of these, whatever the clocks of other machines say
        since = max(since, datetime.fromisoformat(moves[-1].time) + timedelta(milliseconds=1))
    time = since.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    move = {"version": number, "replaced": replaced, "reason": reason[:MAX_REASON]}
    client.set_registered_model_tag(name, MOVE_TAG + time, json.dumps(move))
    if str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number:
        if_exists(client.delete_registered_model_alias, name, CHALLENGER)


def describe(version: Version, card: str) -> None:
    """Sets the Markdown description of a version."""
    _client().update_model_version(version.name, version.number, description=card[:MAX_DESCRIPTION])


def describe_champion(version: Version, card: str) -> None:
    """Sets the Markdown description of the registered model: that of its champion."""
    page = f"#/models/{version.name}/versions/{version.number}"
    text = f"The champion is [version {version.number}]({page}).\n\n{card}"
    _client().update_registered_model(version.name, description=text[:MAX_DESCRIPTION])


def history(name: str) -> list[ChampionPeriod]:
    """All champions in order; what was done by other means than register is said to be unknown."""
    moves, champion, periods = _moves(name), champion_of(name), list[ChampionPeriod]()

    def add(number: str | None, since: str, until: str, reason: str) -> None:
        if number is not None:
            version = version_of(name, number)
            shown = UNKNOWN if version else "deleted"
            if version:
                with suppress(LookupError, ValueError):  # no tag, or one that somebody edited
                    shown = f"{float(version.tags['dice']):.4f}"
            periods.append(ChampionPeriod(number, since, until, shown, reason))

    # The champion that the next move, or this call, found.
    ends = [*((move.time, move.replaced) for move in moves), (NOW, champion.number if champion else None)]
    for move, (until, last) in zip([_Move(UNKNOWN, None, None, BY_OTHERS), *moves], ends, strict=True):
        add(move.version, move.time, until if move.version == last else UNKNOWN, move.reason)
        if move.version != last:  # the alias was moved or removed by others
            add(last, UNKNOWN, until, BY_OTHERS)
    return periods


@dataclass(frozen=True)
class _Move:
    """A move of the alias champion: its time, to which version, and from which."""

    time: str
    version: str | None
    replaced: str | None
    reason: str


def _moves(name: str) -> list[_Move]:
    """The moves that ``make_champion`` noted, in order."""
    moves = list[_Move]()
    for key, text in sorted(_client().get_registered_model(name).tags.items()):
        if key.startswith(MOVE_TAG):
            with suppress(ValueError, TypeError):  # somebody else's tag
                time = key.removeprefix(MOVE_TAG)
                datetime.fromisoformat(time)
                moves.append(_Move(time, **json.loads(text)))
    return moves


def _set_alias(version: Version, alias: str) -> None:
    try:
        _client().set_registered_model_alias(version.name, alias, version.number)
    except MlflowException:
        # Another process set it for the first time at the same moment: now it can be moved.
        if alias not in _client().get_registered_model(version.name).aliases:
            raise
        _client().set_registered_model_alias(version.name, alias, version.number)


def _version(found: Any) -> Version:
    source, description, is_champion = found.source or "", found.description or "", CHAMPION in found.aliases
    return Version(found.name, str(found.version), dict(found.tags), is_champion, source, description)


def _client() -> Any:  # parts of it have no types
    return MlflowClient()
