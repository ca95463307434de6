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


def table(folder: Path, content: str | bytes) -> Path:
    path = folder / "train-rle.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "ImageId, EncodedPixels\r\n" + ROWS,
        ROWS,
        "\ufeff" + ROWS,
        'ImageId, EncodedPixels, reader\n"a.1", "3 2", "x, y"\n\n"b.2","-1",\n"a.1","0 1 4 2",z\n \n',
        "b.2,-1\na.1,3 2\na.1,0 1 4 2",
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
        *(ROWS.replace(",", f"{end},") for end in (".dcm", ".PNG", ".jpeg", ".dicom")),
        gzip.compress(ROWS.encode(), mtime=0),
    ],
)
def test_every_dialect_of_the_table_reads_the_same(tmp_path: Path, content: str | bytes) -> None:
    assert read_annotations(table(tmp_path, content)) == {"a.1": ["3 2", "0 1 4 2"], "b.2": []}


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


def test_absolute_starts_are_named_in_a_single_mask_and_few_relative_ones_are_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a: the run lengths look absolute: .* convert: gap = start - end"):
        unite([ABSOLUTE], (30, 18), "a")
    with pytest.raises(UserError, match=r"^a: run lengths reach pixel"):
        unite([ABSOLUTE], (23, 23), "a")  # 529 pixels: the last run ends at 531, also if the first is 1
    texts = {"a": [ABSOLUTE], "b": ["5 2 1 1 9 3 8 2 7 1"]}
    assert (
        read_annotations(table(tmp_path, "".join(f"{name},{text[0]}\n" for name, text in texts.items())))
        == texts
    )


def test_a_mask_and_minus_one_of_one_image_are_kept_and_the_mask_is_used(tmp_path: Path) -> None:
    annotations = read_annotations(table(tmp_path, "a,-1\na,3 2\nb,-1\nb,-1\nc,1 1\n"))
    assert annotations == {"a": ["3 2", "-1"], "b": [], "c": ["1 1"]}
    labels = run_length_labels(annotations)
    read = [read_label(label, b"", (3, 4), name, 99) for name, label in labels.items()]
    assert [(label.annotations, np.count_nonzero(label.mask)) for label in read] == [(1, 2), (0, 0), (1, 1)]
    note = "the table has a mask and -1: the mask is used"
    assert [label.notes for label in read] == [(note,), (), ()]


def test_ids_match_files_without_folders_and_suffixes_if_none_matches_as_it_is() -> None:
    table = {"train/x/a": 1, "C:\\data\\b": 2, "c": 3}
    assert match_ids(table, {"a", "b.png", "d"}) == {"a": 1, "b.png": 2, "c": 3}
    assert match_ids(table, {"a", "b", "c"}) == table  # c is an id as it is, so the others are, too
    assert match_ids({"a": 1}, {"x/a", "y/a"}) == {"a": 1}  # which of them is unknown
    with pytest.raises(UserError, match=r"^y/a and x/a: both match the image a"):
        match_ids({"x/a": 1, "y/a": 2}, {"a"})


def test_a_text_of_a_ragged_mask_may_be_longer_than_csv_allows_by_default(tmp_path: Path) -> None:
    text = " ".join(["1 1"] * 50_000)
    assert read_annotations(table(tmp_path, f"a,{text}\n")) == {"a": [text]}


