"""The model registry: versions, and which of them is the champion."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

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
EVIDENCE = ("holdout", "external")  # images that neither trained a model nor chose its epoch or thresholds
TURN_TAG, TURN_SECONDS, PAUSE_SECONDS = "deciding", 30, 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A registered version and whether it holds the alias champion."""

    name: str
    number: str
    champion: bool
    reason: str


@dataclass(frozen=True)
class Evidence:
    """A model's last score on one set of images that were new to it; ``timestamp`` in ms since 1970."""

    identity: str
    subset: str
    images: int
    dice: float
    dice_baseline: float
    timestamp: int

    @property
    def where(self) -> str:
        """The images, for messages."""
        return f"{self.images} {self.subset} images ({self.identity[:8]})"


@dataclass(frozen=True)
class Champion:
    """The version with the alias, the images that it was registered by, and its scores by identity."""

    number: str
    identity: str | None
    scores: Mapping[str, Evidence]


def best_model(name: str) -> tuple[str, str]:
    """Address of the experiment's model with the highest Dice, and which models were compared.

    Only scores on one set of images compare: that by which the champion of ``name`` was registered where
    models of this experiment were scored on it, else the hold-out part that was scored last, or the external
    set where there is none.
    Raises UserError where no model has such a score.
    """
    active = mlflow.active_run()
    assert active is not None
    found = mlflow.search_logged_models(experiment_ids=[active.info.experiment_id], output_format="list")
    scores = [(evidence, model.model_id) for model in found for evidence in _scores_of(model).values()]
    if not scores:
        raise UserError(
            "model=best: no model of this experiment was scored on its hold-out part or on an external data"
            " set; `score` one first, or give models:/<id>"
        )
    champion = _champion(MlflowClient(), name)
    ours = champion is not None and any(evidence.identity == champion.identity for evidence, _ in scores)
    identity = champion.identity if champion and ours else _latest([e for e, _ in scores]).identity
    compared = [(evidence, model_id) for evidence, model_id in scores if evidence.identity == identity]
    best, model_id = max(compared, key=lambda scored: (scored[0].dice, scored[0].timestamp))
    which = "by which the champion was registered" if ours else "which were scored last"
    return f"models:/{model_id}", f"best of {len(compared)} scored on the {best.where} {which}"


def register_model(address: str, name: str, promote: str, tags: Mapping[str, str]) -> Version:
    """A new version of ``name``, with what it scored as tags, and the alias if ``promote`` grants it.

    With ``auto`` the alias goes to a model whose Dice on images that were new to it is above the all-empty
    baseline, and above the champion's on the same images. Versions that are registered at the same time are
    decided one after the other, in the order of their numbers.
    """
    client, model_id = MlflowClient(), model_id_of(address)
    scores = _scores_of(mlflow.get_logged_model(model_id)) if model_id else {}
    # By model id: a runs:/ address would take the run's last model, whatever was meant.
    source = f"models:/{model_id}" if model_id else address
    try:
        number = str(mlflow.register_model(source, name, tags=dict(tags) | {TURN_TAG: "true"}).version)
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"name={name}: cannot be registered ({reason}); take a plain word") from error
    try:
        _wait_for_turn(client, name, number)
        champion, reason, by = _decide(promote, scores, _champion(client, name))
        if by is not None:
            noted = {"dice": by.dice, "dice_baseline": by.dice_baseline}
            for key, value in (noted | {"identity": by.identity, "subset": by.subset}).items():
                client.set_model_version_tag(name, number, key, str(value))
        if champion:
            client.set_registered_model_alias(name, ALIAS, number)
        client.update_model_version(name, number, description=f"{reason}. Logged model {model_id}.")
    finally:
        client.delete_model_version_tag(name, number, TURN_TAG)
    return Version(name, number, champion, reason)


