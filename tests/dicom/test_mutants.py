"""Damaged files by the hundred, read in a process of their own: a crash there fails the test here."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from dicom_files import LOSSLESS, RAMP, lossless_file
from helpers import IS_SOAK, ROOT
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from pneumo_experiments.dicom.codecs import DECODERS, UNCOMPRESSED
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
MUTANTS_PER_SOURCE = 50 if IS_SOAK else 24
MAX_CPU_SECONDS = 3  # a bomb takes minutes
MEMORY_BYTES = 4 * 2**30
SOURCES = [
    *("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"),
    *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_08.dcm"),
    *("JPEG-lossy.dcm", "image_dfl.dcm"),
]
SYNTAXES = [*UNCOMPRESSED, *DECODERS, uid.MPEG2MPML, "1.2.3", "DOE^JANE", ""]
NUMBERS = {
    "Rows": (0, 1, 7, 63, 65, 65535),
    "Columns": (0, 1, 7, 63, 65, 65535),
    "BitsAllocated": (0, 1, 8, 12, 16, 32, 64),
    "BitsStored": (0, 1, 7, 8, 9, 12, 15, 16, 17, 65535),
    "HighBit": (0, 7, 8, 15, 16, 65535),
    "PixelRepresentation": (0, 1, 2, 65535),
    "SamplesPerPixel": (0, 1, 3, 65535),
    "NumberOfFrames": ("0", "1", "2", "-1", "2147483647"),
    "RescaleSlope": ("0", "-1", "1e308", "1e-308"),
    "WindowWidth": ("0", "-1", "1", "1e308"),
    "PixelPaddingValue": (0, 1, 32767),
}


def sources() -> dict[str, bytes]:
    """Whole files of every kind, one of them a phantom of 1024 x 1024 pixels."""
    files = {name: (TEST_FILES / name).read_bytes() for name in SOURCES}
    write_sample(Path(sys.argv[1]) / "sample", Contents(1, 0, 0))
    (radiograph,) = Path(sys.argv[1]).rglob("*.dcm")
    files["phantom"] = radiograph.read_bytes()
    for syntax in (uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless):
        files[f"12 bit {LOSSLESS[syntax][0]}"] = lossless_file(RAMP, 12, syntax, PatientName="DOE^JANE")
    return files


def with_bytes_flipped(content: bytes, rng: np.random.Generator) -> bytes:
    end = len(content) if rng.random() < 0.5 else min(2000, len(content))  # half of them in the header
    damaged = bytearray(content)
    for place in rng.integers(128, end, rng.integers(1, 9)):
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def with_a_hole(content: bytes, rng: np.random.Generator) -> bytes:
    start = rng.integers(132, len(content))
    return content[:start] + content[start + rng.integers(1, 300) :]


def with_another_syntax(content: bytes, rng: np.random.Generator) -> bytes:
    element = content.index(b"\2\0\x10\0UI")
    length = int.from_bytes(content[element + 6 : element + 8], "little")
    name = str(SYNTAXES[rng.integers(len(SYNTAXES))]).encode()
    name += bytes(len(name) % 2)
    return content[: element + 6] + len(name).to_bytes(2, "little") + name + content[element + 8 + length :]


def edited(edit: Callable[[Dataset, np.random.Generator], None]) -> Callable[..., bytes]:
    def mutate(content: bytes, rng: np.random.Generator) -> bytes:
        header, file = pydicom.dcmread(io.BytesIO(content)), io.BytesIO()
        edit(header, rng)
        header.save_as(file)
        return file.getvalue()

    return mutate


def drop(header: Dataset, rng: np.random.Generator) -> None:
    tags = [tag for tag in header if tag.tag.group == 0x28 or tag.keyword in ("PixelData", "PatientID")]
    del header[tags[rng.integers(len(tags))].tag]


def change(header: Dataset, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        keyword = list(NUMBERS)[rng.integers(len(NUMBERS))]
        value = NUMBERS[keyword][rng.integers(len(NUMBERS[keyword]))]
        kind = "US" if isinstance(value, int) else "IS" if keyword == "NumberOfFrames" else "DS"
        header[keyword] = DataElement(keyword, kind, value)


MUTATIONS = (
    *(with_bytes_flipped, with_bytes_flipped, cut, with_a_hole, with_another_syntax),
    *(edited(drop), edited(change), edited(change)),
)


def cases() -> Iterator[tuple[str, bytes]]:
    for path in sorted(filter(Path.is_file, TEST_FILES.rglob("*"))):
        yield str(path.relative_to(TEST_FILES)), path.read_bytes()
    for number, (name, content) in enumerate(sources().items()):
        yield name, content
        for k in range(MUTANTS_PER_SOURCE):
            mutate = MUTATIONS[k % len(MUTATIONS)]
            rng = np.random.default_rng([number, k])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mutant = mutate(content, rng)
            yield f"{name}, mutant {k}", mutant


def decode_all() -> None:
    """Read every case under a limit of memory; a line with each name before, and with its outcome after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for name, content in cases():
        print(name, end="\t", flush=True)
        start = time.process_time()
        try:
            radiograph = read_radiograph(content, "x")
        except Rejected as error:
            outcome = str(error).removeprefix("x: ")
            assert outcome
            assert "\n" not in outcome
            assert not any(secret in outcome.upper() for secret in ("DOE", "JANE", "COMPRESSEDSAMPLES"))
        else:
            outcome = "used"
            assert (radiograph.pixels.dtype, radiograph.pixels.ndim) == (np.uint8, 2)
            assert radiograph.pixels.size
        assert time.process_time() - start < MAX_CPU_SECONDS
        print(outcome, flush=True)


def test_files_damaged_in_any_way_are_used_or_rejected_and_nothing_breaks(tmp_path: Path) -> None:
    call = "import sys; sys.path[:0] = ['.', 'tests', 'tests/dicom']\n"
    call += "import test_mutants; test_mutants.decode_all()"
    command = [sys.executable, "-c", call, tmp_path]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"{lines[-1:]}: {child.stderr[-2000:]}"
    assert child.stderr == ""
    outcomes = dict(line.split("\t") for line in lines)
    counts = Counter(outcomes.values())
    assert sum(", mutant " in name for name in outcomes) == MUTANTS_PER_SOURCE * (len(SOURCES) + 4)
    assert min(counts["used"], counts["its pixel data is truncated"]) > MUTANTS_PER_SOURCE
    vague = sum(count for reason, count in counts.items() if reason.startswith("cannot be decoded"))
    assert vague < 0.05 * len(outcomes)  # most reasons say what is wrong
