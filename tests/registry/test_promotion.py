"""Which version is the champion: the rules, their notes in the registry, and its faults."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from command_server import CommandServer
from database_server import DatabaseServer
from helpers import copy_store, environment, make, soak, store_address, working_in
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from numpy.typing import NDArray
from tiny_network import tiny_member
from tracked import log_empty_model, log_model

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.comparison import compare, required_probability
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.registry import versions
from pneumo_experiments.registry.promotion import Challenge, Decision, Pair, challenge, decide
from pneumo_experiments.registry.scores import UnseenScore, scores_of
from pneumo_experiments.registry.versions import Version
from pneumo_experiments.serving import Detector
from pneumo_experiments.settings import Register, Registry, Score, Train
from pneumo_experiments.stages import register as register_stage
from pneumo_experiments.tracking.servers import if_exists

pytestmark = pytest.mark.usefixtures("no_code")

HOLDOUT, EXTERNAL, IMAGES = "a" * 32, "b" * 32, 48
HARD = np.random.default_rng(0).uniform(0.2, 0.6, IMAGES)  # much spread between images, for all models
NOISE = np.random.default_rng(1).normal(0, 0.1, IMAGES)  # of a model that is better here and worse there
NOISE -= NOISE.mean()
BASELINE = 0.125  # every eighth image has no finding
Dices = Sequence[float] | NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one store for all tests, whose models stay in it."""
    return copy_store(empty_store, tmp_path_factory.mktemp("store")).parent


@pytest.fixture
def store(folder: Path) -> Iterator[Path]:
    """The working directory: the folder of the store, where no model is registered yet."""
    with working_in(folder, store_address(folder)):
        yield folder
    if_exists(MlflowClient(store_address(folder)).delete_registered_model, "lungs")


@pytest.fixture(scope="module")
def hard(folder: Path, no_code: None) -> str:
    """A model that scored HARD on the hold-out, and on nothing else."""
    with working_in(folder, store_address(folder)):
        return logged(HARD)


@pytest.fixture(scope="module")
def weak_strong_new(folder: Path, no_code: None, tiny: None) -> list[str]:
    """Models with the tiny network; the third one's score is between the others'."""
    with working_in(folder, store_address(folder)):
        return [servable(HARD + gain, "tiny") for gain in (0.0, 0.15, 0.05)]


def area_px(image: int) -> int:
    """The area of the finding; every eighth image has none."""
    return 90 * (image % 8 < 7)


def logged(dices: Dices | None = None) -> str:
    """A model without a network, that scored so on the hold-out."""
    model = log_empty_model()
    if dices is not None:
        scored(model, dices)
    return model


def scored(
    model: str,
    dices: Dices,
    identity: str = HOLDOUT,
    subset: str = "holdout",
    patients: int = IMAGES,
    area: Callable[[int], int] = area_px,
) -> None:
    """Logs what `score` does: metrics of the model, and the table of the images."""
    baseline, mean = np.mean([area(image) == 0 for image in range(len(dices))]), float(np.mean(dices))
    facts = {"subset": subset, "images": len(dices), "dice_baseline": float(baseline)}
    metrics = {"dice": mean, "dice_low": mean - 0.1, "dice_high": mean + 0.1}
    rows = [(f"{identity[0]}{i}", f"p{i % patients}", float(dice), area(i)) for i, dice in enumerate(dices)]
    with tracking.run("score", Score(model=model)):
        tracking.log_scores(metrics, model, Path("siim.h5"), identity, facts)
        tracking.log_table(("image_id", "patient", "dice", "truth_area_px"), rows, "scores")


def id_of(model: str) -> str:
    return model.removeprefix("models:/")


def champion_by(identity: str, model: str = "") -> Version:
    """A champion that these images made one."""
    return Version("lungs", "1", {"identity": identity}, champion=True, source=model)


def pair_of(model: str, other: str, deciding: str = HOLDOUT) -> Any:
    """The comparison with a champion that these images made one, or None."""
    return challenge(id_of(model), champion_by(deciding, other)).pair


