"""The model registry: registers versions, and moves their aliases."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.buffered_client import is_outage
from pneumo_experiments.tracking.models import model_id_of
from pneumo_experiments.tracking.store import SETTING, tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"  # aliases
PROJECT_TAG, PROJECT = "project", "pneumo_experiments"  # of our registered models
NO_SUCH, EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"  # MLflow's error codes
NO_ALIASES = (400, 404, 405, 501)  # statuses of a store that does not know aliases


@dataclass(frozen=True)
class Version:
    """A registered version, and whether it holds the alias champion; a deleted model has no id."""

    name: str
    number: str
    champion: bool
    reason: str
    model_id: str | None = None
    source: str = ""
    tags: Mapping[str, str] | None = None
    description: str = ""


def claim(name: str) -> None:
    """Creates the registered model unless it exists; raises UserError for a name that is taken or refused."""
    client: Any = MlflowClient()
    try:
        client.create_registered_model(name, tags={PROJECT_TAG: PROJECT})
    except MlflowException as error:
        if is_outage(error):
            raise
        if error.error_code != EXISTS:
            raise _refused(name, error) from error
        _adopt(client, name)


def require_ours(name: str) -> None:
    """Raises UserError if there is no registered model of this project with the name."""
    try:
        model: Any = MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if is_outage(error):
            raise
        raise UserError(f"name={name}: no such registered model; register makes one") from error
    if model.tags.get(PROJECT_TAG) != PROJECT:
        raise _taken(name)


def _adopt(client: Any, name: str) -> None:
    """Takes an existing registered model that nobody has used yet; one of another project is refused."""
    try:
        model = client.get_registered_model(name)
        if model.tags.get(PROJECT_TAG) == PROJECT:
            return
        if versions(client, name) or any(tag.startswith("mlflow.prompt") for tag in model.tags):
            raise _taken(name)
        client.set_registered_model_tag(name, PROJECT_TAG, PROJECT)
    except MlflowException as error:
        if is_outage(error):
            raise
        raise _refused(name, error) from error


@contextmanager
def registering(address: str, name: str, tags: Mapping[str, str]) -> Generator[str]:
    """Registers a new version with these tags, and yields its number for the block to decide about it.

    Raises UserError if the name is refused, or if the version is deleted in the block.
    """
    model_id = model_id_of(address)
    claim(name)
    # By model id: a runs:/ address would register the run's last model.
    source = f"models:/{model_id}" if model_id else address
    try:
        with redirect_stderr(StringIO()):  # it would say that the model exists already, which claim made
            new = mlflow.register_model(source, name, tags=dict(tags))  # pyright: ignore[reportUnknownMemberType]
        number = str(new.version)
    except MlflowException as error:
        if is_outage(error):
            raise
        raise _refused(name, error) from error
    try:
        yield number
    except MlflowException as error:
        if is_outage(error) or version_of(name, number) is not None:
            raise
        raise UserError(
            f"name={name}: version {number} was deleted before it was decided; no alias moved, register again"
        ) from error


def champion_of(name: str) -> Version | None:
    """The version with the alias champion; None if there is no such alias or registered model."""
    try:
        found = MlflowClient().get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if is_outage(error):
            raise
        return None
    return _as_version(found, is_champion=True)


def version_of(name: str, number: str) -> Version | None:
    """A version by number; None if it does not exist or was deleted."""
    try:
        found: Any = MlflowClient().get_model_version(name, number)
    except MlflowException as error:
        if is_outage(error):
            raise
        return None
    return _as_version(found, is_champion=CHAMPION in (found.aliases or []))


def set_alias(name: str, alias: str, number: str) -> None:
    """Moves an alias to a version; raises UserError if the store has no aliases.

    The version keeps a reason that says so.
    """
    client: Any = MlflowClient()
    try:
        try:
            client.set_registered_model_alias(name, alias, number)
        except MlflowException:
            # Another process set it for the first time at the same moment: now it can be moved.
            if alias not in client.get_registered_model(name).aliases:
                raise
            client.set_registered_model_alias(name, alias, number)
    except MlflowException as error:
        refused = f"{error.get_http_status_code()} {error}"
        is_unknown = error.get_http_status_code() in NO_ALIASES or any(
            f"failed with error code {status} " in refused for status in NO_ALIASES
        )
        if not is_unknown or version_of(name, number) is None:
            raise
        reason = f"the alias {alias} cannot be set ({_first_line(error)})"
        with suppress(MlflowException):
            client.set_model_version_tag(name, number, "decision", "none")
            client.set_model_version_tag(name, number, "reason", reason[:1000])
        raise UserError(
            f"{SETTING}={tracking_uri()}: {reason}; version {number} of {name} stays registered without it;"
            " use a store with aliases, or promote=never"
        ) from error


def delete_alias(name: str, alias: str) -> None:
    """Removes an alias; does nothing if there is none."""
    with suppress(MlflowException):
        MlflowClient().delete_registered_model_alias(name, alias)


def _as_version(found: Any, is_champion: bool) -> Version:
    source, tags = str(found.source or ""), dict(found.tags)
    model_id = source.removeprefix("models:/") if source.startswith("models:/m-") else None
    reason = tags.get("reason", "")
    description = str(found.description or "")
    return Version(
        str(found.name), str(found.version), is_champion, reason, model_id, source, tags, description
    )


def versions(client: Any, name: str) -> list[Any]:
    """All versions of a registered model, as MLflow has them."""
    quote = '"' if "'" in name else "'"
    return [*client.search_model_versions(f"name = {quote}{name}{quote}")]


def _taken(name: str) -> UserError:
    return UserError(
        f"name={name}: is a registered model of another project; choose another name, such as name={name}-2"
    )


def _refused(name: str, error: MlflowException) -> UserError:
    return UserError(f"name={name}: cannot be registered ({_first_line(error)}); use letters and digits")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
