"""Entry point ``register``: a version in the model registry, and the alias champion if it earned that."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, replace
from pathlib import Path

from pneumo_experiments import tracking
from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.evaluation.load_models import addresses_of, common_images, load_models
from pneumo_experiments.export.onnx_file import check_onnx, export_onnx
from pneumo_experiments.registry import versions
from pneumo_experiments.registry.lineage import Lineage, lineage
from pneumo_experiments.registry.model_card import model_card
from pneumo_experiments.registry.promotion import Challenge, Decision, challenge, decide
from pneumo_experiments.registry.scores import best_model, images_of, scores_of
from pneumo_experiments.registry.versions import CHAMPION, Version
from pneumo_experiments.serving import Detector, load
from pneumo_experiments.settings import BEST, NONE, Device, Register, Score
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.train import log_model
from pneumo_experiments.words import command, rows

# Longer than it takes another `register` to move the alias after its last look at it.
SETTLE_SECONDS = 0.5
HISTORY_ROW = "{:<7}  {:<24}  {:<24}  {:<7}  {}"


def register(settings: Register) -> Version | None:
    """Registers the model, or the experiment's best one, as a new version; returns it.

    With ``version`` it makes that version the champion and returns it. With ``history`` it prints the
    champions, and returns the current one, None if there is none.
    """
    _check_task(settings)
    with tracking.run("register", settings):
        if settings.history:
            return _print_history(settings.registry.name)
        moved = settings.version
        name = settings.registry.name
        version = _register(settings) if moved is None else _move_champion(name, str(moved))
        state = "champion" if version.champion else "not champion"
        tracking.rename(f"register {name} version {version.number} · {state}")
        page = tracking.page_of_active_run()
    if tracking.active_run() is None:
        model = f"models:/{name}/{version.number}"
        print(
            rows({"model": model, "run": page, "next": f"{command('score', model=model)} --dicom_dir FOLDER"})
        )
    return version


def _check_task(settings: Register) -> None:
    """Raises UserError for settings that do not go together, and for an export that cannot be written."""
    if settings.history and settings.version is not None:
        raise UserError("version and history: two tasks; give one of them")
    if settings.history or settings.version is not None:
        task = "history" if settings.history else "version"
        others = {"model": (settings.model, BEST), "export": (settings.export, NONE)}
        if task == "version":  # moves the alias in any case
            others["promote"] = (settings.registry.promote, "auto")
        for name, (value, default) in others.items():
            if value != default:
                raise UserError(f"{task} and {name}={value}: {task} registers nothing; leave out {name}")
    elif settings.export == "onnx":
        check_onnx(settings.onnx_file)


def _register(settings: Register) -> Version:
    name, model, models = settings.registry.name, settings.model, 1
    if model == BEST:
        champion = versions.champion_of(name)
        model, why, models = best_model(champion.tags.get("identity") if champion else None)
        print(f"register: {model} is the {why}")
    addresses = addresses_of(model)
    detector = load_models(model, settings.dataset, Device())  # what cannot be loaded must not be registered
    if settings.export == "onnx":
        _export(settings.onnx_file, detector)
    members = [id for address in addresses if (id := tracking.model_info(address).model_id)]
    versions.claim(name)
    identity = ",".join(members)
    if len(members) > 1:  # the same models may have other thresholds, by the data set that was named
        identity += " " + ",".join(map(str, astuple(detector.thresholds)))
    existing = versions.version_with(name, identity) if len(members) == len(addresses) else None
    if existing is not None and _is_decided(settings, existing):
        state = "the champion"
        if not existing.champion:
            remedy = f"version={existing.number} makes it the champion"
            state = f"not the champion ({existing.reason}); {remedy}"
        print(f"register: {model} is already {name} version {existing.number}, {state}")
        return existing
    origin = lineage(members, detector.data_fingerprint)
    address = addresses[0] if existing or len(addresses) == 1 else log_model(detector, "ensemble")
    deciding: AbstractContextManager[Version] = (
        versions.deciding(existing) if existing else versions.registering(address, name)
    )
    with deciding as new:
        if len(members) > 1:
            versions.note_members(new, identity)
        decision = _decide(settings, new, detector, origin, models)
    version = versions.version_of(name, new.number)
    if version is None:
        raise UserError(f"name={name}: version {new.number} was deleted meanwhile; register again")
    state = "the champion" if version.champion else "not the champion"
    line = f"{name} version {version.number} is {state}: {decision.reason}"
    tracking.describe(f"{line}.\nModel {model}.")
    print(f"register: {line}")
    return version


def _is_decided(settings: Register, version: Version) -> bool:
    """Whether nothing is left to decide about a version: it is the champion, or its comparison is known."""
    if version.champion or settings.registry.promote == "never":
        return True
    known = challenge(version.model_id, versions.champion_of(version.name))
    return settings.registry.promote == "auto" and known.is_known_to(version)


def _decide(settings: Register, new: Version, detector: Detector, origin: Lineage, models: int) -> Decision:
    """Decides about a new version, the best of so many models, and again if the champion moved meanwhile."""
    registry = settings.registry
    while True:
        champion = versions.champion_of(new.name)
        known = _compare(settings, new, detector, champion).counted(registry, new, models)
        decision = decide(registry, known)
        card = model_card(new, detector, decision, origin).text
        if _number(versions.champion_of(new.name)) != _number(champion):
            continue  # decided against one that is no longer champion
        versions.describe(new, card)
        versions.decide(new, decision.alias, decision.tags())
        if decision.alias != CHAMPION:
            return decision
        time.sleep(SETTLE_SECONDS)
        champion = versions.champion_of(new.name)
        if _number(champion) == new.number:
            versions.describe_champion(new, card)
            return decision
        # With promote=always each would take the alias back from the other: the last one keeps it.
        if champion is None or registry.promote == "always":
            return decision


def _number(version: Version | None) -> str | None:
    return None if version is None else version.number


def _export(path: Path, detector: Detector) -> None:
    """Writes and logs the ONNX file."""
    file = export_onnx(path, detector)
    tracking.log_file(path)
    tracking.log_params({f"onnx_{name}_difference": gap for name, gap in file.from_fp32._asdict().items()})
    print(f"register: {path}, {file.size_mb:.0f} MB; differences from the model in fp32: {file.from_fp32}")
    if file.from_own_format is not None:
        own = f"differences from the model in its own format, {detector.precisions}"
        print(f"register: {own}: {file.from_own_format}")


def _compare(settings: Register, new: Version, detector: Detector, champion: Version | None) -> Challenge:
    """Compares with the champion, or all-empty masks; scores both first, if they have no common score."""
    known = challenge(new.model_id, champion)
    if known.pair is None and settings.registry.promote != "never":
        problem = _score(settings.dataset, new, detector, champion)
        known = replace(challenge(new.model_id, champion), problem=problem)
    return known


def _score(dataset: Path, new: Version, detector: Detector, champion: Version | None) -> str:
    """Scores the new version, and the champion if there is one, on common images; returns why it cannot."""
    models = {"the new version": (new, detector)}
    try:
        if champion is not None:
            loaded = load(tracking.model_data(champion.source))
            models[f"version {champion.number}"] = (champion, loaded)
        subset, identity = common_images(dataset, {name: own for name, (_, own) in models.items()})
        for name, (version, _) in models.items():
            last = scores_of(version.model_id).get(identity)
            if last is None or images_of(last) is None:
                print(f"register: scores {name}, {version.source}, on {dataset}")
                score(Score(model=version.source, dataset=dataset, subset=subset, overlays=0))
    except ServerUnreachable:
        raise
    except UserError as error:
        return str(error)
    return ""


def _move_champion(name: str, number: str) -> Version:
    """Moves the alias champion to an existing version."""
    versions.require_ours(name)
    version, before = versions.version_of(name, number), versions.champion_of(name)
    if version is None:
        raise UserError(f"version={number}: {name} has no such version; history=true lists the champions")
    if version.champion:
        print(f"register: {name} version {number} is the champion already")
        return version
    load(tracking.model_data(version.source))  # one that nobody could load must not be served
    reason = f"moved by hand from version {before.number}" if before else "moved by hand"
    with versions.refusals(f"version={number}: cannot become the champion", "no alias moved"):
        versions.make_champion(version, reason)
        versions.describe_champion(version, version.description)
    line = f"{name} version {number} is the champion: {reason}"
    tracking.describe(f"{line}.")
    print(f"register: {line}")
    return replace(version, champion=True, tags={**version.tags, "reason": reason})


def _print_history(name: str) -> Version | None:
    """Prints and logs the champions in order."""
    versions.require_ours(name)
    periods = versions.history(name)
    tracking.log_json({"champions": [asdict(period) for period in periods]}, "champions.json")
    if periods:
        print(HISTORY_ROW.format("version", "from", "until", "Dice", "why"))
        for period in periods:
            print(HISTORY_ROW.format(*astuple(period)))
    else:
        print(f"register: {name} has had no champion")
    return versions.champion_of(name)
