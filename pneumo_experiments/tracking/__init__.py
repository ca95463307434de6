"""The only room that talks to MLflow: runs and what they hold, models and the registry."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a hospital's network must see no stray calls
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# By default MLflow tries eight times, for minutes; tracking.delivery knows better what to do.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds without an answer, also to an upload
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # libpq would wait forever
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a machine without git is no reason to complain

from pneumo_experiments.tracking.addresses import check_address, hide_passwords
from pneumo_experiments.tracking.models import log_model, model_data
from pneumo_experiments.tracking.registry import EVIDENCE, Version, best_model, register_model
from pneumo_experiments.tracking.runs import (
    active_run,
    artifacts_of_active_run,
    be_silent,
    describe,
    log_dataset,
    log_file,
    log_json,
    log_metrics,
    log_params,
    log_picture,
    log_scores,
    log_table,
    run,
)
from pneumo_experiments.tracking.store import open_store, tracking_uri

__all__ = [
    "EVIDENCE",
    "Version",
    "active_run",
    "artifacts_of_active_run",
    "be_silent",
    "best_model",
    "check_address",
    "describe",
    "hide_passwords",
    "log_dataset",
    "log_file",
    "log_json",
    "log_metrics",
    "log_model",
    "log_params",
    "log_picture",
    "log_scores",
    "log_table",
    "model_data",
    "open_store",
    "register_model",
    "run",
    "tracking_uri",
]
