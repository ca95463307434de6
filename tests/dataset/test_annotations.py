from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pneumo_experiments.dataset.annotations import (
    match_ids,
    plain_run_lengths,
    read_annotations,
    read_patients,
    unite,
)
from pneumo_experiments.dataset.labels import read_label, run_length_labels
from pneumo_experiments.errors import UserError

ROWS = "a.1,3 2\r\nb.2, -1\r\na.1, 0 1 4 2\r\n"
ABSOLUTE = "101 7 201 9 302 9 404 5 520 11"
NOTE = "the table has a mask and -1: the mask is used"
READ = {"a.1": ["3 2", "0 1 4 2"], "b.2": []}


def table(folder: Path, content: str | bytes, name: str = "train-rle.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "ImageId, EncodedPixels\r\n" + ROWS,
        "ImageId,EncodedPixels\n" + ROWS.replace("\r", ""),
        ROWS,
        "\ufeff" + ROWS,
        "\ufeffImageId,EncodedPixels\r\n" + ROWS,
        "EncodedPixels,ImageId\n3 2,a.1\n-1,b.2\n0 1 4 2,a.1\n",
        'ImageId, EncodedPixels, reader\n"a.1", "3 2", "x, y"\n\n"b.2","-1",\n"a.1","0 1 4 2",z\n \n',
        "b.2,-1\na.1,3 2\na.1,0 1 4 2",
        "ImageId,EncodedPixels\na.1.dcm,3 2\nb.2.dcm, -1\na.1.dcm,0 1 4 2\n",
    ],
    ids=[
        "kaggle",
        "plain",
        "no header",
        "bom",
        "bom and header",
        "swapped",
        "quoted",
        "no last newline",
        "files",
    ],
)
def test_every_dialect_of_the_table_reads_the_same(tmp_path: Path, content: str) -> None:
    assert read_annotations(table(tmp_path, content)) == READ


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffsep=;\r\nImageId;EncodedPixels\r\na.1;3 2\r\nb.2;-1\r\na.1;0 1 4 2\r\n",
        "a.1|3 2\nb.2|-1\na.1|0 1 4 2\n",
        "ImageId#EncodedPixels\na.1#3 2\nb.2#-1\na.1#0 1 4 2\n",
        ",ImageId,EncodedPixels\n0,a.1,3 2\n1,b.2,-1\n2,a.1,0 1 4 2\n",
        "0,a.1,3 2\n1,b.2,-1\n2,a.1,0 1 4 2\n",
        "3 2,a.1\n-1,b.2\n0 1 4 2,a.1\n",
        "IMAGE_ID,RLE_Mask,reader\na.1,3 2,x\nb.2,-1,y\na.1,0 1 4 2,z\n",
        "ImageId,EncodedPixels,\na.1,3 2,\nb.2,-1,,\na.1,0 1 4 2,\n",
        "'ImageId','EncodedPixels'\n'a.1','3 2'\n'b.2','-1'\n'a.1','0 1 4 2'\n",
        "ImageId,EncodedPixels\na.1,3.0 2.0\nb.2,-1.0\na.1,0.0 1.0 4.0 2.0\n",
        "ImageId,EncodedPixels\na.1,3,2\nb.2,\u22121\na.1,0,1,4,2\n",
        'ImageId,EncodedPixels\na.1,"[3, 2]"\nb.2,[]\na.1,"[0, 1, 4, 2]"\n',
        'ImageId;EncodedPixels\na.1;3 2\nb.2;" -1"\na.1;"0;1;4;2"\n',
        *(f"ImageId,EncodedPixels\na.1,3 2\nb.2,{blank}\na.1,0 1 4 2\n" for blank in ("", "NaN", "None")),
        *(ROWS.replace(",", f"{end},") for end in (".PNG", ".jpeg", ".dicom")),
    ],
)
def test_a_table_of_another_program_reads_the_same(tmp_path: Path, content: str) -> None:
    assert read_annotations(table(tmp_path, content)) == READ


@given(
    st.sampled_from(list(",;\t|:~")),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.permutations([("ImageId", "a.1", "b.2"), ("EncodedPixels", "3 2", "-1"), ("reader", "ä", "")]),
    st.booleans(),
)
def test_separator_encoding_line_end_and_order_of_the_columns_change_nothing(
    separator: str, encoding: str, end: str, columns: list[tuple[str, ...]], quoted: bool
) -> None:
    quote = '"' if quoted else ""
    rows = [separator.join(f"{quote}{field}{quote}" for field in row) for row in zip(*columns, strict=True)]
    content = end.join(rows).encode(encoding)
    assert read_annotations(Path("t.csv"), content) == {"a.1": ["3 2"], "b.2": []}


@pytest.mark.parametrize(
    "text", ["387,620 23", "1.000 2", "3.5 2", "1 2;3 4", "1e3 2", "3 2,", "-1 3", "[3 2", "3 +2"]
)
def test_numbers_that_can_mean_two_things_stay_as_they_are_and_are_refused(text: str) -> None:
    assert plain_run_lengths(text) == text
    with pytest.raises(UserError, match=r"^a: run length '.*' is (negative|not a whole number)"):
        unite([plain_run_lengths(text)], (1024, 1024), "a")


