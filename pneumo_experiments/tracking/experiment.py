"""How an experiment shows in MLflow's UI: its description, and views with the columns that matter."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode

from mlflow.entities import Experiment
from mlflow.utils.mlflow_tags import (
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER,
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME,
)

DEFAULT_EXPERIMENT = "pneumothorax"  # where nobody names another
STAGE_TAG = "pneumo.stage"  # of a run: train, trial, score, …: what it does, whatever its name
KIND_TAG = "mlflow.experimentKind"  # without it the UI opens its pages for language models
NOTE_TAG = "mlflow.note.content"
VIEW_TAG = "mlflow.sharedViewState."  # and the view's key: what the UI itself writes for "share view"
RUN_NAME = "attributes.`Run Name`"  # the name of that column
SINCE_MS = 1_764_374_400_000  # the UI wants a date

DESCRIPTION = """\
Pneumothorax on chest radiographs. **Views (top right): trainings, trials, scores.**

| metric | of which images | what it says |
|---|---|---|
| `dice` (`dice_low`, `dice_high`) | hold-out: neither trained the model nor chose its epoch or thresholds | \
the challenge's Dice with its 95% interval; compare models by it |
| `dice_positive` | the same with a finding | how well findings are outlined |
| `val/dice` | validation images, which chose epoch and thresholds | optimistic; for trainings of one fold |
| `holdout/dice`, `all/dice` | those of a data set | of a submission: nobody knows what trained its model |
| `epoch/dice` | validation images, after each epoch | the curve of a training |
| `trial/value` | validation images, with thresholds of other patients | what the search maximises |

Compare each Dice with `dice_baseline`, the Dice of an empty mask for every image."""


WEIGHTS = "bce_weight dice_weight focal_weight"
# Of each view of the UI: the stage whose runs it shows, and its columns of metrics and params.
VIEWS = {
    "trainings": (
        "train",
        "dice dice_low dice_high dice_positive val/dice",
        f"dice_baseline network image_size weights epochs best_epoch learning_rate {WEIGHTS} fold seed",
    ),
    "trials": (
        "trial",
        "trial/value epoch/dice_positive trial/seconds",
        f"trial_state {WEIGHTS} learning_rate",
    ),
    "scores": (
        "score",
        "dice dice_low dice_high dice_positive holdout/dice all/dice sensitivity specificity auroc",
        "dice_baseline images positives subset model",
    ),
}


def _view_tag(name: str) -> str:
    """The value of the experiment's tag by which the UI knows a view, sorted by its first column, falling."""
    stage, metrics, params = VIEWS[name]
    columns = [f"metrics.`{metric}`" for metric in metrics.split()]
    columns += [f"params.`{param}`" for param in params.split()]
    state = {
        "searchFilter": f"tags.`{STAGE_TAG}` = '{stage}' and attributes.status != 'FAILED'",
        "orderByKey": columns[0],
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": [RUN_NAME, *columns],
        "columnWidths": {RUN_NAME: 330} | {column: max(95, 8 * len(column) - 50) for column in columns},
    }
    packed = b64encode(zlib.compress(json.dumps(state).encode())).decode()
    times = {"createdAt": SINCE_MS, "updatedAt": SINCE_MS}
    return json.dumps({"name": name, **times, "state": f"deflate;{packed}"})


def missing_tags(experiment: Experiment) -> dict[str, str]:
    """Tags that the experiment needs for the UI; a description that it has stays."""
    wanted = {VIEW_TAG + name: _view_tag(name) for name in VIEWS}
    once = {
        KIND_TAG: "custom_model_development",
        NOTE_TAG: DESCRIPTION,
        MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME: "dice",
        MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER: "True",
    }
    wanted |= {name: text for name, text in once.items() if name not in experiment.tags}
    return {name: text for name, text in wanted.items() if experiment.tags.get(name) != text}
