"""Who the patients are, what is said of them, and that no patient is in two parts of a split."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import GREYS, dicom_bytes
from helpers import ROOT, ended, make
from mlflow import MlflowClient

from pneumo_experiments.dataset.annotations import read_patients
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed_image import Entry, hash_patient, salted
from pneumo_experiments.dataset.patients import (
    ROW,
    SHIPPED,
    SOURCES,
    Grouping,
    count_sources,
    describe_sources,
    grouping_problem,
    make_grouping,
    shipped_grouping,
)
from pneumo_experiments.dataset.splits import Split, split
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, describe_seen, hash_image_ids, make_split, seen_by
from pneumo_experiments.settings import Preprocess, SplitSettings, Train, as_config, from_flat
from pneumo_experiments.stages.preprocess import preprocess

# Four of the contest's images, of two patients.
ANNA = (
    "1.2.276.0.7230010.3.1.4.8323329.5597.1517875188.959090",
    "1.2.276.0.7230010.3.1.4.8323329.580.1517875163.537053",
)
BERT = (
    "1.2.276.0.7230010.3.1.4.8323329.31759.1517875156.671103",
    "1.2.276.0.7230010.3.1.4.8323329.1229.1517875166.872911",
)


def archive(folder: Path, patients: dict[str, str]) -> dict[str, object]:
    """Small DICOM files by image id and PatientID, and their annotations; the settings that name them."""
    (folder / "dicom").mkdir(parents=True)
    for image_id, patient in patients.items():
        header = {"PatientID": patient} if patient else {}
        (folder / "dicom" / f"{image_id}.dcm").write_bytes(dicom_bytes(GREYS, **header))
    (folder / "rle.csv").write_text("".join(f"{image_id},3 2\n" for image_id in patients))
    return {"dicom_dir": folder / "dicom", "rle_csv": folder / "rle.csv", "image_size": 32, "workers": 1}


def made(chosen: dict[str, object], path: Path) -> dict[str, str]:
    """Patient of each image in a data set that preprocess made."""
    preprocess(from_flat(Preprocess, chosen | {"dataset": path}))
    with Dataset.open(path) as dataset:
        return {entry.image_id: entry.patient for entry in dataset.entries}


def sources_in(report: Path) -> dict[str, int]:
    return json.loads(report.read_text())["patients"]["sources"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "pneumo_experiments.dataset.patients"]


# The table that ships.


def test_the_shipped_table_is_what_the_script_makes_of_the_real_one(real_data: Path, tmp_path: Path) -> None:
    table = real_data / "labels" / "patients.csv.gz"
    script = [sys.executable, ROOT / "tools" / "siim_patients.py", table, tmp_path / "made.bin"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "12,047 images of 6,171 patients, 120,470 bytes" in done.stdout
    assert (tmp_path / "made.bin").read_bytes() == SHIPPED.read_bytes()
    nih = read_patients(table)
    ours = shipped_grouping(list(nih)).hashes
    assert ours.keys() == nih.keys()
    assert len(set(ours.values())) == len(set(nih.values())) == 6171
    assert len({(ours[image_id], nih[image_id]) for image_id in nih}) == 6171  # the same groups
    assert not set(ours.values()) & {
        hash_patient(str(n)) for n in range(7000)
    }  # its numbers are no PatientID


def test_the_shipped_table_holds_numbers_in_an_order_that_says_nothing_of_the_patients() -> None:
    rows = np.fromfile(SHIPPED, np.dtype([("image", "<u8"), ("patient", "<u2")]))
    assert SHIPPED.stat().st_size == 10 * len(rows) == 120_470
    assert (np.diff(rows["image"].astype(object)) > 0).all()
    _, first = np.unique(rows["patient"], return_index=True)
    assert rows["patient"][np.sort(first)].tolist() == list(range(1, 6172))  # in order of their first images


def test_the_shipped_table_has_only_its_own_images() -> None:
    foreign = [f"image-{n}" for n in range(10_000)] + ["", ANNA[0] + "1", "\udce9"]
    assert shipped_grouping(foreign) == shipped_grouping([]) == Grouping()
    found = shipped_grouping([*foreign, *ANNA, *BERT]).hashes
    assert found.keys() == {*ANNA, *BERT}
    assert found[ANNA[0]] == found[ANNA[1]] != found[BERT[0]] == found[BERT[1]]


# Which source tells which image.

MIXED = {
    **{ANNA[0]: "uuid-1", ANNA[1]: "uuid-2", BERT[0]: "uuid-3"},
    **{"ward-1": "4711", "ward-2": "4711", "nobody-1": "", "nobody-2": ""},
}


def test_by_default_patients_come_from_the_shipped_table_and_else_from_patient_id(
    store: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    patient = made(archive(store, MIXED), store / "d.h5")
    assert patient[ANNA[0]] == patient[ANNA[1]] != patient[BERT[0]]
    assert patient["ward-1"] == patient["ward-2"] == hash_patient("4711")
    assert len(set(patient.values())) == 5
    told = {"shipped table": 3, "PatientID": 2, "unknown": 2}
    assert sources_in(store / "d.report.json") == told
    line = "shipped table: 3, PatientID: 2, unknown: 2"
    assert f"7 images of 5 patients ({line}), 7 with pneumothorax" in capsys.readouterr().out
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.params["patients_from"] == line
    assert line in run.data.tags["mlflow.note.content"]
    page = (store / "d.report.html").read_text()
    card = page.split("<h3>Source of the patients</h3>")[1].split("</section>")[0]
    assert [card.count(f"<th scope=row>{name}</th>") for name in told] == [1, 1, 1]
    assert warnings_of(caplog) == []


def test_a_file_wins_for_its_images_and_a_data_set_with_other_patients_is_named(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = archive(store, MIXED)
    patient = made(chosen | {"patients_csv": "none"}, store / "d.h5")
    assert patient[ANNA[0]] == hash_patient("uuid-1") != patient[ANNA[1]]
    assert sources_in(store / "d.report.json") == {"PatientID": 5, "unknown": 2}
    with pytest.raises(UserError, match=r"made with patients by PatientID, not by shipped table; overwrite"):
        made(chosen, store / "d.h5")
    own, chosen = store / "own.csv", chosen | {"patients_csv": "own.csv"}
    own.write_text(f"id,patient\n{ANNA[0]},x\n{BERT[0]},x\nward-1,y\nnobody-1,x\n")
    patient = made(chosen | {"overwrite": True}, store / "d.h5")
    assert patient[ANNA[0]] == patient[BERT[0]] == patient["nobody-1"] == hash_patient("x")
    assert patient[ANNA[1]] == hash_patient("uuid-2")
    assert patient["ward-1"] == hash_patient("y") != patient["ward-2"] == hash_patient("4711")
    assert sources_in(store / "d.report.json") == {"patients_csv": 4, "PatientID": 2, "unknown": 1}
    assert warnings_of(caplog) == []  # it names more than half
    own.write_text(own.read_text().replace("ward-1,y", "ward-1,z"))
    with pytest.raises(UserError, match=r"made with other patients; overwrite"):
        made(chosen, store / "d.h5")


def test_a_home_folder_and_an_empty_value_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.csv").write_text("id,patient\na,1\n")
    assert make_grouping("~/own.csv", ["a"]).hashes == {"a": hash_patient("1")}
    with pytest.raises(UserError, match="patients_csv=~nosuchuser/x: names the home of a user"):
        make_grouping("~nosuchuser/x", ["a"])
    assert make_grouping("", list(ANNA)) == make_grouping("none", list(ANNA)) == Grouping()


# Warnings.


def test_images_that_each_count_as_a_patient_are_a_warning_on_the_terminal_once_for_all_folds(
    store: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = store / "alone.h5"
    given = archive(store, {f"image-{n}": f"uuid-{n}" for n in range(12)}) | {"dataset": path}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's would keep it from the terminal
        end = ended(["preprocess", *(f"--{name}={value}" for name, value in given.items())], patch, capsys)
    warning = f"Warning: dataset={path}: each of the 12 images counts as a separate patient"
    assert (end.code, end.err.count(warning)) == (0, 1)
    assert "name them in patients_csv\n" in end.err
    with Dataset.open(path) as dataset:
        for fold in range(5):
            make_split(dataset, SplitSettings(fold=str(fold)))
    made(given | {"patients_csv": "none"}, path)  # the shipped table has none of them
    assert "exists already, from the same files and settings" in capsys.readouterr().out
    assert warnings_of(caplog) == []


def index_of(patients: Mapping[str, str], areas: Mapping[str, int]) -> Dataset:
    """A data set's index alone: to write a file of all images takes 6 seconds."""
    dataset = object.__new__(Dataset)
    dataset.path, dataset.labelled, dataset.settings = Path("d.h5"), True, {}
    dataset.entries = [
        Entry(image_id, patient, "PA", "F", 40, 1024, 1024, 1, areas.get(image_id, 0))
        for image_id, patient in patients.items()
    ]
    return dataset


