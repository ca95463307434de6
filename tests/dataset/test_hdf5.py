from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from samples import SIZE, content_of, examples, packed, write, write_dataset

from pneumo_experiments.dataset.hdf5 import Dataset, DatasetWriter
from pneumo_experiments.dataset.packed_image import ResizedImage, hash_patient
from pneumo_experiments.errors import UserError

ATTACKS = int(os.environ.get("PNEUMO_DAMAGED_FILES") or 100)


DTYPES = ["float32", "float16", "uint8"]


def store(path: Path, images: Iterable[ResizedImage], dtype: str = "uint8", labelled: bool = True) -> str:
    """Writes these images; returns the fingerprint."""
    made = packed(images, dtype, labelled)
    return write_dataset(path, made, image_size=SIZE, pixel_dtype=dtype, labelled=labelled)


@pytest.mark.parametrize("pixel_dtype", DTYPES)
def test_every_pixel_type_reads_back_the_same_images_targets_and_masks(
    tmp_path: Path, pixel_dtype: str
) -> None:
    every_grey = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE)
    written = list(examples(7))
    written[4] = replace(written[4], image=every_grey, target=(every_grey / 255).astype(np.float32))
    fingerprint = store(tmp_path / "d.h5", written, pixel_dtype)
    order = np.array([6, 0, 4, 3, 3, -1])
    images = np.array([written[i].image for i in order])
    targets = np.rint([255 * written[i].target for i in order])
    with h5py.File(tmp_path / "d.h5") as file:
        for name, expected in (("images_0", images), ("ann_0", targets)):
            stored = file[name][()][order]
            assert stored.dtype == pixel_dtype
            if pixel_dtype == "uint8":
                assert file[name].attrs["scale"] == 1 / 255
            else:
                stored = np.rint(stored.astype(np.float32) * 255)
            assert np.array_equal(stored, expected)
    with Dataset.open(tmp_path / "d.h5") as dataset:
        assert dataset.entries == [example.entry for example in written]
        assert (dataset.image_size, dataset.labelled, dataset.fingerprint) == (SIZE, True, fingerprint)
        assert np.array_equal(dataset.images(order), images)
        assert dataset.targets(order).dtype == dataset.images(order).dtype == np.uint8
        assert np.array_equal(dataset.targets(order), targets)
        for index, example in enumerate(written):
            assert dataset.rle(index) == example.rle
            assert dataset.mask(index).shape == (40, 30)
            assert np.count_nonzero(dataset.mask(index)) == example.entry.area_px
        with pytest.raises(IndexError):
            dataset.images([7])


def test_plain_h5py_finds_the_promised_layout(tmp_path: Path) -> None:
    fingerprint = write(tmp_path / "d.h5", 515)
    written = list(examples(515))
    with h5py.File(tmp_path / "d.h5") as file:
        assert set(file) == {"images_0", "images_1", "ann_0", "ann_1", "index", "rle"}
        index, text = file["index"], file["rle"]
        for kind in ("images", "ann"):
            first, last = file[f"{kind}_0"], file[f"{kind}_1"]
            assert (first.shape, last.shape) == ((512, SIZE, SIZE), (3, SIZE, SIZE))
            assert (last.chunks, last.dtype) == ((1, SIZE, SIZE), np.float32)
            assert (last.compression, last.shuffle) == ("gzip", False)
            for row in (0, 2):
                chunk = last.id.read_direct_chunk((row, 0, 0))[1]
                assert index[f"{kind}_crc"][512 + row] == zlib.crc32(chunk)
        assert np.array_equal(file["images_1"][1], written[513].image.astype(np.float32) / np.float32(255))
        assert np.array_equal(file["ann_1"][1], written[513].target)
        assert index.dtype.names == (
            *("image_id", "patient", "view", "sex", "age", "rows", "columns", "annotations", "area_px"),
            *("images_crc", "ann_crc", "rle_crc"),
        )
        assert (index["image_id"][513], index["area_px"][513]) == (b"image-513", written[513].entry.area_px)
        assert text.asstr()[513] == written[513].rle
        assert index["rle_crc"][513] == zlib.crc32(text.id.read_direct_chunk((513,))[1])
        assert (file.attrs["format"], file.attrs["image_size"]) == (b"pneumo_experiments", SIZE)
        assert json.loads(file.attrs["settings"]) == {"rle_csv": "train-rle.csv"}
        assert file.attrs["fingerprint"].decode() == fingerprint
    with Dataset.open(tmp_path / "d.h5") as dataset:
        assert (len(dataset), dataset.settings) == (515, {"rle_csv": "train-rle.csv"})
        across = dataset.images([514, 511, 512, 0])
        assert np.array_equal(across, [written[i].image for i in (514, 511, 512, 0)])


def test_a_set_without_labels_has_no_annotations_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "d.h5", 3, labelled=False)
    with h5py.File(tmp_path / "d.h5") as file:
        assert set(file) == {"images_0", "index"}
    with Dataset.open(tmp_path / "d.h5") as dataset:
        assert not dataset.labelled
        assert dataset.images([2]).shape == (1, SIZE, SIZE)
        for ask in (lambda: dataset.targets([0]), lambda: dataset.rle(0), lambda: dataset.mask(0)):
            with pytest.raises(UserError, match=r"d\.h5: has no annotations; run preprocess with rle_csv"):
                ask()


