"""Which version is the champion: the rules, their notes in the registry, and its faults."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from command_server import CommandServer
from database_server import DatabaseServer
from helpers import environment, make, soak
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from numpy.typing import NDArray
from tiny_network import CPU, random_network

from pneumo_experiments import __version__, tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.comparison import compare, required_probability
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.registry import champions, model_scores, versions
from pneumo_experiments.registry.model_scores import UnseenScore
from pneumo_experiments.registry.promotion import Decision, Pair, compared, counted, decide
from pneumo_experiments.serving import Detector, TrainedNetwork, save
from pneumo_experiments.settings import Register, Registry, Score, Train, as_config
from pneumo_experiments.stages import register as register_stage
from pneumo_experiments.tracking.code_version import version_in

pytestmark = pytest.mark.usefixtures("no_code")

HOLDOUT, EXTERNAL, IMAGES = "a" * 32, "b" * 32, 48
HARD = np.random.default_rng(0).uniform(0.2, 0.6, IMAGES)  # much spread between images, for all models
NOISE = np.random.default_rng(1).normal(0, 0.1, IMAGES)  # of a model that is better here and worse there
BASELINE = 0.125  # every eighth image has no finding
Dices = Sequence[float] | NDArray[np.float64]


def area_px(image: int) -> int:
    """The area of the finding; every eighth image has none."""
    return 90 * (image % 8 < 7)


@dataclass(frozen=True)
class Store:
    folder: Path

    @property
    def client(self) -> Any:
        return MlflowClient()

    def version(self, number: int | str) -> ModelVersion:
        return self.client.get_model_version("lungs", str(number))

    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model("lungs").aliases
        return {alias: str(number) for alias, number in found.items()}


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(None)
    yield Store(tmp_path)
    assert mlflow.active_run() is None
    mlflow.set_tracking_uri(None)


def logged(dices: Dices | None, identity: str = HOLDOUT, subset: str = "holdout") -> str:
    """A model without a network, that scored so on the images; one run has both."""
    folder = Path("model")
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text("{}")
    with tracking.run("train", Train()):
        model = tracking.log_model(folder)
        if dices is not None:
            log_scores(model, dices, identity, subset)
    return model


def log_scores(
    model: str,
    dices: Dices,
    identity: str = HOLDOUT,
    subset: str = "holdout",
    patients: int = IMAGES,
    area: Callable[[int], int] = area_px,
) -> None:
    """Logs in the active run what `score` does: metrics of the model, and the table of the images."""
    baseline = float(np.mean([area(image) == 0 for image in range(len(dices))]))
    facts = {"subset": subset, "images": len(dices), "dice_baseline": baseline}
    mean = float(np.mean(dices))
    metrics = {"dice": mean, "dice_low": mean - 0.1, "dice_high": mean + 0.1}
    tracking.log_scores(metrics, model, Path("siim.h5"), identity, facts)
    rows = [(f"{identity[0]}{i}", f"p{i % patients}", float(dice), area(i)) for i, dice in enumerate(dices)]
    tracking.log_table(("image_id", "patient", "dice", "truth_area_px"), rows, "scores")


def scored(model: str, *arguments: Any, **named: Any) -> None:
    with tracking.run("score", Score(model=model)):
        log_scores(model, *arguments, **named)


def scores_of(model: str) -> dict[str, UnseenScore]:
    return model_scores.scores_of(model.removeprefix("models:/"))


def pair_of(model: str, other: str, deciding: str = HOLDOUT) -> Pair | None:
    """The comparison with a champion that these images made one."""
    return compared(scores_of(model), champion_by(deciding), scores_of(other))


def champion_by(identity: str) -> versions.Version:
    return versions.Version("lungs", "1", True, "", tags={"identity": identity})


def verdict(pair: Pair | None, number: int = 1, models: int = 1, **settings: Any) -> Decision:
    """The verdict on a challenger if it is that decision on its images."""
    assert pair is not None
    chosen = make(Registry, **settings)
    required = required_probability(chosen.min_probability, number, models)
    pair = replace(pair, decision=number, models=models, required=required)
    return decide(chosen, {pair.new.identity: pair.new}, champion_by(HOLDOUT), pair, "")


def pair_by(gains: Dices) -> Pair:
    """The comparison of a challenger that gains so much on each image."""
    dices = HARD + gains
    score = UnseenScore(HOLDOUT, "holdout", IMAGES, float(np.mean(dices)), BASELINE, 0, "", {})
    comparison = compare(dices, HARD, [str(image) for image in range(IMAGES)])
    return Pair(score, float(HARD.mean()), comparison, IMAGES)


def registered(model: str, **settings: Any) -> Decision:
    """Registers a model by the scores that it has, as `register` does where it need not score."""
    chosen, model_id = make(Registry, name="lungs", **settings), model.removeprefix("models:/")
    with tracking.run("register", Register()), versions.registering(model, "lungs", {}) as number:
        champion, scores = versions.champion_of("lungs"), model_scores.scores_of(model_id)
        pair = compared(scores, champion, model_scores.scores_of(champion.model_id) if champion else {})
        if pair is not None and chosen.promote != "never":
            pair = counted(pair, chosen, number, 1)
        decision = decide(chosen, scores, champion, pair, "")
        champions.decide("lungs", number, decision.alias, decision.reason, decision.tags(champion))
    return decision


# The rules


def test_the_alias_moves_for_a_small_sure_gain_and_not_for_a_larger_unsure_one(store: Store) -> None:
    first, sure, unsure = (logged(HARD + more) for more in (0.0, 0.003, 0.003 + NOISE - NOISE.mean() + 0.005))
    assert "the first champion" in registered(first).reason
    assert store.aliases() == {"champion": "1"}
    decision = registered(unsure)
    tags = store.version(2).tags
    assert (decision.alias, tags["decision"], store.aliases()["challenger"]) == ("challenger",) * 2 + ("2",)
    assert float(tags["gain"]) == pytest.approx(0.008)
    assert 0.5 < float(tags["probability_better"]) < 0.95
    assert tags["reason"] == decision.reason
    assert tags["compared_with"] == "1"
    assert (tags["decision_number"], tags["required_probability"]) == ("2", "0.9925")
    for text in (
        "+0.0080 Dice",
        "decision 2 on these images requires 0.9925; not sure enough",
        "more images",
    ):
        assert text in decision.reason
    assert f"probability of {float(tags['probability_better']):.6g}" in decision.reason
    decision = registered(sure)  # between images it is far less than their spread: only pairing shows it
    assert (decision.alias, store.version(3).tags["probability_better"]) == ("champion", "1.0")
    assert store.aliases() == {"champion": "3", "challenger": "2"}
    tags = store.version(3).tags
    assert {name: tags[name] for name in ("identity", "subset", "images", "dice_baseline")} == {
        **{"identity": HOLDOUT, "subset": "holdout", "images": str(IMAGES), "dice_baseline": str(BASELINE)},
    }
    dice = float(tags["dice"])
    assert dice == pytest.approx(HARD.mean() + 0.003)
    assert (float(tags["dice_low"]), float(tags["dice_high"])) == pytest.approx((dice - 0.1, dice + 0.1))


def test_the_bootstrap_is_over_patients_not_over_images(store: Store) -> None:
    # One patient of four has all the gain.
    first, better = logged(HARD), logged(None)
    scored(better, HARD + np.where(np.arange(IMAGES) % 4 == 0, 0.05, -0.01), patients=4)
    pair = pair_of(better, first)
    assert pair is not None
    assert pair.comparison.difference == pytest.approx(0.005)
    fraction = np.mean(pair.comparison.resamples > 0)
    assert fraction == pytest.approx(1 - 0.75**4, abs=0.01)  # of images it is > 0.85
    assert "has 4 patients with a finding, needs 20" in verdict(pair).reason


def test_each_decision_on_the_same_images_requires_more() -> None:
    pair = pair_by(0.035 + NOISE - NOISE.mean())
    assert 0.9925 < pair.comparison.probability_better < 1 - 0.03 / 9
    aliases = [verdict(pair, number).alias for number in (1, 2, 3, 20)]
    assert aliases == ["champion", "champion", "challenger", "challenger"]
    assert verdict(pair, 1, 4).alias == "champion"  # as decision 2
    best = verdict(pair, 1, 20)
    assert best.alias == "challenger"
    assert "decision 1 on these images, of the best of 20 models, requires 0.9985" in best.reason
    assert verdict(pair, 3, min_probability=0.95).alias == "champion"  # 1 - 0.05 / 9
    assert verdict(pair, promote="always").reason.startswith("promote=always: Dice ")


def test_decisions_are_counted_on_each_set_of_images_and_outlast_versions(store: Store) -> None:
    def count(number: int, identity: str = HOLDOUT) -> int:
        return champions.count_decision("lungs", str(number), identity)

    def decided(identity: str, decision: str) -> None:  # without a note of the registered model
        tags = {"identity": identity, "decision": decision}
        store.client.create_model_version("lungs", model, tags=tags)

    model = logged(None)
    versions.claim("lungs")
    for identity in (HOLDOUT, EXTERNAL):
        decided(identity, "champion")
    decided(HOLDOUT, "none")
    assert [count(4), count(5), count(4, EXTERNAL), count(6)] == [2, 3, 2, 4]
    assert count(6) == 4  # of a process that was killed, and the same version again
    decided(HOLDOUT, "challenger")  # version 4 again
    assert count(7) == 5
    for number in (1, 4):
        store.client.delete_model_version("lungs", str(number))
    assert count(8) == 5  # the first had no note


def test_a_champion_is_replaced_only_on_images_of_20_patients_with_a_finding(store: Store) -> None:
    first, better = logged(None), logged(None)
    for model, more in ((first, 0.4), (better, 0.5)):
        scored(model, HARD + more, patients=26, area=lambda image: 90 * (image % 26 < 8))
    pair = pair_of(better, first)
    assert pair is not None
    assert (pair.positives, pair.comparison.probability_better) == (8, 1)
    assert "; has 8 patients with a finding, needs 20: score on more images" in verdict(pair).reason
    aliases = [verdict(replace(pair, positives=positives)).alias for positives in (8, 19, 20)]
    assert aliases == ["challenger", "challenger", "champion"]
    assert verdict(pair, promote="always").alias == "champion"
    for model in (first, better):
        scored(model, HARD, EXTERNAL, "external")
    enough = pair_of(better, first)  # although the hold-out decided about the champion
    assert enough is not None and enough.new.identity == EXTERNAL


def test_a_first_champion_is_surely_better_than_empty_masks(store: Store) -> None:
    def first(pair: Pair, positives: int) -> tuple[str, str]:
        pair = replace(pair, decision=1, required=0.97, positives=positives)
        decision = decide(Registry(), {HOLDOUT: pair.new}, None, pair, "")
        assert decision.tags(None)["compared_with"] == "baseline"
        return decision.alias, decision.reason

    surely, hardly = (
        compared(scores_of(logged(dices)), None, {}) for dices in (HARD, HARD - HARD.mean() + BASELINE + 0.02)
    )
    assert surely is not None and hardly is not None
    empty = np.arange(IMAGES) % 8 == 7
    assert (surely.positives, surely.other_dice) == (np.sum(~empty), BASELINE)
    assert surely.comparison.difference == pytest.approx(np.mean(HARD - empty))
    alias, reason = first(surely, 10)
    assert (alias, "the first champion: Dice" in reason) == ("champion", True)
    alias, reason = first(surely, 9)
    assert (alias, "has 9 patients with a finding, needs 10: score" in reason) == ("challenger", True)
    alias, reason = first(hardly, 42)
    assert (alias, "needs an interval above 0: score on more" in reason) == ("challenger", True)


def test_a_twin_is_no_better_and_the_limits_are_the_users() -> None:
    twin = pair_by(np.zeros(IMAGES))
    assert twin.comparison.probability_better == 0.5
    refused = verdict(twin, min_probability=0.5)
    assert (refused.alias, refused.reason.endswith("not better")) == ("challenger", True)
    gained = pair_by(np.full(IMAGES, 0.01))
    refused = verdict(gained, min_gain=0.0101)
    assert (refused.alias, "min_gain=0.0101" in refused.reason) == ("challenger", True)
    assert verdict(gained, min_gain=0.0099).alias == "champion"
    unsure = pair_by(0.012 + NOISE - NOISE.mean())
    assert verdict(unsure).alias == "challenger"
    assert verdict(unsure, min_probability=0.5).alias == "champion"


def test_always_overrides_visibly_and_never_leaves_the_aliases(store: Store) -> None:
    assert registered(logged(HARD), promote="never").alias == "none"
    assert store.aliases() == {}
    assert (store.version(1).tags["decision"], store.version(1).tags["reason"]) == ("none", "promote=never")
    assert registered(logged(HARD)).alias == "champion"
    worse = logged(HARD - 0.01)
    assert registered(worse, promote="never").alias == "none"
    assert store.aliases() == {"champion": "2"}
    forced = registered(worse, promote="always")
    numbers = [store.version(number).tags.get("decision_number") for number in (1, 2, 3, 4)]
    assert numbers == [None, "1", None, "2"]  # never decides nothing
    assert forced.reason.startswith("promote=always, although: Dice ")
    assert "not better" in forced.reason
    assert store.aliases() == {"champion": "4"}


@pytest.mark.parametrize("dice", [BASELINE, BASELINE - 0.01, None])
def test_a_model_at_the_baseline_or_without_a_score_is_no_first_champion(dice: float | None) -> None:
    score = UnseenScore(HOLDOUT, "holdout", 5, dice or 0, BASELINE, 0, "", {})
    decision = decide(Registry(), {} if dice is None else {HOLDOUT: score}, None, None, "no data set")
    assert ("no score on unseen" if dice is None else f"Dice {dice:.4f}") in decision.reason
    assert ("(no data set)" in decision.reason) == (dice is None)
    assert decision.alias == "challenger"


def test_scores_on_images_that_a_model_has_seen_do_not_count(store: Store) -> None:
    model = logged(None)
    for subset in ("train", "validation", "all"):
        scored(model, HARD, subset[0] * 32, subset)
    assert scores_of(model) == {}


def test_models_compare_on_the_champions_images_else_on_any_that_both_were_scored_on(store: Store) -> None:
    first, second = logged(HARD), logged(HARD + 0.2, EXTERNAL, "external")
    assert pair_of(second, first) is None
    scored(first, HARD + 0.1, EXTERNAL, "external")
    pair = pair_of(second, first)
    assert pair is not None
    assert (pair.new.subset, pair.comparison.difference) == ("external", pytest.approx(0.1))
    scored(second, HARD - 0.1)
    for deciding, difference in ((HOLDOUT, -0.1), (EXTERNAL, 0.1), ("c" * 32, -0.1)):
        pair = pair_of(second, first, deciding)
        assert pair is not None
        assert (pair.new.identity == HOLDOUT) == (difference < 0)
        assert pair.comparison.difference == pytest.approx(difference)


def test_without_the_images_or_with_others_in_the_table_nothing_is_compared(store: Store) -> None:
    first, second = logged(HARD), logged(HARD + 0.1)
    run = store.client.get_run(scores_of(second)[HOLDOUT].run_id)
    (table,) = Path(run.info.artifact_uri).rglob("scores.json")
    content = json.loads(table.read_text())
    damages = [
        {**content, "data": content["data"][1:]},
        {**content, "data": [["other", *content["data"][0][1:]], *content["data"][1:]]},
        {**content, "data": [[*row[:2], 1.0, row[3]] for row in content["data"]]},  # not the logged mean
        {**content, "data": [[*row[:3], 90] for row in content["data"]]},  # not the logged baseline
        {"columns": ["image_id"], "data": [["a0"]]},
        [],
    ]
    for damage in damages:
        table.write_text(json.dumps(damage))
        assert pair_of(second, first) is None
    table.write_text(json.dumps({**content, "data": content["data"][::-1]}))  # in another order
    assert pair_of(second, first) is not None
    table.unlink()
    assert pair_of(second, first) is None
    alone = decide(Registry(), scores_of(second), None, None, "no data set")
    assert "the table of its images is lost (no data set); score it again" in alone.reason
    decision = decide(Registry(), scores_of(second), champion_by(HOLDOUT), None, "no data set")
    assert "version 1: they have no scores of the same images (no data set); score both" in decision.reason
    assert decision.alias == "challenger"


# Who was champion when


def test_the_history_shows_which_version_was_champion_when_and_why(store: Store) -> None:
    for more in (0.0, 0.01, -0.1, 0.02):
        registered(logged(HARD + more))
    version = versions.version_of("lungs", "2")
    assert version is not None
    champions.move_champion(version, "moved by hand from version 4")
    reigns = champions.history("lungs")
    assert [each.number for each in reigns] == ["1", "2", "4", "2"]
    assert [each.since for each in reigns[1:]] + ["now"] == [each.until for each in reigns]
    times = [datetime.fromisoformat(each.since) for each in reigns]
    assert times == sorted(times)
    assert "first champion" in reigns[0].reason
    assert "+0.0100 Dice" in reigns[1].reason
    assert reigns[3].reason == "moved by hand from version 4"
    assert reigns[0].dice == f"{HARD.mean():.4f}"
    tags = {number: store.version(number).tags for number in (1, 2, 3, 4)}
    assert tags[1]["champion_until"] == reigns[1].since
    assert (tags[2]["champion_since"], "champion_until" in tags[2]) == (reigns[3].since, False)
    assert (tags[4]["champion_since"], tags[4]["champion_until"]) == (reigns[2].since, reigns[3].since)
    assert "champion_since" not in tags[3]
    lines = champions.history_lines(reigns)
    assert lines[0].split() == ["version", "from", "until", "Dice", "why"]
    assert lines[4].split()[:4] == ["2", reigns[3].since, "now", reigns[3].dice]

    store.client.set_registered_model_alias("lungs", "champion", "3")  # not by register
    reigns = champions.history("lungs")
    assert [(r.number, r.since, r.until) for r in reigns[-2:]] == [
        ("2", times[3].isoformat(timespec="milliseconds").replace("+00:00", "Z"), "unknown"),
        ("3", "unknown", "now"),
    ]
    registered(logged(HARD + 0.05))
    last = champions.history("lungs")
    assert [(r.number, r.until) for r in last[-3:]] == [("2", "unknown"), ("3", last[-1].since), ("5", "now")]
    store.client.delete_model_version("lungs", "5")
    last = champions.history("lungs")
    assert (last[-1].number, last[-1].until, last[-1].dice) == ("5", "unknown", "deleted")


# Faults


def test_the_name_of_another_projects_model_is_refused_and_an_unused_one_is_taken(store: Store) -> None:
    model = logged(HARD)
    store.client.create_registered_model("lungs")
    store.client.create_model_version("lungs", model)
    for call in (versions.claim, versions.require_ours):
        with pytest.raises(UserError, match="name=lungs: is a registered model of another project"):
            call("lungs")
    with pytest.raises(UserError, match="another project"):
        registered(model)
    assert len(store.client.search_model_versions("name = 'lungs'")) == 1
    with pytest.raises(UserError, match="name=nobody: no such"):
        versions.require_ours("nobody")
    store.client.create_registered_model("unused")
    versions.claim("unused")
    versions.claim("unused")
    versions.require_ours("unused")


def test_a_version_that_is_deleted_meanwhile_is_one_line_and_blocks_nobody(store: Store) -> None:
    model = logged(HARD)
    with (
        pytest.raises(UserError, match="version 1 was deleted before it was decided; no alias moved"),
        versions.registering(model, "lungs", {}) as number,
    ):
        store.client.delete_model_version("lungs", number)
        champions.decide("lungs", number, "champion", "the first", {})
    assert store.aliases() == {}
    assert registered(model).alias == "champion"
    with versions.registering(logged(HARD + 0.1), "lungs", {}) as number:
        store.client.delete_model_version("lungs", "2")  # the champion, just before it is replaced
        champions.decide("lungs", number, "champion", "better", {})
    assert store.aliases() == {"champion": "3"}
    assert [each.number for each in champions.history("lungs")] == ["2", "3"]


def test_a_database_that_takes_no_aliases_leaves_a_decided_version(store: Store) -> None:
    model = logged(HARD)
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute(
            "CREATE TRIGGER none_here BEFORE INSERT ON registered_model_aliases"
            " BEGIN SELECT RAISE(ABORT, 'no aliases here'); END"
        )
    with pytest.raises(
        UserError, match=r"the alias champion cannot be set .*; version 1 of lungs stays"
    ) as e:
        registered(model)
    assert "\n" not in str(e.value)
    tags = store.version(1).tags
    assert (tags["decision"], "champion_since" in tags) == ("none", False)
    assert {run.info.status for run in store.client.search_runs(["0"])} == {"FINISHED", "FAILED"}
    assert registered(model, promote="never").alias == "none"


# Several at once


def servable(dices: Dices, network: str = "fcn_resnet50") -> str:
    """A model that can be loaded, where that network is the tiny one, and scored so."""
    member = TrainedNetwork(tiny_predictor(), as_config(make(Train, network=network)))
    detector = Detector((member,), 32, Thresholds(), "f" * 64)
    folder = Path("servable")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save(folder, detector)
    with tracking.run("train", Train()):
        model = tracking.log_model(folder)
    scored(model, dices)
    return model


def tiny_predictor() -> Any:
    from pneumo_experiments.learning.predict import Predictor

    return Predictor(random_network(0), CPU)


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=soak), "postgresql"])
def test_of_versions_registered_at_once_the_best_ends_as_champion(
    kind: str, store: Store, tiny: None, commands: CommandServer, database: DatabaseServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "postgresql":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database.create("promotion"))
        mlflow.set_tracking_uri(None)
    models = [servable(HARD + more) for more in (0.0, 0.15, 0.05)]
    variables = environment() | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    started = [
        commands.start(
            "register", "--model", model, "--name", "lungs",
            folder=store.folder, environment=variables, tiny=True,
        )
        for model in models
    ]  # fmt: skip
    ends = [command.communicate() for command in started]
    assert [code for code, _ in ends] == [0] * len(models), ends
    versions = store.client.search_model_versions("name = 'lungs'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3]
    assert {int(v.tags["decision_number"]) for v in versions} <= {1, 2, 3}
    assert store.client.get_model_version_by_alias("lungs", "champion").source == models[1]
    reigns = champions.history("lungs")
    # Some may have been champion for a moment, when none of the others was yet.
    assert (float(reigns[-1].dice), reigns[-1].until) == (max(float(each.dice) for each in reigns), "now")
    description = store.client.get_registered_model("lungs").description
    assert description.startswith(f"The champion is [version {reigns[-1].number}](#/models/lungs/versions/")


@pytest.mark.parametrize("moment", ["before its move", "after its move"])
def test_a_decision_is_made_again_if_the_champion_moved(
    moment: str, store: Store, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak, strong, new = (servable(HARD + gain, "tiny") for gain in (0.0, 0.15, 0.05))
    for model in (weak, strong):
        register_stage.register(make(Register, model=model, name="lungs", promote="never"))

    def move(number: str) -> None:
        version = versions.version_of("lungs", number)
        assert version is not None
        champions.move_champion(version, "by another process")

    def decide_then_move(*known: Any) -> Decision:
        monkeypatch.setattr(register_stage, "decide", decide)
        decision = decide(*known)
        move("2")
        return decision

    move("1")
    if moment == "before its move":
        monkeypatch.setattr(register_stage, "decide", decide_then_move)
    else:
        monkeypatch.setattr(register_stage, "time", SimpleNamespace(sleep=lambda _: move("2")))
    version = register_stage.register(make(Register, model=new, name="lungs"))
    assert version is not None and not version.champion
    assert store.aliases() == {"champion": "2", "challenger": "3"}
    assert store.version(3).tags["compared_with"] == "2"
    assert [each.number for each in champions.history("lungs")][-1] == "2"


def test_an_alias_that_another_process_sets_at_the_same_moment_is_moved(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses the second of two first rows of an alias."""
    for _ in range(2):
        registered(logged(HARD), promote="never")
    set_alias = MlflowClient.set_registered_model_alias

    def collide(client: MlflowClient, name: str, alias: str, number: str) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_alias)
        set_alias(client, name, alias, "1")
        raise MlflowException("duplicate key value violates unique constraint", BAD_REQUEST)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", collide)
    champions.decide("lungs", "2", "champion", "better", {})
    assert store.aliases() == {"champion": "2"}