HEADER = "ImageId,EncodedPixels\n"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "the table is empty"),
        ("\n \n", "the table is empty"),
        (HEADER, "has a header but no rows"),
        ("ImageId,ClassId\na,1 2\n", "found the columns ImageId, ClassId"),
        ("ImageId EncodedPixels\na 1 2\n", "found the one column ImageId EncodedPixels; separate columns by"),
        (HEADER + "a,387,620 23\n", "line 2: 3 fields, and 2 in the first line; put fields with"),
        ("ImageId,EncodedPixels,by\na,1 2,x,y\n", "line 2: 4 fields, and 3 in the first line"),
        ("Jane Doe,\nb,1 2\nc\n", "line 3: an image id or value is missing"),
        ("a.1,Jane Doe\n", "found a first row of 2 fields without these names"),
        ("a.1,1 2,3\n", "found a first row of 3 fields without these names"),
        (HEADER + ",1 2\n", "line 2: an image id or value is missing"),
        (HEADER + "b,-1\na,\nc,NaN\n", "line 3: no run lengths for a, and other images have -1"),
        (HEADER + "a.png,1 2\na.jpg,1 2\n", "line 3: a.jpg and a.png differ only in their suffixes"),
        (HEADER + f"b,7 3\na,{ABSOLUTE}\n", "line 3: the run lengths look absolute: each start"),
        (HEADER.encode() + b"a,1 2\nb,\xfc\n", "line 3: not a CSV table in UTF-8"),
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


@pytest.mark.parametrize(
    ("texts", "pixels", "overlap"),
    [
        (["0 3", "2 3", "10 1"], [0, 1, 2, 3, 4, 10], True),
        (["0 3", "3 3"], [0, 1, 2, 3, 4, 5], False),  # they only touch
        ([], [], False),
    ],
)
def test_annotations_of_one_image_are_united_not_added(
    texts: list[str], pixels: list[int], overlap: bool
) -> None:
    mask, overlapping = unite(texts, (4, 3), "a")
    assert (mask.T.ravel().nonzero()[0].tolist(), overlapping) == (pixels, overlap)
    with pytest.raises(UserError, match=r"^a: odd"):
        unite([*texts, "2"], (4, 3), "a")


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


@pytest.mark.parametrize("rows", ["image7,Jane Doe", "image7,x,Jane Doe", "id,patient\ni,Jane Doe\ni,Doe J"])
def test_no_patient_is_named_in_a_message(tmp_path: Path, rows: str) -> None:
    with pytest.raises(UserError) as caught:
        read_patients(table(tmp_path, f"{rows}\n"))
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


def test_the_real_table_has_the_known_numbers_of_images_patients_overlaps_and_areas(real_data: Path) -> None:
    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    counts = np.array([len(texts) for texts in annotations.values()])
    assert (len(counts), np.count_nonzero(counts), counts.max()) == (12047, 2669, 10)
    assert np.count_nonzero(counts > 1) == 624
    patients = read_patients(real_data / "labels" / "patients.csv.gz")
    assert patients.keys() == annotations.keys()
    assert patients["1.2.276.0.7230010.3.1.4.8323329.5597.1517875188.959090"] == "00028864"
    areas, overlaps, added_more = list[int](), 0, 0
    for image_id, texts in annotations.items():
        if texts:
            mask, overlapping = unite(texts, (1024, 1024), image_id)
            areas.append(np.count_nonzero(mask.T))
            overlaps += overlapping
            added_more += sum(map(int, " ".join(texts).split()[1::2])) > areas[-1]
    assert overlaps == added_more == 183
    assert (min(areas), np.median(areas), max(areas)) == (55, 8630, 161421)


READER = """
import resource, sys
from pathlib import Path
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for name in sys.argv[1:]:
    try:
        read_annotations(Path(name))
    except UserError as error:
        print(error)
"""


def test_a_table_without_end_is_one_line_and_little_memory(tmp_path: Path) -> None:
    long, many = tmp_path / "long.csv.gz", tmp_path / "many.csv.gz"
    long.write_bytes(gzip.compress(b"\n" * 2**27, 1, mtime=0))
    many.write_bytes(gzip.compress(b"a\n" * 2**21, 1, mtime=0))
    command = [sys.executable, "-c", READER, long, many, "/dev/zero"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{long}: unpacks to more than 100,000,000 bytes; check that it is the right table",
        f"{many}: more than 1,048,576 rows; check that it is the right table",
        "/dev/zero: contains more than 100,000,000 bytes; check that it is the right table",
    ]
