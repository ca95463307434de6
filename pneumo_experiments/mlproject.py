"""The text of MLproject, read off the settings."""

from __future__ import annotations

import json

from pneumo_experiments.settings import CONFIG, ENTRY_POINTS, as_text, leaves

HEAD = """\
# Written by `python -m pneumo_experiments mlproject` from pneumo_experiments/settings: change it there.
#
# Declared here is only what goes in and out, and config, a YAML file of settings. Every other setting of
# `python -m pneumo_experiments NAME --help` is accepted as -P name=value as well: MLflow appends it to the
# command. Their defaults are not declared: MLflow would pass them like explicit choices, which beat a config
# file.
"""
COMMAND = "python -m pneumo_experiments"


def mlproject_text(image: str | None = None) -> str:
    """MLproject as YAML: what goes in and out of each entry point, and its command.

    With ``image`` MLflow starts the commands in a container of that image.
    """
    # A shell that MLflow starts in the project's folder runs it: the parent of that shell is MLflow.
    head, command = "name: pneumo_experiments\nconda_env: conda.yaml\n", f"{COMMAND} --mlflow_pid $PPID"
    if image:  # Kubernetes names a job after the project, and allows no underscore; MLflow is not to be seen
        head, command = f"name: pneumo-experiments\ndocker_env: {{image: {json.dumps(image)}}}\n", COMMAND
    entry_points = (_entry_point(name, kind, command) for name, kind in ENTRY_POINTS.items())
    return f"{HEAD}{head}entry_points:\n{''.join(entry_points)}"


def _entry_point(name: str, kind: type, command: str) -> str:
    declared = [leaf for leaf in (CONFIG, *leaves(kind)) if leaf.arg.declared]
    lines = [f"  {name}:", "    parameters:"]
    for leaf in declared:
        # A path of MLflow's type "path" that does not exist would end `mlflow run` before this program can
        # explain, and leave the run RUNNING: all are strings, and the stages check them.
        lines += [
            f"      # {leaf.arg.help}",
            f"      {leaf.name}: {{type: string, default: {json.dumps(as_text(leaf.default))}}}",
        ]
    options = " ".join(f"--{leaf.name} {{{leaf.name}}}" for leaf in declared)
    return "\n".join([*lines, f'    command: "{command} {name} {options}"', ""])
