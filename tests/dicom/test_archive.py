from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import GREYS, dicom_bytes, with_uids
from helpers import ROOT

from pneumo_experiments.dicom.archive import Archive, open_archive
from pneumo_experiments.dicom.containers import read_file
from pneumo_experiments.errors import Rejected, UserError

MUTANTS = int(os.environ.get("PNEUMO_ZIP_MUTANTS") or 150)
DICOM = bytes(128) + b"DICM" + bytes(40)


def place(folder: Path, *names: str, content: bytes = DICOM) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def zipped(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in contents.items():
            file.writestr(name, content, compresslevel=1)
    return path


def ids(archive: Archive) -> list[str]:
    return [member.image_id for member in archive.members]


def test_dicom_files_are_known_by_name_or_first_bytes_and_the_rest_is_counted(tmp_path: Path) -> None:
    place(tmp_path, "b/1.2.3.dcm", "a/ID_1.DCM", "x.dicom", content=b"anything")
    place(tmp_path, "IM000001", "1.2.840.7", "deep/down/scan.ima", "DICOMDIR", "__MACOSX/a.dcm", "x/._a.dcm")
    place(tmp_path, ".DS_Store", "x/.DS_Store", "more.zip", content=b"PK")
    place(tmp_path, "notes.txt", "short", content=b"DICM")
    archive = open_archive(tmp_path)
    assert ids(archive) == ["1.2.3", "1.2.840.7", "ID_1", "IM000001", "scan.ima", "x"]
    junk = {".DS_Store": 2, "DICOMDIR": 1, "__MACOSX and ._ files": 2, "zip files": 1}
    assert (archive.skipped, archive.files) == (junk | {"other files": 2}, 6)


def test_of_equal_files_with_one_id_the_first_is_used_and_of_differing_ones_none(tmp_path: Path) -> None:
    place(tmp_path, "x/same.dcm", "y/same.dcm", "single.dcm", "x/other.dcm")
    place(tmp_path, "y/other.dcm", content=DICOM + b"x")
    place(tmp_path, "x/swapped.dcm", content=DICOM[:-1] + b"1")
    place(tmp_path, "y/swapped.dcm", content=DICOM[:-1] + b"2")
    archive = open_archive(tmp_path, "stem")
    annotated = open_archive(tmp_path, "auto", {"other", "swapped"})
    assert (annotated.members, annotated.differing) == (archive.members, archive.differing)
    assert [member.name for member in archive.members] == ["x/same.dcm", "single.dcm"]
    assert archive.differing == ("other", "swapped")
    assert archive.duplicates == {"same": 2, "other": 2, "swapped": 2}
    assert archive.image_ids == {"same", "single", "other", "swapped"}
    assert archive.files == 7


def of_patients(tmp_path: Path) -> dict[str, str]:
    """Files of one name, the SOP Instance UID of each by its path."""
    uids = {f"PAT{number}/IM-0001-0001": f"1.2.3.{number}" for number in range(4)}
    for number, (name, uid) in enumerate(uids.items()):
        content = with_uids(dicom_bytes(GREYS + np.uint8(number)), instance=uid)
        place(tmp_path, f"{name}.dcm", content=content)
    return uids


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    uids = of_patients(tmp_path)
    place(tmp_path, "alone.dcm", "x/twice.dcm", "y/twice.dcm")
    archive, by_uid = open_archive(tmp_path), open_archive(tmp_path, "sop_instance_uid")
    assert (ids(archive), archive.differing) == ([*uids, "alone", "twice"], ())
    told = "the file's name, or the file's path for 4 files of one name that differ"
    assert (archive.identified_by, by_uid.identified_by) == (told, "the SOP Instance UID")
    assert ids(open_archive(tmp_path, "stem")) == ["alone", "twice"]
    assert ids(open_archive(tmp_path, "path")) == [*uids, "alone", "x/twice", "y/twice"]
    assert ids(by_uid) == [*uids.values(), "alone", "twice"]
    assert {member.image_id: member.name for member in by_uid.members}["1.2.3.2"] == "PAT2/IM-0001-0001.dcm"
    # What a table names decides.
    for wanted in (list(uids), list(uids.values())):
        assert ids(open_archive(tmp_path, wanted=[*wanted[1:], "gone"]))[:4] == wanted
    assert open_archive(tmp_path, wanted={"IM-0001-0001"}).differing == ("IM-0001-0001",)


def test_objects_without_pictures_are_passed_over_and_counted_by_class(tmp_path: Path) -> None:
    kinds = {
        "Basic Text SR Storage": "88.11",
        "Grayscale Softcopy Presentation State Storage": "11.1",
        "Key Object Selection Document Storage": "88.59",
    }
    for kind, uid in kinds.items():
        written = with_uids(dicom_bytes(GREYS), sop_class=f"1.2.840.10008.5.1.4.1.1.{uid}")
        place(tmp_path, f"{kind}.dcm", f"{kind} 2", content=written)
    with pytest.raises(UserError, match=r"no \.dcm.* files, only .*Basic Text SR Storage \(2\)"):
        open_archive(tmp_path)
    for number, uid in enumerate(("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4")):
        place(tmp_path, f"{number}.dcm", content=with_uids(dicom_bytes(GREYS), sop_class=uid))
    archive = open_archive(tmp_path)
    assert (ids(archive), archive.skipped) == (["0", "1", "2"], dict.fromkeys(kinds, 2))


def test_a_zip_file_is_read_in_place_like_the_folder_that_it_holds(tmp_path: Path) -> None:
    place(tmp_path / "folder", "s/1.dcm", "__MACOSX/s/._1.dcm", "s/IM2", "s/.DS_Store")
    place(tmp_path / "folder", "readme.txt", content=b"hello")
    path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "folder"))
    archive, folder = open_archive(path), open_archive(tmp_path / "folder")
    found, expected = ([replace(m, stamp=0, number=0) for m in read.members] for read in (archive, folder))
    assert (found, archive.skipped) == (expected, folder.skipped)
    assert [read_file(path, member, 10) for member in archive.members] == [DICOM, DICOM]


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    place(tmp_path, "1.dcm", "2.dcm")
    before = open_archive(tmp_path).members
    os.utime(tmp_path / "1.dcm", ns=(0, 12345))
    after = open_archive(tmp_path).members
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]
    paths = [zipped(tmp_path / f"{k}.zip", {"a.dcm": DICOM + bytes([k])}) for k in range(2)]
    first, second = (open_archive(path).members[0] for path in paths)
    assert first.stamp != second.stamp


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere", r"nowhere: no such file or folder; name the folder that holds"),
        ("", r"contains no \.dcm, \.png or \.jpg files, only other files \(2\); name the folder"),
        ("notes.txt", r"notes\.txt: neither a folder, nor a zip or tar file"),
        ("empty", r"empty: contains no \.dcm, \.png or \.jpg files; name"),
    ],
)
def test_where_there_is_nothing_the_error_names_it_and_the_remedy(
    tmp_path: Path, name: str, fault: str
) -> None:
    place(tmp_path, "notes.txt", content=b"hello")
    zipped(tmp_path / "empty", {})
    with pytest.raises(UserError, match=fault):
        open_archive(tmp_path / name)


