"""What models scored on unseen images: their scores, the tables of the images, the best model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlflow
import mlflow.artifacts
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.buffered_client import is_outage
from pneumo_experiments.tracking.calls import SCORE_TAG

# Subsets whose images neither trained a model nor chose its epoch or thresholds.
UNSEEN_SUBSETS = ("holdout", "external")


@dataclass(frozen=True)
class UnseenScore:
    """A model's latest scores on one set of unseen images; ``timestamp`` in ms since 1970."""

    identity: str
    subset: str
    images: int
    dice: float
    dice_baseline: float
    timestamp: int
    run_id: str
    """the run that scored the model"""
    metrics: Mapping[str, float]
    """dice, its interval and all other metrics that this run logged, by name"""

    @property
    def images_text(self) -> str:
        """The images, for messages."""
        return f"{self.images} {self.subset} images ({self.identity[:8]})"


def scores_of(model_id: str | None) -> dict[str, UnseenScore]:
    """A logged model's scores on unseen images by identity; none for one that is deleted or not logged."""
    if model_id is None:
        return {}
    try:
        model = MlflowClient().get_logged_model(model_id)
    except MlflowException as error:
        if is_outage(error):
            raise
        return {}
    return _scores_in(model)


def best_model(identity: str | None) -> tuple[str, str, int]:
    """Address of the experiment's model with the highest Dice on unseen images, why, and of how many models.

    Models are compared on one set of images: the champion's (``identity``), if models of this experiment were
    scored on it, else the hold-out split that was scored last, or without one the external data set.
    Raises UserError if no model was scored on unseen images.
    """
    experiment = tracking.experiment_of_active_run()
    models = mlflow.search_logged_models(experiment_ids=[experiment], output_format="list")
    scores = [(score, model.model_id) for model in models for score in _scores_in(model).values()]
    if not scores:
        raise UserError(
            "model=best: no model of this experiment was scored on its hold-out split or on an external data"
            " set; run score first, or give models:/<id>"
        )
    if identity and any(score.identity == identity for score, _ in scores):
        why = "the champion's images"
    else:
        identity, why = latest([score for score, _ in scores]).identity, "the images scored last"
    compared = [(score, model_id) for score, model_id in scores if score.identity == identity]
    best, model_id = max(compared, key=lambda scored: (scored[0].dice, scored[0].timestamp))
    count = len(compared)
    return f"models:/{model_id}", f"best of {count} models scored on {best.images_text}, {why}", count


def latest(scores: Sequence[UnseenScore]) -> UnseenScore:
    """The latest score on a hold-out split; without one the latest on an external data set."""
    return max(scores, key=lambda score: (score.subset == "holdout", score.timestamp))


def read_table(run_id: str, name: str) -> list[dict[str, Any]] | None:
    """The rows of a table that ``log_table`` logged in a run; None if it has none, or a damaged one."""
    content = read_json(run_id, f"{name}.json")
    try:
        columns, data = content["columns"], content["data"]
        return [dict(zip(columns, row, strict=True)) for row in data]
    except (TypeError, LookupError, ValueError):
        return None


def read_json(run_id: str, name: str) -> Any:
    """What a JSON artifact of a run holds; None if there is none, or a damaged one."""
    try:
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (MlflowException, requests.RequestException, OSError) as error:
        if isinstance(error, MlflowException | requests.RequestException) and is_outage(error):
            raise
        return None
    except (ValueError, RecursionError):
        return None


def _scores_in(model: Any) -> dict[str, UnseenScore]:
    """The scores by identity; on the same images the latest one."""
    scores, of_run = dict[str, UnseenScore](), dict[tuple[str, str], dict[str, float]]()
    metrics = cast("list[Any]", model.metrics or [])
    for metric in metrics:
        of_run.setdefault((metric.run_id, metric.dataset_digest), {})[metric.key] = metric.value
    for metric in sorted(metrics, key=lambda metric: metric.timestamp):
        facts = json.loads(model.tags.get(f"{SCORE_TAG}{metric.dataset_digest}", "{}"))
        if metric.key == "dice" and facts.get("subset") in UNSEEN_SUBSETS:
            scores[metric.dataset_digest] = UnseenScore(
                identity=metric.dataset_digest,
                subset=facts["subset"],
                images=int(facts["images"]),
                dice=metric.value,
                dice_baseline=float(facts["dice_baseline"]),
                timestamp=metric.timestamp,
                run_id=metric.run_id,
                metrics=of_run[metric.run_id, metric.dataset_digest],
            )
    return scores
