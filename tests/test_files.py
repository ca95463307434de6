"""Files that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumo_experiments.files import write_atomically


@pytest.mark.parametrize("place", [".", "work"])
def test_the_target_appears_complete_and_only_at_the_end(place: str, tmp_path: Path) -> None:
    path, work = tmp_path / "a.txt", tmp_path / place
    work.mkdir(exist_ok=True)
    with write_atomically(path, None if place == "." else work) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
        assert [*work.glob("*.part")] == [temporary]
    assert path.read_text() == "whole"
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, FileNotFoundError])
def test_a_failed_block_keeps_the_old_file_and_removes_the_temporary_one(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), write_atomically(path) as temporary:
        if error is not FileNotFoundError:  # of a block that writes nothing
            temporary.write_text("new")
            raise error
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as first, write_atomically(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert [*tmp_path.iterdir()] == [path]


def test_the_error_of_the_block_is_not_hidden_by_the_cleaning_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="mine"), write_atomically(tmp_path / "file" / "a.txt"):
        raise ValueError("mine")
