from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from html_reader import HOSTILE, Reader
from hypothesis import given
from hypothesis import strategies as st

from pneumo_experiments.data_report.page import page
from pneumo_experiments.data_report.report import DataReport
from pneumo_experiments.data_report.statistics import Statistics, make_statistics
from pneumo_experiments.data_report.summary import summary
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.packed_image import Entry, Packed, hash_patient
from pneumo_experiments.dataset.patients import Grouping
from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.dataset.shards import FileResult
from pneumo_experiments.dicom.archive import DIFFERING_FILES, Archive
from pneumo_experiments.dicom.containers import DicomFile

ANNA, BERT, CARL = hash_patient("Anna"), hash_patient("Bert"), hash_patient("", "c1")
JPEG, PLAIN = "JPEG Baseline, 8 bit, MONOCHROME2", "Explicit VR Little Endian, 12 bit, MONOCHROME1"

ENTRIES = [
    Entry("a1", ANNA, "PA", "F", 34, 100, 200, 0, 0),
    Entry("b1", BERT, "AP", "M", 61, 100, 100, 1, 1000),
    Entry("b2", BERT, "AP", "M", 61, 100, 100, 3, 4000),
    Entry("a2", ANNA, "PA", "F", 35, 100, 200, 1, 100),
    Entry("c1", CARL, "", "", -1, 100, 100, 0, 0),
    Entry("b3", BERT, "AP", "M", 148, 100, 100, 1, 500),
]


def used(entry: Entry, pixels: str = "", format: str = JPEG) -> FileResult:
    """The result of a file that is used; ``pixels`` tell equal images."""
    packed = Packed(entry, None, pixels or entry.image_id, "", b"", None)
    return FileResult(entry.image_id, format=format, packed=packed)


def made(
    results: Sequence[FileResult],
    others: Collection[str] = (),
    annotated: Collection[str] | None = (),
    **archive: object,
) -> Statistics:
    """The statistics of these files; ``others`` were found, ``annotated`` are in the table beside results."""
    ids = sorted({*(result.image_id for result in results), *others})
    members = tuple(DicomFile(image_id, f"{image_id}.dcm", 0, 0) for image_id in ids)
    nothing = {"skipped": {}, "duplicates": {}, "differing": ()}
    listed = Archive(Path(), **({"files": len(ids), "members": members} | nothing | archive))  # type: ignore[arg-type]
    table = None if annotated is None else {*annotated, *(each.image_id for each in results if each.packed)}
    return make_statistics(listed, table, Grouping("shipped table", hashes={"a1": ANNA, "a2": ANNA}), results)


def clean() -> list[FileResult]:
    return [used(entry, format=PLAIN if entry.image_id == "c1" else JPEG) for entry in ENTRIES]


TABLE = ("r1", "r2", "r5", "d1", "gone2", "gone1", "late")  # beside the images that are used


def full(order: int = 1, annotated: Collection[str] | None = TABLE) -> Statistics:
    """The statistics of a folder that has everything; ``order`` -1 reads it backwards."""
    pixels = ["same", "p1", "p1", "p3", "same", "same"]
    formats = [JPEG, JPEG, JPEG, JPEG, PLAIN, JPEG]
    results = list(map(used, ENTRIES, pixels, formats))
    results[2] = replace(results[2], notes=("a window",), overlapping=True)
    results[3] = replace(results[3], notes=("a window",))
    results[4] = replace(results[4], notes=("a table",))
    results += [
        FileResult("r2", reason="5 frames instead of one"),
        FileResult("r1", reason="12 frames instead of one"),
        FileResult("r3", reason="not a DICOM file"),
        FileResult("r5", reason="odd number of run lengths (3); write pairs", invalid_run_lengths=True),
    ]
    return made(
        results[::order],
        ["u1", "u0", "late"],
        annotated,
        files=16,
        identified_by="the file's path",
        skipped={"__MACOSX and ._ files": 3, "zip files": 1, ".DS_Store": 0},
        duplicates={"u1": 2, "b1": 3, "d1": 2},
        differing=("d1",),
    )


