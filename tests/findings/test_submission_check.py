"""The check of a submission: each kind of problem is named, and only what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from dicom_files import GREYS, dicom_bytes
from helpers import make
from mlflow import MlflowClient
from samples import write

from pneumo_experiments.dataset.annotations import read_annotations, unite
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.dicom.archive import open_archive
from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import write_submission
from pneumo_experiments.findings.submission_check import (
    CHALLENGE,
    SubmissionCheck,
    are_too_many,
    check_submission,
    mask_warnings,
    native_shapes,
    sample_images,
    usual_masks,
)
from pneumo_experiments.settings import Score
from pneumo_experiments.stages.score import score

IDS = ["ID_a", "ID_b", "ID_c"]
GOOD = "ImageId,EncodedPixels\nID_c,0 5 3 2\nID_a,-1\nID_b,1048575 1\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.csv"


def checked(path: Path, text: str, expected: list[str] | None = IDS) -> SubmissionCheck:
    path.write_text(text, encoding="utf-8", newline="")
    return check_submission(path, expected, {})


def test_a_submission_as_score_writes_it_has_no_problems(path: Path) -> None:
    mask = np.zeros((1024, 1024), bool)
    mask[3:900, 5:50] = True
    write_submission(path, [("ID_c", encode(mask)), ("ID_a", ""), ("ID_b", "-1")])
    assert check_submission(path, IDS, {}) == SubmissionCheck(images=3, positives=1, problems=[])
    assert checked(path, GOOD) == SubmissionCheck(3, 2, [])
    assert checked(path, GOOD.replace("\n", "\r\n")) == SubmissionCheck(3, 2, [])
    assert checked(path, GOOD.replace(",-1", ", -1")) == SubmissionCheck(3, 2, [])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("ImageId,EncodedPixels\n", "", "the first line is not ImageId,EncodedPixels"),
        ("ImageId,", "image_id,", "the first line is not ImageId,EncodedPixels"),
        ("ID_a,-1\n", "ID_a,-1,0.3\n", "line 3: not an image id and run lengths"),
        ("ID_a,-1\n", "ID_a,-1\nID_a,-1\n", "ID_a: more than one row"),
        ("ID_a,-1\n", "", "ID_a: missing"),
        ("ID_a,-1\n", "ID_a,-1\nID_d,-1\n", "ID_d: no image of the test set"),
        ("ID_a,-1", "ID_a.dcm,-1", "ID_a.dcm: a suffix or folder that the ids of the test set do not have"),
        ("ID_a,-1", "test/ID_a.png,-1", "test/ID_a.png: a suffix or folder that the ids of the test set do"),
        ("ID_a,-1", "ID_a,-1.0", "ID_a: not written as whole numbers separated by blanks, or as -1 for no"),
        ("0 5 3 2", "0.0 5.0 3.0 2.0", "ID_c: not written as whole numbers separated by blanks"),
        ("0 5 3 2", '"0,5,3,2"', "ID_c: not written as whole numbers separated by blanks"),
        ("ID_a,-1", "ID_a,NaN", "ID_a: no run lengths; an empty mask is written -1"),
        ("Id,Enc", "Id, Enc", "the first line is not ImageId,EncodedPixels"),
        ("ImageId,", "\ufeffImageId,", "it starts with a byte order mark"),
        ("ID_a,-1", "ID_a,", "ID_a: no run lengths; an empty mask is written -1"),
        ("ID_a,-1", "ID_a,5 3 2", "ID_a: odd number of run lengths (3); write pairs 'gap length'"),
        ("ID_a,-1", "ID_a,5 x", "ID_a: run length 'x' is not a whole number of pixels"),
        ("1048575 1", "1048575 2", "ID_b: run lengths reach pixel 1048577 of an image with 1048576"),
        ("0 5 3 2", "0 5 0 2", "ID_c: runs of length 0, runs that touch"),
        ("0 5 3 2", "0 5 3 0", "ID_c: runs of length 0, runs that touch"),
        ("ID_a,-1", "ID_a,7 0", "ID_a: runs of length 0, runs that touch, or an empty mask not written as"),
    ],
)
def test_each_kind_of_problem_is_named(path: Path, old: str, new: str, problem: str) -> None:
    assert old in GOOD
    problems = checked(path, GOOD.replace(old, new)).problems
    assert any(line.startswith(problem) for line in problems), problems
    assert all("\n" not in line for line in problems)
    # A row that cannot be used, or an id that is misspelled, also leaves an image without its row.
    assert len(problems) == 1 + any("missing" in line for line in problems if not line.startswith(problem))


def test_many_images_with_one_problem_are_one_line(path: Path) -> None:
    ids = [f"ID_{number}" for number in range(10)]
    problems = checked(path, GOOD, [*IDS, *ids]).problems
    assert problems == ["ID_0, ID_1, ID_2 and 7 more: missing"]
    rows = "".join(f"{image_id},1\n" for image_id in ids)
    problems = checked(path, f"ImageId,EncodedPixels\n{rows}", ids).problems
    assert len(problems) == 4
    assert problems[-1] == "7 more images with run lengths that cannot be decoded"


def test_a_file_that_is_no_table_is_an_error(path: Path) -> None:
    for content, reason in ((b"", "empty"), (b"\xff\xfe\0", "not a CSV table"), (None, "no such file")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            check_submission(path, None, {})


def test_the_sizes_of_the_radiographs_limit_the_run_lengths(tmp_path: Path, path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    for name in IDS:
        (folder / f"{name}.dcm").write_bytes(dicom_bytes(GREYS))
    (folder / "ID_c.dcm").write_bytes(b"broken")
    shapes = native_shapes(open_archive(folder))
    assert shapes == {"ID_a": GREYS.shape, "ID_b": GREYS.shape}
    path.write_text(f"ImageId,EncodedPixels\nID_c,9999 1\nID_a,{GREYS.size - 1} 1\nID_b,{GREYS.size} 1\n")
    (problem,) = check_submission(path, IDS, shapes).problems
    assert problem.startswith(f"ID_b: run lengths reach pixel {GREYS.size + 1} of an image with {GREYS.size}")


def test_the_expected_images_are_those_of_the_sample_in_its_order(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("ImageId,EncodedPixels\nb,-1\na,-1\nb,-1\n")
    assert sample_images(sample) == ["b", "a"]
    assert sample_images(None) is None


def test_the_fraction_of_positives_stands_beside_the_training_images(tmp_path: Path) -> None:
    write(tmp_path / "d.h5", count=5)
    write(tmp_path / "unlabelled.h5", count=5, labelled=False)
    assert usual_masks(tmp_path / "d.h5").positives == 0.4
    assert usual_masks(tmp_path / "d.h5").cells is CHALLENGE.cells  # 2 masks say nothing of where they lie
    assert usual_masks(tmp_path / "unlabelled.h5") is CHALLENGE
    assert usual_masks(tmp_path / "nothing.h5") is CHALLENGE
    check = SubmissionCheck(images=100, positives=25, problems=[])
    assert check.positives_line(None) == "25 of 100 images have a mask (25.0%)"
    assert check.positives_line(0.4) == "25 of 100 images have a mask (25.0%), of the training images 40.0%"
    assert check.positives_line(0.6).endswith("check the thresholds, and that the model suits these images")
    assert check.positives_line(0.1).endswith("check the thresholds, and that the model suits these images")
    assert "check the thresholds" in SubmissionCheck(100, 0, []).positives_line(0.2)
    odd = ": check the thresholds, and that the model suits these images"
    for positives, images, end in ((51, 100, odd), (50, 100, ""), (19, 19, ""), (20, 20, odd)):
        line = SubmissionCheck(images, positives, []).positives_line(None)
        assert line == f"{positives} of {images} images have a mask ({positives / images:.1%}){end}"


def test_findings_on_far_more_images_than_usual_are_too_many() -> None:
    # More than twice the usual fraction: 44% of 1,000 images, whose 3 standard errors are 4%.
    assert [are_too_many(count, 1000, 0.22) for count in (440, 441)] == [False, True]
    # And 3 standard errors: 0.22 + 3 * sqrt(0.22 * 0.78 / 20) = 49.8% of 20 images.
    assert [are_too_many(count, 20, 0.22) for count in (9, 10)] == [False, True]
    assert [are_too_many(count, 19, usual) for count in (19,) for usual in (0.22, None)] == [False, False]
    assert [are_too_many(count, 20, None) for count in (10, 11)] == [False, True]
    assert not are_too_many(1000, 1000, 0.5)
    # Of samples as the training's hardly any: beyond 3 standard errors, and twice as many.
    for images in (20, 50, 1000):
        samples = np.random.default_rng(0).binomial(images, 0.22, 2000)
        assert np.mean([are_too_many(count, images, 0.22) for count in samples.tolist()]) < 0.01


def test_absurd_masks_are_a_line_each_and_usual_ones_none() -> None:
    masks = [0.9] * 18 + [0.0] * 2
    assert mask_warnings(masks, {"in training": 0.2215}) == [
        "18 masks cover more than half of their image: look at their overlays",
        "a finding on 90% of the images, 22% in training: check the thresholds, and that the model suits"
        " these images",
    ]
    assert mask_warnings([0.5001, *masks[18:]], {"in training": None}) == [
        "1 mask covers more than half of its image: look at their overlays"
    ]
    # As the largest of the real ones; and none of the labels' findings, however many.
    largest = 161_421 / 1024**2
    assert mask_warnings([largest] * 5 + [0.5] + [0.0] * 14, {"in training": 0.2215}) == []
    assert mask_warnings([largest] * 18 + [0.0] * 2, {"in training": 0.2215, "by their labels": 0.85}) == []
    (line,) = mask_warnings([largest] * 20, {"in training": 0.2, "by their labels": 0.3})
    assert line.startswith("a finding on 100% of the images, 20% in training, 30% by their labels: check")
    (line,) = mask_warnings([largest] * 20, {"in training": None})
    assert line.startswith("a finding on 100% of the images: check the thresholds")


def test_a_check_names_masks_of_whole_images_and_calls_them_valid(
    path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text("ImageId,EncodedPixels\nID_a,0 1048576\nID_b,0 524289\nID_c,0 524288\n")
    score(make(Score, check=path))
    assert capsys.readouterr().out.splitlines()[:-1] == [  # the last is the run's page
        "score: 3 of 3 images have a mask (100.0%)",
        "score: 2 masks cover more than half of their image: look at them",
        f"score: {path} has the form of a submission, but its masks are doubtful; its ids were not"
        " checked: give sample_submission or dicom_dir",
    ]
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.tags["mlflow.note.content"].splitlines()[1:] == [
        "3 of 3 images have a mask (100.0%).",
        "2 masks cover more than half of their image: look at them.",
    ]


@cache
def lungs(count: int, shape: tuple[int, int] = (1024, 1024)) -> list[np.ndarray]:
    """Masks like the challenge's: crescents at the top of either lung, of various sizes."""
    rows, columns = shape
    y, x = np.mgrid[:rows, :columns] / [[[rows]], [[columns]]]
    masks = list[np.ndarray]()
    for number in range(count):
        side, size = (0.3 if number % 2 else 0.7), 0.08 + 0.01 * (number % 7)
        inside = ((x - side) / size) ** 2 + ((y - 0.25) / size) ** 2 < 1
        masks.append(inside & (((x - side) / size) ** 2 + ((y - 0.25 - size / 2) / size) ** 2 > 1))
    return masks


