"""Writes the example request's radiograph: synthetic, 256 pixels, some kilobytes.

python tools/serving_example.py pneumo_experiments/serving/example.dcm
"""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package is used from its folder, not installed

from pneumo_experiments.dataset.resize import resize_image  # noqa: E402
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample  # noqa: E402

SIDE_PX = 256


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder) / "sample", Contents(1, 1, 0))
        (file,) = (Path(folder) / "sample" / "dicom-images-test").rglob("*.dcm")
        radiograph = dcmread(file)
    small = resize_image(np.ascontiguousarray(radiograph.pixel_array), SIDE_PX)
    jpeg = BytesIO()
    Image.fromarray(small).save(jpeg, "JPEG", quality=80)
    radiograph.Rows = radiograph.Columns = SIDE_PX
    radiograph.PixelSpacing = [spacing * 1024 / SIDE_PX for spacing in radiograph.PixelSpacing]
    radiograph.PixelData = encapsulate([jpeg.getvalue() + bytes(len(jpeg.getvalue()) % 2)])
    radiograph.save_as(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
