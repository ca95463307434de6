from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_reader import HOSTILE, Reader
from hypothesis import given
from hypothesis import strategies as st

from pneumo_experiments.data_report.page import page
from pneumo_experiments.data_report.statistics import Report, make_report
from pneumo_experiments.data_report.summary import summary
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.packed import Entry, hash_patient
from pneumo_experiments.dataset.rle import decode

ANNA, BERT, CARL = (hash_patient(name) for name in ("Anna", "Bert", "Carl"))
JPEG, PLAIN = "JPEG Baseline, 8 bit, MONOCHROME2", "Explicit VR Little Endian, 12 bit, MONOCHROME1"

ENTRIES = [
    Entry("a1", ANNA, "PA", "F", 34, 100, 200, 0, 0),
    Entry("b1", BERT, "AP", "M", 61, 100, 100, 1, 1000),
    Entry("b2", BERT, "AP", "M", 61, 100, 100, 3, 4000),
    Entry("a2", ANNA, "PA", "F", 35, 100, 200, 1, 100),
    Entry("c1", CARL, "", "", -1, 100, 100, 0, 0),
    Entry("b3", BERT, "AP", "M", 148, 100, 100, 1, 500),
]
CLEAN: dict[str, Any] = {
    "files": 6,
    "identified_by": "",
    "skipped": {},
    "duplicates": {},
    "rejected": [],
    "entries": ENTRIES,
    "patient_sources": {"shipped table": 4, "unknown": 2},
    "pixel_hashes": ["p0", "p1", "p2", "p3", "p4", "p5"],
    "formats": [JPEG, JPEG, JPEG, JPEG, PLAIN, JPEG],
    "notes": [],
    "annotated": [entry.image_id for entry in ENTRIES],
    "file_ids": [entry.image_id for entry in ENTRIES],
    "overlapping": [],
    "invalid_run_lengths": [],
}
REJECTED = [
    ("r2", "r2: 5 frames instead of one"),
    ("r1", "12 frames instead of one"),
    ("r3", "not a DICOM file"),
    ("r5", "odd number of run lengths (3); write pairs 'gap length'"),
    ("b1", "another file of this image is used"),
]
FULL = CLEAN | {
    "files": 15,
    "identified_by": "the file's path",
    "skipped": {"__MACOSX and ._ files": 3, "zip files": 1, ".DS_Store": 0},
    "duplicates": {"u1": 2, "b1": 3},
    "rejected": REJECTED,
    "pixel_hashes": ["same", "p1", "p1", "p3", "same", "same"],
    "annotated": {*CLEAN["annotated"], "r1", "r2", "r5", "gone2", "gone1", "late"},
    "file_ids": [*CLEAN["file_ids"], "r1", "r2", "r3", "r5", "u1", "u0", "late"],
    "notes": [("a window", "b2"), ("a table", "c1"), ("a window", "a2")],
    "overlapping": ["b2"],
    "invalid_run_lengths": ["r5"],
}


def full_report() -> Report:
    return make_report(**FULL)


def findings(html: str) -> dict[str, int]:
    """Count of each line that unfolds, by its title."""
    lines = re.findall(r"<summary><b>([\d,]+)</b><span>(.*?)</span></summary>", html)
    return {title: int(n.replace(",", "")) for n, title in lines}


def test_each_image_found_has_one_outcome() -> None:
    report = full_report()
    assert (report.files, report.images) == (15, 13)
    outcome = report.outcome
    assert (outcome.used, outcome.rejected, outcome.without_annotation, outcome.not_read) == (6, 4, 2, 1)


def test_rejections_for_one_reason_stand_together_with_each_ones_own_words() -> None:
    kinds = full_report().as_json()["rejected"]
    assert kinds == [
        {
            "reason": "n frames instead of one",
            "files": [
                {"image_id": "r1", "reason": "12 frames instead of one"},
                {"image_id": "r2", "reason": "5 frames instead of one"},
            ],
        },
        {
            "reason": "another file of this image is used",
            "files": [{"image_id": "b1", "reason": "another file of this image is used"}],
        },
        {"reason": "not a DICOM file", "files": [{"image_id": "r3", "reason": "not a DICOM file"}]},
        {
            "reason": "odd number of run lengths (n); write pairs 'gap length'",
            "files": [
                {"image_id": "r5", "reason": "odd number of run lengths (3); write pairs 'gap length'"}
            ],
        },
    ]


