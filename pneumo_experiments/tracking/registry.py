"""The model registry: registers versions and decides which one is the champion."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.calls import SCORE_TAG
from pneumo_experiments.tracking.models import model_id_of

ALIAS = "champion"
# Subsets whose images neither trained a model nor chose its epoch or thresholds.
UNSEEN_SUBSETS = ("holdout", "external")
PENDING_TAG = "deciding"  # of a version until it is decided whether it becomes the champion
PENDING_SECONDS, POLL_SECONDS = 30, 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A registered version and whether it holds the alias champion."""

    name: str
    number: str
    champion: bool
    reason: str


@dataclass(frozen=True)
class UnseenScore:
    """A model's latest Dice on one set of unseen images; ``timestamp`` in ms since 1970."""

    identity: str
    subset: str
    images: int
    dice: float
    dice_baseline: float
    timestamp: int

    @property
    def images_text(self) -> str:
        """The images, for messages."""
        return f"{self.images} {self.subset} images ({self.identity[:8]})"


@dataclass(frozen=True)
class Champion:
    """The version with the alias, the identity of the images that decided it, and its scores by identity."""

    number: str
    identity: str | None
    scores: Mapping[str, UnseenScore]


def best_model(name: str) -> tuple[str, str]:
    """Address of the experiment's model with the highest Dice on unseen images, and a text that says why.

    Models are compared on one set of images: the champion's, if models of this experiment were scored on it,
    else the hold-out split that was scored last, or without one the external data set.
    Raises UserError if no model was scored on unseen images.
    """
    active = mlflow.active_run()
    assert active is not None
    models = mlflow.search_logged_models(experiment_ids=[active.info.experiment_id], output_format="list")
    scores = [(score, model.model_id) for model in models for score in _scores_of(model).values()]
    if not scores:
        raise UserError(
            "model=best: no model of this experiment was scored on its hold-out split or on an external data"
            " set; run score first, or give models:/<id>"
        )
    champion = _champion(MlflowClient(), name)
    if champion and any(score.identity == champion.identity for score, _ in scores):
        identity, why = champion.identity, "the champion's images"
    else:
        identity, why = _latest([score for score, _ in scores]).identity, "the images scored last"
    compared = [(score, model_id) for score, model_id in scores if score.identity == identity]
    best, model_id = max(compared, key=lambda scored: (scored[0].dice, scored[0].timestamp))
    return f"models:/{model_id}", f"best of {len(compared)} models scored on {best.images_text}, {why}"


def register_model(address: str, name: str, promote: str, tags: Mapping[str, str]) -> Version:
    """Registers a new version of ``name`` with its scores as tags, and makes it champion if it earns that.

    With ``promote=auto`` a model becomes champion if its Dice on unseen images is above the all-empty
    baseline, and above the champion's on the same images. Versions that are registered at the same time are
    decided one after the other, in the order of their numbers.
    """
    client, model_id = MlflowClient(), model_id_of(address)
    scores = _scores_of(mlflow.get_logged_model(model_id)) if model_id else {}
    # By model id: a runs:/ address would register the run's last model.
    source = f"models:/{model_id}" if model_id else address
    try:
        new = mlflow.register_model(source, name, tags=dict(tags) | {PENDING_TAG: "true"})  # pyright: ignore[reportUnknownMemberType]
        number = str(new.version)
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"name={name}: cannot be registered ({reason}); use letters and digits") from error
    try:
        _wait_for_earlier_versions(client, name, number)
        is_champion, reason, score = _decide(promote, scores, _champion(client, name))
        if score is not None:
            values = {"dice": score.dice, "dice_baseline": score.dice_baseline}
            for key, value in (values | {"identity": score.identity, "subset": score.subset}).items():
                client.set_model_version_tag(name, number, key, str(value))
        if is_champion:
            client.set_registered_model_alias(name, ALIAS, number)
        client.update_model_version(name, number, description=f"{reason}. Logged model {model_id}.")
    finally:
        client.delete_model_version_tag(name, number, PENDING_TAG)
    return Version(name, number, is_champion, reason)


