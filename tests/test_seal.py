"""Data set files that are damaged, or made to do harm: refused in one line, or read as they were written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ROOT
from isal import isal_zlib
from samples import SIZE, content_of, write

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.seal import append_seal, read_seal
from pneumo_experiments.errors import UserError

ATTACKS = int(os.environ.get("PNEUMO_DAMAGED_FILES") or 300)


def told_by(path: Path) -> list[Any]:
    """Everything that a data set tells."""
    with Dataset.open(path) as dataset:
        return [*content_of(path), [dataset.mask(row).tolist() for row in range(len(dataset))]]


def refusal(path: Path) -> str:
    """The one line that ends the reading of a file; empty where it is read to its end."""
    try:
        told_by(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable()  # so it is one line
        return str(error)
    return ""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, a range zeroed, copied or cut out, or the end lost."""
    changed = bytearray(content)
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 600))
    match rng.integers(5):
        case 0:
            for place in rng.integers(0, len(content), rng.integers(1, 9)).tolist():
                changed[place] ^= int(rng.integers(1, 256))
        case 1:
            changed[start : start + length] = bytes(min(length, len(content) - start))
        case 2:
            other = int(rng.integers(len(content) - length))
            changed[other : other + length] = changed[start : start + length]
        case 3:
            del changed[start : start + length]
        case _:
            del changed[start:]
    return bytes(changed)


def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "whole.h5", 12)
    content, true = (tmp_path / "whole.h5").read_bytes(), told_by(tmp_path / "whole.h5")
    rng, refused = np.random.default_rng(0), 0
    for number in range(ATTACKS):
        path = tmp_path / "d.h5"
        path.write_bytes(damaged(content, rng))
        if refusal(path):
            refused += 1
        else:
            assert told_by(path) == true, f"file {number} was changed and read"
    print(f"{ATTACKS} damaged files: {refused} refused, {ATTACKS - refused} read as they were written")
    # The rest hit nothing but the structure of HDF5, by which we do not read.
    assert refused > ATTACKS / 4


# What HDF5 can do besides: each leads to another file, or takes the library to its limits.


def soft_link(file: Any, secret: Path) -> None:
    del file["images_0"]
    file["images_0"] = h5py.SoftLink("/ann_0")


def external_link(file: Any, secret: Path) -> None:
    del file["images_0"]
    file["images_0"] = h5py.ExternalLink(secret, "images_0")


def external_storage(file: Any, secret: Path) -> None:
    del file["images_0"]
    size = 12 * SIZE * SIZE
    file.create_dataset("images_0", (12, SIZE, SIZE), "uint8", external=[(str(secret), 0, size)])


def virtual(file: Any, secret: Path) -> None:
    del file["images_0"]
    layout = h5py.VirtualLayout((12, SIZE, SIZE), "float32")
    layout[:] = h5py.VirtualSource(secret, "images_0", (12, SIZE, SIZE))
    file.create_virtual_dataset("images_0", layout)


def huge(file: Any, secret: Path) -> None:
    del file["images_0"]
    file.create_dataset("images_0", (2**40, 2**11, 2**11), "float32", chunks=(1, 2**11, 2**11))


def one_enormous_chunk(file: Any, secret: Path) -> None:
    del file["ann_0"]
    file.create_dataset("ann_0", (12, 2**14, 2**14), "uint8", chunks=(12, 2**14, 2**14), fillvalue=1)


def other_types(file: Any, secret: Path) -> None:
    for name in ("images_0", "index", "rle"):
        del file[name]
        file[name] = [b"text"]
    for name in ("image_size", "labelled", "settings", "fingerprint"):
        file.attrs[name] = np.zeros((3, 3))


def endless_groups(file: Any, secret: Path) -> None:
    del file["images_0"]
    group = file.create_group("images_0")
    group["images_0"] = group


STRUCTURES = [
    soft_link,
    external_link,
    external_storage,
    virtual,
    huge,
    one_enormous_chunk,
    other_types,
    endless_groups,
]


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_another_hdf5_structure_is_refused_and_under_the_right_seal_never_looked_at(
    tmp_path: Path, change: Callable[[Any, Path], None]
) -> None:
    secret, path = tmp_path / "secret", tmp_path / "d.h5"
    write(secret, 12, seed=1)
    write(path, 12)
    true = told_by(path)
    with path.open("rb") as file:
        sealed = read_seal(path, file)
    with h5py.File(path, "a") as file:
        change(file, secret)
    assert "changed by another program" in refusal(path)
    # A hostile hand can seal it. The seal tells where pictures lie within this file: nothing else is read.
    append_seal(path, *sealed)
    reason = refusal(path)
    assert "damaged at" in reason or told_by(path) == true  # HDF5 may have used a removed picture's room


# Seals that fit their own checksum and were made to do harm.