def pair_by(gains: Dices) -> Pair:
    """The comparison of a challenger that gains so much on each image."""
    dices = HARD + gains
    score = UnseenScore(HOLDOUT, "holdout", IMAGES, float(np.mean(dices)), BASELINE, 0, "", {})
    comparison = compare(dices, HARD, [str(image) for image in range(IMAGES)])
    return Pair(score, float(HARD.mean()), comparison, IMAGES)


def verdict(pair: Pair, number: int = 1, models: int = 1, **settings: Any) -> Decision:
    """The verdict on a challenger if it is that decision on its images."""
    chosen = make(Registry, **settings)
    required = required_probability(chosen.min_probability, number, models)
    pair = replace(pair, decision=number, models=models, required=required)
    return decide(chosen, Challenge(champion_by(HOLDOUT), pair.new, pair))


def registered(model: str, **settings: Any) -> Decision:
    """Registers a model by the scores that it has, as `register` does where it need not score."""
    chosen = make(Registry, name="lungs", **settings)
    with versions.registering(model, "lungs") as new:
        known = challenge(id_of(model), versions.champion_of("lungs")).counted(chosen, new, 1)
        decision = decide(chosen, known)
        versions.decide(new, decision.alias, decision.tags())
    return decision


def decided(model: str, alias: str, tags: dict[str, str]) -> None:
    """Registers a model, decided in that way."""
    with versions.registering(model, "lungs") as new:
        versions.decide(new, alias, tags)


def tags_of(number: int) -> dict[str, str]:
    return MlflowClient().get_model_version("lungs", str(number)).tags


def aliases() -> dict[str, str]:
    found = MlflowClient().get_registered_model("lungs").aliases
    return {alias: str(number) for alias, number in found.items()}


def existing(number: int) -> Version:
    version = versions.version_of("lungs", str(number))
    assert version is not None
    return version


# The rules


def test_the_alias_moves_for_a_small_sure_gain_and_not_for_a_larger_unsure_one(
    store: Path, hard: str
) -> None:
    sure, unsure = (logged(HARD + more) for more in (0.003, 0.008 + NOISE))
    assert registered(hard).reason.endswith("decision 1 on these images requires 0.97")
    assert aliases() == {"champion": "1"}
    decision, tags = registered(unsure), tags_of(2)
    assert (decision.alias, tags["decision"], aliases()["challenger"]) == ("challenger", "challenger", "2")
    pair = decision.challenge.pair
    assert pair is not None
    assert pair.comparison.difference == pytest.approx(0.008)
    assert 0.5 < pair.comparison.probability_better < 0.95
    assert (pair.decision, pair.required) == (2, pytest.approx(0.9925))
    assert (tags["reason"], tags["compared_with"]) == (decision.reason, "1")
    for text in (
        *("+0.0080 Dice", "decision 2 on these images requires 0.9925; not sure enough", "more images"),
        f"probability of {pair.comparison.probability_better:.6g}",
    ):
        assert text in decision.reason
    decision, tags = registered(sure), tags_of(3)  # only pairing shows so small a gain
    assert decision.alias == "champion"
    assert "better with a probability of 1;" in decision.reason
    assert aliases() == {"champion": "3", "challenger": "2"}
    dice = HARD.mean() + 0.003
    assert tags == {
        **{"decision": "champion", "reason": decision.reason, "compared_with": "1", "identity": HOLDOUT},
        **{"dice": f"{dice:.4f}", "dice_interval": f"{dice - 0.1:.4f} to {dice + 0.1:.4f}"},
    }


def test_the_bootstrap_is_over_patients_not_over_images(store: Path, hard: str) -> None:
    better = logged()  # one patient of four has all the gain
    scored(better, HARD + np.where(np.arange(IMAGES) % 4 == 0, 0.05, -0.01), patients=4)
    pair = pair_of(better, hard)
    assert pair.comparison.difference == pytest.approx(0.005)
    fraction = np.mean(pair.comparison.resamples > 0)
    assert fraction == pytest.approx(1 - 0.75**4, abs=0.01)  # of images it is > 0.85
    assert "has 4 patients with a finding, needs 20" in verdict(pair).reason


NOTHING, SURE, UNSURE, LATER = np.zeros(IMAGES), np.full(IMAGES, 0.01), 0.012 + NOISE, 0.035 + NOISE