def test_absolute_starts_are_named_in_a_table_and_in_a_single_mask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a: the run lengths look absolute: .* convert: gap = start - end"):
        unite([ABSOLUTE], (30, 18), "a")
    with pytest.raises(UserError, match=r"^a: run lengths reach pixel"):
        unite([ABSOLUTE], (23, 23), "a")  # 529 pixels: the last run ends at 531, also if the first is 1
    relative = "5 2 1 1 9 3 8 2 7 1"
    assert read_annotations(table(tmp_path, f"a,{ABSOLUTE}\nb,{relative}\n")) == {
        "a": [ABSOLUTE],
        "b": [relative],
    }


def test_a_mask_and_minus_one_of_one_image_are_kept_and_the_mask_is_used(tmp_path: Path) -> None:
    annotations = read_annotations(table(tmp_path, "a,-1\na,3 2\nb,-1\nb,-1\nc,1 1\n"))
    assert annotations == {"a": ["3 2", "-1"], "b": [], "c": ["1 1"]}
    labels = run_length_labels(annotations)
    read = {name: read_label(label, b"", (3, 4), name, 99) for name, label in labels.items()}
    assert {name: label.annotations for name, label in read.items()} == {"a": 1, "b": 0, "c": 1}
    assert np.count_nonzero(read["a"].mask) == 2
    assert [label.notes for label in read.values()] == [(NOTE,), (), ()]


def test_ids_match_files_without_folders_and_suffixes_if_none_matches_as_it_is() -> None:
    table = {"train/x/a": 1, "C:\\data\\b": 2, "c": 3}
    assert match_ids(table, {"a", "b.png", "d"}) == {"a": 1, "b.png": 2, "c": 3}
    assert match_ids(table, {"a", "b", "c"}) == table  # c is an id as it is, so the others are, too
    assert match_ids({"a": 1}, {"x/a", "y/a"}) == {"a": 1}  # which of them is unknown
    with pytest.raises(UserError, match=r"^y/a and x/a: both match the image a"):
        match_ids({"x/a": 1, "y/a": 2}, {"a"})


def test_a_packed_table_reads_as_the_plain_one_whatever_its_name(tmp_path: Path) -> None:
    for name in ("train-rle.csv.gz", "train-rle.csv"):
        assert read_annotations(table(tmp_path, gzip.compress(ROWS.encode()), name)) == READ