def test_a_reason_is_shown_with_its_numbers_where_all_files_share_them() -> None:
    headings = [kind.heading for kind in full_report().rejected]
    assert headings[0] == "n frames instead of one"
    assert headings[3] == "odd number of run lengths (3); write pairs 'gap length'"


def test_what_does_not_fit_together_is_listed_in_full_and_sorted() -> None:
    report = full_report()
    assert report.skipped == {"__MACOSX and ._ files": 3, "zip files": 1}
    assert list(report.notes.items()) == [("a window", ["a2", "b2"]), ("a table", ["c1"])]
    assert report.annotated_without_file == ["gone1", "gone2"]
    assert report.files_without_annotation == ["u0", "u1"]  # r3 is rejected already
    assert report.invalid_run_lengths == ["r5"]
    assert list(report.duplicates) == ["b1", "u1"]
    assert report.duplicates["b1"].files == 3
    assert [double.used for double in report.duplicates.values()] == [True, False]


def test_a_table_without_rows_leaves_every_file_without_annotation() -> None:
    ids = [f"i{n}" for n in range(9)]
    nothing = {"entries": [], "pixel_hashes": [], "formats": [], "annotated": [], "file_ids": ids[::-1]}
    assert make_report(**CLEAN | nothing).files_without_annotation == ids


def test_the_same_image_is_found_with_its_patients_and_areas() -> None:
    assert full_report().as_json()["identical_images"] == [
        {"image_ids": ["a1", "b3", "c1"], "patients": 3, "areas_px": [0, 500, 0]},
        {"image_ids": ["b1", "b2"], "patients": 1, "areas_px": [1000, 4000]},
    ]
    assert make_report(**CLEAN).identical_images == []


def test_views_sexes_sizes_and_formats_are_counted_the_most_frequent_first() -> None:
    report = full_report()
    assert list(report.views.items()) == [("AP", 3), ("PA", 2), ("unknown", 1)]
    assert list(report.sexes.items()) == [("M", 3), ("F", 2), ("unknown", 1)]
    assert list(report.sizes.items()) == [("100 x 100", 4), ("100 x 200", 2)]
    assert list(report.formats.items()) == [(JPEG, 5), (PLAIN, 1)]
    equal = make_report(**CLEAN | {"formats": ["b", "a", "c", "c", "b", "a"]})
    assert list(equal.formats) == ["a", "b", "c"]


def test_ages_count_unknown_and_implausible_ones_apart() -> None:
    ages = full_report().ages
    assert ages.unknown == 1
    assert ages.implausible == {"b3": 148}
    assert ages.decades == {"30-39": 2, "40-49": 0, "50-59": 0, "60-69": 2}
    assert ages.quantiles is not None
    assert (ages.quantiles["min"], ages.quantiles["p50"], ages.quantiles["max"]) == (34, 48, 61)


@pytest.mark.parametrize(("age", "known"), [(-1, False), (0, True), (110, True), (111, False)])
def test_an_age_from_0_to_110_is_plausible(age: int, known: bool) -> None:
    one = {"entries": [replace(ENTRIES[0], age=age)], "pixel_hashes": ["p"], "formats": [JPEG]}
    ages = make_report(**CLEAN | one).ages
    assert (ages.quantiles is not None) == bool(ages.decades) == known
    assert (ages.unknown, len(ages.implausible)) == (int(age < 0), int(age > 110))


def test_patients_are_counted_by_their_images() -> None:
    patients = full_report().patients
    assert (patients.count, patients.most_images) == (3, 3)
    assert patients.images_per_patient == {"1": 1, "2": 1, "3": 1}


