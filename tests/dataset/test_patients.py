"""Who the patients are, what is said of them, and that no patient is in two parts of a split."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_server import CommandServer
from dicom_files import GREYS, dicom_bytes
from helpers import ROOT, environment, make, store_address
from mlflow import MlflowClient
from pydicom.uid import generate_uid
from samples import write_dataset

from pneumo_experiments.dataset.annotations import read_annotations, read_patients
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed_image import Entry, ResizedImage, hash_patient, pack, salted
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


@pytest.fixture
def desk(store: Path) -> Path:
    """A folder to work in, with nothing but a store."""
    return store


def archive(folder: Path, patients: dict[str, str]) -> dict[str, object]:
    """Small DICOM files by image id and PatientID, and their annotations; the settings that name them."""
    (folder / "dicom").mkdir()
    for image_id, patient in patients.items():
        content = dicom_bytes(GREYS, PatientID=patient) if patient else dicom_bytes(GREYS)
        (folder / "dicom" / f"{image_id}.dcm").write_bytes(content)
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


def random_ids(count: int) -> dict[str, str]:
    """Images of the contest's kind: each file has a PatientID of its own."""
    return {f"image-{n}": generate_uid(entropy_srcs=[str(n)]) for n in range(count)}


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


def test_the_shipped_table_holds_numbers_in_an_order_that_says_nothing_of_the_patients() -> None:
    rows = np.fromfile(SHIPPED, np.dtype([("image", "<u8"), ("patient", "<u2")]))
    assert SHIPPED.stat().st_size == 10 * len(rows) == 120_470
    assert (np.diff(rows["image"].astype(object)) > 0).all()
    _, first = np.unique(rows["patient"], return_index=True)
    assert rows["patient"][np.sort(first)].tolist() == list(range(1, 6172))  # in order of their first images


def test_the_shipped_table_goes_into_the_package_that_is_built(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pneumo_experiments", tmp_path / "pneumo_experiments", ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read("pneumo_experiments/dataset/siim_patients.bin") == SHIPPED.read_bytes()
        assert "pneumo_experiments/data_report/page.html.j2" in packed.namelist()


def test_the_shipped_table_has_only_its_own_images() -> None:
    foreign = [f"image-{n}" for n in range(10_000)] + ["", ANNA[0] + "1", "\udce9"]
    assert shipped_grouping(foreign) == shipped_grouping([]) == Grouping()
    found = shipped_grouping([*foreign, *ANNA, *BERT]).hashes
    assert found.keys() == {*ANNA, *BERT}
    assert found[ANNA[0]] == found[ANNA[1]] != found[BERT[0]] == found[BERT[1]]


def test_a_number_of_the_shipped_table_is_no_patient_id(real_data: Path) -> None:
    images = read_patients(real_data / "labels" / "patients.csv.gz")
    shipped = set(shipped_grouping(list(images)).hashes.values())
    assert not shipped & {hash_patient(str(number)) for number in range(7000)}


# Which source tells which image.

MIXED = {ANNA[0]: "uuid-1", ANNA[1]: "uuid-2", BERT[0]: "uuid-3"} | {
    "ward-1": "4711",
    "ward-2": "4711",
    "nobody-1": "",
    "nobody-2": "",
}


def test_by_default_patients_come_from_the_shipped_table_and_else_from_patient_id(
    desk: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    patient = made(archive(desk, MIXED), desk / "d.h5")
    assert patient[ANNA[0]] == patient[ANNA[1]] != patient[BERT[0]]
    assert patient["ward-1"] == patient["ward-2"] == hash_patient("4711")
    assert len(set(patient.values())) == 5
    told = {"shipped table": 3, "PatientID": 2, "unknown": 2}
    assert sources_in(desk / "d.report.json") == told
    line = "shipped table: 3, PatientID: 2, unknown: 2"
    assert f"7 images of 5 patients ({line}), 7 with pneumothorax" in capsys.readouterr().out
    run = MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])[0]
    assert run.data.params["patients_csv"] == "auto"
    assert run.data.params["patients_from"] == line
    assert line in run.data.tags["mlflow.note.content"]
    page = (desk / "d.report.html").read_text()
    card = page.split("<h3>Source of the patients</h3>")[1].split("</section>")[0]
    assert [card.count(f"<th scope=row>{name}</th>") for name in told] == [1, 1, 1]
    assert warnings_of(caplog) == []


