"""Claims: of several processes one does a task, until it has ended or is silent."""

from __future__ import annotations

import time

import optuna
import pytest

from pneumo_experiments import tracking
from pneumo_experiments.search import claims
from pneumo_experiments.search.claims import claim, heartbeat

ELSEWHERE = {"pneumo.host": "another", "pneumo.machine": "", "pneumo.process": "1:1"}
HERE = tracking.process_tags() | {"pneumo.process": "1:1.0"}  # a process of this machine that has ended


def study_of_two(other: dict[str, str], seconds_ago: float) -> optuna.Study:
    """A study whose task another process has claimed, which was seen so long ago."""
    study = optuna.create_study()
    study.set_user_attr("claim.task", other)
    study.set_user_attr("alive." + "/".join(other.values()), time.time() - seconds_ago)
    return study


@pytest.mark.parametrize(
    ("other", "seconds_ago", "is_free"),
    [(ELSEWHERE, 0, False), (ELSEWHERE, 50, False), (ELSEWHERE, 61, True), (HERE, 0, True)],
)
def test_a_task_is_free_when_its_process_has_ended_or_is_silent(
    other: dict[str, str], seconds_ago: float, is_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 0)
    study = study_of_two(other, seconds_ago)
    with heartbeat(study):
        assert claim(study, "task") == is_free
        assert claim(study, "task") == is_free
        assert claim(study, "another task")


def test_of_two_that_claim_at_once_the_later_one_has_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of_two(ELSEWHERE, 0)
    with heartbeat(study):
        monkeypatch.setattr(time, "sleep", lambda seconds: study.set_user_attr("claim.new", ELSEWHERE))
        assert not claim(study, "new")


def test_a_process_shows_that_it_is_alive_and_at_the_end_frees_its_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    study, key = optuna.create_study(), "alive." + "/".join(tracking.process_tags().values())
    with heartbeat(study):
        first = study.user_attrs[key]
        assert claim(study, "task")
        end = time.monotonic() + 10
        while study.user_attrs[key] == first:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert study.user_attrs[key] == 0