def findings(html: str) -> dict[str, int]:
    """Count of each line that unfolds, by its title."""
    lines = re.findall(r"<summary><b>([\d,]+)</b><span>(.*?)</span></summary>", html)
    return {title: int(n.replace(",", "")) for n, title in lines}


def rejection(reason: str, **files: str) -> dict[str, object]:
    return {"reason": reason, "files": [{"image_id": name, "reason": each} for name, each in files.items()]}


def test_the_json_says_what_was_found_used_and_left_out() -> None:
    found = json.loads(DataReport("d.h5", full(), is_written=True).json)
    annotated, ages = found.pop("annotated"), found.pop("ages")
    odd = "odd number of run lengths ({}); write pairs"
    assert found == {
        "files": 16,
        "images": 14,
        "identified_by": "the file's path",
        "outcome": {"used": 6, "rejected": 5, "without_annotation": 2, "not_read": 1},
        "skipped": {"__MACOSX and ._ files": 3, "zip files": 1},
        "rejected": [
            rejection("n frames instead of one", r1="12 frames instead of one", r2="5 frames instead of one"),
            rejection("not a DICOM file", r3="not a DICOM file"),
            rejection(odd.format("n"), r5=odd.format(3)),
            rejection(DIFFERING_FILES, d1=DIFFERING_FILES),
        ],
        "invalid_run_lengths": ["r5"],
        "annotated_without_file": ["gone1", "gone2"],
        "files_without_annotation": ["u0", "u1"],  # r3 is rejected already
        "duplicates": {
            "b1": {"files": 3, "used": True},
            "d1": {"files": 2, "used": False},
            "u1": {"files": 2, "used": False},
        },
        "identical_images": [
            {"image_ids": ["a1", "b3", "c1"], "patients": 3, "areas_px": [0, 500, 0]},
            {"image_ids": ["b1", "b2"], "patients": 1, "areas_px": [1000, 4000]},
        ],
        "views": {"AP": 3, "PA": 2, "unknown": 1},
        "sexes": {"M": 3, "F": 2, "unknown": 1},
        "sizes": {"100 x 100": 4, "100 x 200": 2},
        "formats": {JPEG: 5, PLAIN: 1},
        "notes": {"a window": ["a2", "b2"], "a table": ["c1"]},
        "patients": {
            "count": 3,
            "most_images": 3,
            "images_per_patient": {"1": 1, "2": 1, "3": 1},
            "sources": {"shipped table": 2, "PatientID": 3, "unknown": 1},
        },
    }
    assert list(found["views"]) == ["AP", "PA", "unknown"]  # the most frequent first
    # Ages 34, 35, 61, 61 and areas 100, 500, 1000, 4000; between neighbours the quantile is linear, at 3 x q.
    quantiles = {"min": 34, "p10": 34.3, "p25": 34.75, "p50": 48, "p75": 61, "p90": 61, "max": 61}
    assert ages.pop("quantiles") == pytest.approx(quantiles)
    decades = {"30-39": 2, "40-49": 0, "50-59": 0, "60-69": 2}
    assert ages == {"unknown": 1, "implausible": {"b3": 148}, "decades": decades}
    areas = {"min": 100, "p10": 220, "p25": 400, "p50": 750, "p75": 1750, "p90": 3100, "max": 4000}
    assert annotated.pop("area_px") == pytest.approx(areas)
    # Fractions .005 (of 100 x 200), .05, .1, .4.
    fractions = {"min": 0.005, "p10": 0.0185, "p25": 0.03875, "p50": 0.075, "p75": 0.175, "p90": 0.31}
    assert annotated.pop("area_share") == pytest.approx(fractions | {"max": 0.4})
    assert annotated == {
        "positives": 4,
        "annotations_per_positive": {"1": 3, "3": 1},
        "overlapping": ["b2"],
        "dice_all_empty": 2 / 6,
    }


def test_what_is_equally_frequent_is_in_the_order_of_its_names() -> None:
    results = [used(replace(ENTRIES[0], image_id=f"i{n}"), format=name) for n, name in enumerate("baccba")]
    assert list(made(results).formats) == ["a", "b", "c"]