@pytest.mark.parametrize(
    ("gains", "decision", "models", "settings", "refusal"),
    [
        (NOTHING, 1, 1, {"min_probability": 0.5}, "; not better"),  # a twin
        (SURE, 1, 1, {"min_gain": 0.0101}, "needs a gain above min_gain=0.0101: score on more"),
        (SURE, 1, 1, {"min_gain": 0.0099}, ""),
        (UNSURE, 1, 1, {}, "; not sure enough: score on more"),
        (UNSURE, 1, 1, {"min_probability": 0.5}, ""),
        (LATER, 1, 1, {}, ""),
        (LATER, 2, 1, {}, ""),
        (LATER, 3, 1, {}, "decision 3 on these images requires 0.996667; not sure enough"),
        (LATER, 20, 1, {}, "decision 20 on these images requires 0.999925; not sure enough"),
        (LATER, 3, 1, {"min_probability": 0.95}, ""),  # 1 - 0.05 / 9
        (LATER, 1, 4, {}, ""),  # as decision 2
        (LATER, 1, 20, {}, "decision 1 on these images, of the best of 20 models, requires 0.9985; not sure"),
    ],
)
def test_later_decisions_require_more_and_the_limits_are_the_users(
    gains: Dices, decision: int, models: int, settings: dict[str, float], refusal: str
) -> None:
    pair = pair_by(gains)
    assert 0.9925 < pair.comparison.probability_better < 1 - 0.03 / 9 or gains is not LATER
    found = verdict(pair, decision, models, **settings)
    assert (found.alias, refusal in found.reason) == ("challenger" if refusal else "champion", True)


def test_decisions_are_counted_on_each_set_of_images_and_outlast_versions(store: Path, hard: str) -> None:
    client = MlflowClient()
    versions.claim("lungs")

    def count(number: int, identity: str = HOLDOUT) -> int:
        return versions.count_decision(Version("lungs", str(number), {}), identity)

    def decide_without_note(identity: str, decision: str) -> None:
        client.create_model_version("lungs", hard, tags={"identity": identity, "decision": decision})

    for identity, decision in ((HOLDOUT, "champion"), (EXTERNAL, "champion"), (HOLDOUT, "none")):
        decide_without_note(identity, decision)
    assert [count(4), count(5), count(4, EXTERNAL), count(6)] == [2, 3, 2, 4]
    assert count(6) == 4  # of a process that was killed, and the same version again
    decide_without_note(HOLDOUT, "challenger")  # version 4 again
    assert count(7) == 5
    for number in ("1", "4"):
        client.delete_model_version("lungs", number)
    assert count(8) == 5  # the first had no note


def test_a_champion_is_replaced_only_on_images_of_20_patients_with_a_finding(store: Path) -> None:
    first, better = logged(), logged()
    for model, more in ((first, 0.4), (better, 0.5)):
        scored(model, HARD + more, patients=26, area=lambda image: 90 * (image % 26 < 8))
    pair = pair_of(better, first)
    assert (pair.positives, pair.comparison.probability_better) == (8, 1)
    assert "; has 8 patients with a finding, needs 20: score on more images" in verdict(pair).reason
    found = [verdict(replace(pair, positives=positives)).alias for positives in (8, 19, 20)]
    assert found == ["challenger", "challenger", "champion"]
    assert verdict(pair, promote="always").alias == "champion"
    for model in (first, better):
        scored(model, HARD, EXTERNAL, "external")
    assert pair_of(better, first).new.identity == EXTERNAL  # although the hold-out decided before


def test_a_first_champion_is_surely_better_than_empty_masks(store: Path, hard: str) -> None:
    barely = logged(HARD - HARD.mean() + BASELINE + 0.02)
    surely, hardly = (challenge(id_of(model), None).pair for model in (hard, barely))
    assert surely is not None and hardly is not None
    empty = np.arange(IMAGES) % 8 == 7
    assert (surely.positives, surely.other_dice) == (np.sum(~empty), BASELINE)
    assert surely.comparison.difference == pytest.approx(np.mean(HARD - empty))
    for pair, positives, alias, reason in (
        (surely, 10, "champion", "; decision 1 on these images requires 0.97"),
        (surely, 9, "challenger", "has 9 patients with a finding, needs 10: score"),
        (hardly, 42, "challenger", "needs an interval above 0: score on more"),
    ):
        pair = replace(pair, decision=1, required=0.97, positives=positives)
        decision = decide(Registry(), Challenge(None, pair.new, pair))
        assert (decision.alias, decision.tags()["compared_with"]) == (alias, "baseline")
        assert reason in decision.reason


