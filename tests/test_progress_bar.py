"""How long work takes, without a terminal."""

from __future__ import annotations

import time

import pytest

from pneumo_experiments.progress_bar import ProgressBar, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def work(bar: ProgressBar, clock: Clock, steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.now += seconds
        bar.update()


def test_long_work_says_from_its_first_steps_how_long_it_takes_and_corrects_itself(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("train", 100) as bar:
        work(bar, clock, 1, 4.0)  # starts slowly, once
        work(bar, clock, 1, 1.0)
        assert capsys.readouterr().out == "train: about 2 minutes left\n"
        work(bar, clock, 29, 1.0)  # a quarter of the time is more than half a minute
        assert not capsys.readouterr().out
        work(bar, clock, 1, 61.0)  # a slow one: 91 seconds for 31 more
        assert capsys.readouterr().out == "train: about 3 minutes left\n"
        work(bar, clock, 68, 1.0)
    assert "left" not in capsys.readouterr().out.split("minutes left\n")[-1]


def test_short_work_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("train", 20) as bar:
        work(bar, clock, 20, 1.0)
    with ProgressBar("quiet", 10_000, is_shown=False) as bar:
        work(bar, clock, 100, 1.0)
    assert capsys.readouterr().out == ""


def test_what_was_finished_earlier_does_not_count_for_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("preprocess", 1000, finished=900) as bar:
        work(bar, clock, 5, 1.0)
    assert capsys.readouterr().out == "preprocess: about 2 minutes left\n"  # 95 files, a second each


def test_a_trial_says_how_long_it_and_the_others_take_together(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("trial", 15.0, pieces=4) as bar:
        work(bar, clock, 15, 1.0)
    assert capsys.readouterr().out == "trial: about 10 seconds left, with 3 more about 60 seconds\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "about 10 seconds"),
        (44, "about 40 seconds"),
        (100, "about 2 minutes"),
        (3_600, "about 60 minutes"),
        (5_400, "about 1 h 30 min"),
        (7_190, "about 2 h"),
    ],
)
def test_a_length_of_time_is_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
