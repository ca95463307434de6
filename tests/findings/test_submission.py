from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import write_submission

ROWS = [("ID_0011fe81e", "175654 22 987 42"), ("ID_003206608", "-1"), ("ID_004d6fbb6", "")]


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_a_submission_reads_back_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "submission.csv"
    assert write_submission(path, iter(ROWS)) == 3
    assert read(path) == [
        ["ImageId", "EncodedPixels"],
        ["ID_0011fe81e", "175654 22 987 42"],
        ["ID_003206608", "-1"],
        ["ID_004d6fbb6", "-1"],
    ]


def test_the_bytes_are_those_kaggle_shows(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ROWS[:2])
    assert path.read_bytes() == b"ImageId,EncodedPixels\nID_0011fe81e,175654 22 987 42\nID_003206608,-1\n"


def test_without_images_only_the_header_is_written(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    assert write_submission(path, []) == 0
    assert read(path) == [["ImageId", "EncodedPixels"]]


def test_an_image_that_comes_twice_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ROWS[:2])
    old = path.read_bytes()
    with pytest.raises(UserError, match="ID_003206608"):
        write_submission(path, [*ROWS, ROWS[1]])
    assert path.read_bytes() == old
    assert {file.name for file in tmp_path.iterdir()} == {"submission.csv", ".submission.csv.sha256"}


def test_nothing_is_left_when_the_rows_break_off(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_submission(tmp_path / "submission.csv", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_a_file_is_refused_before_any_row_is_drawn(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        raise AssertionError("drawn")
        yield

    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "submission.csv"):
        with pytest.raises(UserError, match="name a") as error:
            write_submission(path, rows())
        assert "\n" not in str(error.value)
