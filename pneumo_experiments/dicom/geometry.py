"""Where a radiograph lies in the patient: the side at an edge of the image, and the size of a pixel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dicom.header import Attributes, text

# Patient Orientation (0020,0020), PS3.3 C.7.6.1.1.1: where a row leads to, and where a column does. The first
# letter of each is its main direction.
EDGES = ({"L": "right", "R": "left"}, {"L": "bottom", "R": "top"})
FRONTAL_VIEWS = ("AP", "PA", "")
# The calibrated spacing first. Imager Pixel Spacing is that of the detector, where the chest is enlarged.
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing")
LEAST_FRACTION = 0.1  # of a finding's area, from which a side counts


class Geometry(NamedTuple):
    """``left_edge`` of the image shows the patient's left: right, left, top, bottom, or empty if unknown.

    ``spacing_mm`` are the distances of rows and of columns, as the attribute ``spacing`` has them.
    """

    left_edge: str = "right"
    spacing: str = ""
    spacing_mm: tuple[float, float] | None = None

    def area_mm2(self, area_px: int) -> float | None:
        """The area of so many pixels; None without a spacing."""
        return None if self.spacing_mm is None else area_px * self.spacing_mm[0] * self.spacing_mm[1]


def read_geometry(header: Attributes) -> Geometry:
    """The geometry in a header; values that are damaged count as absent.

    Without Patient Orientation a frontal view is taken to be displayed as usual: the patient's left on the
    right. Other views have no sides.
    """
    spacing, spacing_mm = next(
        ((name, found) for name in SPACINGS if (found := _spacing_mm(header, name)) is not None), ("", None)
    )
    return Geometry(_left_edge(header), spacing, spacing_mm)


def side_of(mask: NDArray[np.bool_], left_edge: str) -> str:
    """The patient's side of a finding (H, W): right, left, both, or empty without a finding or a known edge.

    The middle of the image divides the sides. A side counts if it holds at least a tenth of the area.
    """
    area_px = int(np.count_nonzero(mask))
    if not area_px or not left_edge:
        return ""
    rows, columns = mask.shape
    first = mask[:, : columns // 2] if left_edge in ("left", "right") else mask[: rows // 2]
    in_first = int(np.count_nonzero(first))
    halves = (in_first, area_px - in_first)
    on_left, on_right = halves if left_edge in ("left", "top") else halves[::-1]
    if min(on_left, on_right) >= LEAST_FRACTION * area_px:
        return "both"
    return "left" if on_left > on_right else "right"


def _left_edge(header: Attributes) -> str:
    directions = header.values("PatientOrientation")
    if not any(directions):
        view = text(header, "ViewPosition").upper()
        return "right" if view in FRONTAL_VIEWS else ""
    for edges, direction in zip(EDGES, directions, strict=False):
        if str(direction)[:1] in edges:
            return edges[str(direction)[:1]]
    return ""


def _spacing_mm(header: Attributes, keyword: str) -> tuple[float, float] | None:
    match header.numbers(keyword):
        case [float(rows), float(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case []:
            return None
        case _:
            header.is_damaged(keyword)
            return None
