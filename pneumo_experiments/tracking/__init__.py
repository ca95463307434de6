"""Everything that talks to MLflow: runs and what they log, models, the store, its outages."""

# The names below are what other rooms use.
# ruff: noqa: F401
# pyright: reportUnusedImport=false

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # hospital networks must see no unexpected requests
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for every child run
# By default MLflow retries for minutes; tracking.buffered_client buffers instead.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds, also for an upload
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; libpq would wait forever
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # no warning on a machine without git

from pneumo_experiments.tracking.code_version import code_differences, code_version
from pneumo_experiments.tracking.log import (
    active_run,
    artifacts_of_active_run,
    describe,
    disabled,
    link_to_active_run,
    log_csv,
    log_dataset,
    log_file,
    log_image,
    log_image_step,
    log_json,
    log_metrics,
    log_model,
    log_page,
    log_params,
    log_scores,
    log_table,
    log_thresholds,
    log_yaml,
    logged_steps,
    page_of_active_run,
    rename,
)
from pneumo_experiments.tracking.models import delete_model, model_data, model_info
from pneumo_experiments.tracking.processes import end_with_mlflow_run, has_ended, process_tags
from pneumo_experiments.tracking.runs import end_if_running, joined_run, run
from pneumo_experiments.tracking.servers import check_server, database_file, with_driver
from pneumo_experiments.tracking.store import connect_store, open_store, tracking_uri, wait_for_store
from pneumo_experiments.tracking.system_metrics import warn_without_gpu_metrics