def test_of_two_that_always_promote_the_last_one_keeps_the_alias(
    store: Store, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [servable(HARD + gain, "tiny") for gain in (0.0, 0.05)]
    register_stage.register(make(Register, model=models[0], name="lungs", promote="always"))

    def move_back(_: float) -> None:
        first = versions.version_of("lungs", "1")
        assert first is not None
        champions.move_champion(first, "by another process")

    monkeypatch.setattr(register_stage, "time", SimpleNamespace(sleep=move_back))
    register_stage.register(make(Register, model=models[1], name="lungs", promote="always"))
    assert store.aliases() == {"champion": "1"}


# The version of the code


def test_the_code_version_is_the_commit_with_a_mark_for_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        options = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *options, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert version_in(package) == __version__
    git("init", "-q")
    assert version_in(package) == __version__  # no part of the checkout around it
    git("add", "package")
    git("commit", "-qm", "first")
    clean = f"{__version__}+{git('rev-parse', 'HEAD')[:12]}"
    assert version_in(package) == clean
    (tmp_path / "elsewhere.txt").touch()
    assert version_in(package) == clean
    (package / "new.py").touch()
    assert version_in(package) == f"{clean}-dirty"


def test_every_run_records_its_code_version(store: Store) -> None:
    with tracking.run("train", Train()) as run_id:
        pass
    assert store.client.get_run(run_id).data.tags["code_version"] == tracking.code_version()
    assert tracking.code_version().startswith(__version__)