def test_a_file_that_cannot_be_read_is_rejected_and_one_that_is_gone_ends_the_work(tmp_path: Path) -> None:
    place(tmp_path, "gone.dcm", "turned.dcm", "huge.dcm")
    os.truncate(tmp_path / "huge.dcm", 5 * 2**20 + 2**24)  # a hole: takes no room on the disk
    gone, huge, turned = open_archive(tmp_path).members
    (tmp_path / "gone.dcm").unlink()
    (tmp_path / "turned.dcm").unlink()
    (tmp_path / "turned.dcm").mkdir()
    with pytest.raises(UserError, match="gone: the file disappeared during the run") as caught:
        read_file(tmp_path, gone, 10)
    assert not isinstance(caught.value, Rejected)
    for member, fault in (
        (turned, "cannot be read"),
        (huge, "rejected because 22,020,096 bytes are more than"),
    ):
        with pytest.raises(Rejected, match=f"{member.image_id}: {fault}"):
            read_file(tmp_path, member, 2**20)
    assert len(read_file(tmp_path, huge, 2 * 2**20)) == huge.size


def test_encryption_in_a_zip_file_rejects_one_file(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"good.dcm": DICOM, "secret.dcm": DICOM})
    content = bytearray(path.read_bytes())
    content[content.index(b"secret.dcm") - 30 + 6] |= 1  # in the file's own header and in the list of files
    content[content.rindex(b"secret.dcm") - 46 + 8] |= 1
    path.write_bytes(content)
    good, secret = open_archive(path).members
    assert read_file(path, good, 10) == DICOM
    with pytest.raises(Rejected, match="secret: encrypted, or an unsupported compression method"):
        read_file(path, secret, 10)


def test_of_differing_files_with_one_name_in_a_zip_file_none_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for name, content in [("x/one.dcm", b"1"), ("x/one.dcm", b"2"), ("same.dcm", b""), ("same.dcm", b"")]:
            file.writestr(name, DICOM + content)
    archive = open_archive(path, "stem")
    assert (ids(archive), archive.differing) == (["same"], ("one",))
    assert archive.duplicates == {"one": 2, "same": 2}


def test_a_file_in_a_zip_file_may_have_any_path(tmp_path: Path) -> None:
    names = {"a": "./a.dcm", "b": "x//b.dcm", "c": "/c.dcm", "d": "../../d.dcm", "e": "x/./y/../e.dcm"}
    contents = {name: DICOM + image_id.encode() for image_id, name in names.items()}
    path = zipped(tmp_path / "a.zip", contents | {".": DICOM})
    archive = open_archive(path)
    assert (ids(archive), archive.skipped) == (list(names), {"other files": 1})
    for member in archive.members:
        assert read_file(path, member, 10) == DICOM + member.image_id.encode()
    assert ids(open_archive(path, "path")) == ["a", "c", "d", "x/b", "x/y/e"]  # no id leaves the folder