def test_areas_are_those_of_positives_in_pixels_and_as_share_of_each_ones_picture() -> None:
    found = full_report().annotated
    assert found is not None
    assert found.positives == 4
    assert found.annotations_per_positive == {"1": 3, "3": 1}
    # Areas 100, 500, 1000, 4000; between neighbours the quantile is linear, at 3 x q.
    assert found.area_px == pytest.approx(
        {"min": 100, "p10": 220, "p25": 400, "p50": 750, "p75": 1750, "p90": 3100, "max": 4000}
    )
    # Shares .005 (of 100 x 200), .05, .1, .4.
    assert found.area_share == pytest.approx(
        {"min": 0.005, "p10": 0.0185, "p25": 0.03875, "p50": 0.075, "p75": 0.175, "p90": 0.31, "max": 0.4}
    )
    assert found.overlapping == ["b2"]
    assert found.dice_all_empty == 2 / 6


def test_a_set_without_labels_has_no_annotations_and_misses_none() -> None:
    report = make_report(**FULL | {"annotated": None})
    assert report.annotated is None
    assert report.annotated_without_file == report.files_without_annotation == []
    assert report.outcome.without_annotation == 0
    assert "without labels" in page(report, "Test set")
    assert not any("Dice" in line or "pneumothorax" in line for line in summary(report))


def test_a_set_of_negatives_has_no_areas() -> None:
    negatives = [replace(entry, area_px=0, annotations=0) for entry in ENTRIES]
    report = make_report(**CLEAN | {"entries": negatives})
    assert report.annotated is not None
    assert report.annotated.area_px is None and report.annotated.area_share is None
    assert report.annotated.dice_all_empty == 1
    assert "Annotated area" not in page(report, "Negatives")
    assert summary(report)[-1] == "0 with pneumothorax; all-empty predictions score Dice 1.0000"


def test_a_report_without_a_used_image_still_gives_the_reasons() -> None:
    nothing = {"entries": [], "pixel_hashes": [], "formats": [], "overlapping": []}
    report = make_report(**FULL | nothing | {"file_ids": ["b1", "r1", "r2", "r3", "r5"]})
    assert (report.outcome.used, report.outcome.rejected, report.patients.count) == (0, 5, 0)
    assert report.ages.quantiles is None and report.ages.decades == {}
    assert report.annotated is not None and report.annotated.dice_all_empty is None
    assert json.loads(json.dumps(report.as_json())) == report.as_json()
    html = page(report, "Nothing")
    assert "No image was used" in html and "Rejected: not a DICOM file" in html
    assert "rejected, not a DICOM file (1): r3" in summary(report)
    empty = FULL | nothing | {"files": 0, "file_ids": [], "rejected": [], "annotated": []}
    assert summary(make_report(**empty))[0] == "0 files found: 0 used"


def test_lists_that_belong_together_must_have_one_length() -> None:
    with pytest.raises(ValueError, match="6 entries, 5 pixel hashes, 6 formats"):
        make_report(**CLEAN | {"pixel_hashes": ["p"] * 5})


def test_the_json_has_all_fields_and_survives_a_file() -> None:
    told = full_report().as_json()
    assert json.loads(json.dumps(told)) == told
    assert list(told) == [
        *("files", "images", "identified_by", "outcome", "skipped", "rejected", "invalid_run_lengths"),
        *("annotated_without_file", "files_without_annotation", "duplicates", "identical_images"),
        *("views", "sexes", "ages", "sizes", "formats", "notes", "patients", "annotated"),
    ]


def test_the_order_of_the_input_changes_nothing() -> None:
    backwards = {name: FULL[name][::-1] for name in ("entries", "pixel_hashes", "formats", "rejected")}
    backwards["file_ids"] = set(FULL["file_ids"])
    assert json.dumps(make_report(**FULL | backwards).as_json()) == json.dumps(full_report().as_json())


def test_no_patient_leaves_a_report() -> None:
    report = full_report()
    told = json.dumps(report.as_json()) + page(report, "Report") + "".join(summary(report))
    for patient in (ANNA, BERT, CARL):
        assert patient not in told


