"""A model as an ONNX file: written, and compared with the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import __version__
from pneumo_experiments.dataset.resize import resize_image
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically, writing
from pneumo_experiments.learning.onnx_export import (
    MEANINGS,
    PRODUCER,
    Difference,
    difference,
    in_fp32,
    is_own_file,
    require_onnx,
    write_onnx,
)
from pneumo_experiments.serving import Detector
from pneumo_experiments.synthetic import anatomy
from pneumo_experiments.synthetic.radiographs import draw_radiograph

LIMIT = 1e-3  # largest difference of a probability between the file and the model in fp32


@dataclass(frozen=True)
class OnnxFile:
    """A written file, and how far its probabilities are from the model's."""

    size_mb: float
    from_fp32: Difference
    from_own_format: Difference | None
    """of a model that was not trained in fp32: its thresholds were chosen on predictions in its own format"""


def check_onnx(path: Path) -> None:
    """Raises UserError if a library is missing, or ``path`` holds anything but an earlier export."""
    require_onnx()
    with writing(f"onnx_file={path}"):
        if path.exists() and not (path.is_file() and is_own_file(path)):
            raise UserError(f"onnx_file={path}: exists, and export did not write it; name another file")


def export_onnx(path: Path, detector: Detector) -> OnnxFile:
    """Writes the detector's networks to an ONNX file, and compares both.

    Raises UserError, and leaves ``path`` as it was, when a probability differs by more than ``LIMIT``.
    """
    ensemble, batches = detector.predictor, check_batches(detector.image_size)
    with writing(f"onnx_file={path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            write_onnx(temporary, ensemble, detector.image_size, _facts(detector))
            from_fp32, own = difference(temporary, in_fp32(ensemble), batches), None
            if not from_fp32.is_within(LIMIT):
                raise UserError(
                    f"onnx_file={path}: not written: its probabilities differ from the model's by up to"
                    f" {from_fp32}, more than {LIMIT}; use other versions of the packages of the extra onnx"
                )
            if detector.precisions != "fp32":
                own = difference(temporary, ensemble, batches)
            check_onnx(path)  # again: the export takes a while
        return OnnxFile(path.stat().st_size / 1e6, from_fp32, own)


def check_batches(image_size: int) -> list[NDArray[np.uint8]]:
    """Batches of 3, 1 and 1 images (n, S, S): noise, a gradient, black, and synthetic radiographs."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (image_size, image_size), np.uint8)
    gradient = np.linspace(0, 255, image_size**2).astype(np.uint8).reshape(image_size, image_size)
    sick, healthy = (
        resize_image(draw_radiograph(rng, anatomy.build(rng, sex), view, annotations).pixels, image_size)
        for sex, view, annotations in (("M", "PA", 1), ("F", "AP", 0))
    )
    return [np.stack([noise, gradient, sick]), np.zeros_like(noise)[None], healthy[None]]


def _facts(detector: Detector) -> dict[str, str]:
    """What one needs to use the file alone, as text."""
    return {
        "package": f"{PRODUCER} {__version__}",
        "image_size": str(detector.image_size),
        **{name: str(value) for name, value in asdict(detector.thresholds).items()},
        **({"min_area_of": str(side)} if (side := detector.thresholds.min_area_of) else {}),
        "data_fingerprint": detector.data_fingerprint,
        "networks": ",".join(str(member.settings["network"]) for member in detector.members),
        "tta": ",".join(member.predictor.tta for member in detector.members),
        **MEANINGS,
    }