def test_a_zip_file_that_this_python_does_not_read_is_one_line(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"ä.dcm": DICOM})
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    path.write_bytes(content[: entry + 6] + b"\x63\x00" + content[entry + 8 :])
    with pytest.raises(UserError, match=r"a\.zip: this Python does not support its zip version; unpack it"):
        open_archive(path)
    path.write_bytes(content.replace("ä".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match=r"a\.zip: file names in it are not UTF-8; unpack it"):
        open_archive(path)
    # In the file's own header alone, the name costs no more than the file.
    path.write_bytes(content.replace("ä".encode(), b"\xff\xfe", 1))
    with pytest.raises(Rejected, match="ä: damaged in the zip file"):
        read_file(path, open_archive(path).members[0], 10)


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_zip_is_read_and_its_damage_rejects_one_file(tmp_path: Path, method: int) -> None:
    noise = DICOM + np.random.default_rng(0).bytes(20_000)
    path = zipped(tmp_path / "a.zip", {"bad.dcm": noise, "good": noise}, method)
    content = path.read_bytes()
    bad, good = open_archive(path).members
    assert read_file(path, bad, 10_000) == read_file(path, good, 10_000) == noise
    for place in (46, 60, 9000):
        changed, other = bytearray(content), tmp_path / f"{place}.zip"
        changed[place] ^= 0xFF
        other.write_bytes(changed)
        bad, good = open_archive(other).members
        assert read_file(other, good, 10_000) == noise
        with pytest.raises(Rejected, match=r"bad: (damaged in the zip file|cannot be read \(damaged\))"):
            read_file(other, bad, 10_000)


def test_mutants_of_a_zip_file_end_in_one_line_or_the_files_as_they_were(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for number, method in enumerate(METHODS):
            file.writestr(f"{number}.dcm", DICOM + bytes([number]) * 300, method)
            file.writestr(f"plain{number}", DICOM + bytes([number]), method)
    content, outcomes = path.read_bytes(), Counter[str]()
    for number in range(MUTANTS):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)).tolist():
            changed[place] = int(rng.integers(256))
        mutant = tmp_path / f"{number}.zip"  # an open zip file is kept by its path
        mutant.write_bytes(changed)
        try:
            archive = open_archive(mutant)
        except UserError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
            mutant.unlink()
            continue
        for member in archive.members:
            try:
                read = read_file(mutant, member, 10)
                outcomes["read"] += 1
                assert read[:132] == DICOM[:132]
                assert zlib.crc32(read) == member.stamp
            except Rejected:
                outcomes["rejected"] += 1
        mutant.unlink()
    print(f"{MUTANTS} mutants of a zip file: {dict(outcomes)}")
    assert min(outcomes.values()) > MUTANTS / 20
    assert len(outcomes) == 3


BOMBER = """
import resource, sys
from pathlib import Path
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.dicom.containers import read_file
from pneumo_experiments.errors import UserError
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 48 * 2**20,) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        archive = open_archive(path)
        print(archive.skipped, *(len(read_file(path, member, 10**6)) for member in archive.members))
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs to know how much memory is in use")
def test_a_bomb_in_a_zip_file_inflates_no_further_than_its_declared_size(tmp_path: Path) -> None:
    size, files = 64 * 2**20, list[Path]()
    declared = size.to_bytes(4, "little")
    for method in METHODS[1:]:
        content = zipped(tmp_path / "a.zip", {"bomb.dcm": bytes(size)}, method).read_bytes()
        assert len(content) < 2**19
        assert content.count(declared) == 2
        named, unnamed = (tmp_path / f"{name} {method}.zip" for name in ("named", "unnamed"))
        named.write_bytes(content.replace(declared, (999).to_bytes(4, "little")))
        unnamed.write_bytes(named.read_bytes().replace(b"bomb.dcm", b"nosuffix"))
        files += [named, unnamed]
    command = [sys.executable, "-c", BOMBER, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[::2] == ["bomb: damaged in the zip file"] * 3
    told = "contains no .dcm, .png or .jpg files, only other files (1)"
    assert [told in line for line in lines[1::2]] == [True] * 3


def test_a_linked_folder_is_read_and_each_folder_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    place(elsewhere, "1.dcm", "deep/2.dcm")
    place(root, "z/3.dcm")
    for link, target in {
        root / "a-link": elsewhere,
        root / "b-link": elsewhere / "deep",
        root / "c-link": root / "z",
        root / "z" / "up": root,
        elsewhere / "again": elsewhere,
        root / "round.dcm": Path("round.dcm"),
        root / "broken": Path("nowhere"),
    }.items():
        link.symlink_to(target)
    archive = open_archive(root)
    assert [member.name for member in archive.members] == ["a-link/1.dcm", "b-link/2.dcm", "z/3.dcm"]
    assert (archive.files, archive.duplicates, archive.skipped) == (3, {}, {})
    assert [read_file(archive.root, member, 10) for member in archive.members] == [DICOM] * 3


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
