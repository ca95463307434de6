"""What a search may vary: ranges, files of ranges, and warm starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from helpers import ROOT, make
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage

from pneumo_experiments.errors import UserError
from pneumo_experiments.search.space import (
    SPACE,
    as_range_text,
    search_space,
    suggest,
    unsearched_ranges,
    with_values,
    within,
)
from pneumo_experiments.search.storage import retry
from pneumo_experiments.search.study import open_study
from pneumo_experiments.settings import Recipe, Search, StudySettings, as_config, flat, leaves


def space_of(searched: str, path: Path | None = None, **recipe: Any) -> dict[str, Any]:
    return search_space(make(StudySettings, searched=searched, space=path), make(Recipe, **recipe))


def error_of(searched: str, path: Path | None = None, **recipe: Any) -> str:
    with pytest.raises(UserError) as raised:
        space_of(searched, path, **recipe)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "space.yaml"


def test_every_range_is_within_the_limits_of_its_setting() -> None:
    known = {leaf.name: leaf for leaf in leaves(Recipe)}
    for name, range_ in SPACE.items():
        limits = known[name].arg
        ends = range_.choices if isinstance(range_, CategoricalDistribution) else (range_.low, range_.high)
        assert all(limits.min <= end <= limits.max for end in ends), name
    assert "bce_weight" not in SPACE  # the reference of the others


def test_the_searched_names_have_their_ranges_in_order_and_once() -> None:
    space = space_of(" ema, dice_weight ,ema,")
    assert [*space] == ["ema", "dice_weight"]
    assert space["dice_weight"] == FloatDistribution(0.1, 10, log=True)
    default = ["dice_weight", "focal_weight", "presence_weight", "learning_rate"]
    assert [*space_of(StudySettings().searched)] == default


def test_names_without_a_range_are_named_with_the_nearest() -> None:
    assert error_of("dice_wieght") == (
        "searched=dice_wieght: no setting 'dice_wieght' with a range; did you mean dice_weight?"
    )
    assert "give one of dice_weight, " in error_of("qqq")
    assert error_of("bce_weight").startswith("searched=bce_weight: no setting")
    assert error_of(" , ").startswith("searched: no setting is named; name some of dice_weight")
    assert error_of("augment_strength", augment="none").endswith("set augment=mild")


def test_the_weight_of_a_head_that_the_network_does_not_have_is_not_searched(file: Path) -> None:
    file.write_text("aux_weight: {low: 0, high: 1}\nnetwork: {choices: [fcn_resnet50, unet:resnet18]}\n")
    for network in ("unet:resnet18", "lraspp_mobilenet_v3_large"):
        assert error_of("dice_weight,aux_weight", file, network=network) == (
            f"searched=aux_weight: without effect, since {network} has no auxiliary head; leave it out, or"
            " take another network, such as fcn_resnet50"
        )
    assert [*space_of("aux_weight", file)] == ["aux_weight"]
    assert [*space_of("aux_weight,network", file, network="unet:resnet18")] == ["aux_weight", "network"]


def test_a_file_changes_ranges_and_gives_other_settings_one(file: Path) -> None:
    file.write_text(
        "dice_weight: {low: 0.5, high: 2}\n"
        "learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"
        "batch_size: {low: 4, high: 16}\n"
        "augment: {choices: [strong, false]}\n"
    )
    space = space_of("dice_weight,learning_rate,batch_size,augment", file)
    assert space == {
        "dice_weight": FloatDistribution(0.5, 2),
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "batch_size": IntDistribution(4, 16),
        "augment": CategoricalDistribution(["strong", "none"]),
    }
    settings = make(StudySettings, searched="dice_weight,augment", space=file)
    assert unsearched_ranges(settings) == ["learning_rate", "batch_size"]
    assert space_of("focal_weight", file)["focal_weight"] == SPACE["focal_weight"]  # not in the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dice_wieght: {low: 1, high: 2}",
            "no setting 'dice_wieght' with a range; did you mean dice_weight?",
        ),
        ("dice_weight: {low: 2, high: 2}", "dice_weight: low 2 is not below high 2"),
        ("dice_weight: {low: 3, high: 2}", "dice_weight: low 3 is not below high 2"),
        ("dice_weight: {low: 0, high: 2, log: true}", "dice_weight: a logarithmic range cannot start at 0; "),
        ("dice_weight: {low: -1, high: 2}", "dice_weight: -1.0 is not in the range 0<=x<="),
        ("ema: {choices: [0.5, 7]}", "ema: 7.0 is not in the range 0<=x<=1"),
        ("ema: {choices: [0.5, high]}", "ema: 'high' is not a valid number"),
        ("ema: {choices: [true]}", "ema: True is not a number"),
        ("batch_size: {choices: [4.5]}", "batch_size: '4.5' is not a valid whole number"),
        ("batch_size: {low: 4, high: .inf}", "batch_size: 'inf' is not a valid whole number"),
        ("dice_weight: {low: .nan, high: 2}", "dice_weight: 'nan' is not a finite number"),
        ("compile: {choices: [1]}", "compile: 1 is not a boolean"),
        ("augment: {low: 0, high: 1}", "augment: write choices"),
        ("network: {choices: [unet]}", "network: 'unet' is no network; the nearest are unet:"),
        ("ema: {choices: []}", "ema: write choices as a list, without low, high and log"),
        ("ema: {choices: 3}", "ema: write choices as a list"),
        ("ema: {choices: [0.1], low: 0}", "ema: write choices as a list"),
        ("dice_weight: {low: 1}", "dice_weight: write low and high"),
        (
            "dice_weight: {low: 1, high: 2, step: 1}",
            "dice_weight: no step; write low, high and log, or choices",
        ),
        ("dice_weight: {low: 1, high: 2, log: often}", "dice_weight: write log as true or false"),
        ("dice_weight: 3", "dice_weight: write {low: …, high: …} or {choices: […]}"),
        ("dice_weight: {low: [1], high: 2}", "dice_weight: "),
        *((no_mapping, "") for no_mapping in ("- dice_weight", "dice_weight", "{", "a: b: c", "\x00", None)),
    ],
)
def test_a_range_that_cannot_be_used_is_named_with_its_file(
    text: str | None, message: str, file: Path
) -> None:
    if text is not None:  # else there is no file
        file.write_text(text)
    assert error_of("dice_weight", file).startswith(f"space={file}: {message}")


def test_values_outside_a_range_move_to_its_nearest_end() -> None:
    space = space_of("dice_weight,focal_weight,ema")
    assert within({"dice_weight": 99, "focal_weight": 0, "ema": 0.9, "lovasz_weight": 1}, space) == {
        "dice_weight": 10,
        "focal_weight": 0.1,
        "ema": 0.9,
    }
    assert within({"ema": 0.5}, space) == {}  # not among the choices: Optuna draws it


def test_suggested_values_stay_in_their_ranges_and_reach_the_recipe(file: Path) -> None:
    file.write_text("batch_size: {low: 4, high: 16}\naugment: {choices: [true, false]}\n")
    space = space_of("dice_weight,ema,batch_size,augment", file)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        values = suggest(study.ask(), space)
        assert 0.1 <= values["dice_weight"] <= 10
        assert values["ema"] in (0.0, 0.9, 0.99, 0.999)
        recipe = flat(with_values(Recipe(), values))
        assert {name: recipe[name] for name in values} == values
        assert isinstance(recipe["batch_size"], int)
        assert {n: v for n, v in recipe.items() if n not in values} == {
            n: v for n, v in flat(Recipe()).items() if n not in values
        }


# Warm starts


def queued(storage: InMemoryStorage, **values: Any) -> list[dict[str, Any]]:
    """What a new study of dice_weight and ema tries first."""
    settings = make(Search, searched="dice_weight,ema", storage="none", **({"study": "new"} | values))
    space = search_space(settings.study, settings.recipe)
    study = open_study(storage, settings, "f" * 64, space)
    return [trial.system_attrs["fixed_params"] for trial in study.trials]


def test_the_settings_as_given_are_tried_first() -> None:
    assert queued(InMemoryStorage(), dice_weight=3.0, ema=0.99) == [{"dice_weight": 3.0, "ema": 0.99}]
    assert queued(InMemoryStorage(), dice_weight=0.0, ema=0.5) == [{"dice_weight": 0.1}]


def test_a_trial_that_repeats_a_dead_one_keeps_its_mark_but_not_its_constraints() -> None:
    settings, storage = make(Search, searched="ema", ema=0.9, storage="none", study="s"), InMemoryStorage()
    study = open_study(storage, settings, "f" * 64, search_space(settings.study, settings.recipe))
    trial = study.ask()
    trial.set_user_attr("dice", 0.5)
    trial.set_constraint("all_empty", 0.5)
    retry(study, study.trials[0])
    again = study.trials[1]
    assert (again.user_attrs, again.constraints) == ({"as_given": True}, {})
    assert again.system_attrs["fixed_params"] == {"ema": 0.9}


def test_a_config_file_is_a_warm_start(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(as_config(make(Recipe, dice_weight=50.0, ema=0.999))))
    first = queued(InMemoryStorage(), dice_weight=3.0, ema=0.9, warm_start=str(path))
    assert first == [{"dice_weight": 3.0, "ema": 0.9}, {"dice_weight": 10, "ema": 0.999}]


def test_the_three_best_trials_of_another_study_are_a_warm_start() -> None:
    storage = InMemoryStorage()
    old = optuna.create_study(study_name="old", storage=storage, direction="maximize")
    ranges = {"dice_weight": FloatDistribution(0.1, 99), "lovasz_weight": FloatDistribution(0, 3)}
    for weight, value in {1.0: 0.5, 3.0: 0.8, 5.0: 0.6, 50.0: 0.7}.items():
        params = {"dice_weight": weight, "lovasz_weight": 1.0}
        old.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=ranges))
    first = queued(storage, dice_weight=2.0, ema=0.9, warm_start="old")
    assert [values["dice_weight"] for values in first] == [2.0, 3.0, 10.0, 5.0]
    assert first[1] == {"dice_weight": 3.0}


def test_a_warm_start_that_is_not_there_leaves_no_study() -> None:
    storage = InMemoryStorage()
    with pytest.raises(UserError, match=r"^warm_start=odl: no such study in the storage; there is none yet"):
        queued(storage, warm_start="odl")
    assert optuna.get_all_study_names(storage) == []


def test_the_table_in_the_docs_holds_every_range() -> None:
    table = (ROOT / "docs/search.md").read_text(encoding="utf-8")
    rows = [
        row.strip("| \n").replace("\\|", "/").split(" | ") for row in table.splitlines() if row[:3] == "| `"
    ]
    documented = {name.strip("`"): text.replace("/", "|") for name, text in rows}
    assert documented == {name: as_range_text(range_) for name, range_ in SPACE.items()}
