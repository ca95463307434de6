"""One DICOM file to one 8-bit picture, or the reason why not."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing
from pydicom.uid import UID, RLELossless

from pneumo_experiments.errors import Rejected, UserError

JPEG_END = b"\xff\xd9"  # end of image (ITU-T T.81 B.1.1.3); JPEG-LS and JPEG 2000 end with it, too
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1, "": 1}  # units of an age string, PS3.5 6.2


@dataclass(frozen=True)
class Radiograph:
    """A picture with what its header tells; the raw PatientID stays in memory and out of messages."""

    image_id: str
    pixels: NDArray[np.uint8] = field(repr=False)  # (H, W), bright is dense
    patient: str = field(repr=False)
    view: str
    sex: str
    age: int  # years, -1 unknown


def find_dicom(folder: Path) -> list[Path]:
    """All .dcm files below a folder, sorted; an image's id is its file's stem."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that holds the .dcm files")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".dcm" and not _is_archive_junk(path.relative_to(folder)) and path.is_file()
    )
    if not files:
        raise UserError(f"{folder}: no .dcm files in it; name the folder that holds them")
    image_id, count = Counter(path.stem for path in files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder}: {count} files have the same image id, {image_id}.dcm; keep one of them")
    return files


def read_radiograph(source: Path | bytes, image_id: str) -> Radiograph:
    """A single grey picture as 8-bit greys (H, W); anything else is ``Rejected`` with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of an age '62', a bad date …: no matter here
        try:
            header = pydicom.dcmread(io.BytesIO(source) if isinstance(source, bytes) else source)
            reason = _unusable(header)
            if reason is None:
                return Radiograph(
                    image_id=image_id,
                    pixels=_greys(header),
                    patient=_text(header, "PatientID"),
                    view=_text(header, "ViewPosition").upper(),
                    sex=_text(header, "PatientSex").upper(),
                    age=_age_years(_text(header, "PatientAge")),
                )
        except InvalidDicomError:
            reason = "not a DICOM file"
        except Exception as error:  # damaged bytes make pydicom and the decoders raise nearly anything
            # Only the kind of error: its text may quote the header.
            reason = f"cannot be decoded: damaged, cut short or not supported ({type(error).__name__})"
    raise Rejected(f"{image_id}: {reason}")


def _is_archive_junk(path: Path) -> bool:
    return path.name.startswith("._") or "__MACOSX" in path.parts


def _unusable(header: Any) -> str | None:
    """Why a file is no single grey picture that can be decoded; None when it is."""
    if "PixelData" not in header:
        return "no pixel data: not an image, or cut short"
    if header.SamplesPerPixel != 1 or header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        return f"not a grey image ({header.PhotometricInterpretation})"
    if int(header.get("NumberOfFrames") or 1) != 1:
        return f"{header.NumberOfFrames} frames instead of one"
    if header.BitsStored > 16:
        return f"{header.BitsStored} bits per pixel instead of 16 or fewer"
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        if not _has_decoder(syntax):
            return f"transfer syntax {syntax.name} is not supported"
        # A decoder fills up a picture that ends early with grey, and says nothing.
        if syntax != RLELossless and JPEG_END not in get_frame(header.PixelData, 0, number_of_frames=1)[-16:]:
            return "its picture is cut short"
    return None


def _has_decoder(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _greys(header: Any) -> NDArray[np.uint8]:
    stored: NDArray[Any] = header.pixel_array
    if stored.ndim != 2:
        raise ValueError("not a picture of rows and columns")
    # 8 bits are taken as they are, whatever window the header suggests.
    greys = stored if stored.dtype == np.uint8 and header.BitsStored == 8 else _to_8_bits(stored, header)
    return 255 - greys if header.PhotometricInterpretation == "MONOCHROME1" else greys


def _to_8_bits(stored: NDArray[Any], header: Any) -> NDArray[np.uint8]:
    """Stored values (H, W) through modality LUT and VOI LUT or window, scaled to 0-255.

    The ends of the scale are those of the window or LUT; without either, those of the picture.
    Works on the table of all values that the stored bits can hold (DICOM PS3.3 C.11.1 and C.11.2).
    """
    bits = int(header.BitsStored)
    levels = np.arange(2**bits)
    if header.PixelRepresentation == 1:
        levels[2 ** (bits - 1) :] -= 2**bits  # two's complement
    index = stored.astype(np.int64) & (2**bits - 1)
    values: NDArray[Any] = apply_modality_lut(levels, header)
    if header.get("VOILUTSequence"):
        values = apply_voi(np.rint(values).astype(np.int64), header)
        low, high = values.min(), values.max()
    elif header.get("WindowWidth") is not None and header.get("WindowCenter") is not None:
        values = apply_windowing(values, header)
        low, high = apply_windowing(np.array([-1e30, 1e30]), header)
    else:
        low, high = values[index].min(), values[index].max()
    if low == high:
        return np.zeros(stored.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) / (float(high) - float(low)) * 255
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)[index]


def _text(header: Any, keyword: str) -> str:
    return str(header.get(keyword) or "").replace("\0", "").strip()


def _age_years(text: str) -> int:
    """Whole years of a DICOM age string ('062Y', '018M') or plain number ('62'); -1 for anything else."""
    age = re.fullmatch(r"(\d{1,3})([DWMY]?)", text.upper())
    return int(int(age[1]) * YEARS[age[2]]) if age else -1
