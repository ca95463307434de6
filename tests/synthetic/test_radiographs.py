"""The synthetic data set: its layout, its tags, its randomness, and what its pictures show."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.errors import UserError
from pneumo_experiments.synthetic import anatomy, kaggle_layout
from pneumo_experiments.synthetic.kaggle_layout import Contents, is_sample, plan, write_sample
from pneumo_experiments.synthetic.radiographs import SyntheticRadiograph, draw_radiograph

IMAGES, TEST_IMAGES, SEED = 24, 4, 3
SHAPE = (1024, 1024)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radiographs") / "sample"
    calls = list[None]()
    write_sample(folder, Contents(IMAGES, TEST_IMAGES, SEED), lambda: calls.append(None), workers=1)
    assert len(calls) == IMAGES + TEST_IMAGES
    return folder


@pytest.fixture(scope="module")
def train(sample: Path) -> dict[str, pydicom.Dataset]:
    return {path.stem: pydicom.dcmread(path) for path in (sample / "dicom-images-train").rglob("*.dcm")}


@pytest.fixture(scope="module")
def annotations(sample: Path) -> dict[str, list[NDArray[np.bool_]]]:
    """The masks of each image id, one per row of the CSV; [] where it says -1."""
    with (sample / "train-rle.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ImageId", " EncodedPixels"]
    masks = defaultdict[str, list[NDArray[np.bool_]]](list)
    for image_id, text in rows[1:]:
        masks[image_id] += [] if text == " -1" else [rle.decode(text, SHAPE, image_id)]
    return masks


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_lie_as_on_kaggle(sample: Path) -> None:
    train = list((sample / "dicom-images-train").rglob("*.dcm"))
    assert len(train) == IMAGES
    for path in train:
        tags = pydicom.dcmread(path, stop_before_pixels=True)
        place = (tags.StudyInstanceUID, tags.SeriesInstanceUID, f"{tags.SOPInstanceUID}.dcm")
        assert path.relative_to(sample / "dicom-images-train").parts == place
        assert all(pydicom.uid.UID(uid).is_valid for uid in place[:2])
    test = list((sample / "dicom-images-test").iterdir())
    assert len(test) == TEST_IMAGES
    for path in test:
        assert path.suffix == ".dcm" and path.stem.startswith("ID_") and len(path.stem) == 12
        int(path.stem[3:], 16)
    names = {"dicom-images-test", "dicom-images-train", "sample.json", "train-rle.csv"}
    assert {path.name for path in sample.iterdir()} == names
    assert not sample.with_name("sample.part").exists()


def test_the_tags_are_those_of_the_real_files(train: dict[str, pydicom.Dataset]) -> None:
    for tags in train.values():
        assert tags.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
        assert (tags.Rows, tags.Columns, tags.BitsAllocated, tags.BitsStored) == (1024, 1024, 8, 8)
        assert (tags.PhotometricInterpretation, tags.SamplesPerPixel) == ("MONOCHROME2", 1)
        assert (tags.Modality, tags.BodyPartExamined) == ("CR", "CHEST")
        assert tags.PatientAge.isdigit() and 12 <= int(tags.PatientAge) <= 92
        assert tags.PatientName == tags.PatientID
        assert tags.pixel_array.shape == SHAPE
        assert tags.pixel_array.dtype == np.uint8
    assert {tags.ViewPosition for tags in train.values()} == {"PA", "AP"}
    assert {tags.PatientSex for tags in train.values()} == {"F", "M"}


def test_real_files_have_no_tag_that_ours_lack(real_data: Path, sample: Path) -> None:
    real = pydicom.dcmread(next((real_data / "dicom-images-train").rglob("*.dcm")))
    ours = pydicom.dcmread(next((sample / "dicom-images-train").rglob("*.dcm")))
    assert set(real.keys()) == set(ours.keys())
    assert all(real[tag].VR == ours[tag].VR for tag in real.keys())  # noqa: SIM118  (its values are elements)


def test_three_in_ten_are_positive_and_every_image_has_its_rows(
    train: dict[str, pydicom.Dataset], annotations: dict[str, list[NDArray[np.bool_]]]
) -> None:
    assert set(annotations) == set(train)
    assert sum(bool(masks) for masks in annotations.values()) == round(0.3 * IMAGES)


def test_every_annotation_covers_part_of_the_lungs(annotations: dict[str, list[NDArray[np.bool_]]]) -> None:
    for masks in annotations.values():
        for mask in masks:
            rows, columns = np.nonzero(mask)
            assert 500 < rows.size < 180_000
            assert rows.min() > 20 and rows.max() < 960
            assert columns.min() > 60 and columns.max() < 964


def test_some_images_have_several_annotations_and_some_of_these_overlap(
    annotations: dict[str, list[NDArray[np.bool_]]],
) -> None:
    several = [masks for masks in annotations.values() if len(masks) > 1]
    overlapping = [any((a & b).sum() > 50 for a, b in combinations(masks, 2)) for masks in several]
    assert any(overlapping) and not all(overlapping)


def test_a_patient_returns_with_the_same_sex_and_age_and_is_never_in_both_sets(
    sample: Path, train: dict[str, pydicom.Dataset]
) -> None:
    persons = defaultdict[str, list[tuple[str, str]]](list)
    for tags in train.values():
        persons[tags.PatientID].append((tags.PatientSex, tags.PatientAge))
    assert max(map(len, persons.values())) > 1
    assert all(len(set(visits)) == 1 for visits in persons.values())
    test = {pydicom.dcmread(path).PatientID for path in (sample / "dicom-images-test").iterdir()}
    assert test and not test & set(persons)


def test_a_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    write_sample(tmp_path / "alone", Contents(2, 1, 5), workers=1)
    write_sample(tmp_path / "together", Contents(2, 1, 5), workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_another_seed_and_hard_images_are_another_sample(tmp_path: Path) -> None:
    samples = {"easy": Contents(2, 1, 4), "another": Contents(2, 1, 5), "hard": Contents(2, 1, 4, "hard")}
    for name, sample in samples.items():
        write_sample(tmp_path / name, sample)
        assert [is_sample(tmp_path / name, other) for other in samples.values()] == [
            other is sample for other in samples.values()
        ]
    easy, another, hard = (contents(tmp_path / name) for name in samples)
    assert set(easy) & set(another) == {"train-rle.csv", "sample.json"}
    assert len({*easy.values(), *another.values(), *hard.values()}) == len(easy) + len(another) + len(hard)
    assert json.loads(hard["sample.json"])["difficulty"] == "hard"


def test_a_finished_sample_is_known_by_its_settings(sample: Path, tmp_path: Path) -> None:
    assert is_sample(sample, Contents(IMAGES, TEST_IMAGES, SEED))
    assert not is_sample(sample, Contents(IMAGES, TEST_IMAGES, SEED + 1))
    assert not is_sample(sample, Contents(IMAGES + 1, TEST_IMAGES, SEED))
    assert not is_sample(tmp_path, Contents(IMAGES, TEST_IMAGES, SEED))
    settings = json.loads((sample / "sample.json").read_text())
    assert settings == {"format": kaggle_layout.FORMAT, "images": 24, "test_images": 4, "seed": 3}


def test_a_folder_with_files_and_the_working_directory_are_refused_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("keep")
    monkeypatch.chdir(tmp_path / "work")
    reasons = {tmp_path / "mine": "not an empty folder", Path(): "is the working directory or above it"}
    for folder, reason in (reasons | {tmp_path / "work": reasons[Path()]}).items():
        with pytest.raises(UserError, match=reason):
            write_sample(folder, Contents(2, 0, 0))
    assert {path.name for path in tmp_path.rglob("*")} == {"mine", "mine.txt", "work"}


def test_an_empty_folder_is_filled_and_old_pieces_are_cleared(tmp_path: Path) -> None:
    folder, part = tmp_path / "sample", tmp_path / "sample.part"
    folder.mkdir()
    part.mkdir()
    (part / ".lock").touch()  # by which a killed process's folder is known
    (part / "dicom-images-train").mkdir()
    (part / "dicom-images-train" / "leftover.dcm").write_bytes(b"half")
    write_sample(folder, Contents(1, 0, 0))
    assert is_sample(folder, Contents(1, 0, 0))
    assert not list(tmp_path.rglob("leftover.dcm"))


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample", Contents(3, 0, 0), interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images", [1, 10, 33, 200])
def test_the_plan_keeps_its_fraction_of_positives(images: int) -> None:
    plans = plan(Contents(images, 16))
    train = [one for one in plans if not one.test]
    assert [one.number for one in plans] == list(range(images + 16))
    assert sum(one.annotations > 0 for one in train) == round(0.3 * images)
    assert not {one.patient for one in train} & {one.patient for one in plans if one.test}


@cache
def radiograph(index: int, annotations: int, hard: bool = False) -> SyntheticRadiograph:
    rng = np.random.default_rng([7, index])
    sex, view = ("F", "M")[index % 2], ("PA", "AP")[index // 2 % 2]
    return draw_radiograph(rng, anatomy.build(rng, sex), view, annotations, hard=hard)


def deviation(values: NDArray[np.float64], where: NDArray[np.bool_]) -> float:
    """Median over the 16 x 16 blocks that lie wholly within ``where`` of their standard deviation."""
    blocks = values.reshape(64, 16, 64, 16).std(axis=(1, 3))
    return float(np.median(blocks[where.reshape(64, 16, 64, 16).all(axis=(1, 3))]))


def test_a_pneumothorax_is_darker_than_the_lung_beside_it() -> None:
    darker = list[float]()
    for index in range(8):
        ill = radiograph(index, 1)
        (mask,) = ill.annotations
        grey = ill.pixels.astype(np.float64)
        medial = 1 if np.nonzero(mask.any(axis=0))[0].mean() < 512 else -1
        # The lung beside it: the crescent's own shape, moved down and towards the midline.
        width = int(np.median(mask.sum(axis=1)[mask.any(axis=1)]))
        beside = np.roll(mask, (50, medial * (width + 20)), axis=(0, 1)) & ~mask
        darker.append(grey[beside].mean() - grey[mask].mean())
    assert np.mean(np.array(darker) > 5) >= 0.9


# Hard ones


@pytest.mark.parametrize("images", [1, 10, 40, 1200])
def test_hard_data_have_the_real_fraction_of_positives_and_few_patients_with_many(images: int) -> None:
    plans = [one for one in plan(Contents(images, 5, 1, "hard")) if not one.test]
    assert [one.number for one in plans] == list(range(images)) and all(one.hard for one in plans)
    assert sum(one.annotations > 0 for one in plans) == round(0.22 * images)
    if images < 1000:
        return
    sizes = np.bincount([one.patient for one in plans])
    assert np.mean(sizes == 1) == pytest.approx(0.68, abs=0.06)  # as in the real table
    assert np.mean(sizes == 2) == pytest.approx(0.15, abs=0.05)
    assert 20 < sizes.max() <= 60
    ill = np.sort(np.bincount([one.patient for one in plans if one.annotations]))[::-1]
    ill = ill[ill > 0]
    assert 0.3 < ill[: round(len(ill) / 10)].sum() / ill.sum() < 0.6  # 0.41 in the real table


def test_areas_of_hard_findings_are_those_of_the_real_ones() -> None:
    person = anatomy.build(np.random.default_rng(0), "F")
    lungs = [anatomy.lung(person, side, np.random.default_rng(1)) for side in (-1, 1)]
    drawn = np.random.default_rng(2)
    areas = []
    for index in range(600):
        _, polygons = anatomy.collapses(lungs, 1 + (index % 8 == 0), False, drawn, hard=True)
        areas.append(sum(map(anatomy.area_px, polygons)))
    quartiles = np.quantile(areas, [0.25, 0.5, 0.75])
    assert quartiles == pytest.approx([4059, 8630, 18388], rel=0.2)
    assert min(areas) < 1_000 and max(areas) > 60_000


def test_a_hard_finding_is_annotated_within_the_lung_and_nothing_else_is() -> None:
    for index in range(6):
        ill, well = radiograph(index, 1, hard=True), radiograph(index, 0, hard=True)
        (mask,) = ill.annotations
        assert mask.any() and not well.annotations
        # The twin has the same folds, drains and exposure: it differs in one lung alone.
        changed = np.nonzero((ill.pixels != well.pixels).any(axis=0))[0]
        assert changed.max() < 600 or changed.min() > 424
        assert not np.array_equal(well.pixels, radiograph(index, 0).pixels)


def test_hard_findings_are_fainter() -> None:
    lost = {True: list[float](), False: list[float]()}
    for index in range(6):
        for hard, values in lost.items():
            ill, well = radiograph(index, 1, hard=hard), radiograph(index, 0, hard=hard)
            grey = well.pixels.astype(float) - ill.pixels
            values.append(grey[ill.annotations[0]].mean() / np.ptp(well.pixels))
    assert np.median(lost[True]) < 0.6 * np.median(lost[False])


def test_a_healthy_twin_differs_only_by_air_without_vessels_in_one_lung() -> None:
    larger = 0
    for index in range(8):
        ill, well = radiograph(index, 1), radiograph(index, 0)
        (mask,) = ill.annotations
        assert not well.annotations
        lost = well.pixels.astype(np.float64) - ill.pixels
        assert np.median(lost[mask]) > 8
        changed = np.nonzero((lost != 0).any(axis=0))[0]
        assert changed.max() < 560 or changed.min() > 464
        remaining = (lost != 0) & ~mask
        if mask.sum() > 15_000:  # what is lost is the texture of lung, so it varies; the rest gets denser
            larger += 1
            assert deviation(lost, mask) > 2 * deviation(lost, remaining)
    assert larger > 1


def test_brightness_does_not_give_a_pneumothorax_away(
    train: dict[str, pydicom.Dataset], annotations: dict[str, list[NDArray[np.bool_]]]
) -> None:
    grey = {image_id: float(tags.pixel_array.mean()) for image_id, tags in train.items()}
    ill = [grey[image_id] for image_id, masks in annotations.items() if masks]
    well = [grey[image_id] for image_id, masks in annotations.items() if not masks]
    auroc = np.mean([[a > b for b in well] for a in ill])
    assert 0.25 < auroc < 0.75


def test_separate_annotations_are_pockets_that_do_not_touch() -> None:
    rng = np.random.default_rng(11)
    ill = draw_radiograph(rng, anatomy.build(rng, "M"), "PA", annotations=4)
    assert len(ill.annotations) == 4
    assert not any((a & b).any() for a, b in combinations(ill.annotations, 2))
