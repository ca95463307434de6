"""What a DICOM object about a radiograph repeats of its header: patient, study, series and image."""

from __future__ import annotations

import warnings
from typing import Any

from pneumo_experiments.dicom.header import parse, unpacked
from pneumo_experiments.dicom.picture import is_picture

ATTRIBUTES = (
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality"),
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
    *("PatientOrientation", "LossyImageCompression", "LossyImageCompressionMethod"),
)
MAX_LENGTH = 1024  # characters; the standard allows fewer for each


def read_source(content: bytes, max_pixels: int) -> dict[str, str]:
    """The texts of ``ATTRIBUTES``, with backslashes between values, of a file that has been decoded.

    Absent, damaged and overlong ones are left out; a picture that is not DICOM has none. They name the
    patient: never print or log them.
    """
    if is_picture(unpacked(content, max_pixels)):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about values that the standard does not allow
        header, _ = parse(content, max_pixels)
        texts = {keyword: _text(header, keyword) for keyword in ATTRIBUTES}
    return {keyword: text for keyword, text in texts.items() if 0 < len(text) <= MAX_LENGTH}


def _text(header: Any, keyword: str) -> str:
    try:
        value = header.get(keyword)
        values = (
            [] if value is None else [value] if isinstance(value, str) or not _is_several(value) else value
        )
        return "\\".join(str(each).replace("\0", "").strip() for each in values)
    except MemoryError:
        raise
    except Exception:  # pydicom raises many types for damaged bytes
        return ""


def _is_several(value: Any) -> bool:
    return hasattr(value, "append")  # pydicom's MultiValue; a name has components, but is one value