def _scores_of(model: Any) -> dict[str, Evidence]:
    """A logged model's evidence by identity; of several scores on the same images the last one."""
    found = dict[str, Evidence]()
    for metric in sorted(model.metrics or [], key=lambda metric: metric.timestamp):
        facts = json.loads(model.tags.get(f"{SCORE_TAG}{metric.dataset_digest}", "{}"))
        if metric.key == "dice" and facts.get("subset") in EVIDENCE:
            found[metric.dataset_digest] = Evidence(
                identity=metric.dataset_digest,
                subset=facts["subset"],
                images=int(facts["images"]),
                dice=metric.value,
                dice_baseline=float(facts["dice_baseline"]),
                timestamp=metric.timestamp,
            )
    return found


def _latest(scores: list[Evidence]) -> Evidence:
    """The last score on a hold-out part; on an external set where there is none."""
    return max(scores, key=lambda evidence: (evidence.subset == "holdout", evidence.timestamp))


def _champion(client: MlflowClient, name: str) -> Champion | None:
    try:
        version = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:  # no such model, or no such alias yet
        return None
    try:  # the version itself does not keep the model's id
        scores = _scores_of(client.get_logged_model((version.source or "").removeprefix("models:/")))
    except MlflowException:  # deleted meanwhile, or never a logged model
        scores = {}
    return Champion(str(version.version), version.tags.get("identity"), scores)


def _wait_for_turn(client: MlflowClient, name: str, number: str) -> None:
    """Waits until the versions before this one are decided.

    The store numbers them one by one, which makes the numbers a queue on any store, without a lock.
    """
    quote = '"' if "'" in name else "'"
    waiting, end = 0, 0.0
    while True:
        versions = client.search_model_versions(f"name = {quote}{name}{quote}")
        before = sorted(
            int(v.version) for v in versions if TURN_TAG in v.tags and int(v.version) < int(number)
        )
        if not before:
            return
        if len(before) != waiting:
            waiting, end = len(before), time.monotonic() + TURN_SECONDS
        if time.monotonic() >= end:  # the process of the first was killed
            log.warning("%s version %s was never decided: going on without it", name, before[0])
            client.delete_model_version_tag(name, str(before[0]), TURN_TAG)
        else:
            time.sleep(PAUSE_SECONDS)


def _decide(
    promote: str, scores: Mapping[str, Evidence], champion: Champion | None
) -> tuple[bool, str, Evidence | None]:
    """Whether a model with these scores becomes the champion, why, and by which of them."""
    mine, theirs = _latest([*scores.values()]) if scores else None, None
    if champion is not None and (common := scores.keys() & champion.scores.keys()):
        last = _latest([scores[identity] for identity in common]).identity
        compared = champion.identity if champion.identity in common else last
        mine, theirs = scores[compared], champion.scores[compared]
    earned, reason = _is_better(mine, champion, theirs)
    if promote == "never":
        return False, "promote=never", mine
    if promote == "always":
        return True, "promote=always" if earned else f"promote=always, although: {reason}", mine
    return earned, reason, mine


def _is_better(mine: Evidence | None, champion: Champion | None, theirs: Evidence | None) -> tuple[bool, str]:
    if mine is None:
        return False, (
            "no score on images that are new to it (train and validation do not count); `score` it with"
            " subset=holdout, or on another data set with subset=all"
        )
    dice = f"Dice {mine.dice:.4f} on {mine.where}"
    baseline = f"above the all-empty baseline {mine.dice_baseline:.4f}"
    if mine.dice <= mine.dice_baseline:
        return False, f"{dice} is not {baseline}"
    if champion is None:
        return True, f"the first champion: {dice} is {baseline}"
    if theirs is None:
        return False, (
            f"{dice} does not compare: the champion, version {champion.number}, was not scored on these"
            " images; `score` both on one set, or let promote=always decide"
        )
    better = mine.dice > theirs.dice
    verdict = "better than" if better else "not better than"
    return better, f"{dice} is {verdict} the champion's {theirs.dice:.4f} on the same images"