def test_always_overrides_visibly_and_never_leaves_the_aliases(store: Path, hard: str) -> None:
    worse = logged(HARD - 0.01)
    assert registered(hard, promote="never").alias == "none"
    assert aliases() == {}
    assert (tags_of(1)["decision"], tags_of(1)["reason"]) == ("none", "promote=never")
    assert registered(hard).alias == "champion"
    assert registered(worse, promote="never").alias == "none"
    assert aliases() == {"champion": "2"}
    forced = registered(worse, promote="always")
    decided = [
        key for key in MlflowClient().get_registered_model("lungs").tags if key.startswith("decision.")
    ]
    assert sorted(decided) == [f"decision.{HOLDOUT}.2", f"decision.{HOLDOUT}.4"]  # never decides nothing
    assert re.fullmatch("promote=always, although: Dice .*; not better", forced.reason)
    assert verdict(pair_by(SURE), promote="always").reason.startswith("promote=always: Dice ")
    assert aliases() == {"champion": "4"}


@pytest.mark.parametrize("dice", [BASELINE, BASELINE - 0.01, None])
def test_a_model_at_the_baseline_or_without_a_score_is_no_first_champion(dice: float | None) -> None:
    score = None if dice is None else UnseenScore(HOLDOUT, "holdout", 5, dice, BASELINE, 0, "", {})
    decision = decide(Registry(), Challenge(None, score, None, "no data set"))
    assert ("no score on unseen" if dice is None else f"Dice {dice:.4f}") in decision.reason
    assert ("(no data set)" in decision.reason) == (dice is None)
    assert decision.alias == "challenger"


def test_models_compare_on_the_champions_images_else_on_any_that_both_were_scored_on(store: Path) -> None:
    first, second = logged(HARD), logged()
    for subset in ("train", "validation", "all"):  # images that it has seen
        scored(second, HARD, HOLDOUT, subset)
    assert scores_of(id_of(second)) == {}
    scored(second, HARD + 0.2, EXTERNAL, "external")
    assert pair_of(second, first) is None
    scored(first, HARD + 0.1, EXTERNAL, "external")
    pair = pair_of(second, first)
    assert (pair.new.subset, pair.comparison.difference) == ("external", pytest.approx(0.1))
    scored(second, HARD - 0.1)
    for deciding, difference in ((HOLDOUT, -0.1), (EXTERNAL, 0.1), ("c" * 32, -0.1)):
        pair = pair_of(second, first, deciding)
        assert (pair.new.identity == HOLDOUT) == (difference < 0)
        assert pair.comparison.difference == pytest.approx(difference)


def test_without_the_images_or_with_others_in_the_table_nothing_is_compared(store: Path, hard: str) -> None:
    second = logged(HARD + 0.1)
    run = MlflowClient().get_run(scores_of(id_of(second))[HOLDOUT].run_id)
    (table,) = Path(run.info.artifact_uri).rglob("scores.json")
    content = json.loads(table.read_text())
    (first_row, *rest), rows = content["data"], content["data"]
    for damaged in (
        rest,
        [["other", *first_row[1:]], *rest],
        [[*row[:2], 1.0, row[3]] for row in rows],  # not the logged mean
        [[*row[:3], 90] for row in rows],  # not the logged baseline
    ):
        table.write_text(json.dumps({**content, "data": damaged}))
        assert pair_of(second, hard) is None
    columns = content["columns"]
    for text in (
        json.dumps(content)[:-9],
        "[" * 100_000,
        *("5", '"text"', '{"data": 5}', json.dumps({"columns": columns, "data": [5]})),
        json.dumps({"columns": [f"other {name}" for name in columns], "data": rows}),
        json.dumps({"columns": columns, "data": [row[:2] for row in rows]}),
        json.dumps({"columns": columns, "data": [[*row[:2], None, row[3]] for row in rows]}),
        json.dumps({"columns": columns, "data": [[*row[:2], "high", "large"] for row in rows]}),
    ):
        table.write_text(text)
        assert pair_of(second, hard) is None
    table.write_text(json.dumps({**content, "data": rows[::-1]}))  # in another order
    assert pair_of(second, hard) is not None
    table.unlink()
    for champion, reason in (
        (None, "the table of its images is lost (no data set); score it again"),
        (
            champion_by(HOLDOUT, hard),
            "version 1: they have no scores of the same images (no data set); score both",
        ),
    ):
        known = challenge(id_of(second), champion)
        decision = decide(Registry(), replace(known, problem="no data set"))
        assert (decision.alias, reason in decision.reason, known.pair) == ("challenger", True, None)


