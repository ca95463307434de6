"""The text of MLproject, read off the settings."""

from __future__ import annotations

import json

from pneumo_experiments.settings import CONFIG_HELP, ENTRY_POINTS, NONE, as_text, leaves

HEAD = """\
# Written by `python -m pneumo_experiments mlproject` from pneumo_experiments/settings: change it there.
#
# Declared here is only what goes in and out, and config, a YAML file of settings. Every other setting of
# `python -m pneumo_experiments NAME --help` is accepted as -P name=value as well: MLflow appends it to the
# command. Their defaults are not declared: MLflow would pass them like explicit choices, which beat a config
# file.
name: pneumo_experiments
conda_env: conda.yaml
entry_points:
"""
# A shell that MLflow starts in the project's folder runs it: the parent of that shell is MLflow.
COMMAND = "python -m pneumo_experiments --mlflow_pid $PPID"


def mlproject_text() -> str:
    """MLproject as YAML: what goes in and out of each entry point, and its command."""
    return HEAD + "".join(_entry_point(name, kind) for name, kind in ENTRY_POINTS.items())


def _entry_point(name: str, kind: type) -> str:
    declared = [("config", CONFIG_HELP, NONE)]
    declared += [
        (leaf.name, leaf.arg.help, as_text(leaf.default)) for leaf in leaves(kind) if leaf.arg.declared
    ]
    lines = [f"  {name}:", "    parameters:"]
    for parameter, meaning, default in declared:
        # A path of MLflow's type "path" that does not exist would end `mlflow run` before this program can
        # explain, and leave the run RUNNING: all are strings, and the stages check them.
        lines += [
            f"      # {meaning}",
            f"      {parameter}: {{type: string, default: {json.dumps(default)}}}",
        ]
    options = " ".join(f"--{parameter} {{{parameter}}}" for parameter, _, _ in declared)
    return "\n".join([*lines, f'    command: "{COMMAND} {name} {options}"', ""])
