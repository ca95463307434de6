"""Where the settings of a training come from: the command itself, a study, or the training of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.averaging import largest_difference
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.serving import Detector, TrainedNetwork, load
from pneumo_experiments.settings import NONE, Train, as_now, flat, from_flat, is_none, weight_shaping
from pneumo_experiments.words import some_of

MAX_NAMED = 5  # differences in a message


@dataclass(frozen=True)
class SettingsSource:
    """Complete settings of a training, and where they come from."""

    settings: Train
    study: str = ""
    best: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """the study's best values, by name"""
    replaced: Sequence[str] = ()
    """the names of settings that were given, in whose place these stand"""
    model: str | None = None
    """the address of the model whose training is repeated"""
    changed_code: Sequence[str] = ()
    """what of the code differs from that model's"""
    data_fingerprint: str = ""
    """of the data set that trained that model"""

    def compare_weights(self, network: PneumothoraxNet) -> tuple[float, str]:
        """Largest difference of a trained network's weights from those of the model's; which these are."""
        assert self.model is not None
        members, fold = load(tracking.model_data(self.model)).members, self.settings.split.fold
        member = next(each for each in members if len(members) == 1 or each.settings["fold"] == fold)
        which = f"those of {self.model}" + (f", fold {fold}" if len(members) > 1 else "")
        return largest_difference(member.predictor.network, network), which


def settings_source(settings: Train, best: Mapping[str, Any] | None = None) -> SettingsSource:
    """The settings with the best ones of the study that they name, or those of the model that they name.

    Raises UserError if they name both, or a model and settings of their own.
    """
    if is_none(settings.reproduce):
        if best is None:
            return SettingsSource(settings)
        # The run's config.yaml repeats this training, also when the study has found something better.
        given, default = flat(settings), flat(Train())
        replaced = [name for name, value in best.items() if given[name] not in (default[name], value)]
        complete = from_flat(Train, given | dict(best) | {"from_study": NONE})
        return SettingsSource(complete, settings.from_study, best, replaced)
    if not is_none(settings.from_study):
        raise UserError("reproduce and from_study both name settings; give one of them")
    own, default = weight_shaping(settings), weight_shaping(Train())
    if given := sorted(name for name in own if own[name] != default[name]):
        raise UserError(
            f"reproduce={settings.reproduce}: takes its settings from the model; leave out"
            f" {some_of(given, MAX_NAMED)}, or train with a changed copy of the config.yaml in the model's"
            " run"
        )
    return _from_model(settings)


def _from_model(settings: Train) -> SettingsSource:
    address = settings.reproduce
    tracking.open_store()
    detector = load(tracking.model_data(address))
    shaping = _settings_of(address, detector)
    dataset = settings.dataset
    if dataset.absolute() == Train().dataset.absolute():
        dataset = Path(str(detector.members[0].settings.get("dataset", dataset)))
    return SettingsSource(
        replace(from_flat(Train, flat(settings) | shaping), dataset=dataset),
        model=address,
        changed_code=tracking.code_differences(address),
        data_fingerprint=detector.data_fingerprint,
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
    if "epochs" not in recorded:
        raise UserError(
            f"reproduce={address}: not a model of train: it does not say epochs; name a model that train has"
            " logged"
        )
    try:
        return as_now(Train, recorded)
    except ValueError as error:
        raise UserError(f"reproduce={address}: its settings are damaged ({error}); train again") from None
