"""Writes a mask as a DICOM Segmentation object that refers to its radiograph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, config, valuerep
from pydicom.datadict import dictionary_VR
from pydicom.uid import UID, generate_uid

from pneumo_experiments import __version__
from pneumo_experiments.dicom.header import ATTRIBUTES
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.files import write_atomically

NAME = "pneumo_experiments"
SERIES_NUMBER = 100  # far from those of the acquisition
REFERENCES = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
NAMES = ("PatientName", "ReferringPhysicianName")
IDENTITY = ("PatientID", "PatientName")
SEXES = ("F", "M", "O", "")
MAX_PARAMETER_LENGTH = 200  # of a name or value


@dataclass(frozen=True)
class Segment:
    """A mask (H, W), not empty, with the header of its radiograph as ``read_source`` gives it."""

    image_id: str
    mask: NDArray[np.bool_]
    source: Mapping[str, str]


def require_highdicom() -> None:
    """Raises UserError if the library that writes Segmentation objects is not installed."""
    if find_spec("highdicom") is None:
        raise UserError("dicom_seg=true: needs highdicom; pip install 'pneumo-experiments[seg]'")


def write_segmentation(path: Path, segment: Segment, parameters: Mapping[str, str]) -> None:
    """Writes the object; ``parameters`` say with which settings the algorithm found the mask.

    It lies in the image plane of its radiograph, pixel on pixel: a projection has no frame of reference. It
    has no pixel spacing of its own either: GDCM and ITK refuse one in an object without a place in space.
    Raises Rejected if the radiograph's header lacks what the object must refer to, OSError as writing does.
    """
    source = _dataset(segment)
    try:
        written = _build(segment.mask, source, parameters)
    except MemoryError:
        raise
    except Exception as error:  # for a value that only highdicom refuses; its text may quote the header
        raise Rejected(
            f"no DICOM Segmentation: highdicom refuses the file's header ({type(error).__name__})",
            segment.image_id,
        ) from None
    with write_atomically(path) as temporary:
        written.save_as(temporary, enforce_file_format=True)


def _build(mask: NDArray[np.bool_], source: Dataset, parameters: Mapping[str, str]) -> Any:
    hd: Any = import_module("highdicom")  # takes half a second
    kept = {keyword: source[keyword].value for keyword in (*NAMES, "PatientOrientation")}
    for keyword in NAMES:  # highdicom would print a name without family and given part
        setattr(source, keyword, "")
    coded = hd.sr.CodedConcept
    algorithm = hd.AlgorithmIdentificationSequence(
        name=NAME,
        family=coded("123110", "DCM", "Artificial Intelligence"),
        version=__version__,
        parameters={name: value[:MAX_PARAMETER_LENGTH] for name, value in parameters.items()},
    )
    description = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Pneumothorax",
        segmented_property_category=coded("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=coded("36118008", "SCT", "Pneumothorax"),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )
    written: Any = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=mask,
        segmentation_type="BINARY",
        segment_descriptions=[description],
        series_instance_uid=generate_uid(prefix=None),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=NAME,
        software_versions=__version__,
        device_serial_number=__version__,
        content_label="PNEUMOTHORAX",
        content_description="Pneumothorax, outlined by an algorithm",
        series_description="Pneumothorax segmentation",
        specific_character_set="ISO_IR 192",
    )
    for keyword, value in kept.items():  # highdicom leaves the last out, which a projection must have
        setattr(written, keyword, value)
    return written


def _dataset(segment: Segment) -> Dataset:
    """The header of the radiograph, with valid values only."""
    source, (rows, columns) = segment.source, segment.mask.shape
    for keyword in REFERENCES:
        value = source.get(keyword, "")
        if not UID(value, validation_mode=config.IGNORE).is_valid:
            problem = "is not valid" if value else "is missing"
            raise Rejected(f"no DICOM Segmentation: the file's {keyword} {problem}", segment.image_id)
    dataset = Dataset()
    for keyword in ATTRIBUTES:
        vr, value = dictionary_VR(keyword), source.get(keyword, "")
        values = value.split("\\")
        if any(not _is_valid(vr, each) for each in values) or (
            keyword == "PatientSex" and value not in SEXES
        ):
            if keyword in IDENTITY:  # another patient's object is worse than none
                reason = f"no DICOM Segmentation: the file's {keyword} is not valid"
                raise Rejected(reason, segment.image_id)
            value = ""
        setattr(dataset, keyword, value.split("\\") if "\\" in value else value)
    if not dataset.LossyImageCompression:
        del dataset.LossyImageCompression, dataset.LossyImageCompressionMethod
    dataset.Rows, dataset.Columns = rows, columns
    return dataset


def _is_valid(vr: str, value: str) -> bool:
    try:
        cast("Any", valuerep).validate_value(vr, value, config.RAISE)
    except ValueError:
        return False
    return value.isprintable()