# Who was champion when


def test_the_history_shows_which_version_was_champion_when_and_why(store: Path, hard: str) -> None:
    client = MlflowClient()
    for alias, reason in (
        ("champion", "first"),
        ("champion", "better"),
        ("challenger", "worse"),
        ("champion", "best"),
    ):
        decided(hard, alias, {"reason": reason, "dice": "0.56789"})
    versions.make_champion(existing(2), "by hand")
    periods = versions.history("lungs")
    rows = [(each.number, each.reason, each.dice) for each in periods]
    assert rows == [
        (*row, "0.5679") for row in (("1", "first"), ("2", "better"), ("4", "best"), ("2", "by hand"))
    ]
    times = [each.since for each in periods]
    assert [each.until for each in periods] == [*times[1:], "now"]
    assert times == sorted(times)

    client.set_registered_model_alias("lungs", "champion", "3")  # not by register
    last = versions.history("lungs")[-2:]
    assert [(each.number, each.since, each.until) for each in last] == [
        ("2", times[3], "unknown"),
        ("3", "unknown", "now"),
    ]
    client.set_registered_model_tag("lungs", "champion.of", "the year")  # somebody's own tag
    decided(hard, "champion", {"reason": "best of all"})
    last = versions.history("lungs")[-3:]
    assert [(each.number, each.until) for each in last] == [
        *(("2", "unknown"), ("3", last[-1].since), ("5", "now")),
    ]
    client.set_model_version_tag("lungs", "5", "dice", "n/a")  # by hand
    assert versions.history("lungs")[-1].dice == "unknown"
    client.delete_model_version("lungs", "5")
    last = versions.history("lungs")
    assert (last[-1].number, last[-1].until, last[-1].dice) == ("5", "unknown", "deleted")


# Faults


def test_only_a_registered_model_with_our_tag_is_ours(store: Path, hard: str) -> None:
    client = MlflowClient()
    client.create_registered_model("lungs")
    mlflow.genai.register_prompt("greeting", "Hello")
    for name in ("lungs", "greeting"):
        with pytest.raises(UserError, match=f"name={name}: is a registered model of another project"):
            versions.claim(name)
    with pytest.raises(UserError, match="or give it the tag project=pneumo_experiments if it is yours"):
        registered(hard)
    assert not client.search_model_versions("name = 'lungs'")
    for name in ("lungs", "greeting", "nobody"):
        with pytest.raises(UserError, match=f"name={name}: no such registered model of this project"):
            versions.require_ours(name)
    client.set_registered_model_tag("lungs", "project", "pneumo_experiments")
    assert registered(hard).alias == "champion"
    versions.require_ours("lungs")


def test_a_version_that_is_deleted_meanwhile_is_one_line_and_blocks_nobody(store: Path, hard: str) -> None:
    client = MlflowClient()
    with (
        pytest.raises(UserError, match=r"name=lungs: version 1 cannot be decided \(.*not found\)"),
        versions.registering(hard, "lungs") as new,
    ):
        client.delete_model_version("lungs", new.number)
        versions.decide(new, "champion", {"reason": "the first"})
    assert aliases() == {}
    decided(hard, "champion", {"reason": "the first"})
    with versions.registering(hard, "lungs") as new:
        client.delete_model_version("lungs", "2")  # the champion, just before it is replaced
        versions.decide(new, "champion", {"reason": "better"})
    assert aliases() == {"champion": "3"}
    assert [each.number for each in versions.history("lungs")] == ["2", "3"]