@pytest.mark.parametrize(("age", "known"), [(-1, False), (0, True), (110, True), (111, False)])
def test_an_age_from_0_to_110_is_plausible(age: int, known: bool) -> None:
    ages = made([used(replace(ENTRIES[0], age=age))]).ages
    assert (ages.quantiles is not None) == bool(ages.decades) == known
    assert (ages.unknown, len(ages.implausible)) == (int(age < 0), int(age > 110))


def test_a_set_without_labels_has_no_annotations_and_misses_none() -> None:
    found = full(annotated=None)
    assert found.annotated is None
    assert found.annotated_without_file == found.files_without_annotation == []
    assert (found.outcome.without_annotation, found.outcome.not_read) == (0, 3)
    assert "without labels" in page(found, "Test set")
    assert not any("Dice" in line or "pneumothorax" in line for line in summary(found))


def test_a_set_of_negatives_has_no_areas() -> None:
    found = made([used(replace(entry, area_px=0, annotations=0)) for entry in ENTRIES])
    assert found.annotated is not None
    assert found.annotated.area_px is None and found.annotated.area_share is None
    assert found.annotated.dice_all_empty == 1
    assert "Annotated area" not in page(found, "Negatives")
    assert summary(found)[-1] == "0 with pneumothorax; all-empty predictions score Dice 1.0000"


def test_a_report_without_a_used_image_still_gives_the_reasons() -> None:
    found = made([FileResult("r1", reason="not a DICOM file")], annotated=["r1"])
    assert (found.outcome.used, found.outcome.rejected, found.patients.count) == (0, 1, 0)
    assert found.ages.quantiles is None and found.ages.decades == {}
    assert found.annotated is not None and found.annotated.dice_all_empty is None
    html = DataReport("d.h5", found, is_written=False).page
    assert "Data report: d.h5 was not written" in html
    assert "No image was used" in html and "Rejected: not a DICOM file" in html
    assert "rejected, not a DICOM file (1): r1" in summary(found)
    assert summary(made([]))[0] == "0 files found: 0 used"
    assert made([], [f"i{n}" for n in range(9)]).files_without_annotation == [f"i{n}" for n in range(9)]


def test_the_order_of_the_input_changes_nothing() -> None:
    assert json.dumps(asdict(full(-1))) == json.dumps(asdict(full()))


def test_no_patient_leaves_a_report() -> None:
    report = DataReport("d.h5", full(), is_written=True)
    for patient in (ANNA, BERT, CARL):
        assert patient not in report.json + report.page + "".join(report.lines)


def test_the_summary_is_short_and_complete() -> None:
    assert summary(full()) == [
        "16 files found with 14 image ids: 6 used, 5 rejected, 2 without annotation, 1 not read",
        "rejected for 4 reasons (5): n frames instead of one, not a DICOM file,"
        " odd number of run lengths (3) and 1 more",
        "skipped: __MACOSX and ._ files (3), zip files (1)",
        "the id of an image is the file's path",
        "annotated, but no file found (2): gone1, gone2",
        "file found, but not in the annotation table (2): u0, u1",
        "several files with the same id (3): b1, d1, u1",
        "same image under several ids (2): a1 = b3, b1 = b2",
        "read with notes: a window (2), a table (1)",
        "6 images of 3 patients, at most 3 per patient",
        "view AP 3, PA 2, unknown 1; sex M 3, F 2, unknown 1; age median 48 years, 1 unknown, 1 above 110",
        "4 with pneumothorax, median area 750 px, 1 with overlapping annotations;"
        " all-empty predictions score Dice 0.3333",
    ]


def test_a_clean_summary_mentions_no_faults() -> None:
    assert summary(made(clean())) == [
        "6 files found: 6 used",
        "6 images of 3 patients, at most 3 per patient",
        "view AP 3, PA 2, unknown 1; sex M 3, F 2, unknown 1; age median 48 years, 1 unknown, 1 above 110",
        "4 with pneumothorax, median area 750 px; all-empty predictions score Dice 0.3333",
    ]


def test_a_summary_names_three_ids_and_counts_the_rest() -> None:
    ids = [f"gone{i}" for i in range(1203)]
    lines = summary(made(clean(), annotated=ids))
    assert "annotated, but no file found (1,203): gone0, gone1, gone10 and 1,200 more" in lines


