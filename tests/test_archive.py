from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from pneumo_experiments.data.archive import Archive, open_archive, read_member
from pneumo_experiments.errors import Rejected, UserError

DICOM = bytes(128) + b"DICM" + bytes(40)


def place(folder: Path, *names: str, content: bytes = DICOM) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def ids(archive: Archive) -> list[str]:
    return [member.image_id for member in archive.members]


def test_dicom_files_are_known_by_their_name_or_their_first_bytes(tmp_path: Path) -> None:
    place(tmp_path, "b/1.2.3.dcm", "a/ID_1.DCM", "x.dicom", content=b"anything")
    place(tmp_path, "IM000001", "1.2.840.7", "deep/down/scan.ima")
    place(tmp_path, "notes.txt", "short", content=b"DICM")
    archive = open_archive(tmp_path)
    assert ids(archive) == ["1.2.3", "1.2.840.7", "ID_1", "IM000001", "scan.ima", "x"]
    assert archive.skipped == {"other files": 2}
    assert archive.files == 6


def test_junk_is_passed_over_and_counted(tmp_path: Path) -> None:
    place(tmp_path, "a.dcm", "__MACOSX/a.dcm", "x/._a.dcm", "DICOMDIR")
    place(tmp_path, ".DS_Store", "x/.DS_Store", "more.zip", content=b"PK")
    archive = open_archive(tmp_path)
    assert ids(archive) == ["a"]
    assert archive.skipped == {".DS_Store": 2, "DICOMDIR": 1, "__MACOSX and ._ files": 2, "zip files": 1}


def test_the_order_is_that_of_the_ids_whatever_the_folders(tmp_path: Path) -> None:
    place(tmp_path / "one", "z/1.dcm", "a/2.dcm", "m/3.dcm")
    place(tmp_path / "two", "a/1.dcm", "a/b/2.dcm", "3.dcm")
    assert ids(open_archive(tmp_path / "one")) == ids(open_archive(tmp_path / "two")) == ["1", "2", "3"]


def test_of_equal_files_with_one_id_the_first_is_kept_and_of_differing_ones_none(tmp_path: Path) -> None:
    place(tmp_path, "x/same.dcm", "y/same.dcm", "single.dcm", "x/other.dcm")
    place(tmp_path, "y/other.dcm", content=DICOM + b"x")
    place(tmp_path, "x/swapped.dcm", content=DICOM[:-1] + b"1")
    place(tmp_path, "y/swapped.dcm", content=DICOM[:-1] + b"2")
    archive = open_archive(tmp_path)
    assert [(member.image_id, member.name) for member in archive.members] == [
        ("same", "x/same.dcm"),
        ("single", "single.dcm"),
    ]
    assert archive.differing == ("other", "swapped")
    assert archive.doubles == {"same": 2, "other": 2, "swapped": 2}
    assert archive.image_ids == {"same", "single", "other", "swapped"}
    assert archive.files == 7


def test_a_zip_file_is_read_in_place_like_the_folder_that_it_holds(tmp_path: Path) -> None:
    place(tmp_path / "folder", "s/1.dcm", "__MACOSX/s/._1.dcm", "s/IM2", "s/.DS_Store", "readme.txt")
    place(tmp_path / "folder", "readme.txt", content=b"hello")
    path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "folder"))
    archive, folder = open_archive(path), open_archive(tmp_path / "folder")
    assert [(m.image_id, m.name, m.size) for m in archive.members] == [
        (m.image_id, m.name, m.size) for m in folder.members
    ]
    assert archive.skipped == folder.skipped
    assert [read_member(path, member, 10) for member in archive.members] == [DICOM, DICOM]


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    place(tmp_path, "1.dcm", "2.dcm")
    before = open_archive(tmp_path).members
    os.utime(tmp_path / "1.dcm", ns=(0, 12345))
    after = open_archive(tmp_path).members
    assert after[0] != before[0]
    assert after[1] == before[1]
    stamps = list[int]()
    for number, content in enumerate((b"1", b"2")):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as file:
            file.writestr("a.dcm", DICOM + content)
        stamps.append(open_archive(tmp_path / f"{number}.zip").members[0].stamp)
    assert stamps[0] != stamps[1]


def test_where_there_is_nothing_the_error_names_it_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; name the one that holds"):
        open_archive(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.dcm files in it; name the folder"):
        open_archive(tmp_path)
    place(tmp_path, "notes.txt", content=b"hello")
    with pytest.raises(UserError, match=r"notes\.txt: neither a folder nor a zip file"):
        open_archive(tmp_path / "notes.txt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(UserError, match=r"empty\.zip: no \.dcm files"):
        open_archive(tmp_path / "empty.zip")


def test_a_file_that_cannot_be_read_is_rejected_and_one_that_is_gone_ends_the_work(tmp_path: Path) -> None:
    place(tmp_path, "gone.dcm", "turned.dcm", "huge.dcm")
    os.truncate(tmp_path / "huge.dcm", 5 * 2**20 + 2**24)  # a hole: takes no room on the disk
    gone, huge, turned = open_archive(tmp_path).members
    (tmp_path / "gone.dcm").unlink()
    (tmp_path / "turned.dcm").unlink()
    (tmp_path / "turned.dcm").mkdir()
    with pytest.raises(
        UserError, match="gone: its file was there and is gone; run the same command"
    ) as caught:
        read_member(tmp_path, gone, 10)
    assert not isinstance(caught.value, Rejected)
    with pytest.raises(Rejected, match=r"turned: cannot be read \(Is a directory\)"):
        read_member(tmp_path, turned, 10)
    with pytest.raises(Rejected, match=r"huge: 22,020,096 bytes, more than a picture of max_pixels"):
        read_member(tmp_path, huge, 2**20)
    assert len(read_member(tmp_path, huge, 2 * 2**20)) == huge.size


def test_damage_and_encryption_in_a_zip_file_reject_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("bad.dcm", "good.dcm", "secret.dcm"):
            file.writestr(name, DICOM)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        offsets = {info.filename: info.header_offset for info in file.infolist()}
    content[offsets["bad.dcm"] + 30 + len("bad.dcm") + 150] ^= 0xFF
    content[offsets["secret.dcm"] + 6] |= 1
    entry = content.rindex(b"secret.dcm") - 46
    content[entry + 8] |= 1
    path.write_bytes(content)
    bad, good, secret = open_archive(path).members
    assert read_member(path, good, 10) == DICOM
    with pytest.raises(Rejected, match="bad: damaged in the zip file"):
        read_member(path, bad, 10)
    with pytest.raises(Rejected, match="secret: encrypted or compressed in an unknown way"):
        read_member(path, secret, 10)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_without_permission_is_counted(tmp_path: Path) -> None:
    place(tmp_path, "a.dcm", "closed/b.dcm")
    (tmp_path / "closed").chmod(0)
    try:
        archive = open_archive(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert ids(archive) == ["a"]
    assert archive.skipped == {"folders without permission": 1}