def test_a_text_of_a_ragged_mask_may_be_longer_than_csv_allows_by_default(tmp_path: Path) -> None:
    text = " ".join(["1 1"] * 50_000)
    assert read_annotations(table(tmp_path, f"a,{text}\n")) == {"a": [text]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "the table is empty"),
        ("\n \n", "the table is empty"),
        ("ImageId,EncodedPixels\n", "has a header but no rows"),
        ("ImageId,ClassId\na,1 2\n", "found the columns ImageId, ClassId"),
        ("ImageId EncodedPixels\na 1 2\n", "found the one column ImageId EncodedPixels; separate columns by"),
        (
            "ImageId,EncodedPixels\na,387,620 23\n",
            "line 2: 3 fields, and 2 in the first line; put fields with",
        ),
        ("ImageId,EncodedPixels,by\na,1 2,x,y\n", "line 2: 4 fields, and 3 in the first line"),
        ("Jane Doe,\nb,1 2\nc\n", "line 3: an image id or value is missing"),
        ("a.1,Jane Doe\n", "found a first row of 2 fields without these names"),
        ("a.1,1 2,3\n", "found a first row of 3 fields without these names"),
        ("ImageId,EncodedPixels\na,1 2\nb\n", "line 3: an image id or value is missing"),
        ("ImageId,EncodedPixels\n,1 2\n", "line 2: an image id or value is missing"),
        (
            "ImageId,EncodedPixels\nb,-1\na,\nc,NaN\n",
            "line 3: no run lengths for a, and other images have -1",
        ),
        (
            "ImageId,EncodedPixels\na.png,1 2\na.jpg,1 2\n",
            "line 3: a.jpg and a.png differ only in their suffixes",
        ),
        (
            f"ImageId,EncodedPixels\nb,7 3\na,{ABSOLUTE}\n",
            "line 3: the run lengths look absolute: each start",
        ),
        (b"ImageId,EncodedPixels\na,1 2\nb,\xfc\n", "line 3: not a CSV table in UTF-8"),
        (b"\xff\xfe\0", "line 1: not a CSV table in UTF-8"),
        (b"ImageId\0,EncodedPixels\na,1 2\n", "line 1: not a CSV table in UTF-8"),
        (b"PK\3\4\x14\0", "a zip or Excel file, no CSV table; unpack it, or save it as CSV"),
        (gzip.compress(ROWS.encode() * 99, mtime=0)[:60], "cannot be read (damaged or truncated)"),
    ],
)
def test_what_is_not_the_table_is_one_line_that_names_the_file(
    tmp_path: Path, content: str | bytes, fault: str
) -> None:
    path = table(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_annotations(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert fault in message
    assert "Doe" not in message
    assert "\n" not in message


def test_a_missing_table_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file; expected .* ImageId and EncodedPixels"):
        read_annotations(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"a folder; expected .* Kaggle_ID and NIH_ID"):
        read_patients(tmp_path)


def test_annotations_of_one_image_are_united_not_added() -> None:
    mask, overlapping = unite(["0 3", "2 3", "10 1"], (4, 3), "a")
    assert mask.T.ravel().nonzero()[0].tolist() == [0, 1, 2, 3, 4, 10]
    assert overlapping
    mask, overlapping = unite(["0 3", "3 3"], (4, 3), "a")
    assert mask.T.ravel().nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert not overlapping  # they only touch
    mask, overlapping = unite([], (4, 3), "a")
    assert not mask.any()
    assert not overlapping
    with pytest.raises(UserError, match=r"^a: odd"):
        unite(["0 3", "2"], (4, 3), "a")


@pytest.mark.parametrize(
    "content",
    [
        "Kaggle_ID,NIH_ID\na,00028864_007.png\nb,00015606_016.png\n",
        "a,00028864_007.png\nb,00015606_016.png\n",
        "id,patient\na,00028864\nb,00015606\nc,\n",
        "id;patient\na.png;00028864\nb.png;00015606\nc.png;NaN\nd.png;nan\n",
        "patient,id\r\n00028864,a\r\n00028864,a\r\n00015606,b\r\n",
    ],
)
def test_patients_read_from_the_nih_mapping_and_from_plain_columns(tmp_path: Path, content: str) -> None:
    assert read_patients(table(tmp_path, content)) == {"a": "00028864", "b": "00015606"}


def test_no_patient_is_named_in_a_message(tmp_path: Path) -> None:
    for content in (
        "image7,Jane Doe\n",
        "image7,x,Jane Doe\n",
        "id,patient\nimage7,Jane Doe\nimage7,Doe J\n",
    ):
        with pytest.raises(UserError) as caught:
            read_patients(table(tmp_path, content))
        assert "Doe" not in str(caught.value)


def test_the_13_real_images_have_their_known_areas(real_data: Path) -> None:
    annotations = read_annotations(real_data / "train-rle.csv")
    with (real_data / "known_areas.csv").open() as known:
        for row in csv.DictReader(known):
            texts = annotations.pop(row["ImageId"])
            mask, _ = unite(texts, (1024, 1024), row["ImageId"])
            assert len(texts) == int(row["n_annotations"])
            assert np.count_nonzero(mask) == int(row["union_area_px"])
    assert not annotations


def test_the_real_table_has_the_known_numbers_of_images_annotations_and_patients(real_data: Path) -> None:
    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    counts = np.array([len(texts) for texts in annotations.values()])
    assert len(counts) == 12047
    assert np.count_nonzero(counts) == 2669
    assert np.count_nonzero(counts > 1) == 624
    assert counts.max() == 10
    patients = read_patients(real_data / "labels" / "patients.csv.gz")
    assert patients.keys() == annotations.keys()
    assert patients["1.2.276.0.7230010.3.1.4.8323329.5597.1517875188.959090"] == "00028864"


def test_183_real_images_overlap_and_the_areas_span_the_known_range(real_data: Path) -> None:
    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    areas, overlaps = dict[str, int](), 0
    for image_id, texts in annotations.items():
        if texts:
            mask, overlapping = unite(texts, (1024, 1024), image_id)
            areas[image_id], overlaps = np.count_nonzero(mask.T), overlaps + overlapping
    assert overlaps == 183
    added = {image_id: sum(map(int, " ".join(annotations[image_id]).split()[1::2])) for image_id in areas}
    assert sum(added[image_id] > areas[image_id] for image_id in areas) == 183
    assert min(areas.values()) == 55
    assert max(areas.values()) == 161421
    assert np.median(list(areas.values())) == 8630


@pytest.mark.parametrize(
    ("repeated", "fault"),
    [
        (b"\0", "unpacks to more than 100,000,000 bytes; check that it is the right table"),
        (b"\n", "unpacks to more than 100,000,000 bytes; check that it is the right table"),
        (b"a\n", "more than 1,048,576 rows; check that it is the right table"),
        (b"", "contains more than 100,000,000 bytes; check that it is the right table"),
    ],
)
def test_a_table_without_end_is_one_line_and_little_memory(
    tmp_path: Path, repeated: bytes, fault: str
) -> None:
    path = tmp_path / "train-rle.csv.gz" if repeated else Path("/dev/zero")
    size = 2**28 if "unpacks" in fault else 2**25
    if repeated:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(size // 2**20):
                file.write(repeated * (2**20 // len(repeated)))
    code = """
import resource, sys
from pathlib import Path
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    read_annotations(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: {fault}\n"