READER = """
import resource, sys
from pathlib import Path
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for name in sys.argv[1:]:
    try:
        with Dataset.open(Path(name)) as dataset:
            for row in range(len(dataset)):
                dataset.images([row, row]), dataset.targets([row, row]), dataset.mask(row)
        print("read")
    except UserError as error:
        print(error)
"""
HEADER = {
    "image_size": SIZE,
    "pixel_dtype": "uint8",
    "labelled": True,
    "settings": {"rle_csv": "x"},
    "fingerprint": "0" * 64,
}
ENTRY: list[Any] = ["image", "patient", "PA", "F", 50, 40, 30, 1, 6]
DEEP = b"[" * 500_000
NOT_MADE = "not written by this project"


def sealed(path: Path, lines: list[bytes], chunks: list[bytes], tail: bytes = b"") -> None:
    """A file of these chunks, which lie from byte 8 on, under these lines."""
    content = b"".join(lines)
    digest = hashlib.sha256(content).hexdigest().encode()
    tail = tail or b"%s %016d pneumo_experiments seal 0001\n" % (digest, len(content))
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"".join(chunks) + content + tail)


def hostile_seals(folder: Path) -> dict[Path, str]:
    """Files and what is said of each."""
    chunk = isal_zlib.compress(bytes(SIZE * SIZE), 1)
    bomb = isal_zlib.compress(bytes(10**5), 1)
    place = [8, len(chunk), isal_zlib.crc32(chunk)]
    expected: dict[Path, str] = {}

    def add(reason: str, lines: list[bytes], chunk: bytes = chunk, tail: bytes = b"") -> None:
        path = folder / f"{len(expected):02}.h5"
        sealed(path, lines, [chunk], tail)
        expected[path] = reason

    def row(*values: Any, runs: bytes = b"3 6\n") -> bytes:
        return json.dumps(values).encode() + b"\n" + runs

    header, good = json.dumps(HEADER).encode() + b"\n", row(*ENTRY, place, place)
    add("read", [header, good])
    for name, values in {
        "image_size": [2**40, 2**14, 0, -SIZE, str(SIZE), True, 16.0, None],
        "pixel_dtype": ["object", "float64", ["uint8"], None],
        "labelled": [1, "yes", None],
        "settings": [[], None, {"a": 1}, {"a": {}}, {"a": "\ud800"}, {"a": "x" * 2**21}],
        "fingerprint": [None, 0, "\udfff"],
        "another": [0],
    }.items():
        for value in values:
            add(NOT_MADE, [json.dumps(HEADER | {name: value}).encode() + b"\n", good])
    for head in (b"{}\n", b"[]\n", b"7\n", b"\n", b"\xff\n", DEEP + b"\n", b"9" * 500_000 + b"\n"):
        add(NOT_MADE, [head, good])
    values = {0: [5, "\ud800"], 1: [None], 2: [[]], 4: ["50", 10**400], 5: [0, 10**9], 6: [-1, 1.5]}
    values |= {7: [True, -1, 2**40], 8: [-1, 1201]}
    for at, value in ((at, value) for at, some in values.items() for value in some):
        add(NOT_MADE, [header, row(*ENTRY[:at], value, *ENTRY[at + 1 :], place, place)])
    for other in ([], [1], [1, 2, 3, 4], "abc", 7, {}, [8, 2**40, 0], [2**40, 8, 0], [-8, 8, 0], [8, -1, 0]):
        add(NOT_MADE, [header, row(*ENTRY, place, other)])
    add(NOT_MADE, [header, row(*ENTRY, [8, True, 0], place)])
    for places in ([], [place], [place] * 3):
        add(NOT_MADE, [header, row(*ENTRY, *places)])
    for line in (
        b"",
        b"\n",
        DEEP + b"\n",
        b"{}\n",
        good[:-4],
        good + b"[",
        row(*ENTRY, place, place, runs=b"3 6"),
    ):
        add(NOT_MADE, [header, line])
    for runs in (b"x\n", b"\n", b"3\n", b"3 -6\n", b"3 99999999999999999\n", b"1200 1\n"):
        add("image: ", [header, row(*ENTRY, place, place, runs=runs)])
    for other in (b"", chunk[:-1], chunk[2:], bomb, isal_zlib.compress(bytes(255))):
        lies = [8, len(other), isal_zlib.crc32(other)]
        add("damaged at images_0, row 0", [header, row(*ENTRY, lies, place)], other + chunk)
    add("damaged at ann_0, row 0", [header, row(*ENTRY, place, [*place[:2], 0])])
    for length in (0, 1, 10**15, 10**16 - 1):
        add("damaged", [header, good], tail=b"%064d %016d pneumo_experiments seal 0001\n" % (0, length))
    return expected


def test_a_hostile_seal_is_refused_in_one_line_and_little_memory(tmp_path: Path) -> None:
    expected = hostile_seals(tmp_path)
    assert len(expected) > 70
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, expected)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for line, (path, reason) in zip(done.stdout.splitlines(), expected.items(), strict=True):
        assert reason in line, path