def test_the_fingerprint_is_that_of_the_content_and_pixel_format(tmp_path: Path) -> None:
    path, same = tmp_path / "d.h5", list(examples(3))
    first, second, third = same
    brighter, shifted = first.image.copy(), second.target.copy()
    brighter[0, 0] ^= 1
    shifted[0, 0] += 0.01
    older = replace(third.entry, age=99)
    found = [
        store(path, same, "float32"),
        store(path, same),
        store(path, same, "float32", labelled=False),
        store(path, [second, first, third], "float32"),
        store(path, [replace(first, image=brighter), second, third], "float32"),
        store(path, [first, replace(second, target=shifted), third], "float32"),
        store(path, [first, second, replace(third, entry=older)], "float32"),
        store(path, [first, replace(second, rle="0 1"), third], "float32"),
        store(path, same[:2], "float32"),
    ]
    assert len(set(found)) == len(found)
    assert all(len(digest) == 64 for digest in found)
    assert write(tmp_path / "again.h5", 3) == found[0]  # with other settings


def test_a_write_that_is_interrupted_or_not_finished_leaves_the_old_file_and_no_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "d.h5"
    (tmp_path / "d.h5.part").write_text("mine")  # a file of the user's, named like an unfinished one
    old = write(path, 2)

    def broken() -> Iterator[ResizedImage]:
        yield from examples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(path, broken())
    with (
        pytest.raises(RuntimeError, match="without finish"),
        DatasetWriter.create(path, image_size=SIZE, pixel_dtype="uint8", labelled=True) as writer,
    ):
        writer.append(next(packed(examples(1), "uint8")))
    assert {path.name for path in tmp_path.iterdir()} == {"d.h5", "d.h5.part"}
    assert (tmp_path / "d.h5.part").read_text() == "mine"
    with Dataset.open(path) as dataset:
        assert dataset.fingerprint == old


def test_nothing_is_written_of_no_images_or_in_a_place_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d\.h5: no images to write"):
        store(tmp_path / "new" / "d.h5", [])
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "d.h5")


def changed(**attributes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        with h5py.File(path, "a") as file:
            file.attrs.update(attributes)

    return change


def cut(part: float) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, int(part * path.stat().st_size))


def of_another_program(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["images_0"] = np.zeros((1, 4, 4))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (Path.unlink, "no such data set"),
        (lambda path: path.unlink() or path.mkdir(), "no such data set"),
        (lambda path: path.write_text("ImageId,EncodedPixels\n"), "not an HDF5 file"),
        (of_another_program, "not a data set of pneumo_experiments"),
        (changed(image_size=2 * SIZE), "changed by another program"),
        *((cut(part), "truncated") for part in (0.3, 0.9, 0.999)),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"image-3", b"image-4")), "damaged"),
        # Of variable length, as version 1 wrote it.
        (changed(format="pneumo_experiments", format_version=1), "format version 1 instead of 2; delete it"),
        (changed(format_version=3), "format version 3 instead of 2; delete it and run preprocess again"),
    ],
)
def test_a_file_that_is_not_ours_is_one_line_with_the_remedy(
    tmp_path: Path, damage: Callable[[Path], object], fault: str
) -> None:
    path = tmp_path / "d.h5"
    write(path)
    damage(path)
    with pytest.raises(UserError) as caught:
        Dataset.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert "run preprocess" in message
    assert "\n" not in message


def told_by(path: Path) -> list[Any]:
    """Everything that a data set tells."""
    with Dataset.open(path) as dataset:
        return [*content_of(path), [dataset.mask(row).tolist() for row in range(len(dataset))]]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bits flipped, a range zeroed or copied, or the end lost."""
    changed = bytearray(content)
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 600))
    match rng.integers(4):
        case 0:
            for place in rng.integers(0, len(content), rng.integers(1, 9)).tolist():
                changed[place] ^= 1 << int(rng.integers(8))
        case 1:
            changed[start : start + length] = bytes(min(length, len(content) - start))
        case 2:
            other = int(rng.integers(len(content) - length))
            changed[other : other + length] = changed[start : start + length]
        case _:
            del changed[start:]
    return bytes(changed)


def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "whole.h5", 12)
    content, true = (tmp_path / "whole.h5").read_bytes(), told_by(tmp_path / "whole.h5")
    rng, refused, path = np.random.default_rng(0), 0, tmp_path / "d.h5"
    for number in range(ATTACKS):
        path.write_bytes(damaged(content, rng))
        try:
            assert told_by(path) == true, f"file {number} was changed and read"
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")
            assert str(error).isprintable()  # so it is one line
    print(f"{ATTACKS} damaged files: {refused} refused, {ATTACKS - refused} read as they were written")
    assert refused > ATTACKS / 4  # the rest hit what nobody reads


def test_a_damaged_image_is_named_and_not_returned(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    write(path, 4)
    with h5py.File(path) as file:
        chunk = file["images_0"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(content)
    with Dataset.open(path) as dataset:
        assert len(dataset.images([0, 1, 3])) == 3
        with pytest.raises(UserError, match=r"d\.h5: damaged at images_0, row 2; delete it and run pre"):
            dataset.images([1, 2])


def test_a_patient_is_a_salted_hash_and_an_unknown_patient_a_group_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PNEUMO_PATIENT_SALT", raising=False)
    plain = hash_patient("00028864")
    assert len(f"{int(plain, 16):016x}") == len(plain) == 16
    assert hash_patient(" 00028864 ", "another image") == plain != hash_patient("00015606")
    assert hash_patient("", "image-1") != hash_patient("", "image-2")
    assert hash_patient(" ", "image-1") == hash_patient("", "image-1") != hash_patient("image-1")
    with pytest.raises(ValueError, match="both empty"):
        hash_patient("")
    monkeypatch.setenv("PNEUMO_PATIENT_SALT", "ward 7")
    assert hash_patient("00028864") != plain