def entries_of(patients: list[str]) -> list[Entry]:
    return index_of({f"i{n}": name for n, name in enumerate(patients)}, {}).entries


@pytest.mark.parametrize(
    ("patients", "sources", "fault"),
    [
        (list("abcdef"), {}, "each of the 6 images counts"),
        (list("abcdef"), {"PatientID": 6}, "each of the 6 images counts"),
        (list("abcdef"), {"shipped table": 5, "unknown": 1}, "each of the 6 images counts"),
        (list("abcdef"), {"shipped table": 5, "PatientID": 1}, "each of the 6 images counts"),
        (list("abcdef"), {"shipped table": 6}, ""),  # whoever made the table knows
        (list("abcdef"), {"patients_csv": 6}, ""),
        (list("abcdee"), {"PatientID": 6}, ""),
        (list("aaaabc"), {"PatientID": 6}, "4 of 6 images have the same patient"),
        (list("aaaabc"), {"patients_csv": 6}, "4 of 6 images have the same patient"),  # the wrong column
        (list("aaabcd"), {"PatientID": 6}, ""),  # half of them is not most
        (["a"], {}, ""),
        ([], {}, ""),
    ],
)
def test_a_grouping_is_doubted_where_nobody_grouped_or_all_are_one(
    patients: list[str], sources: dict[str, int], fault: str
) -> None:
    told = grouping_problem(entries_of(patients), describe_sources(sources))
    assert told.startswith(fault) if fault else told == ""
    assert ("patients_csv" in told) == bool(fault)


