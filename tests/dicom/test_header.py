"""Sides of the patient, spacing of pixels, and what damaged headers do to both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dicom_files import GREYS, dicom_bytes
from pydicom.multival import MultiValue

from pneumo_experiments.dicom.header import Geometry, side_of
from pneumo_experiments.dicom.radiograph import read_radiograph


def geometry_of(**header: Any) -> Geometry:
    return read_radiograph(dicom_bytes(GREYS, **header), "x").geometry


@pytest.mark.parametrize(
    ("header", "edge"),
    [
        ({}, "right"),  # the usual display: the patient's left is on the right
        ({"PatientOrientation": ""}, "right"),
        ({"PatientOrientation": ["R", "F"]}, "left"),  # mirrored
        ({"PatientOrientation": ["RP", "FL"]}, "left"),
        ({"PatientOrientation": ["F", "L"]}, "bottom"),  # turned
        ({"PatientOrientation": ["H", "R"]}, "top"),
        ({"PatientOrientation": ["A", "F"]}, ""),  # from the side
        ({"PatientOrientation": ["AL", "F"]}, ""),
        ({"PatientOrientation": MultiValue(str, ["R"])}, "left"),
        ({"ViewPosition": "AP"}, "right"),
        ({"ViewPosition": "LL"}, ""),
        ({"ViewPosition": "LL", "PatientOrientation": ["R", "F"]}, "left"),
    ],
)
def test_the_header_says_where_the_patient_s_left_is(header: dict[str, Any], edge: str) -> None:
    assert geometry_of(**header).left_edge == edge


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, ("", None)),
        ({"PixelSpacing": [0.2, 0.1]}, ("PixelSpacing", (0.2, 0.1))),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, ("ImagerPixelSpacing", (0.2, 0.1))),
        ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [3, 3]}, ("PixelSpacing", (0.2, 0.1))),
        ({"PixelSpacing": [0, 0.1], "ImagerPixelSpacing": [3, 3]}, ("ImagerPixelSpacing", (3, 3))),
        ({"PixelSpacing": "0.2"}, ("", None)),
        ({"PixelSpacing": ""}, ("", None)),
    ],
)
def test_the_spacing_in_the_patient_comes_before_that_at_the_detector(
    header: dict[str, Any], expected: tuple[str, Any]
) -> None:
    found = geometry_of(**header)
    assert (found.spacing, found.spacing_mm) == expected
    area = None if expected[1] is None else pytest.approx(50 * expected[1][0] * expected[1][1])
    assert found.area_mm2(50) == area


def test_a_damaged_spacing_or_orientation_costs_only_itself() -> None:
    content = dicom_bytes(GREYS, PixelSpacing=[0.25, 0.25], PatientOrientation=["R", "F"])
    damaged = content.replace(b"0.25\\0.25", b"0.25\\a.b5").replace(b"R\\F", b"\xff\\F")
    assert damaged != content
    radiograph = read_radiograph(damaged, "x")
    assert (radiograph.geometry.spacing, radiograph.geometry.left_edge) == ("", "")
    assert np.array_equal(radiograph.pixels, GREYS)


ALL = slice(None)


def square(rows: slice, columns: slice, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "sides"),  # with the patient's left on the right, left, bottom, top, and unknown
    [
        (square(ALL, slice(0, 10)), ("right", "left", "both", "both", "")),
        (square(ALL, slice(10, 20)), ("left", "right", "both", "both", "")),
        (square(slice(0, 10), ALL), ("both", "both", "right", "left", "")),
        (square(slice(0, 0), ALL), ("", "", "", "", "")),
        (square(slice(3, 4), slice(1, 11)), ("both", "both", "right", "left", "")),  # a tenth, of ten pixels
        (square(slice(3, 4), slice(0, 11)), ("right", "left", "right", "left", "")),  # less
        (square(ALL, slice(1, 2), (5, 3)), ("left", "right", "both", "both", "")),  # the middle column
    ],
)
def test_a_side_counts_from_a_tenth_of_the_area(mask: np.ndarray, sides: tuple[str, ...]) -> None:
    assert tuple(side_of(mask, edge) for edge in ("right", "left", "bottom", "top", "")) == sides
