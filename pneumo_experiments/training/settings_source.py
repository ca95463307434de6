"""Where the settings of a training come from: the command itself, a study, or the training of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.averaging import largest_difference
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.serving import Detector, TrainedNetwork, load
from pneumo_experiments.settings import (
    NONE,
    Train,
    checked,
    flat,
    from_flat,
    is_none,
    leaves,
    weight_shaping,
)

MAX_NAMED = 5  # differences in a message


@dataclass(frozen=True)
class Origin:
    """Complete settings of a training; ``notes`` say in its run where they come from.

    ``model`` is the address of the model whose training is repeated.
    """

    settings: Train
    notes: Mapping[str, object] = field(default_factory=dict[str, object])
    model: str | None = None
    data_fingerprint: str = ""
    """of the data set that trained that model"""

    def log_notes(self, data_fingerprint: str) -> None:
        """Logs to the active run where the settings come from, and whether the data set is the same."""
        notes = dict(self.notes)
        if self.model is not None:
            notes["same_data"] = data_fingerprint == self.data_fingerprint
            print(f"train: the data set is {'the same' if notes['same_data'] else 'another one'}")
        tracking.log_params(notes)

    def log_weights(self, network: PneumothoraxNet, fold: str) -> None:
        """Logs to the active run whether a trained network has the weights of the repeated training."""
        if self.model is None:
            return
        members = load(tracking.model_data(self.model)).members
        member = next(each for each in members if len(members) == 1 or each.settings["fold"] == fold)
        difference = largest_difference(member.predictor.network, network)
        tracking.log_params({"same_weights": difference == 0, "weights_difference": f"{difference:.3g}"})
        which = f"those of {self.model}" + (f", fold {fold}" if len(members) > 1 else "")
        differ = f"differ by up to {difference:.3g} from" if difference else "are"
        print(f"train: the weights {differ} {which}")


def origin_of(settings: Train, best: Mapping[str, Any] | None = None) -> Origin:
    """The settings with the best ones of the study that they name, or those of the model that they name.

    Raises UserError if they name both, or a model beside settings of their own.
    """
    if is_none(settings.reproduce):
        return Origin(settings) if best is None else _from_study(settings, best)
    if not is_none(settings.from_study):
        raise UserError("reproduce and from_study both name settings; give one of them")
    own, default = weight_shaping(settings), weight_shaping(Train())
    if given := sorted(name for name in own if own[name] != default[name]):
        raise UserError(
            f"reproduce={settings.reproduce}: takes its settings from the model; leave out {_listed(given)},"
            " or train with a changed copy of the config.yaml in the model's run"
        )
    return _from_model(settings)


def _from_study(settings: Train, best: Mapping[str, Any]) -> Origin:
    line = ", ".join(f"{name} {value}" for name, value in best.items())
    print(f"train: best settings of study {settings.from_study}: {line}")
    # The run's config.yaml repeats this training, also when the study has found something better.
    complete = from_flat(Train, flat(settings) | dict(best) | {"from_study": NONE})
    return Origin(complete, {"study_used": settings.from_study})


def _from_model(settings: Train) -> Origin:
    address = settings.reproduce
    tracking.open_store()
    detector = load(tracking.model_data(address))
    shaping = _settings_of(address, detector)
    dataset = settings.dataset
    if dataset.absolute() == Train().dataset.absolute():
        dataset = Path(str(detector.members[0].settings.get("dataset", dataset)))
    differing = tracking.code_differences(address)
    print(f"train: repeats the training of {address}, dataset={dataset}")
    print(f"train: the code is {'the same' if not differing else f'another one: {_listed(differing)}'}")
    return Origin(
        replace(from_flat(Train, flat(settings) | shaping), dataset=dataset),
        {"same_code": not differing},
        address,
        detector.data_fingerprint,
    )


def _settings_of(address: str, detector: Detector) -> dict[str, Any]:
    """The settings that shaped the model's weights, checked; those of an ensemble if it is one training."""
    each = [_checked_settings(address, member) for member in detector.members]
    if len(each) == 1:
        return each[0]
    folds, count = [one["fold"] for one in each], each[0]["folds"]
    shared = [{name: value for name, value in one.items() if name != "fold"} for one in each]
    if folds != [str(fold) for fold in range(count)] or any(one != shared[0] for one in shared):
        raise UserError(f"reproduce={address}: an ensemble of several trainings; reproduce them one by one")
    return each[0] | {"fold": "all"}


def _checked_settings(address: str, member: TrainedNetwork) -> dict[str, Any]:
    recorded = dict(member.settings) | {"precision": member.predictor.compute.precision}
    shaping = weight_shaping(Train())
    if missing := sorted(shaping.keys() - recorded.keys()):
        raise UserError(
            f"reproduce={address}: not a model of train, or one of another version: it does not say"
            f" {_listed(missing)}; name a model that train has logged"
        )
    by_name = {leaf.name: leaf for leaf in leaves(Train)}
    try:
        return {name: checked(by_name[name], recorded[name]) for name in shaping}
    except ValueError as error:
        raise UserError(f"reproduce={address}: its settings are damaged ({error}); train again") from None


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
