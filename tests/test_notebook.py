"""The notebook, executed at small size."""

from __future__ import annotations

import json
from pathlib import Path

from command_server import CommandServer
from helpers import ROOT, copy_store, environment
from mlflow import MlflowClient

NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"


def test_the_tour_leads_from_radiographs_to_two_scored_models(
    tmp_path: Path, empty_store: Path, commands: CommandServer
) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert code.count("SMALL = False") == 1
    code = code.replace("SMALL = False", "SMALL = True")
    code += "\nprint('drawn:', sum(map(len, [axes.get_children() for axes in figure.axes])))"
    (tmp_path / "tour").mkdir()
    copy_store(empty_store, tmp_path / "tour")
    ended, said = commands.start(
        folder=tmp_path, environment=environment() | {"MPLBACKEND": "Agg"}, tiny=True, code=code
    ).communicate()
    assert ended == 0, said
    assert "second against first:" in said and said.count("hold-out Dice 0.") == 2
    client = MlflowClient(f"sqlite:///{tmp_path}/tour/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len([run for run in runs if "dice" in run.data.metrics]) >= 2
    assert int(said.partition("drawn: ")[2].split()[0]) > 20