def test_sources_are_counted_by_image() -> None:
    entries = [
        replace(entry, patient=hash_patient(name, entry.image_id))
        for entry, name in zip(entries_of(list("abcde")), ["1", "", "1", " ", "2"], strict=True)
    ]
    grouping = Grouping("shipped table", "auto 0", {"i4": entries[4].patient, "elsewhere": "x"})
    assert count_sources(entries, grouping) == {"shipped table": 1, "PatientID": 2, "unknown": 2}
    assert count_sources(entries, Grouping()) == {"PatientID": 3, "unknown": 2}


# What a model knows of them.


def test_most_of_a_random_half_is_of_patients_of_the_other_half_and_none_of_the_holdout() -> None:
    numbers = np.fromfile(SHIPPED, ROW)["patient"].tolist()
    hashes = [salted(f"SIIM-ACR patient {number}") for number in numbers]
    areas = np.arange(len(numbers)) % 5 // 4
    names = [f"i{place}" for place in range(len(numbers))]
    dataset = index_of(dict(zip(names, hashes, strict=True)), dict(zip(names, areas.tolist(), strict=True)))
    mixed = np.random.default_rng(0).permutation(len(numbers))
    half, other = Subset(dataset, mixed[:6000]), Subset(dataset, mixed[6000:])
    by = Counter(seen_by(other, hash_image_ids(half)))
    one = hash_image_ids(Subset(dataset, np.array([7])))
    assert one == {salted("image i7"), salted(f"patient {hashes[7]}")}
    known = {numbers[place] for place in mixed[:6000].tolist()}
    assert by == Counter("patient" * (numbers[place] in known) for place in mixed[6000:].tolist())
    assert by == {"patient": 3275, "": 2772}
    assert describe_seen(other, hash_image_ids(half), "it").startswith(
        "0 of 6,047 images trained it or chose its thresholds, the patients of 3275 more did"
    )
    parts = split(hashes, areas, holdout=0.2, folds=5, fold=0, seed=0)
    trained = hash_image_ids(Subset(dataset, np.append(parts.train, parts.validation)))
    assert describe_seen(Subset(dataset, parts.holdout), trained, "it") == ""
    assert {*seen_by(Subset(dataset, parts.validation), trained)} == {"image"}