def test_a_summary_gives_reasons_the_lines_that_are_left() -> None:
    rejected = [FileResult(f"r{i}", reason=f"fault {'abcdefgh'[i]}; repair it") for i in range(8)]
    lines = summary(made(clean() + rejected))
    assert len(lines) == 12
    assert lines[1] == "rejected, fault a (1): r0"
    assert lines[8] == "rejected, fault h (1): r7"


def test_a_long_id_is_shortened_to_its_end_and_a_terminal_gets_no_control_characters() -> None:
    uid = "1.2.276.0.7230010.3.1.4.8323329.14508.1517875252.443873"
    odd = [FileResult(uid, reason="damaged"), FileResult("\x1b[2J\udce9\n", reason="empty")]
    lines = summary(made(clean() + odd))
    assert lines[1] == f"rejected, damaged (1): …{uid[-23:]}"
    assert lines[2] == "rejected, empty (1): \ufffd[2J\ufffd\ufffd"


def test_the_page_shows_every_finding_with_its_count() -> None:
    assert findings(page(full(), "Report")) == {
        "Rejected: n frames instead of one": 2,
        "Rejected: not a DICOM file": 1,
        "Rejected: odd number of run lengths (3); write pairs": 1,
        f"Rejected: {DIFFERING_FILES}": 1,
        "Of these, rejected because of their run lengths": 1,
        "File found, but not in the annotation table": 2,
        "Annotated, but no file found": 2,
        "Skipped files": 4,
        "Several files with the same id": 3,
        "The same image under several ids": 2,
        "Images whose annotations overlap": 1,
        "Ages above 110 years": 1,
        "a window": 2,
        "a table": 1,
    }
    assert findings(page(made([used(replace(entry, age=50)) for entry in ENTRIES]), "Report")) == {}


def test_the_page_explains_its_numbers_in_plain_words() -> None:
    text = Reader(page(full(), "Data of a clinic")).text
    for words in (
        "Data of a clinic files found 16 images used 6 images left out 8 patients 3 with pneumothorax 4",
        "r1 12 frames instead of one r2 5 frames instead of one",
        "b1 3 files, one is used",
        "u1 2 files, none is used",
        "a1 = b3 = c1 3 patients; annotated 0, 500, 0 px",
        "View AP 3 50.0% PA 2 33.3% unknown 1 16.7%",
        "M (male) 3 50.0% F (female) 2 33.3%",
        "40-49 0 0.0%",
        "The age is unknown for 1 image.",
        "Median 750 7.50%",
        "4 of 6 images (66.7%) show a pneumothorax. Predicting every image as empty scores a Dice of 0.3333",
    ):
        assert words in text


def test_a_hostile_name_is_shown_and_not_run() -> None:
    entries = [replace(ENTRIES[0], image_id=HOSTILE, view=HOSTILE, sex=HOSTILE, age=200), *ENTRIES[1:]]
    results = [replace(used(entry, "p", HOSTILE), overlapping=True) for entry in entries]
    results.append(FileResult(HOSTILE + "2", reason=HOSTILE, invalid_run_lengths=True))
    found = made(
        results, [HOSTILE + "4"], [HOSTILE + "3"], skipped={HOSTILE: 1}, duplicates={HOSTILE: 2}, files=9
    )
    html = page(found, HOSTILE, [(HOSTILE, HOSTILE), (HOSTILE, "data:image/" + HOSTILE)])
    plain = page(full(), "Report", [("one", "one.png"), ("two", "two.png")])
    reader = Reader(html)
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in Reader(plain).tags}
    assert reader.open == []
    attributes = {name for _, attributes in reader.tags for name in attributes}
    assert attributes == {name for _, attributes in Reader(plain).tags for name in attributes}
    assert reader.text.count(HOSTILE) >= 15


