"""Copies of the challenge's data in other containers: pictures, masks as pictures, gzip, tar, one file."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from dicom_files import dicom_bytes
from helpers import make, store_in
from PIL import Image

from pneumo_experiments.dataset.annotations import read_annotations, read_file_names, unite
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed_image import Entry
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.dicom.containers import read_file
from pneumo_experiments.dicom.picture import NOTE, read_mask, read_picture
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.settings import Preprocess
from pneumo_experiments.stages.preprocess import preprocess
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

IMAGES = 6
SMOOTH = np.add.outer(np.arange(64), np.arange(96) * 1.5).astype(np.uint8)  # greys 0 to 205


def png(values: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: Any) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def jpeg(values: np.ndarray, mode: str = "L") -> bytes:
    return png(values, mode, "JPEG", quality=95)


@pytest.mark.parametrize(
    ("content", "tolerance", "name"),
    [
        (png(SMOOTH), 0, "PNG, 8 bit"),
        (png(SMOOTH, "RGB"), 0, "PNG, 8 bit"),
        (png(SMOOTH, "LA"), 0, "PNG, 8 bit"),
        (png(SMOOTH, "RGBA"), 0, "PNG, 8 bit"),
        (png(SMOOTH, "P"), 0, "PNG, 8 bit"),
        (png(SMOOTH.astype(np.uint16)), 0, "PNG, 16 bit"),
        (png(SMOOTH.astype(np.uint16) * 257), 0, "PNG, 16 bit"),
        (jpeg(SMOOTH), 4, "JPEG, 8 bit"),
        (jpeg(SMOOTH, "RGB"), 4, "JPEG, 8 bit"),
        (gzip.compress(png(SMOOTH), mtime=0), 0, "PNG, 8 bit"),
    ],
)
def test_a_grey_picture_gives_its_greys_in_every_mode(content: bytes, tolerance: int, name: str) -> None:
    read = read_radiograph(content, "x")
    assert read.pixels.dtype == np.uint8
    assert read.pixels.shape == SMOOTH.shape
    assert np.abs(read.pixels.astype(int) - SMOOTH).max() <= tolerance
    assert (read.format, read.patient, read.age) == (name, "", -1)


def test_16_bit_greys_are_scaled_from_the_darkest_to_the_brightest() -> None:
    deep = 1000 + 37 * np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 64
    expected = np.rint((deep - deep.min()) / (deep.max() - deep.min()) * 255)
    assert np.array_equal(read_picture(png(deep), 10**6)[0], expected)


def coloured() -> np.ndarray:
    colours = np.stack([SMOOTH] * 3, axis=2)
    colours[:8, :8, 0] = 255 - colours[:8, :8, 0]  # a stamp in a corner
    return colours


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(coloured()), r"not a grayscale image \(RGB\)"),
        (png(SMOOTH)[:-40], "cannot be decoded: damaged, truncated or not supported"),
        (jpeg(SMOOTH)[:-40], "cannot be decoded: damaged, truncated or not supported"),
        (png(np.zeros((3000, 40), np.uint8)), r"3000 x 40 pixels exceed max_pixels=100000; raise it"),
        (png(np.full((64, 64), 7, np.uint8)), "no contrast: at least 99% of its pixels"),
        (gzip.compress(png(SMOOTH), mtime=0)[:-9], "truncated"),
        (gzip.compress(bytes(3 * 10**7), mtime=0), r"inflates to more than the \d+ bytes of max_pixels"),
        (
            imagecodecs.png_encode(np.stack([SMOOTH.astype(np.uint16) * 16] * 3, axis=2)),
            "a 16-bit PNG picture in several channels; save it as grey",
        ),
        (b"GIF89a" + bytes(99), "not a DICOM file, but a GIF picture"),
        (b"MM\0*" + bytes(999), "not a DICOM file, but a TIFF picture"),
    ],
)
def test_what_is_no_grey_picture_is_rejected_by_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=f"^image-7: {reason}"):
        read_radiograph(content, "image-7", max_pixels=100_000)


MASK = np.zeros((64, 96), bool)
MASK[10:30, 20:70] = True
LABELS = np.where(np.arange(96) < 40, MASK * 1, MASK * 2).astype(np.uint8)
SHAPE_IN_ALPHA = np.stack([MASK * 0] * 3 + [MASK * 255], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        png(MASK.astype(np.uint8) * 255),
        png(MASK.astype(np.uint8)),  # 0 and 1
        png(MASK),  # 1 bit
        png(MASK.astype(np.uint16) * 65535),
        png(np.stack([MASK * 255, MASK * 0, MASK * 0], axis=2).astype(np.uint8)),  # red
        png(np.stack([MASK * 200, MASK * 200, MASK * 200, MASK * 255], axis=2).astype(np.uint8)),
        jpeg(MASK.astype(np.uint8) * 255),
        png(LABELS),  # numbered parts
        png(SHAPE_IN_ALPHA),
    ],
)
def test_a_mask_is_read_from_every_kind_of_picture(content: bytes) -> None:
    assert np.array_equal(read_mask(content, 10**6), MASK)
    assert not read_mask(png(np.zeros((5, 7), np.uint8)), 10**6).any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(SMOOTH), r"its mask is none: \d\d% of its pixels are neither 0 nor 205"),
        (png(LABELS * np.uint8(127)), "its mask has the values 0, 127, 254; write 0 and one other"),
        (jpeg(MASK.astype(np.uint8)), "its mask is too dark for a JPEG"),
    ],
)
def test_what_is_no_mask_is_rejected_by_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        read_mask(content, 10**6)


def test_a_flipped_bit_in_a_picture_is_noticed() -> None:
    content = png(MASK.astype(np.uint8) * 255)
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for place in range(start, end):
        flipped = bytearray(content)
        flipped[place] ^= 4
        with pytest.raises(Exception, match=r"checksum|broken PNG"):
            read_mask(bytes(flipped), 10**6)


def test_a_picture_in_three_channels_counts_three_times_and_is_noted() -> None:
    assert read_radiograph(png(SMOOTH, "RGB"), "x").notes == (NOTE,)
    with pytest.raises(Rejected, match="64 x 96 pixels in three colour channels exceed max_pixels=10000"):
        read_radiograph(png(SMOOTH, "RGB"), "x", max_pixels=10_000)
    assert read_radiograph(png(SMOOTH), "x", max_pixels=10_000).notes == ()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic radiographs in the challenge's layout, and as pictures with masks."""
    folder = tmp_path_factory.mktemp("copies")
    write_sample(folder / "sample", Contents(IMAGES, 0, 5))
    dicom_dir, table = folder / "sample" / "dicom-images-train", folder / "sample" / "train-rle.csv"
    copies(folder, dicom_dir, table, ("png", "jpg", "half", "masks"))
    return folder