def of_masks(texts: list[str]) -> str:
    return "ImageId,EncodedPixels\n" + "".join(f"ID_{number},{text}\n" for number, text in enumerate(texts))


def absolute(text: str, first: int) -> str:
    lengths = np.array(text.split(), int)
    return " ".join(map(str, np.c_[np.cumsum(lengths)[::2] + first, lengths[1::2]].ravel()))


SIZES = (
    "the runs repeat every {0} pixels, and columns of the images have 1024: were the masks made at {0} x {0}"
)
ROW_BY_ROW = "the masks look made row by row: run lengths go down columns, so encode each mask transposed"


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (lambda: [encode(mask) for mask in lungs(20)], ""),
        (lambda: [encode(mask[:, ::-1]) for mask in lungs(20)], ""),  # both lungs look alike
        (lambda: [encode(mask) for mask in lungs(2, (256, 256))], SIZES.format(256)),
        (lambda: [encode(mask) for mask in lungs(3, (128, 128))], SIZES.format(128)),
        (lambda: [encode(mask) for mask in lungs(3, (768, 768))], SIZES.format(768)),
        (lambda: [encode(mask) for mask in lungs(3, (2048, 2048))], SIZES.format(2048)),
        (lambda: [encode(mask.T) for mask in lungs(20)], ROW_BY_ROW),
        (lambda: [encode(mask[::-1]) for mask in lungs(20)], "the masks look upside down"),
        (lambda: [encode(np.rot90(mask, 3)) for mask in lungs(20)], "the masks look turned by a quarter"),
        (lambda: [absolute(encode(mask), 1) for mask in lungs(1)], "ID_0: the run lengths look absolute"),
        (lambda: [absolute(encode(mask), 0) for mask in lungs(1)], "ID_0: the run lengths look absolute"),
        (lambda: [absolute(encode(m), 1) for m in lungs(2, (256, 256))], SIZES.format(256)),
    ],
)
def test_a_mistake_in_all_masks_is_named(path: Path, texts: Callable[[], list[str]], problem: str) -> None:
    result = checked(path, of_masks(texts()), None)
    assert result.doubts == []
    if not problem:
        assert result.problems == []
    else:
        assert any(line.startswith(problem) for line in result.problems), result.problems


