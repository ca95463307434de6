"""Writes the table of the contest's patients that ships with the package.

python tools/siim_patients.py TABLE            TABLE is patients.csv(.gz) with the columns Kaggle_ID,NIH_ID
python tools/siim_patients.py TABLE OUTPUT     another place than the package

The patients are numbered from 1 in the order of the hashed image ids, so that nothing of their NIH numbers is
left. See pneumo_experiments/dataset/patients.py for the format.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package is used from its folder, not installed

from pneumo_experiments.dataset.annotations import read_patients
from pneumo_experiments.dataset.patients import ROW, SHIPPED, image_number
from pneumo_experiments.errors import UserError


def packed(patients: Mapping[str, str]) -> bytes:
    """The rows of the table; UserError where two images have one hash."""
    images = sorted((image_number(image_id), patient) for image_id, patient in patients.items())
    if len({image for image, _ in images}) < len(images):
        raise UserError("two image ids have the same 64 bits of SHA-256: take more of them")
    numbers: dict[str, int] = {}
    rows = [(image, numbers.setdefault(patient, len(numbers) + 1)) for image, patient in images]
    return np.array(rows, ROW).tobytes()


def main() -> None:
    """Reads the table, writes the rows and says how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=SHIPPED)
    given = parser.parse_args()
    patients = read_patients(given.table)
    content = packed(patients)
    given.output.write_bytes(content)
    count = len(set(patients.values()))
    print(f"{len(patients):,} images of {count:,} patients, {len(content):,} bytes: {given.output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