def _scores_of(model: Any) -> dict[str, UnseenScore]:
    """A logged model's scores on unseen images by identity; on the same images the latest one."""
    scores = dict[str, UnseenScore]()
    for metric in sorted(model.metrics or [], key=lambda metric: metric.timestamp):
        facts = json.loads(model.tags.get(f"{SCORE_TAG}{metric.dataset_digest}", "{}"))
        if metric.key == "dice" and facts.get("subset") in UNSEEN_SUBSETS:
            scores[metric.dataset_digest] = UnseenScore(
                identity=metric.dataset_digest,
                subset=facts["subset"],
                images=int(facts["images"]),
                dice=metric.value,
                dice_baseline=float(facts["dice_baseline"]),
                timestamp=metric.timestamp,
            )
    return scores


def _latest(scores: list[UnseenScore]) -> UnseenScore:
    """The latest score on a hold-out split; without one the latest on an external data set."""
    return max(scores, key=lambda score: (score.subset == "holdout", score.timestamp))


def _champion(client: MlflowClient, name: str) -> Champion | None:
    try:
        version = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:  # no such model or alias yet
        return None
    try:  # the version itself does not have the model's id
        scores = _scores_of(client.get_logged_model((version.source or "").removeprefix("models:/")))
    except MlflowException:  # deleted, or not a logged model
        scores = {}
    return Champion(str(version.version), version.tags.get("identity"), scores)


def _wait_for_earlier_versions(client: MlflowClient, name: str, number: str) -> None:
    """Waits until all versions before this one are decided.

    The store numbers versions one by one, so the numbers are a queue that needs no lock.
    """
    quote = '"' if "'" in name else "'"
    pending_count, end = 0, 0.0
    while True:
        versions = client.search_model_versions(f"name = {quote}{name}{quote}")
        pending = sorted(
            int(v.version) for v in versions if PENDING_TAG in v.tags and int(v.version) < int(number)
        )
        if not pending:
            return
        if len(pending) != pending_count:
            pending_count, end = len(pending), time.monotonic() + PENDING_SECONDS
        if time.monotonic() >= end:  # the process of the first was killed
            log.warning("%s version %s was never decided: continuing without it", name, pending[0])
            client.delete_model_version_tag(name, str(pending[0]), PENDING_TAG)
        else:
            time.sleep(POLL_SECONDS)


def _decide(
    promote: str, scores: Mapping[str, UnseenScore], champion: Champion | None
) -> tuple[bool, str, UnseenScore | None]:
    """Whether a model with these scores becomes champion, why, and the score that decided it."""
    new, current = _latest([*scores.values()]) if scores else None, None
    if champion is not None and (common := scores.keys() & champion.scores.keys()):
        last = _latest([scores[identity] for identity in common]).identity
        compared = champion.identity if champion.identity in common else last
        new, current = scores[compared], champion.scores[compared]
    is_better, reason = _is_better(new, champion, current)
    if promote == "never":
        return False, "promote=never", new
    if promote == "always":
        return True, "promote=always" if is_better else f"promote=always, although: {reason}", new
    return is_better, reason, new


def _is_better(
    new: UnseenScore | None, champion: Champion | None, current: UnseenScore | None
) -> tuple[bool, str]:
    if new is None:
        return False, (
            "no score on unseen images (train and validation do not count); run score with subset=holdout,"
            " or on another data set with subset=all"
        )
    dice = f"Dice {new.dice:.4f} on {new.images_text}"
    baseline = f"above the all-empty baseline {new.dice_baseline:.4f}"
    if new.dice <= new.dice_baseline:
        return False, f"{dice} is not {baseline}"
    if champion is None:
        return True, f"the first champion: {dice} is {baseline}"
    if current is None:
        return False, (
            f"{dice} cannot be compared: the champion, version {champion.number}, was not scored on these"
            " images; score both on the same images, or use promote=always"
        )
    better = new.dice > current.dice
    verdict = "better than" if better else "not better than"
    return better, f"{dice} is {verdict} the champion's {current.dice:.4f} on the same images"
