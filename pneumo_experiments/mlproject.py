"""The text of MLproject, read off the settings."""

from __future__ import annotations

import json
from dataclasses import Field, fields
from typing import Any

from pneumo_experiments.settings import ENTRY_POINTS, Main, as_text

HEAD = """\
# Written by `python -m pneumo_experiments mlproject` from pneumo_experiments/settings.py: change it there.
name: pneumo_experiments
conda_env: conda.yaml
entry_points:
"""


def mlproject_text() -> str:
    """MLproject as YAML: each entry point's parameters with meaning and default, and its command."""
    return HEAD + "".join(_entry_point(name, kind) for name, kind in ENTRY_POINTS.items())


def _entry_point(name: str, kind: type) -> str:
    declared = [f for f in fields(kind) if not _depends_on_data(f, kind)]
    lines = [f"  {name}:", "    parameters:"]
    for f in declared:
        lines += [
            f"      # {f.metadata['meaning']}",
            f"      {f.name}: {{type: {_type_of(f)}, default: {json.dumps(as_text(f.default))}}}",
        ]
    others = [f.name for f in fields(kind) if _depends_on_data(f, kind)]
    if others:
        # A declared default is logged before the program can choose, so these must not have one.
        lines += ["      # these too can be given; their defaults are smaller on the synthetic sample:"]
        lines += [f"      #   {other}" for other in others]
    options = " ".join(f"--{f.name} {{{f.name}}}" for f in declared)
    return "\n".join([*lines, f'    command: "python -m pneumo_experiments {name} {options}"', ""])


def _depends_on_data(f: Field[Any], kind: type) -> bool:
    return kind is Main and f.metadata["sample"] is not None


def _type_of(f: Field[Any]) -> str:
    # A parameter of MLflow's type "path" that does not exist ends `mlflow run` before this program can
    # explain, and leaves the run RUNNING: paths are strings here and checked by the stages.
    return "float" if str(f.type) in ("int", "float") else "string"
