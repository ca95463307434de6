from __future__ import annotations

from pathlib import Path

import pytest

from pneumo_experiments.files import write_atomically


def test_the_target_appears_complete_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
        assert temporary.parent == tmp_path
    assert path.read_text() == "whole"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failed_block_keeps_the_old_file_and_removes_the_temporary_one(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), write_atomically(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_the_temporary_file_can_be_in_another_folder(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with write_atomically(tmp_path / "a.txt", work) as temporary:
        temporary.write_text("whole")
        assert [*tmp_path.iterdir()] == [work]
        assert [*work.glob("*.part")] == [temporary]
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert not [*work.iterdir()]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with write_atomically(path) as first, write_atomically(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert [*tmp_path.iterdir()] == [path]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), write_atomically(path):
        pass
    assert path.read_text() == "old"


def test_the_error_of_the_block_is_not_hidden_by_the_cleaning_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="mine"), write_atomically(tmp_path / "file" / "a.txt"):
        raise ValueError("mine")