def test_the_summary_is_short_and_complete() -> None:
    assert summary(full_report()) == [
        "15 files found with 13 image ids: 6 used, 4 rejected, 2 without annotation, 1 not read",
        "rejected for 4 reasons (5): n frames instead of one, another file of this image is used,"
        " not a DICOM file and 1 more",
        "skipped: __MACOSX and ._ files (3), zip files (1)",
        "the id of an image is the file's path",
        "annotated, but no file found (2): gone1, gone2",
        "file found, but not in the annotation table (2): u0, u1",
        "several files with the same id (2): b1, u1",
        "same image under several ids (2): a1 = b3, b1 = b2",
        "read with notes: a window (2), a table (1)",
        "6 images of 3 patients, at most 3 per patient",
        "view AP 3, PA 2, unknown 1; sex M 3, F 2, unknown 1; age median 48 years, 1 unknown, 1 above 110",
        "4 with pneumothorax, median area 750 px, 1 with overlapping annotations;"
        " all-empty predictions score Dice 0.3333",
    ]


def test_a_clean_summary_mentions_no_faults() -> None:
    assert summary(make_report(**CLEAN)) == [
        "6 files found: 6 used",
        "6 images of 3 patients, at most 3 per patient",
        "view AP 3, PA 2, unknown 1; sex M 3, F 2, unknown 1; age median 48 years, 1 unknown, 1 above 110",
        "4 with pneumothorax, median area 750 px; all-empty predictions score Dice 0.3333",
    ]


def test_a_summary_names_three_ids_and_counts_the_rest() -> None:
    ids = [f"gone{i}" for i in range(1203)]
    lines = summary(make_report(**CLEAN | {"annotated": [*CLEAN["annotated"], *ids]}))
    assert "annotated, but no file found (1,203): gone0, gone1, gone10 and 1,200 more" in lines


def test_a_summary_gives_reasons_the_lines_that_are_left() -> None:
    rejected = [(f"r{i}", f"fault {'abcdefgh'[i]}; mend it") for i in range(8)]
    lines = summary(make_report(**CLEAN | {"rejected": rejected}))
    assert len(lines) == 12
    assert lines[1] == "rejected, fault a (1): r0"
    assert lines[8] == "rejected, fault h (1): r7"


def test_a_long_id_is_shortened_to_its_end_and_a_terminal_gets_no_control_characters() -> None:
    uid = "1.2.276.0.7230010.3.1.4.8323329.14508.1517875252.443873"
    lines = summary(make_report(**CLEAN | {"rejected": [(uid, "damaged"), ("\x1b[2J\udce9\n", "empty")]}))
    assert lines[1] == f"rejected, damaged (1): …{uid[-23:]}"
    assert lines[2] == "rejected, empty (1): \ufffd[2J\ufffd\ufffd"


def test_the_page_shows_every_finding_with_its_count() -> None:
    assert findings(page(full_report(), "Report")) == {
        "Rejected: n frames instead of one": 2,
        "Rejected: another file of this image is used": 1,
        "Rejected: not a DICOM file": 1,
        "Rejected: odd number of run lengths (3); write pairs &#39;gap length&#39;": 1,
        "Of these, rejected because of their run lengths": 1,
        "File found, but not in the annotation table": 2,
        "Annotated, but no file found": 2,
        "Skipped files": 4,
        "Several files with the same id": 2,
        "The same image under several ids": 2,
        "Images whose annotations overlap": 1,
        "Ages above 110 years": 1,
        "a window": 2,
        "a table": 1,
    }
    clean = CLEAN | {"entries": [replace(entry, age=50) for entry in ENTRIES]}
    assert findings(page(make_report(**clean), "Report")) == {}