def test_a_store_that_takes_no_aliases_is_one_line(store: Path, hard: str) -> None:
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute(
            "CREATE TRIGGER none_here BEFORE INSERT ON registered_model_aliases"
            " BEGIN SELECT RAISE(ABORT, 'no aliases here'); END"
        )
    with pytest.raises(UserError, match=r"version 1 cannot be decided .*promote=never") as error:
        registered(hard)
    assert "\n" not in str(error.value)
    assert "decision" not in tags_of(1)
    assert registered(hard, promote="never").alias == "none"
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("DROP TRIGGER none_here")


# Several at once


def servable(dices: Dices, network: str = "fcn_resnet50") -> str:
    """A model that can be loaded, where that network is the tiny one, and scored so."""
    member = tiny_member(0)
    member = replace(member, settings={**member.settings, "network": network})
    model = log_model(Detector((member,), 32, Thresholds(), "f" * 64), Train())
    scored(model, dices)
    return model


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=soak), "postgresql"])
def test_of_versions_registered_at_once_the_best_ends_as_champion(
    kind: str, store: Path, tiny: None, commands: CommandServer, database: DatabaseServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "postgresql":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database.create("promotion"))
        mlflow.set_tracking_uri(None)
    models = [servable(HARD + more) for more in (0.0, 0.15, 0.05)]
    variables = environment() | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    words = [("register", "--model", model, "--name", "lungs") for model in models]
    started = [commands.start(*each, folder=store, environment=variables, tiny=True) for each in words]
    ends = [command.communicate() for command in started]
    assert [code for code, _ in ends] == [0] * len(models), ends
    found = MlflowClient().search_model_versions("name = 'lungs'")
    assert sorted(int(version.version) for version in found) == [1, 2, 3]
    assert sum(key.startswith("decision.") for key in MlflowClient().get_registered_model("lungs").tags) == 3
    champion = versions.champion_of("lungs")
    assert champion is not None and champion.source == models[1]
    periods = versions.history("lungs")
    # Some may have been champion for a moment, when none of the others was yet.
    assert (periods[-1].dice, periods[-1].until) == (max(each.dice for each in periods), "now")
    description = MlflowClient().get_registered_model("lungs").description
    assert description.startswith(f"The champion is [version {champion.number}](#/models/lungs/versions/")


@pytest.mark.parametrize(
    ("moment", "promote", "compared_with", "alias"),
    [
        ("before its move", "auto", "2", "challenger"),
        ("after its move", "auto", "2", "challenger"),
        ("after its move", "always", "1", "champion"),  # always does not fight: the last one keeps it
    ],
)
def test_a_decision_is_made_again_if_another_process_moved_the_champion(
    moment: str, promote: str, compared_with: str, alias: str, store: Path, weak_strong_new: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    *others, new = weak_strong_new
    for model in others:
        decided(model, "none", {})
    versions.make_champion(existing(1), "by hand")

    def move_away(*known: Any) -> Any:
        monkeypatch.undo()
        versions.make_champion(existing(2), "by another process")
        return decide(*known) if known[1:] else None

    if moment == "before its move":
        monkeypatch.setattr(register_stage, "decide", move_away)
    else:
        monkeypatch.setattr(register_stage, "time", SimpleNamespace(sleep=move_away))
    version = register_stage.register(make(Register, model=new, name="lungs", promote=promote))
    assert version is not None and not version.champion
    assert (version.tags["compared_with"], version.tags["decision"]) == (compared_with, alias)
    assert aliases()["champion"] == versions.history("lungs")[-1].number == "2"


def test_an_alias_that_another_process_sets_at_the_same_moment_is_moved(
    store: Path, hard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses the second of two first rows of an alias."""
    for _ in range(2):
        decided(hard, "none", {})
    set_alias = MlflowClient.set_registered_model_alias

    def collide(client: MlflowClient, name: str, alias: str, number: str) -> None:
        monkeypatch.undo()
        set_alias(client, name, alias, "1")
        raise MlflowException("duplicate key value violates unique constraint", BAD_REQUEST)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", collide)
    versions.decide(existing(2), "champion", {"reason": "better"})
    assert aliases() == {"champion": "2"}