def copies(folder: Path, dicom_dir: Path, rle_csv: Path, kinds: Collection[str]) -> None:
    """Writes the radiographs of a folder as png/, jpg/, half/ (a half of the size) and masks/."""
    annotations = read_annotations(rle_csv)
    for name in kinds:
        (folder / name).mkdir()
    for path in dicom_dir.rglob("*.dcm"):
        image = Image.fromarray(pixels := read_radiograph(path.read_bytes(), path.stem).pixels)
        image.save(folder / "png" / f"{path.stem}.png", compress_level=1)
        if "masks" in kinds:
            rows, columns = pixels.shape
            half = image.resize((columns // 2, rows // 2), Image.Resampling.BOX)
            mask, _ = unite(annotations[path.stem], (rows, columns), path.stem)
            half.save(folder / "half" / f"{path.stem}.PNG", compress_level=1)
            image.save(folder / "jpg" / f"{path.stem}.jpeg", quality=95)
            Image.fromarray(mask).save(folder / "masks" / f"{path.stem}.png")


Made = tuple[list[Entry], np.ndarray, list[np.ndarray]]


@pytest.fixture(scope="module")
def native(sample: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Made:
    """The data set of the DICOM files and run lengths."""
    source = sample / "sample"
    with store_in(tmp_path_factory.mktemp("native"), empty_store):
        return made(Path("d.h5"), dicom_dir=source / "dicom-images-train", rle_csv=source / "train-rle.csv")


def made(path: Path, **settings: Any) -> Made:
    """The index, greys and masks of the data set that preprocess makes."""
    chosen = {"dataset": path, "image_size": 64, "workers": 1, "pixel_dtype": "uint8"} | settings
    preprocess(make(Preprocess, **chosen))
    with Dataset.open(path) as dataset:
        rows = range(len(dataset))
        return list(dataset.entries), dataset.images(list(rows)), [dataset.mask(row) for row in rows]


def facts(entries: list[Entry]) -> list[tuple[object, ...]]:
    return [(e.image_id, e.rows, e.columns, e.area_px) for e in entries]


def test_copies_as_jpeg_give_nearly_the_data_set_of_the_radiographs(
    sample: Path, native: Made, store: Path
) -> None:
    entries, greys, masks = native
    assert sum(entry.area_px > 0 for entry in entries) >= 2
    others = made(Path("d.h5"), dicom_dir=sample / "jpg", masks_dir=sample / "masks")
    assert facts(others[0]) == facts(entries)
    assert np.abs(others[1].astype(int) - greys).max() <= 2
    assert all(map(np.array_equal, others[2], masks))


def test_run_lengths_and_masks_of_another_size_are_resized_and_that_is_said(
    sample: Path, native: Made, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, half, entries = sample / "sample" / "train-rle.csv", sample / "half", native[0]
    side = entries[0].rows
    positives = sum(entry.area_px > 0 for entry in entries)
    for number, labels in enumerate(({"rle_csv": table, "rle_size": side}, {"masks_dir": sample / "masks"})):
        smaller = made(Path(f"{number}.h5"), dicom_dir=half, **labels)[0]
        for entry, whole in zip(smaller, entries, strict=True):
            assert (entry.image_id, entry.rows, entry.columns) == (whole.image_id, side // 2, side // 2)
            assert abs(4 * entry.area_px - whole.area_px) <= 0.02 * whole.area_px
        resized = positives if number == 0 else IMAGES
        assert f"for {side} x {side} px: resized to the image's ({resized})" in capsys.readouterr().out


def test_run_lengths_of_another_image_size_are_an_error_that_names_the_setting(
    sample: Path, store: Path
) -> None:
    with pytest.raises(UserError, match=r"run lengths reach pixel .* rle_size"):
        made(Path("d.h5"), dicom_dir=sample / "half", rle_csv=sample / "sample" / "train-rle.csv")


def renamed(sample: Path, folder: Path, empty_masks: bool) -> dict[str, Path]:
    """The pictures under the names of a well-known copy, with its table, and with or without empty masks."""
    rows = ["new_filename,ImageId,has_pneumo"]
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number, path in enumerate(sorted((sample / "png").iterdir(), reverse=True)):
        mask = sample / "masks" / path.name
        positive = int(read_mask(mask.read_bytes(), 10**8).any())
        name = f"{number}_train_{positive}_.png"
        shutil.copy(path, folder / "images" / name)
        if positive or empty_masks:
            shutil.copy(mask, folder / "masks" / name)
        rows.append(f"{name},{path.stem},{positive}")
    shutil.copy(sample / "png" / path.name, folder / "images" / "0_test_0_.png")
    (folder / "names.csv").write_text("\n".join(rows))
    return {"dicom_dir": folder / "images", "masks_dir": folder / "masks", "rle_csv": folder / "names.csv"}


def test_the_table_of_new_file_names_gives_the_ids_of_the_challenge(
    sample: Path, native: Made, store: Path
) -> None:
    entries, _, masks = made(Path("named.h5"), **renamed(sample, store, empty_masks=False))
    assert facts(entries) == facts(native[0])
    assert all(map(np.array_equal, masks, native[2]))


def test_only_an_image_whose_mask_and_table_agree_is_used(
    sample: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = renamed(sample, store, empty_masks=True)
    rows = [row.split(",") for row in paths["rle_csv"].read_text().splitlines()[1:]]
    lost, empty, filled, several, twice, good = sorted(rows, key=lambda row: row[2], reverse=True)
    assert [row[2] for row in (lost, empty, filled)] == ["1", "1", "0"]
    (paths["masks_dir"] / lost[0]).unlink()
    text = paths["rle_csv"].read_text().replace(f"{empty[1]},1", f"{empty[1]},0")
    paths["rle_csv"].write_text(text.replace(f"{filled[1]},0", f"{filled[1]},1"))
    (paths["masks_dir"] / "again").mkdir()
    shutil.copy(paths["masks_dir"] / several[0], paths["masks_dir"] / "again")
    shutil.copy(sample / "png" / f"{good[1]}.png", paths["dicom_dir"] / f"{twice[1]}.png")
    entries = made(Path("d.h5"), max_rejected=0.9, **paths)[0]
    assert [entry.image_id for entry in entries] == [good[1]]
    assert "has_pneumo is 1 and there is no mask, or because there are several: 2 images" in caplog.text
    report = json.loads(Path("d.report.json").read_text())
    assert {file["image_id"]: file["reason"] for kind in report["rejected"] for file in kind["files"]} == {
        empty[1]: "has_pneumo is 0, and its mask is not empty",
        filled[1]: "has_pneumo is 1, and its mask is empty",
    }
    assert report["duplicates"] == {twice[1]: {"files": 2, "used": False}}


def test_masks_have_the_path_of_their_image_where_names_repeat(sample: Path, store: Path) -> None:
    pictures, masks = (sorted((sample / name).iterdir()) for name in ("png", "masks"))
    expected = dict[str, int]()
    for number, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        for kind, path in (("images", picture), ("labels", mask)):
            (store / kind / str(number)).mkdir(parents=True)
            shutil.copy(path, store / kind / str(number) / "IM1.png")
        expected[f"{number}/IM1"] = int(read_mask(mask.read_bytes(), 10**8).sum())
    entries = made(Path("d.h5"), dicom_dir=store / "images", masks_dir=store / "labels")[0]
    assert {entry.image_id: entry.area_px for entry in entries} == expected


def test_masks_that_are_swapped_wrong_or_elsewhere_are_an_error(sample: Path, store: Path) -> None:
    (store / "swapped").mkdir()
    (store / "other").mkdir()
    for path in (sample / "masks").iterdir():
        Image.fromarray(~read_mask(path.read_bytes(), 10**8)).save(store / "swapped" / path.name)
        shutil.copy(path, store / "other" / f"{path.stem}_mask.png")
    wrong = {
        store / "swapped": r"its mask covers \d+% of the image: are mask and background swapped\?",
        store / "other": f"masks_dir=.*: holds the mask of 0 of {IMAGES} images; masks are named like",
        store / "gone": "masks_dir=.*gone: no such file or folder",
        sample / "png": "masks_dir: is dicom_dir",
    }
    for folder, reason in wrong.items():
        with pytest.raises(UserError, match=reason):
            made(Path("d.h5"), dicom_dir=sample / "png", masks_dir=folder)


def test_a_table_with_two_rows_of_one_file_or_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for rows, said in {
        "a.png,1,0\na.jpg,2,1": "line 3: a second row for a or for 2",
        "p/a.png,1,0\nq/a.png,2,1": "line 3: a second row for a or for 2",
        "a.png,1,0\nb.png,1.dcm,1": "line 3: a second row for b or for 1",
        "a.png,,0": "line 2: no ImageId for a.png",
    }.items():
        content = f"new_filename,ImageId,has_pneumo\n{rows}\n".encode()
        with pytest.raises(UserError, match=rf"t\.csv, {said}"):
            read_file_names(path, content)


def test_copies_as_png_give_the_same_data_set_and_masks_in_their_folder_are_told_apart(
    sample: Path, native: Made, store: Path
) -> None:
    shutil.copytree(sample / "png", store / "all" / "train")
    shutil.copytree(sample / "masks", store / "all" / "mask")
    together = made(Path("d.h5"), dicom_dir=store / "all", masks_dir=store / "all" / "mask")
    assert facts(together[0]) == facts(native[0])
    assert np.array_equal(together[1], native[1])
    assert all(map(np.array_equal, together[2], native[2]))


def test_masks_of_another_folder_or_with_other_pixels_are_another_data_set(
    sample: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("masks", "others"):
        (store / name).mkdir()
        for path in (sample / "masks").iterdir():
            mask = read_mask(path.read_bytes(), 10**8)
            written = store / name / path.name
            Image.fromarray(np.roll(mask, 3) if name == "others" else mask).save(written, compress_level=0)
            os.utime(written, (0, 0))
    sizes = [[p.stat().st_size for p in sorted((store / name).iterdir())] for name in ("masks", "others")]
    assert sizes[0] == sizes[1]
    made(Path("d.h5"), dicom_dir=sample / "png", masks_dir=store / "masks")
    capsys.readouterr()
    made(Path("d.h5"), dicom_dir=sample / "png", masks_dir=store / "masks")
    assert "exists already, from the same files" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with other images or masks"):
        made(Path("d.h5"), dicom_dir=sample / "png", masks_dir=store / "others")
    path = next((store / "masks").iterdir())
    mask = read_mask(path.read_bytes(), 10**8)
    mask[0, 0] = not mask[0, 0]
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match="was made with other images or masks"):
        made(Path("d.h5"), dicom_dir=sample / "png", masks_dir=store / "masks")


def test_a_png_copy_of_the_real_radiographs_is_the_same_data_set(real_data: Path, store: Path) -> None:
    table, dicom_dir = real_data / "train-rle.csv", real_data / "dicom-images-train"
    copies(store, dicom_dir, table, ["png"])
    entries, greys, masks = made(Path("d.h5"), dicom_dir=dicom_dir, rle_csv=table)
    others, same, equal = made(Path("png.h5"), dicom_dir=store / "png", rle_csv=table)
    assert facts(others) == facts(entries)
    assert [entry.patient for entry in others] == [entry.patient for entry in entries]
    assert np.array_equal(same, greys)
    assert all(map(np.array_equal, equal, masks))


def test_gzip_tar_and_a_single_file_hold_the_same_radiographs(tmp_path: Path) -> None:
    content = {name: dicom_bytes(SMOOTH + np.uint8(number)) for number, name in enumerate("abc")}
    for folder in ("plain", "packed"):
        (tmp_path / folder / "deep").mkdir(parents=True)
    for name, each in content.items():
        (tmp_path / "plain" / "deep" / f"{name}.dcm").write_bytes(each)
        (tmp_path / "packed" / "deep" / f"{name}.dcm.gz").write_bytes(gzip.compress(each))
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "plain", "plain")
    for root in (tmp_path / "plain", tmp_path / "packed", tmp_path / "a.tar"):
        archive = open_archive(root)
        read = {m.image_id: read_radiograph(read_file(root, m, 10**6), m.image_id) for m in archive.members}
        assert {name: radiograph.pixels.tobytes() for name, radiograph in read.items()} == {
            name: (SMOOTH + np.uint8(number)).tobytes() for number, name in enumerate("abc")
        }
    for path in (tmp_path / "plain" / "deep" / "b.dcm", tmp_path / "packed" / "deep" / "b.dcm.gz"):
        single = open_archive(path)
        assert [member.image_id for member in single.members] == ["b"]
        assert read_radiograph(read_file(single.root, single.members[0], 10**6), "b").pixels[0, 0] == 1


def test_a_truncated_tar_file_is_an_error_and_a_file_that_is_cut_later_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in "ab":
            info = tarfile.TarInfo(f"{name}.dcm")
            info.size = len(content := dicom_bytes(SMOOTH))
            file.addfile(info, io.BytesIO(content))
    archive = open_archive(path)
    path.write_bytes(path.read_bytes()[: -len(content) - 4000])
    assert read_file(path, archive.members[0], 10**6) == content
    with pytest.raises(Rejected, match="b: truncated in the tar file"):
        read_file(path, archive.members[1], 10**6)
    for size, said in ((path.stat().st_size, "damaged or truncated tar file"), (250, "neither a folder")):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=rf"a\.tar: {said}"):
            open_archive(path)


@pytest.mark.parametrize("size", [-512, 2**40])
def test_a_tar_file_with_an_impossible_size_is_damaged(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.dcm")
    info.size, info.type = size, tarfile.REGTYPE if size < 0 else tarfile.GNUTYPE_LONGNAME
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(UserError, match=r"a\.tar: damaged or truncated tar file"):
        open_archive(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.tar.gz", gzip.compress(bytes(600), mtime=0), "compressed by gzip; unpack it"),
        ("x.rar", b"Rar!\x1a\x07", "compressed by RAR; unpack it"),
        ("x.tif", b"II*\0", "neither a folder, nor a zip or tar file, nor a DICOM file, nor a PNG or JPEG"),
        ("folder/x.tif", b"II*\0", r"only TIFF pictures \(1\)"),
        ("folder/x.nii.gz", b"", r"only NIfTI files \(1\)"),
    ],
)
def test_what_is_not_read_is_named_for_what_it_is(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        open_archive(path if path.parent == tmp_path else path.parent)
    assert re.search("name (the folder|it)", str(caught.value))


def test_pictures_beside_dicom_files_are_previews_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(SMOOTH))
    (tmp_path / "a.png").write_bytes(png(SMOOTH))
    (tmp_path / "b.jpg").write_bytes(jpeg(SMOOTH))
    archive = open_archive(tmp_path)
    assert [member.name for member in archive.members] == ["a.dcm"]
    assert archive.skipped == {"PNG and JPEG pictures": 2}