def test_the_sizes_of_the_images_decide_what_size_of_masks_is_wrong(path: Path) -> None:
    small, wide = lungs(2, (256, 256)), lungs(2, (256, 400))
    shapes = {"ID_0": (256, 256), "ID_1": (256, 256)}
    path.write_text(of_masks([encode(mask) for mask in small]))
    assert check_submission(path, None, shapes).problems == []
    path.write_text(of_masks([encode(mask.T) for mask in wide]))
    (problem,) = check_submission(path, None, dict.fromkeys(shapes, (256, 400))).problems
    assert problem.startswith("the masks were made row by row")


def test_few_or_inverted_masks_are_doubts_and_no_errors(path: Path) -> None:
    inverted = checked(path, of_masks([encode(~mask) for mask in lungs(5)]), None)
    assert inverted.problems == []
    assert inverted.doubts[0] == "5 masks cover more than half of their image: look at them"
    assert inverted.doubts[1].endswith("usual ones 0.82%: are masks and background swapped?")
    few = checked(path, of_masks([encode(mask.T) for mask in lungs(4)]), None)
    assert (few.problems, few.doubts) == ([], [ROW_BY_ROW])
    assert "check the thresholds" in checked(path, of_masks(["-1"] * 20), None).positives_line(None)


def test_a_table_of_another_program_is_named_and_its_masks_are_checked_all_the_same(path: Path) -> None:
    for text, named in (
        ("sep=;\n" + GOOD.replace(",", ";"), ["the first line is sep=", "its columns are separated by ';'"]),
        (GOOD.replace(",", "\t"), [r"its columns are separated by '\t', not by a comma"]),
    ):
        result = checked(path, text)
        assert (result.images, result.positives) == (3, 2)
        assert all(any(line.startswith(name) for line in result.problems) for name in named)
    path.write_bytes(GOOD.encode("utf-16"))
    assert check_submission(path, IDS, {}) == SubmissionCheck(3, 2, ["it is UTF-16, not UTF-8"])


def test_real_annotations_pass_the_check_and_fail_it_with_each_mistake(path: Path, real_data: Path) -> None:
    real = read_annotations(real_data / "labels" / "train-rle.csv.gz")
    masks = [unite(texts, (1024, 1024), name)[0] for name, texts in list(real.items())[:300] if texts]
    assert checked(path, of_masks([encode(mask) for mask in masks]), None).problems == []
    assert ROW_BY_ROW in checked(path, of_masks([encode(mask.T) for mask in masks]), None).problems
    small = [encode(mask[::4, ::4]) for mask in masks]
    assert any(line.startswith(SIZES.format(256)) for line in checked(path, of_masks(small), None).problems)