def test_unknown_patients_are_never_those_of_other_images_and_equal_names_always() -> None:
    names = {"a": "", "b": "", "c": " ", "d": "0", "e": "1", "f": "", "g": " ", "h": "0", "i": "2"}
    dataset = index_of({image_id: hash_patient(name, image_id) for image_id, name in names.items()}, {})
    first = Subset(dataset, np.arange(5))
    second = Subset(dataset, np.array([5, 6, 7, 0, 8]))
    assert seen_by(second, hash_image_ids(first)) == ["", "", "patient", "image", ""]


# The seed of the split.


def equal(one: Split, other: Split) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """60 images of 30 patients, a third of them positive."""
    return index_of({f"i{n}": f"p{n // 2}" for n in range(60)}, {f"i{n}": 100 + n for n in range(0, 60, 3)})


def test_seeds_share_their_split_and_another_split_seed_has_another(pairs: Dataset) -> None:
    first = make_split(pairs, make(Train, seed=0).split)
    assert equal(make_split(pairs, make(Train, seed=1).split), first)
    assert not np.array_equal(make_split(pairs, SplitSettings(split_seed=1)).holdout, first.holdout)


def test_a_model_is_scored_on_the_split_that_it_was_trained_with(pairs: Dataset) -> None:
    trained = make(Train, seed=7, split_seed=3, holdout=0.3, folds=3, fold="2")
    scored = make_split(pairs, from_flat(SplitSettings, as_config(trained)))
    assert equal(scored, make_split(pairs, trained.split))


# The real data.


def test_with_default_settings_no_real_patient_is_in_two_parts(
    real_labels: dict[str, tuple[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    grouping = make_grouping(Preprocess().source.patients_csv, list(real_labels))
    hashes = {name: grouping.hashes.get(name) or hash_patient("", name) for name in real_labels}
    areas = {name: area for name, (_, area) in real_labels.items()}
    parts = vars(make_split(index_of(hashes, areas), SplitSettings())).values()
    assert [len(part) for part in parts] == [7712, 1928, 2407]
    nih = np.array([patient for patient, _ in real_labels.values()])
    names = [set(nih[part].tolist()) for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == 6171
    assert warnings_of(caplog) == []


def test_without_the_table_most_real_positives_of_the_holdout_have_a_sibling_in_training(
    real_labels: dict[str, tuple[str, int]],
) -> None:
    nih, area = map(np.array, zip(*real_labels.values(), strict=True))
    # Every file has a PatientID of its own.
    parts = split(list(real_labels), area, holdout=0.2, folds=5, fold=0, seed=0)
    siblings = np.isin(nih[parts.holdout], nih[parts.train])
    assert siblings.mean() == pytest.approx(0.573, abs=0.001)
    assert siblings[area[parts.holdout] > 0].mean() == pytest.approx(0.913, abs=0.001)
    # And what another seed did to the hold-out while it drew the split, too.
    first, second = (split(nih.tolist(), area, holdout=0.2, folds=5, fold=0, seed=seed) for seed in (0, 1))
    assert (len(first.holdout), len(np.intersect1d(first.holdout, second.train))) == (2407, 1443)


def test_the_13_real_files_have_their_patients_from_the_shipped_table_by_default(
    real_data: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"dicom_dir": real_data / "dicom-images-train", "rle_csv": real_data / "train-rle.csv"}
    patient = made(source | {"image_size": 64}, store / "real.h5")
    nih = read_patients(real_data / "labels" / "patients.csv.gz")
    assert len(patient) == len(set(patient.values())) == len({nih[name] for name in patient}) == 13
    with Dataset.open(store / "real.h5") as dataset:
        assert dataset.settings[SOURCES] == "shipped table: 13"
        assert all(len(part) for part in vars(make_split(dataset, SplitSettings())).values())
    assert warnings_of(caplog) == []  # one image each, and that is known


def test_real_test_files_without_labels_are_no_warning(
    real_data: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made({"dicom_dir": real_data / "dicom-images-test", "image_size": 64}, store / "test.h5")
    assert warnings_of(caplog) == []
    assert sources_in(store / "test.report.json") == {"unknown": 10}