def test_the_page_loads_nothing_from_elsewhere() -> None:
    sources = [
        "data:image/png;base64,AAAA",
        "sheet 1.png",
        "http://evil/x.png",
        "//evil/x.png",
        "data:text/html,x",
    ]
    html = page(full(), "Report", [("sheet", source) for source in sources])
    reader = Reader(html)
    addresses = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert addresses == [
        "data:image/png;base64,AAAA",
        "./sheet%201.png",
        "./http%3A//evil/x.png",
        ".///evil/x.png",
        "./data%3Atext/html%2Cx",
    ]
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "a", "base", "form"}
    assert "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_lists_a_thousand_names_and_points_to_the_rest() -> None:
    ids = [f"gone{i:04d}" for i in range(1001)]
    html = page(made(clean(), annotated=ids), "Report")
    assert "gone0999" in html and "gone1000" not in html
    assert "The first 1,000; the JSON report lists all." in html
    assert findings(html)["Annotated, but no file found"] == 1001


def test_a_bar_is_as_long_as_its_count_and_absent_for_none() -> None:
    ages = {"a": 25, "b": 47, "c": 48, "d": 49, "e": 41}
    results = [used(replace(ENTRIES[0], image_id=name, age=age)) for name, age in ages.items()]
    html = page(made(results), "Report")
    lengths = dict(re.findall(r'<th scope=row>([\d-]+)</th><td><i style="--part: (.*?)"', html))
    assert lengths["20-29"] == "max(2px, 25.0%)"
    assert lengths["30-39"] == "0%"
    assert lengths["40-49"] == "max(2px, 100.0%)"


def test_a_chart_sums_up_what_it_has_no_bars_for() -> None:
    entries = [replace(ENTRIES[0], image_id=f"i{n}", rows=1000 + n // 2) for n in range(30)]
    text = Reader(page(made(list(map(used, entries))), "Report")).text
    assert "1011 x 200 2 6.7% 3 others 6 20.0%" in text


def test_a_page_is_utf_8_whatever_a_file_is_called() -> None:
    html = page(made([FileResult("Thorax \udce9 é \x00", reason="damaged")]), "Report")
    assert "Thorax \ufffd é \ufffd" in html.encode("utf-8").decode("utf-8")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 130), st.integers(0, 2000)), max_size=40))
def test_counts_add_up_to_the_images(draws: list[tuple[int, int, int]]) -> None:
    entries = [
        Entry(f"i{n}", hash_patient(str(patient)), "PA", "F", age, 50, 40, int(area > 0), area)
        for n, (patient, age, area) in enumerate(draws)
    ]
    ids = [entry.image_id for entry in entries]
    report = made([used(entry, str(entry.area_px % 3)) for entry in entries])
    assert sum(report.ages.decades.values()) + report.ages.unknown + len(report.ages.implausible) == len(ids)
    assert sum(int(n) * k for n, k in report.patients.images_per_patient.items()) == len(ids)
    twins = [image_id for group in report.identical_images for image_id in group.image_ids]
    lonely = sum(n == 1 for n in Counter(area % 3 for _, _, area in draws).values())
    assert len(twins) == len(set(twins)) == len(ids) - lonely
    assert report.annotated is not None
    areas = sorted(entry.area_px for entry in entries if entry.area_px)
    assert report.annotated.positives == len(areas)
    if areas:
        assert report.annotated.area_px is not None
        assert report.annotated.area_px["p50"] == (areas[(len(areas) - 1) // 2] + areas[len(areas) // 2]) / 2
    lines = summary(report)
    assert len(lines) <= 12 and all(line == line.strip() and line for line in lines)


def test_the_report_of_real_annotations_has_their_known_areas(real_data: Path) -> None:
    annotations = read_annotations(real_data / "train-rle.csv")
    entries = []
    for name, texts in annotations.items():
        masks = [decode(text, (1024, 1024), name) for text in texts or ["-1"]]
        area = int(np.any(masks, axis=0).sum())
        entries.append(Entry(name, hash_patient("", name), "PA", "F", 40, 1024, 1024, len(texts), area))
    found = made(list(map(used, entries))).annotated
    known = np.loadtxt(real_data / "known_areas.csv", delimiter=",", skiprows=1, usecols=2, dtype=int)
    assert found is not None and found.area_px is not None
    assert found.positives == np.count_nonzero(known)
    assert found.area_px["p50"] == np.median(known[known > 0])
    assert found.area_px["max"] == known.max()
    assert found.annotations_per_positive == {"1": 6, "4": 1}
