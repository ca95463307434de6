"""What models scored on unseen images: their scores, the tables of the images, the best model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlflow
import mlflow.artifacts
import numpy as np
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.log import active_runs
from pneumo_experiments.tracking.mlflow_calls import SCORE_TAG
from pneumo_experiments.tracking.servers import if_exists, is_outage
from pneumo_experiments.words import plural

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


class ScoredImage(NamedTuple):
    """An image of a score: its patient, its Dice, and whether the truth has pixels."""

    patient: str
    dice: float
    positive: bool


class BestModel(NamedTuple):
    """The address of a model, why it is the best, and of how many models it is."""

    address: str
    line: str
    models: int


def scores_of(model_id: str | None) -> dict[str, UnseenScore]:
    """A logged model's scores on unseen images by identity; none for one that is deleted or not logged."""
    model = if_exists(MlflowClient().get_logged_model, model_id) if model_id else None
    return _scores_in(model) if model else {}


def best_model(identity: str | None) -> BestModel:
    """The model of the active run's experiment with the highest Dice on unseen images.

    Models are compared on one set of images: the champion's (``identity``), if models of this experiment were
    scored on it, else the hold-out split that was scored last, or without one the external data set.
    Raises UserError if no model was scored on unseen images.
    """
    experiments = [active_runs[-1].info.experiment_id]
    models = mlflow.search_logged_models(experiment_ids=experiments, output_format="list")
    scores = [(score, model.model_id) for model in models for score in _scores_in(model).values()]
    if not scores:
        raise UserError(
            "model=best: no model of this experiment was scored on its hold-out split or on an external data"
            " set; run score first, or give models:/<id>"
        )
    why = "the champion's images"
    if identity not in {score.identity for score, _ in scores}:
        identity, why = latest(score for score, _ in scores).identity, "the images scored last"
    compared = [(score, model_id) for score, model_id in scores if score.identity == identity]
    best, model_id = max(compared, key=lambda scored: (scored[0].dice, scored[0].timestamp))
    line = f"best of {plural(len(compared), 'model')} scored on {best.images_text}, {why}"
    return BestModel(f"models:/{model_id}", line, len(compared))


def latest(scores: Iterable[UnseenScore]) -> UnseenScore:
    """The latest score on a hold-out split; without one the latest on an external data set."""
    return max(scores, key=lambda score: (score.subset == "holdout", score.timestamp))


def images_of(score: UnseenScore) -> dict[str, ScoredImage] | None:
    """The images of a score by id; None if their table is lost or damaged: it could otherwise decide."""
    try:
        images = {
            row["image_id"]: ScoredImage(str(row["patient"]), float(row["dice"]), row["truth_area_px"] > 0)
            for row in read_table(score.run_id, "scores")
        }
    except (LookupError, TypeError, ValueError):
        return None
    means = [(image.dice, not image.positive) for image in images.values()]
    is_whole = len(images) == score.images and np.allclose(
        np.mean(means, axis=0), [score.dice, score.dice_baseline], rtol=0, atol=1e-6
    )
    return images if is_whole else None


def read_table(run_id: str, name: str) -> list[dict[str, Any]]:
    """The rows of a table that ``log_table`` logged in a run; none if it is lost or damaged."""
    table = read_artifact(run_id, f"{name}.json")
    try:
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    except (LookupError, TypeError, ValueError):
        return []


def read_artifact(run_id: str, name: str) -> Any:
    """What a JSON or YAML artifact of a run holds; None if it is lost or damaged."""
    try:
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name)
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (MlflowException, OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if is_outage(error):
            raise
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
