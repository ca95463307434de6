from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import write_submission

ROWS = [("ID_0011fe81e", "175654 22 987 42"), ("ID_003206608", "-1"), ("ID_004d6fbb6", "")]
HEADER = b"ImageId,EncodedPixels\n"


def test_the_bytes_are_those_kaggle_shows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "submission.csv"
    write_submission(path, iter(ROWS))
    rows = b"ID_0011fe81e,175654 22 987 42\nID_003206608,-1\nID_004d6fbb6,-1\n"
    assert path.read_bytes() == HEADER + rows
    write_submission(path, [])
    assert path.read_bytes() == HEADER


def test_a_path_that_cannot_be_a_file_is_refused_before_any_row_is_drawn(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        raise AssertionError("drawn")
        yield

    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "name a file"), (tmp_path / "file" / "s.csv", "choose another place")):
        with pytest.raises(UserError, match=reason):
            write_submission(path, rows())