def test_the_page_explains_its_numbers_in_plain_words() -> None:
    text = Reader(page(full_report(), "Data of a clinic")).text
    for words in (
        "Data of a clinic files found 15 images used 6 images left out 7 patients 3 with pneumothorax 4",
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
    hostile: dict[str, Any] = {
        "entries": entries,
        "pixel_hashes": ["p"] * 6,
        "formats": [HOSTILE] * 6,
        "skipped": {HOSTILE: 1},
        "duplicates": {HOSTILE: 2},
        "rejected": [(HOSTILE + "2", HOSTILE)],
        "annotated": [entry.image_id for entry in entries] + [HOSTILE + "3"],
        "file_ids": [entry.image_id for entry in entries] + [HOSTILE + "2", HOSTILE + "4"],
        "overlapping": [HOSTILE],
        "invalid_run_lengths": [HOSTILE + "2"],
    }
    html = page(
        make_report(**CLEAN | hostile), HOSTILE, [(HOSTILE, HOSTILE), (HOSTILE, "data:image/" + HOSTILE)]
    )
    plain = page(full_report(), "Report", [("one", "one.png"), ("two", "two.png")])
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
    html = page(full_report(), "Report", [("sheet", source) for source in sources])
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
    html = page(make_report(**CLEAN | {"annotated": [*CLEAN["annotated"], *ids]}), "Report")
    assert "gone0999" in html and "gone1000" not in html
    assert "The first 1,000; the JSON report lists all." in html
    assert findings(html)["Annotated, but no file found"] == 1001


def test_a_bar_is_as_long_as_its_count_and_absent_for_none() -> None:
    entries = [replace(ENTRIES[0], age=age) for age in (25, 47, 48, 49, 41)]
    few = {"entries": entries, "pixel_hashes": list("abcde"), "formats": [JPEG] * 5}
    html = page(make_report(**CLEAN | few), "Report")
    lengths = dict(re.findall(r'<th scope=row>([\d-]+)</th><td><i style="--part: (.*?)"', html))
    assert lengths["20-29"] == "max(2px, 25.0%)"
    assert lengths["30-39"] == "0%"
    assert lengths["40-49"] == "max(2px, 100.0%)"


def test_a_chart_sums_up_what_it_has_no_bars_for() -> None:
    entries = [replace(ENTRIES[0], image_id=f"i{n}", rows=1000 + n // 2) for n in range(30)]
    whole = {"entries": entries, "pixel_hashes": list(map(str, range(30))), "formats": [JPEG] * 30}
    text = Reader(page(make_report(**CLEAN | whole), "Report")).text
    assert "1011 x 200 2 6.7% 3 others 6 20.0%" in text


def test_a_page_is_utf_8_whatever_a_file_is_called() -> None:
    html = page(make_report(**CLEAN | {"rejected": [("Thorax \udce9 é \x00", "damaged")]}), "Report")
    assert "Thorax \ufffd é \ufffd" in html.encode("utf-8").decode("utf-8")


def entries_of(draws: list[tuple[int, int, int]]) -> list[Entry]:
    return [
        Entry(f"i{n}", hash_patient(str(patient)), "PA", "F", age, 50, 40, int(area > 0), area)
        for n, (patient, age, area) in enumerate(draws)
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 130), st.integers(0, 2000)), max_size=40))
def test_counts_add_up_to_the_images(draws: list[tuple[int, int, int]]) -> None:
    entries = entries_of(draws)
    ids = [entry.image_id for entry in entries]
    whole = {
        "entries": entries,
        "pixel_hashes": [str(area % 3) for _, _, area in draws],
        "formats": [JPEG] * len(ids),
    }
    report = make_report(**CLEAN | whole | {"file_ids": ids, "annotated": ids, "files": len(ids)})
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
    ids = list(annotations)
    given_lists = {"entries": entries, "pixel_hashes": ids, "formats": [JPEG] * len(ids)}
    whole = {"file_ids": ids, "annotated": set(ids), "files": len(ids)}
    found = make_report(**CLEAN | given_lists | whole).annotated
    known = np.loadtxt(real_data / "known_areas.csv", delimiter=",", skiprows=1, usecols=2, dtype=int)
    assert found is not None and found.area_px is not None
    assert found.positives == np.count_nonzero(known)
    assert found.area_px["p50"] == np.median(known[known > 0])
    assert found.area_px["max"] == known.max()
    assert found.annotations_per_positive == {"1": 6, "4": 1}
