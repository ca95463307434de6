"""The data report of preprocess: its numbers as JSON, as a page and in lines, and a sheet of positives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.data_report.page import page
from pneumo_experiments.data_report.statistics import Statistics
from pneumo_experiments.data_report.summary import summary
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.figures import contact_sheet, jpeg_uri, overlay
from pneumo_experiments.words import plural

POSITIVES = 12  # on the contact sheet
PANEL_PX = 256


@dataclass(frozen=True)
class DataReport:
    """The numbers of a data set ``name``, and a sheet of its positives, RGB (h, w, 3), if it has any."""

    name: str
    statistics: Statistics
    is_written: bool
    positives: NDArray[np.uint8] | None = None

    @property
    def json(self) -> str:
        """The numbers in the order of their fields."""
        return json.dumps(asdict(self.statistics), indent=2) + "\n"

    @property
    def page(self) -> str:
        """The page, one HTML file in UTF-8."""
        title = f"Data report: {self.name}{'' if self.is_written else ' was not written'}"
        caption = "Images with pneumothorax, from the smallest annotated area to the largest"
        figures = [] if self.positives is None else [(caption, jpeg_uri(self.positives))]
        return page(self.statistics, title, figures)

    @property
    def lines(self) -> list[str]:
        """The summary for the terminal."""
        return summary(self.statistics)


def sheet_of_positives(dataset: Dataset) -> NDArray[np.uint8] | None:
    """Positives with their mask outlines, evenly spaced by rank of area; None if there are none."""
    positives = [index for index, entry in enumerate(dataset.entries) if entry.area_px > 0]
    positives.sort(key=lambda index: dataset.entries[index].area_px)
    if not positives:
        return None
    ranks: list[int] = np.unique(np.linspace(0, len(positives) - 1, POSITIVES).round().astype(int)).tolist()
    return contact_sheet([_panel(dataset, positives[rank]) for rank in ranks], columns=2)


def _panel(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    entry = dataset.entries[index]
    caption = f"{entry.area_px:,} px in {plural(entry.annotations, 'annotation')}"
    return overlay(dataset.images([index])[0], dataset.mask(index), None, caption, PANEL_PX)