def test_a_file_wins_for_its_images_and_the_others_go_by_patient_id(
    desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {ANNA[0]: "x", BERT[0]: "x", "ward-1": "y", "nobody-1": "x"}
    (desk / "own.csv").write_text("id,patient\n" + "".join(f"{i},{p}\n" for i, p in names.items()))
    chosen = archive(desk, MIXED) | {"patients_csv": "own.csv"}
    patient = made(chosen, desk / "d.h5")
    assert patient[ANNA[0]] == patient[BERT[0]] == patient["nobody-1"] == hash_patient("x")
    assert patient[ANNA[1]] == hash_patient("uuid-2")
    assert patient["ward-1"] == hash_patient("y") != patient["ward-2"] == hash_patient("4711")
    assert sources_in(desk / "d.report.json") == {"patients_csv": 4, "PatientID": 2, "unknown": 1}
    assert warnings_of(caplog) == []  # it names more than half


def test_a_data_set_with_other_patients_is_named_and_one_that_the_table_would_not_change_stays(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = archive(desk, MIXED)
    patient = made(chosen | {"patients_csv": "none"}, desk / "d.h5")
    assert patient[ANNA[0]] == hash_patient("uuid-1") != patient[ANNA[1]]
    assert sources_in(desk / "d.report.json") == {"PatientID": 5, "unknown": 2}
    with pytest.raises(UserError, match=r"made with patients by PatientID, not by shipped table; overwrite"):
        made(chosen, desk / "d.h5")
    (desk / "own.csv").write_text("id,patient\nward-1,1\nward-2,1\nnobody-1,1\nnobody-2,1\n")
    made(chosen | {"overwrite": True}, desk / "d.h5")
    with pytest.raises(UserError, match=r"made with patients by shipped table, not by patients_csv; over"):
        made(chosen | {"patients_csv": "own.csv"}, desk / "d.h5")
    made(chosen | {"patients_csv": "own.csv", "overwrite": True}, desk / "d.h5")
    (desk / "own.csv").write_text("id,patient\nward-1,2\nward-2,1\nnobody-1,1\nnobody-2,1\n")
    with pytest.raises(UserError, match=r"made with other patients; overwrite"):
        made(chosen | {"patients_csv": "own.csv"}, desk / "d.h5")
    # Where the shipped table knows no image, it changes nothing: what was made without it is the same.
    (desk / "other").mkdir()
    foreign = archive(desk / "other", {"ward-1": "4711", "ward-2": "4711", "ward-3": "12"})
    made(foreign | {"patients_csv": "none"}, desk / "foreign.h5")
    capsys.readouterr()
    made(foreign, desk / "foreign.h5")
    assert "exists already, from the same files and settings" in capsys.readouterr().out


def test_a_home_folder_and_an_empty_value_are_understood(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk))
    (desk / "own.csv").write_text("id,patient\na,1\n")
    assert make_grouping("~/own.csv", ["a"]).hashes == {"a": hash_patient("1")}
    with pytest.raises(UserError, match="patients_csv=~nosuchuser/x: names the home of a user"):
        make_grouping("~nosuchuser/x", ["a"])
    assert make_grouping("", list(ANNA)) == make_grouping("none", list(ANNA)) == Grouping()


# Warnings.


def test_images_that_each_count_as_a_patient_are_a_warning_once_for_preprocess_and_all_folds(
    desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(archive(desk, random_ids(12)), desk / "alone.h5")
    (told,) = warnings_of(caplog)
    assert told.startswith(
        f"Warning: dataset={desk / 'alone.h5'}: each of the 12 images counts as a separate patient"
    )
    assert told.endswith("name them in patients_csv")
    with Dataset.open(desk / "alone.h5") as dataset:
        for fold in range(5):
            make_split(dataset, SplitSettings(fold=str(fold)))
    assert len(warnings_of(caplog)) == 1


def test_the_warning_is_seen_on_the_terminal(desk: Path, commands: CommandServer) -> None:
    given = archive(desk, random_ids(4)) | {"dataset": desk / "d.h5"}
    words = [f"--{name}={value}" for name, value in given.items()]
    variables = environment() | {"MLFLOW_TRACKING_URI": store_address(desk)}
    code, output = commands.start("preprocess", *words, folder=desk, environment=variables).communicate()
    assert code == 0, output
    assert output.count("Warning: dataset=") == 1
    assert "patients_csv" in output


def entries_of(patients: list[str]) -> list[Entry]:
    return [Entry(f"i{n}", name, "PA", "F", 40, 32, 32, 0, 0) for n, name in enumerate(patients)]


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
    dataset = object.__new__(Dataset)  # its index alone: a file of all images takes 6 seconds
    dataset.entries = [
        Entry(f"i{place}", patient, "PA", "F", 40, 1024, 1024, 1, int(areas[place]))
        for place, patient in enumerate(hashes)
    ]
    mixed = np.random.default_rng(0).permutation(len(numbers))
    half, other = Subset(dataset, mixed[:6000]), Subset(dataset, mixed[6000:])
    by = Counter(seen_by(other, hash_image_ids(half)))
    assert hash_image_ids(Subset(dataset, np.array([7]))) == {
        salted("image i7"),
        salted(f"patient {hashes[7]}"),
    }
    known = {numbers[place] for place in mixed[:6000].tolist()}
    assert by == Counter("patient" * (numbers[place] in known) for place in mixed[6000:].tolist())
    assert by == {"patient": 3275, "": 2772}
    assert describe_seen(other, hash_image_ids(half), "it").startswith(
        "0 of 6047 images trained it or chose its thresholds, the patients of 3275 more did"
    )
    parts = split(hashes, areas, holdout=0.2, folds=5, fold=0, seed=0)
    trained = hash_image_ids(Subset(dataset, np.append(parts.train, parts.validation)))
    assert describe_seen(Subset(dataset, parts.holdout), trained, "it") == ""
    assert {*seen_by(Subset(dataset, parts.validation), trained)} == {"image"}


def test_unknown_patients_are_never_those_of_other_images_and_equal_names_always(desk: Path) -> None:
    patients = {"a": "", "b": "", "c": " ", "d": "0", "e": "1", "f": "", "g": " ", "h": "0", "i": "2"}
    made(archive(desk, patients), desk / "d.h5")
    with Dataset.open(desk / "d.h5") as dataset:
        ids = [entry.image_id for entry in dataset.entries]
        first = Subset(dataset, np.array([ids.index(name) for name in "abcde"]))
        second = Subset(dataset, np.array([ids.index(name) for name in "fghai"]))
        assert seen_by(second, hash_image_ids(first)) == ["", "", "patient", "image", ""]


# The seed of the split.


def labelled(path: Path, patients: dict[str, str], areas: dict[str, int]) -> Path:
    """A data set of these images and patients, all with one grey picture."""
    one = ResizedImage(
        entries_of(["x"])[0], np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.float32), "-1"
    )
    packed = pack(one, "uint8")
    entries = (
        Entry(image_id, patient, "PA", "F", 40, 1024, 1024, 1, areas.get(image_id, 0))
        for image_id, patient in patients.items()
    )
    write_dataset(
        path,
        (replace(packed, entry=entry) for entry in entries),
        image_size=32,
        pixel_dtype="uint8",
        settings={},
        labelled=True,
    )
    return path


def equal(one: Split, other: Split) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 30 patients, a third of them positive."""
    patients = {f"i{n}": f"p{n // 2}" for n in range(60)}
    areas = {f"i{n}": 100 + n for n in range(0, 60, 3)}
    return labelled(tmp_path_factory.mktemp("pairs") / "pairs.h5", patients, areas)


def test_seeds_share_their_split_and_another_split_seed_has_another(pairs: Path) -> None:
    with Dataset.open(pairs) as dataset:
        first = make_split(dataset, make(Train, seed=0).split)
        assert equal(make_split(dataset, make(Train, seed=1).split), first)
        other = make_split(dataset, SplitSettings(split_seed=1))
        assert not np.array_equal(other.holdout, first.holdout)


def test_a_model_is_scored_on_the_split_that_it_was_trained_with(pairs: Path) -> None:
    with Dataset.open(pairs) as dataset:
        trained = make(Train, seed=7, split_seed=3, holdout=0.3, folds=3, fold="2")
        split = make_split(dataset, from_flat(SplitSettings, as_config(trained)))
        assert equal(split, make_split(dataset, trained.split))


# The real data.


@pytest.fixture(scope="module")
def labels(real_data: Path) -> tuple[dict[str, str], dict[str, int]]:
    """NIH patient and area of the 12,047 real images (overlaps count twice, which is near enough here)."""
    annotations = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    patients = read_patients(real_data / "labels" / "patients.csv.gz")
    areas = {name: sum(map(int, " ".join(texts).split()[1::2])) for name, texts in annotations.items()}
    return {name: patients[name] for name in sorted(areas)}, areas


def with_siblings(nih: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.isin(nih[some], nih[others])


def test_with_default_settings_no_real_patient_is_in_two_parts(
    labels: tuple[dict[str, str], dict[str, int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patients, areas = labels
    grouping = make_grouping(Preprocess().source.patients_csv, list(patients))
    hashes = {name: grouping.hashes.get(name) or hash_patient("", name) for name in patients}
    path = labelled(tmp_path / "all.h5", hashes, areas)
    nih = np.array(list(patients.values()))
    with Dataset.open(path) as dataset:
        parts = make_split(dataset, SplitSettings())
    assert [len(part) for part in vars(parts).values()] == [7712, 1928, 2407]
    names = [set(nih[part].tolist()) for part in vars(parts).values()]
    assert sum(map(len, names)) == len(set().union(*names)) == 6171
    assert warnings_of(caplog) == []


def test_without_the_table_most_real_positives_of_the_holdout_have_a_sibling_in_training(
    labels: tuple[dict[str, str], dict[str, int]],
) -> None:
    patients, areas = labels
    nih, area = np.array(list(patients.values())), np.array([areas[name] for name in patients])
    # Every file has a PatientID of its own.
    parts = split(list(patients), area, holdout=0.2, folds=5, fold=0, seed=0)
    siblings = with_siblings(nih, parts.holdout, parts.train)
    positive = area[parts.holdout] > 0
    print(f"{siblings.mean():.1%} of {len(siblings):,}, {siblings[positive].mean():.1%} of the positives")
    assert siblings.mean() == pytest.approx(0.573, abs=0.001)
    assert siblings[positive].mean() == pytest.approx(0.913, abs=0.001)
    # And what another seed did to the hold-out while it drew the split, too.
    first, second = (split(nih.tolist(), area, holdout=0.2, folds=5, fold=0, seed=seed) for seed in (0, 1))
    assert (len(first.holdout), len(np.intersect1d(first.holdout, second.train))) == (2407, 1443)


def test_the_13_real_files_have_their_patients_from_the_shipped_table_by_default(
    real_data: Path, desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"dicom_dir": real_data / "dicom-images-train", "rle_csv": real_data / "train-rle.csv"}
    patient = made(source, desk / "real.h5")
    nih = read_patients(real_data / "labels" / "patients.csv.gz")
    assert len(patient) == len(set(patient.values())) == len({nih[name] for name in patient}) == 13
    with Dataset.open(desk / "real.h5") as dataset:
        assert dataset.settings[SOURCES] == "shipped table: 13"
        parts = make_split(dataset, SplitSettings())
    assert [len(part) for part in vars(parts).values()].count(0) == 0
    assert warnings_of(caplog) == []  # one image each, and that is known
    made(source | {"patients_csv": "none"}, desk / "none.h5")
    (told,) = warnings_of(caplog)
    assert "none.h5: each of the 13 images counts as a separate patient" in told


def test_real_test_files_without_labels_are_no_warning(
    real_data: Path, desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made({"dicom_dir": real_data / "dicom-images-test", "image_size": 64}, desk / "test.h5")
    assert warnings_of(caplog) == []
    assert sources_in(desk / "test.report.json") == {"unknown": 10}
